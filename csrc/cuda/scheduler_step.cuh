// One stage of any sampler; formula and row layout: difusores/ops/scheduler_step.py.
//
//     e = sum g_k e_k,  xh = x + r z,  x0 = clamp(p_x xh + p_e e),  (y, d, u) = W [x0, xh, e, z*, s0 .. s4],  m = c_in
//     y
//
// Bytes: every operand that the row reads once, every output once; 128-bit accesses of the widest dtype in the call.
// Layout: [B, inner] with any batch stride. A thread has kVec elements of one image, keeps all of them in registers
// and asks for every operand before it computes. The row is read from device memory, by a counter that is there too:
// nothing waits for the host. An operand that the row reads and that is not there counts as NaN, as does every number
// of a row whose counter points outside its table. Sums are written as fmaf, so that an element has the same bits in
// every instance.
#pragma once
#include "cuda/common.cuh"

namespace difusores {
namespace cuda {

constexpr unsigned kStepThreads = 128;
constexpr unsigned kStepBlocks = 5;  // a multiprocessor: what the registers hold without spilling
// Blocks at most, about what runs at once: each waits for the counter and then for the row before it reads its first
// element, so it takes many.
constexpr int64_t kStepGrid = 640;

enum Position { kG = 0, kR = 3, kPX, kPE, kLo, kHi, kNu0, kNu1, kMode, kCin, kW = 12, kDraw = 39, kRow = 40 };
constexpr int kColumns = 9;  // x0, xh, e, z*, s0 .. s4

// Elements [at, at + count) of an operand as they lie in memory, beginning with the lowest bits.
template <int kVec>
__device__ __forceinline__ uint4 fetch(const Operand& o, int64_t at, int count, bool wide) {
    uint4 raw = {~0u, ~0u, ~0u, ~0u};  // NaN in every dtype
    if (!o.ptr) return raw;
    const char* p = static_cast<const char*>(o.ptr) + at * bytes_of(o.dtype);
    if (wide && count == kVec) {
        if (kVec == 8 || o.dtype == DType::f32) return *reinterpret_cast<const uint4*>(p);
        const uint2 half = *reinterpret_cast<const uint2*>(p);
        return {half.x, half.y, 0, 0};
    }
    Raw<16> parts{raw};
    if (kVec == 4 && o.dtype == DType::f32) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (k < count) parts.set(k, reinterpret_cast<const unsigned*>(p)[k]);
        return parts.v;
    }
#pragma unroll
    for (int k = 0; k < kVec; k += 2) {
        unsigned word = 0;
        if (k < count) word = reinterpret_cast<const unsigned short*>(p)[k];
        if (k + 1 < count) word |= static_cast<unsigned>(reinterpret_cast<const unsigned short*>(p)[k + 1]) << 16;
        parts.set(k / 2, word);
    }
    return parts.v;
}

template <DType D, int kVec>
__device__ __forceinline__ void widen_as(const uint4& raw, float (&out)[kVec]) {
    if constexpr (bytes_of(D) * kVec == 16) unpack<D, kVec>({raw}, out);
    else unpack<D, kVec>({{raw.x, raw.y}}, out);
}

template <int kVec>
__device__ __forceinline__ void widen_all(const uint4& raw, DType dtype, float (&out)[kVec]) {
    if constexpr (kVec == 4)
        if (dtype == DType::f32) return widen_as<DType::f32, kVec>(raw, out);
    if (dtype == DType::bf16) widen_as<DType::bf16, kVec>(raw, out);
    else widen_as<DType::f16, kVec>(raw, out);
}

template <DType D, int kVec>
__device__ __forceinline__ void write_as(void* p, int64_t at, int count, bool wide, const float (&v)[kVec]) {
    if (wide && count == kVec) return store<D, kVec>(p, at, v);
#pragma unroll
    for (int k = 0; k < kVec; ++k)
        if (k < count) store_one<D>(p, at + k, v[k]);
}

template <int kVec>
__device__ __forceinline__ void write(const Result& r, int64_t at, int64_t next, int count, bool wide,
                                      const float (&v)[kVec]) {
    for (int64_t repeat = 0; repeat < r.repeats; ++repeat, at += next) {
        if constexpr (kVec == 4) {
            if (r.dtype == DType::f32) {
                write_as<DType::f32, kVec>(r.ptr, at, count, wide, v);
                continue;
            }
        }
        if (r.dtype == DType::bf16) write_as<DType::bf16, kVec>(r.ptr, at, count, wide, v);
        else write_as<DType::f16, kVec>(r.ptr, at, count, wide, v);
    }
}

// Philox4x32-10: counter (index, index >> 32, draw, 0), key: the image's seed.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t index, unsigned draw) {
    uint4 c = {static_cast<unsigned>(index), static_cast<unsigned>(index >> 32), draw, 0};
    unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned hi0 = __umulhi(c.x, 0xD2511F53u), lo0 = c.x * 0xD2511F53u;
        const unsigned hi1 = __umulhi(c.z, 0xCD9E8D57u), lo1 = c.z * 0xCD9E8D57u;
        c = {hi1 ^ c.y ^ k0, lo1, hi0 ^ c.w ^ k1, lo0};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// Box-Muller: sqrt(-2 ln u) (cos, sin)(2 pi t), u in (0, 1) from the upper 23 bits of a, t in [0, 1) from 24 of b.
__device__ __forceinline__ float2 box_muller(unsigned a, unsigned b) {
    const float u = (static_cast<float>(a >> 9) + 0.5f) * 0x1p-23f;
    const float radius = sqrtf(-2.0f * logf(u));
    float sine, cosine;
    sincospif(static_cast<float>(b >> 8) * 0x1p-23f, &sine, &cosine);
    return make_float2(radius * cosine, radius * sine);
}

template <int kVec>
__device__ __forceinline__ void normals(uint64_t seed, int64_t first, unsigned draw, float (&z)[kVec]) {
#pragma unroll
    for (int k = 0; k < kVec; k += 4) {
        const uint4 bits = philox(seed, static_cast<uint64_t>(first + k) / 4, draw);
        const float2 a = box_muller(bits.x, bits.y), b = box_muller(bits.z, bits.w);
        z[k] = a.x, z[k + 1] = a.y, z[k + 2] = b.x, z[k + 3] = b.y;
    }
}

// Which operands the row reads for the outputs that were asked for; the same in every thread.
struct Reads {
    unsigned weights;  // bit 9 k + j: output k reads column j
    bool x0, xh, e, z, v;
    __device__ __forceinline__ Reads(const SchedulerStepArgs& args, const float* row) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const bool wanted = lane < 9 ? args.y.ptr || args.m.ptr : lane < 18 ? !!args.d.ptr : !!args.u.ptr;
        weights = __ballot_sync(kAllLanes, lane < 27 && wanted && row[kW + (lane < 27 ? lane : 0)] != 0.0f);
        const unsigned columns = weights | weights >> 9 | weights >> 18;
        x0 = args.x0.ptr || columns & 1;
        xh = columns & 2 || (x0 && row[kPX] != 0.0f);
        e = columns & 4 || (x0 && row[kPE] != 0.0f);
        z = columns & 8 || (xh && row[kR] != 0.0f);
        v = columns & 8 && row[kMode] != 0.0f;
    }
    __device__ __forceinline__ bool column(int j) const {
        return (weights >> j | weights >> (9 + j) | weights >> (18 + j)) & 1;
    }
};

