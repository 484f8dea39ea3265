// What the CUDA kernels share: elements as fp32 and back, 128-bit accesses, division by what the host knows, sums over
// a warp and a block. The same text compiles on a CPU behind tests/cuda_emulation/emulation.h, so a kernel names its
// shared memory through the two macros below and takes its arguments by value.
#pragma once
#ifndef DIFUSORES_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DIFUSORES_SHARED(type, name, count) __shared__ type name[count]
#define DIFUSORES_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include <type_traits>

#include "kernels.h"

namespace difusores {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kRow = 40;  // numbers of a step's row

constexpr __host__ __device__ int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Whether p and a step of `stride` elements allow accesses of `bytes` bytes.
inline __host__ bool aligned(const void* p, int64_t stride, DType dtype, int bytes) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0 && stride * bytes_of(dtype) % bytes == 0;
}

// --- an element as fp32, and back ---

template <DType D>
__device__ __forceinline__ float widen(unsigned bits) {
    if constexpr (D == DType::f32) return __uint_as_float(bits);
    else if constexpr (D == DType::bf16) return __uint_as_float(bits << 16);
    else return __half2float(__half_raw{static_cast<unsigned short>(bits)});
}

template <DType D>
__device__ __forceinline__ unsigned narrow(float v) {
    if constexpr (D == DType::f32) return __float_as_uint(v);
    else if constexpr (D == DType::bf16) return static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(v)).x;
    else return static_cast<__half_raw>(__float2half_rn(v)).x;
}

template <DType D>
__device__ __forceinline__ float load_one(const void* p, int64_t i) {
    if constexpr (D == DType::f32) return static_cast<const float*>(p)[i];
    else return widen<D>(static_cast<const unsigned short*>(p)[i]);
}

template <DType D>
__device__ __forceinline__ void store_one(void* p, int64_t i, float v) {
    if constexpr (D == DType::f32) static_cast<float*>(p)[i] = v;
    else static_cast<unsigned short*>(p)[i] = static_cast<unsigned short>(narrow<D>(v));
}

__device__ __forceinline__ float load_one(const void* p, DType dtype, int64_t i) {
    if (dtype == DType::f32) return load_one<DType::f32>(p, i);
    if (dtype == DType::bf16) return load_one<DType::bf16>(p, i);
    return load_one<DType::f16>(p, i);
}

// --- kCount elements at once: 8 or 16 bytes, as they lie in memory ---

template <int kBytes>
struct Raw;
template <>
struct Raw<8> {
    uint2 v;
    __device__ __forceinline__ unsigned word(int k) const { return k == 0 ? v.x : v.y; }
    __device__ __forceinline__ void set(int k, unsigned w) { (k == 0 ? v.x : v.y) = w; }
};
template <>
struct Raw<16> {
    uint4 v;
    __device__ __forceinline__ unsigned word(int k) const { return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w; }
    __device__ __forceinline__ void set(int k, unsigned w) { (k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w) = w; }
};

template <DType D, int kCount>
using RawOf = Raw<bytes_of(D) * kCount>;

template <DType D, int kCount>
__device__ __forceinline__ void unpack(const RawOf<D, kCount>& raw, float (&out)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
        out[k] = D == DType::f32 ? widen<D>(raw.word(k)) : widen<D>(raw.word(k / 2) >> (k % 2 * 16) & 0xFFFFu);
}

template <DType D, int kCount>
__device__ __forceinline__ RawOf<D, kCount> pack(const float (&v)[kCount]) {
    RawOf<D, kCount> raw;
    if constexpr (D == DType::f32) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) raw.set(k, narrow<D>(v[k]));
    } else {
#pragma unroll
        for (int k = 0; k < kCount; k += 2) raw.set(k / 2, narrow<D>(v[k]) | narrow<D>(v[k + 1]) << 16);
    }
    return raw;
}

