// y = x[:, :D] * GELU(x[:, D:]),  GELU(g) = g / 2 * (1 + erf(g / sqrt(2))), or its approximation by tanh.
//
// Bytes: 2 D elements of a row in, D out, once each. A thread takes kEach accesses of 128 bits of y, the same number of
// the values and of the gates; arithmetic is fp32. Layout: contiguous rows.
#pragma once
#include "cuda/common.cuh"

namespace difusores {
namespace cuda {

constexpr unsigned kGegluThreads = 256;
constexpr int kGegluEach = 2;  // accesses of a thread that are under way together

template <bool kTanh>
__device__ __forceinline__ float gelu(float g) {
    if constexpr (kTanh) {  // (1 + tanh(a)) / 2 = 1 / (1 + exp(-2 a))
        const float twice = 1.5957691216057308f * fmaf(0.044715f * g * g, g, g);
        return __fdividef(g, 1.0f + __expf(-twice));
    } else {
        return g * fmaf(0.5f, erff(g * 0.70710678118654752f), 0.5f);
    }
}

template <int kVec, bool kTanh>
__global__ void __launch_bounds__(kGegluThreads, 4)
    geglu_kernel(const __grid_constant__ GegluArgs args, const Divisor vectors_of_row) {
    const int64_t vectors = args.columns / kVec, first = int64_t{blockIdx.x} * (kGegluThreads * kGegluEach);
    const int64_t row0 = first / vectors;
    const unsigned past = static_cast<unsigned>(first - row0 * vectors) + threadIdx.x;
    Packed<kVec> value[kGegluEach], gate[kGegluEach];
    int64_t at[kGegluEach];
#pragma unroll
    for (int k = 0; k < kGegluEach; ++k) {
        const unsigned of_row0 = past + k * kGegluThreads, rows = vectors_of_row.quotient(of_row0);
        const int64_t row = row0 + rows, column = int64_t{of_row0 - rows * static_cast<unsigned>(vectors)} * kVec;
        at[k] = row < args.rows ? row * args.columns + column : -1;
        if (at[k] < 0) continue;
        value[k] = get<kVec>(args.x, at[k] + row * args.columns, args.dtype);
        gate[k] = get<kVec>(args.x, at[k] + (row + 1) * args.columns, args.dtype);
    }
#pragma unroll
    for (int k = 0; k < kGegluEach; ++k) {
        if (at[k] < 0) continue;
        float v[kVec], g[kVec];
        unpack<kVec>(value[k], args.dtype, v);
        unpack<kVec>(gate[k], args.dtype, g);
#pragma unroll
        for (int j = 0; j < kVec; ++j) v[j] *= gelu<kTanh>(g[j]);
        put<kVec>(args.y, at[k], args.dtype, pack<kVec>(args.dtype, v));
    }
}

template <int kVec, class Launch>
__host__ auto launch_geglu_as(const GegluArgs& args, const Launch& launch) {
    const int64_t vectors = args.rows * (args.columns / kVec), each = kGegluThreads * kGegluEach;
    const dim3 grid = {static_cast<unsigned>((vectors + each - 1) / each), 1, 1};
    const Divisor divisor(args.columns / kVec);
    const auto kernel = args.tanh ? geglu_kernel<kVec, true> : geglu_kernel<kVec, false>;
    return launch(kernel, grid, kGegluThreads, 0, args, divisor);
}

// launch(kernel, grid, threads, dynamic shared bytes, arguments of the kernel …)
template <class Launch>
__host__ auto launch_geglu(const GegluArgs& args, const Launch& launch) {
    const int vec = 16 / bytes_of(args.dtype);
    if (args.columns % vec || !aligned(args.x, 0, args.dtype, 16) || !aligned(args.y, 0, args.dtype, 16))
        return launch_geglu_as<1>(args, launch);
    return vec == 8 ? launch_geglu_as<8>(args, launch) : launch_geglu_as<4>(args, launch);
}

}  // namespace cuda
}  // namespace difusores
