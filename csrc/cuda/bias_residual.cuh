// y = scale * (x + bias[c] + add[n, c] + residual): what follows a convolution or a product, rounded once.
//
// Bytes: x and the residual once in, y once out, in accesses of 128 bits; y may be x, whose lines are then in L2 when
// they are written. The parameters come from the caches. Layouts: [N, C, S], an access lies in one channel, if S allows
// it; [N, S, C], an access is kVec channels, if C allows it. A thread takes kBiasEach accesses.
#pragma once
#include "cuda/common.cuh"

namespace difusores {
namespace cuda {

constexpr unsigned kBiasThreads = 256;
constexpr int kBiasEach = 2;  // accesses of a thread that are under way together

// period: accesses of a channel's run (channels first) or of a position (channels last); blocks: of an image.
template <int kVec, bool kLast>
__global__ void __launch_bounds__(kBiasThreads, 4)
    bias_residual_kernel(const __grid_constant__ BiasResidualArgs args, const Divisor period, unsigned period_size,
                         const Divisor blocks, unsigned blocks_of_image) {
    const unsigned n = blocks.quotient(blockIdx.x), vectors = static_cast<unsigned>(args.c * args.s / kVec);
    const unsigned first = (blockIdx.x - n * blocks_of_image) * (kBiasThreads * kBiasEach) + threadIdx.x;
    const int64_t image = n * args.c * args.s;
    Packed<kVec> from_x[kBiasEach], from_r[kBiasEach];
#pragma unroll
    for (int k = 0; k < kBiasEach; ++k) {
        const unsigned v = first + k * kBiasThreads;
        if (v >= vectors) continue;
        from_x[k] = get<kVec>(args.x, image + int64_t{v} * kVec, args.dtype);
        if (args.residual) from_r[k] = get<kVec>(args.residual, image + int64_t{v} * kVec, args.dtype);
    }
#pragma unroll
    for (int k = 0; k < kBiasEach; ++k) {
        const unsigned v = first + k * kBiasThreads;
        if (v >= vectors) continue;
        float h[kVec], b[kVec], a[kVec], r[kVec] = {};
        unpack<kVec>(from_x[k], args.dtype, h);
        if (args.residual) unpack<kVec>(from_r[k], args.dtype, r);
        const unsigned turn = period.quotient(v);
        if constexpr (kLast) {
            const int64_t c = int64_t{v - turn * period_size} * kVec;
            params<kVec>(args.bias, 0, c, 0.0f, b);
            params<kVec>(args.add, n, c, 0.0f, a);
        } else {
            b[0] = param(args.bias, 0, turn, 0.0f), a[0] = param(args.add, n, turn, 0.0f);
#pragma unroll
            for (int j = 1; j < kVec; ++j) b[j] = b[0], a[j] = a[0];
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) h[j] = (h[j] + (b[j] + a[j]) + r[j]) * args.scale;
        put<kVec>(args.y, image + int64_t{v} * kVec, args.dtype, pack<kVec>(args.dtype, h));
    }
}

// Whether the kernel counts that far.
inline __host__ bool takes_bias_residual(const BiasResidualArgs& args) {
    const int64_t each = kBiasThreads * kBiasEach, image = args.c * args.s;
    return image < int64_t{1} << 30 && args.n * ((image + each - 1) / each) < int64_t{1} << 30;
}

template <int kVec, class Launch>
__host__ auto launch_bias_residual_as(const BiasResidualArgs& args, bool channels_last, const Launch& launch) {
    const int64_t each = kBiasThreads * kBiasEach, vectors = args.c * args.s / kVec;
    const int64_t blocks = (vectors + each - 1) / each, period = (channels_last ? args.c : args.s) / kVec;
    const dim3 grid = {static_cast<unsigned>(args.n * blocks), 1, 1};
    const auto kernel = channels_last ? bias_residual_kernel<kVec, true> : bias_residual_kernel<kVec, false>;
    return launch(kernel, grid, kBiasThreads, 0, args, Divisor(period), static_cast<unsigned>(period), Divisor(blocks),
                  static_cast<unsigned>(blocks));
}

// launch(kernel, grid, threads, dynamic shared bytes, arguments of the kernel …)
template <class Launch>
__host__ auto launch_bias_residual(const BiasResidualArgs& args, bool channels_last, const Launch& launch) {
    const int vec = 16 / bytes_of(args.dtype);
    bool wide = (channels_last ? args.c : args.s) % vec == 0;
    if (channels_last) wide = wide && aligned_params(args.bias) && aligned_params(args.add);
    for (const void* p : {args.x, args.residual, static_cast<const void*>(args.y)})
        wide = wide && aligned(p, 0, args.dtype, 16);
    if (!wide) return launch_bias_residual_as<1>(args, channels_last, launch);
    return vec == 8 ? launch_bias_residual_as<8>(args, channels_last, launch)
                    : launch_bias_residual_as<4>(args, channels_last, launch);
}

}  // namespace cuda
}  // namespace difusores