template <DType D, int kCount>
__device__ __forceinline__ void store(void* p, int64_t i, const float (&v)[kCount]) {
    *reinterpret_cast<RawOf<D, kCount>*>(static_cast<char*>(p) + i * bytes_of(D)) = pack<D, kCount>(v);
}

// --- one access by a dtype known when the kernel runs. kVec 4 is fp32, 8 are 16-bit elements, both in 128 bits; 4 of
// 16 bits are in kBytes = 8; 1 is an element of any dtype, without any demand on its address ---

template <int kVec, int kBytes = 16>
struct Packed {
    static constexpr bool kHalves = kBytes == 2 * kVec;
    std::conditional_t<kBytes == 16, uint4, uint2> v;
};
template <>
struct Packed<1> {
    static constexpr bool kHalves = false;
    unsigned v;
};

template <int kVec, int kBytes = 16>
__device__ __forceinline__ Packed<kVec, kBytes> get(const void* p, int64_t i, DType dtype) {
    using Of = Packed<kVec, kBytes>;
    if constexpr (kVec > 1)
        return {*reinterpret_cast<const decltype(Of::v)*>(static_cast<const char*>(p) + i * (kBytes / kVec))};
    else if (dtype == DType::f32) return {static_cast<const unsigned*>(p)[i]};
    else return {static_cast<const unsigned short*>(p)[i]};
}

template <int kVec, int kBytes>
__device__ __forceinline__ void put(void* p, int64_t i, DType dtype, const Packed<kVec, kBytes>& packed) {
    if constexpr (kVec > 1)
        *reinterpret_cast<decltype(packed.v)*>(static_cast<char*>(p) + i * (kBytes / kVec)) = packed.v;
    else if (dtype == DType::f32) static_cast<unsigned*>(p)[i] = packed.v;
    else static_cast<unsigned short*>(p)[i] = static_cast<unsigned short>(packed.v);
}

template <int kVec, int kBytes>
__device__ __forceinline__ void unpack(const Packed<kVec, kBytes>& packed, DType dtype, float (&out)[kVec]) {
    if constexpr (Packed<kVec, kBytes>::kHalves) {
        if (dtype == DType::bf16) unpack<DType::bf16, kVec>({packed.v}, out);
        else unpack<DType::f16, kVec>({packed.v}, out);
    } else if constexpr (kVec == 4) {
        unpack<DType::f32, 4>({packed.v}, out);
    } else {
        out[0] = dtype == DType::f32    ? widen<DType::f32>(packed.v)
                 : dtype == DType::bf16 ? widen<DType::bf16>(packed.v)
                                        : widen<DType::f16>(packed.v);
    }
}

template <int kVec, int kBytes = 16>
__device__ __forceinline__ Packed<kVec, kBytes> pack(DType dtype, const float (&v)[kVec]) {
    if constexpr (Packed<kVec, kBytes>::kHalves)
        return {dtype == DType::bf16 ? pack<DType::bf16, kVec>(v).v : pack<DType::f16, kVec>(v).v};
    else if constexpr (kVec == 4) return {pack<DType::f32, 4>(v).v};
    else
        return {dtype == DType::f32    ? narrow<DType::f32>(v[0])
                : dtype == DType::bf16 ? narrow<DType::bf16>(v[0])
                                       : narrow<DType::f16>(v[0])};
}

// --- per-channel parameters, sums, division ---

__device__ __forceinline__ float param(const Param& p, int64_t n, int64_t c, float otherwise) {
    return p.ptr ? load_one(p.ptr, p.dtype, n * p.row_stride + c) : otherwise;
}

