// Matrix units and what feeds them, each a thin wrapper of one PTX instruction: products of 16-bit tiles with fp32
// sums, 8x8 tiles from shared memory to the products' fragments, copies to shared memory that go on by themselves.
//
// Fragments (PTX ISA, "matrix fragments for mma.m16n8k16"), with g = lane / 4 and t = lane % 4, two elements in a word:
//     a[16][8]  row by row:  a0 = (row g, columns 2t, 2t+1)     a1 = (row g + 8, the same columns)
//     b[8][8]               b0 = (rows 2t, 2t+1, column g)
//     c[16][8]              c[0], c[1] = (row g, columns 2t, 2t+1)   c[2], c[3] = (row g + 8, the same columns)
// A product over 16 is that over 8 twice, with the first half's words before the second's.
//
// sm_75 has products over 8 of fp16 alone, and copies that wait. Behind the emulation: tests/cuda_emulation/mma.h.
#pragma once
#include "cuda/common.cuh"
#ifndef DIFUSORES_EMULATION

namespace difusores {
namespace cuda {

// c += a b, over 8.
template <DType T>
__device__ __forceinline__ void mma_k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b0) {
    if constexpr (T == DType::f16) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(b0));
    } else {
#if __CUDA_ARCH__ >= 800
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(b0));
#else
        __trap();  // the host refuses bf16 there
#endif
    }
}

// c += a b, over 16.
template <DType T>
__device__ __forceinline__ void mma_k16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                        unsigned b1) {
#if __CUDA_ARCH__ >= 800
    if constexpr (T == DType::f16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    mma_k8<T>(c, a0, a1, b0);
    mma_k8<T>(c, a2, a3, b1);
#endif
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Four 8x8 tiles of 16-bit elements: lane 8j + i names the 16 bytes of row i of tile j; word j of a lane is
// (row g, columns 2t, 2t+1) of tile j.
__device__ __forceinline__ void ldmatrix(unsigned (&tiles)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(shared_address(row)));
}

// The same tiles transposed: word j is (rows 2t, 2t+1, column g) of tile j.
__device__ __forceinline__ void ldmatrix_transposed(unsigned (&tiles)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(shared_address(row)));
}

// A number, and threadIdx.x and blockDim.x, which the compiler takes for others at every call: what is computed from
// them is not kept in a register from one use to the next.
__device__ __forceinline__ int anew(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

__device__ __forceinline__ unsigned thread_anew() {
    unsigned index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

__device__ __forceinline__ unsigned threads_anew() {
    unsigned count;
    asm volatile("mov.u32 %0, %%ntid.x;" : "=r"(count));
    return count;
}

// 16 bytes from global to shared memory, or zeros where the source is not real. They are there after copies_done.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool real) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(real ? 16 : 0));
#else
    *static_cast<uint4*>(to) = real ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

// The end of a group of copies, which may be empty.
__device__ __forceinline__ void close_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;");
#endif
}

// Waits for this thread's copies but for those of the latest kLeft groups.
template <int kLeft>
__device__ __forceinline__ void copies_done() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// 2^v within 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float v) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}

// Two elements in a word, the first in its lower half.
template <DType T>
__device__ __forceinline__ unsigned pack_2(float low, float high) {
#if __CUDA_ARCH__ >= 800
    unsigned result;
    if constexpr (T == DType::f16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
#else
    return narrow<T>(low) | narrow<T>(high) << 16;
#endif
}

}  // namespace cuda
}  // namespace difusores
#endif