// total[k] += W[k, j] * operand, for the outputs k that read column j.
template <int kVec>
__device__ __forceinline__ void add_column(const Reads& reads, const float* row, int j, const float (&operand)[kVec],
                                           float (&total)[3][kVec]) {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        if (!(reads.weights >> (kColumns * k + j) & 1)) continue;
        const float w = row[kW + kColumns * k + j];
#pragma unroll
        for (int i = 0; i < kVec; ++i) total[k][i] = fmaf(w, operand[i], total[k][i]);
    }
}

// x0 = clamp(p_x xh + p_e e, lo, hi), or clamp(., -s, s) / s. NaN stays NaN.
template <int kVec>
__device__ __forceinline__ void predict(const float* row, const float (&xh)[kVec], const float (&e)[kVec],
                                        const float* threshold, float (&x0)[kVec]) {
    const float s = threshold ? *threshold : 1.0f;
    const float lo = threshold ? -s : row[kLo], hi = threshold ? s : row[kHi];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        float v = row[kPX] != 0.0f ? row[kPX] * xh[i] : 0.0f;
        if (row[kPE] != 0.0f) v = fmaf(row[kPE], e[i], v);
        v = v < lo ? lo : v;
        v = v > hi ? hi : v;
        x0[i] = threshold ? v / s : v;
    }
}