// The parameters of kVec channels from c on, in accesses of 128 bits if `aligned_params` of all of them.
template <int kVec>
__device__ __forceinline__ void params(const Param& p, int64_t n, int64_t c, float otherwise, float (&out)[kVec]) {
    const int64_t at = n * p.row_stride + c;
    if (kVec > 1 && p.ptr && p.dtype == DType::f32) {
#pragma unroll
        for (int j = 0; j + 4 <= kVec; j += 4) {
            float four[4];
            unpack<4>(get<4>(p.ptr, at + j, DType::f32), DType::f32, four);
#pragma unroll
            for (int k = 0; k < 4; ++k) out[j + k] = four[k];
        }
    } else if (kVec == 8 && p.ptr) {
        unpack<kVec>(get<kVec>(p.ptr, at, p.dtype), p.dtype, out);
    } else {
#pragma unroll
        for (int k = 0; k < kVec; ++k) out[k] = param(p, n, c + k, otherwise);
    }
}

inline __host__ bool aligned_params(const Param& p) { return aligned(p.ptr, p.row_stride, p.dtype, 16); }

// The sum over a warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int other = kWarp / 2; other; other /= 2) v += __shfl_xor_sync(kAllLanes, v, other);
    return v;
}

// The sum over a block, the same bits in every thread; `parts` holds a float2 for every warp and is not in use.
__device__ __forceinline__ float2 block_sum(float a, float b, float2* parts) {
    a = warp_sum(a), b = warp_sum(b);
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = make_float2(a, b);
    __syncthreads();
    float2 total = parts[0];
    for (unsigned k = 1; k < blockDim.x / kWarp; ++k) total.x += parts[k].x, total.y += parts[k].y;
    return total;
}

// The sums of several numbers over a block of whole warps, the same bits in every thread; `parts` holds as many for
// each of 32 warps and is not in use.
template <int kCount>
__device__ __forceinline__ void block_sums(float (&v)[kCount], float* parts) {
    const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        v[k] = warp_sum(v[k]);
        if (lane == 0) parts[k * kWarp + warp] = v[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[k] = warp_sum(lane < blockDim.x / kWarp ? parts[k * kWarp + lane] : 0.0f);
}

// Sums over the threads of a row, the same bits in each. Where a row has more than a warp its block has nothing else;
// `parts` holds a float2 for every warp and is not in use.
__device__ __forceinline__ float2 row_sum(float a, float b, unsigned lanes, float2* parts) {
    if (lanes > kWarp) return block_sum(a, b, parts);
#pragma unroll
    for (unsigned other = kWarp / 2; other; other /= 2) {
        if (other >= lanes) continue;  // all threads go the same way
        a += __shfl_xor_sync(kAllLanes, a, static_cast<int>(other));
        b += __shfl_xor_sync(kAllLanes, b, static_cast<int>(other));
    }
    return make_float2(a, b);
}

// --- clusters of blocks, sm_90 and later; the emulation has its own ---

#ifndef DIFUSORES_EMULATION
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif

// Waits for every thread of the cluster; what they wrote to shared memory before is seen after.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The place of `own`, which lies in this block's shared memory, in that of the cluster's block `rank`.
template <class T>
__device__ __forceinline__ const T* in_block(const T* own, unsigned rank) {
    const T* there = own;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
#endif
    return there;
}
#endif

// --- the row of a sampler's step ---

__device__ __forceinline__ int64_t index_of(const StepRow& source) { return source.step ? *source.step : 0; }

// NaN where the counter is not the number of a row.
__device__ __forceinline__ double number_of(const StepRow& source, int64_t index, int position) {
    if (!source.table) return source.row[position];
    const bool inside = index >= 0 && index < source.count;
    const double number = source.table[(inside ? index : 0) * kRow + position];
    return inside ? number : static_cast<double>(__uint_as_float(~0u));
}

// Quotients of numbers below 2^31 by a divisor below 2^31, without a division (Granlund and Montgomery 1994).
struct Divisor {
    unsigned factor = 0, shift = 0;
    Divisor() = default;
    __host__ explicit Divisor(int64_t divisor) {
        while ((int64_t{1} << shift) < divisor) ++shift;
        factor = static_cast<unsigned>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
    }
    __device__ __forceinline__ unsigned quotient(unsigned n) const { return (__umulhi(n, factor) + n) >> shift; }
};

}  // namespace cuda
}  // namespace difusores
