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

#include "kernels.h"

namespace difusores {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

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

// Elements [i, i + kCount) of an array; kCount == 1: one element, without any demand on its address.
template <DType D, int kCount>
__device__ __forceinline__ void load(const void* p, int64_t i, float (&out)[kCount]) {
    if constexpr (kCount == 1) out[0] = load_one<D>(p, i);
    else
        unpack<D, kCount>(*reinterpret_cast<const RawOf<D, kCount>*>(static_cast<const char*>(p) + i * bytes_of(D)),
                          out);
}

template <DType D, int kCount>
__device__ __forceinline__ void store(void* p, int64_t i, const float (&v)[kCount]) {
    if constexpr (kCount == 1) store_one<D>(p, i, v[0]);
    else *reinterpret_cast<RawOf<D, kCount>*>(static_cast<char*>(p) + i * bytes_of(D)) = pack<D, kCount>(v);
}

}  // namespace cuda
}  // namespace difusores