template <int kVec, bool kPhilox>
__device__ __forceinline__ void step_vector(const SchedulerStepArgs& args, const float* row, const Reads& reads,
                                            int64_t b, int64_t i, bool wide) {
    const int count = args.inner - i < kVec ? static_cast<int>(args.inner - i) : kVec;
    const auto from = [&](const Operand& o) { return fetch<kVec>(o, b * o.batch_stride + i, count, wide); };
    uint4 raw_x = {}, raw_z = {}, raw_v = {}, raw_e[3] = {}, raw_s[5] = {};
    if (reads.xh) raw_x = from(args.sample);
#pragma unroll
    for (int k = 0; k < 3; ++k)
        if (reads.e && args.e[k].ptr && row[kG + k] != 0.0f) raw_e[k] = from(args.e[k]);
    if (reads.z && !kPhilox) raw_z = from(args.noise);
    if (reads.v) raw_v = from(args.variance);
#pragma unroll
    for (int k = 0; k < 5; ++k)
        if (reads.column(4 + k)) raw_s[k] = from(args.slots[k]);

    float x0[kVec] = {}, xh[kVec] = {}, e[kVec] = {}, z[kVec] = {}, v[kVec], total[3][kVec] = {};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        if (!(reads.e && args.e[k].ptr && row[kG + k] != 0.0f)) continue;
        widen_all<kVec>(raw_e[k], args.e[k].dtype, v);
#pragma unroll
        for (int j = 0; j < kVec; ++j) e[j] = fmaf(row[kG + k], v[j], e[j]);
    }
    if (reads.z) {
        if constexpr (kPhilox)
            normals<kVec>(static_cast<uint64_t>(args.seeds[b]), i, static_cast<unsigned>(row[kDraw]), z);
        else widen_all<kVec>(raw_z, args.noise.dtype, z);
    }
    if (reads.xh) {
        widen_all<kVec>(raw_x, args.sample.dtype, xh);
        if (row[kR] != 0.0f) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) xh[j] = fmaf(row[kR], z[j], xh[j]);
        }
    }
    const int64_t at = b * args.inner + i, next = args.batch * args.inner;
    if (reads.x0) {
        predict<kVec>(row, xh, e, args.threshold ? args.threshold + b : nullptr, x0);
        if (args.x0.ptr) write<kVec>(args.x0, at, next, count, wide, x0);
    }
    if (reads.v) {
        widen_all<kVec>(raw_v, args.variance.dtype, v);
#pragma unroll
        for (int j = 0; j < kVec; ++j)
            z[j] *= row[kMode] == 1.0f ? expf(fmaf(v[j], row[kNu1], row[kNu0])) : sqrtf(v[j]);
    }
    add_column<kVec>(reads, row, 0, x0, total);
    add_column<kVec>(reads, row, 1, xh, total);
    add_column<kVec>(reads, row, 2, e, total);
    add_column<kVec>(reads, row, 3, z, total);
#pragma unroll
    for (int k = 0; k < 5; ++k) {
        if (!reads.column(4 + k)) continue;
        widen_all<kVec>(raw_s[k], args.slots[k].dtype, v);
        add_column<kVec>(reads, row, 4 + k, v, total);
    }
    if (args.y.ptr) write<kVec>(args.y, at, next, count, wide, total[0]);
    if (args.d.ptr) write<kVec>(args.d, at, next, count, wide, total[1]);
    if (args.u.ptr) write<kVec>(args.u, at, next, count, wide, total[2]);
    if (args.m.ptr) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) total[0][j] *= row[kCin];
        write<kVec>(args.m, at, next, count, wide, total[0]);
    }
}

// kVec 8: every tensor has 16-bit elements. `wide`: every tensor allows accesses of kVec elements.
template <int kVec, bool kPhilox>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks)
    scheduler_step_kernel(const __grid_constant__ SchedulerStepArgs args, const __grid_constant__ StepRow source,
                          bool wide) {
    DIFUSORES_SHARED(float, row, kRow);
    if (threadIdx.x < kRow) {
        const int64_t index = source.step ? *source.step : 0;
        const bool inside = index >= 0 && index < source.count;
        row[threadIdx.x] = !source.table ? static_cast<float>(source.row[threadIdx.x])
                           : inside      ? static_cast<float>(source.table[index * kRow + threadIdx.x])
                                         : __uint_as_float(~0u);
    }
    __syncthreads();
    const Reads reads(args, row);
    const int64_t vectors = (args.inner + kVec - 1) / kVec;
    for (int64_t b = blockIdx.y; b < args.batch; b += gridDim.y)
        for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < vectors;
             k += static_cast<int64_t>(gridDim.x) * blockDim.x)
            step_vector<kVec, kPhilox>(args, row, reads, b, k * kVec, wide);
}

// The instance and the grid for a call. launch(kernel, grid, threads, dynamic shared bytes, arguments of the kernel …)
template <class Launch>
__host__ auto launch_scheduler_step(const SchedulerStepArgs& args, const StepRow& row, const Launch& launch) {
    const Operand* const operands[] = {&args.sample,   &args.e[0],     &args.e[1],     &args.e[2],
                                       &args.noise,    &args.variance, &args.slots[0], &args.slots[1],
                                       &args.slots[2], &args.slots[3], &args.slots[4]};
    const Result* const results[] = {&args.y, &args.d, &args.u, &args.x0, &args.m};
    const auto allows = [&](int elements) {
        bool all = true;
        for (const Operand* o : operands)
            if (o->ptr)
                all = all &&
                      aligned(o->ptr, args.batch > 1 ? o->batch_stride : 0, o->dtype, elements * bytes_of(o->dtype));
        for (const Result* r : results)
            if (r->ptr)
                all = all && aligned(r->ptr, args.batch * r->repeats > 1 ? args.inner : 0, r->dtype,
                                     elements * bytes_of(r->dtype));
        return all;
    };
    bool short_elements = true;
    for (const Operand* o : operands) short_elements = short_elements && (!o->ptr || o->dtype != DType::f32);
    for (const Result* r : results) short_elements = short_elements && (!r->ptr || r->dtype != DType::f32);
    const int vec = short_elements && allows(8) ? 8 : 4;
    const int64_t blocks = (args.inner + vec * int64_t{kStepThreads} - 1) / (vec * int64_t{kStepThreads});
    const int64_t of_image = args.batch < kStepGrid ? kStepGrid / args.batch : 1;
    const dim3 grid = {static_cast<unsigned>(blocks < of_image ? blocks : of_image),
                       static_cast<unsigned>(args.batch < 65535 ? args.batch : 65535), 1};
    const auto go = [&](auto kernel) {
        return launch(kernel, grid, kStepThreads, size_t{0}, args, row, vec == 8 || allows(4));
    };
    if (vec == 8) return args.seeds ? go(scheduler_step_kernel<8, true>) : go(scheduler_step_kernel<8, false>);
    return args.seeds ? go(scheduler_step_kernel<4, true>) : go(scheduler_step_kernel<4, false>);
}

}  // namespace cuda
}  // namespace difusores
