// What sm_90a alone has: products of 64 rows by a group of four warps, copies of whole tiles to shared memory, and the
// barriers in shared memory that say when these are there. Each function is a thin wrapper of one PTX instruction (PTX
// ISA, "wgmma.mma_async", "cp.async.bulk.tensor", "mbarrier"). No emulation covers them, and no GPU has run them here.
//
// Tiles in shared memory. A tile of R rows of 16-bit elements lies in chunks of kSpan bytes of a row (128, 64 or 32),
// one chunk of all rows after the other. Within a chunk, bits 4.. of an address are changed by those from bit 7 on (by
// as many as a span has sixteenths: 3, 2, 1): so copies write it, so products read it, and eight rows' same 16 bytes
// lie in all banks once. The pattern repeats after eight rows, 8 kSpan bytes, so a chunk begins at a multiple of that.
//
// A descriptor of a factor has, in units of 16 bytes, the address (bits 0-13), the leading offset (16-29), the stride
// (32-45), and the span (62-63: 1 for 128 bytes, 2 for 64, 3 for 32). "Along k": the elements of a row are what a
// product sums over; the stride is that of eight rows, 8 kSpan, the leading offset is not read; 16 columns further the
// address is 32 bytes higher, within a chunk. "Along n": a product sums over rows; the stride is that from eight rows
// to the next eight, 8 kSpan, the leading offset that from one chunk of columns to the next, R kSpan; 16 rows further
// the address is 16 kSpan higher. That is CUTLASS's reading of the format too (mma_traits_sm90_gmma.hpp, canonical
// layouts).
//
// Fragments: warp w of the group has rows 16 w to 16 w + 15, of sums and of a left factor in registers, in the order of
// mma.m16n8k16 (mma.cuh): sums [n][e] are row g + 8 (e / 2), column 8 n + 2 t + e % 2.
#pragma once
#include <cuda.h>

#include "cuda/mma.cuh"

namespace difusores {
namespace cuda {

// --- barriers: a phase ends when `count` threads have arrived and the bytes that were announced are there ---

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Barriers that were made become known to the copies' side; the threads of the block have to meet after it.
__device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Until the phase of this parity has ended: 0 for the first, 1 for the second, 0 for the third …
__device__ __forceinline__ void wait_for(uint64_t* barrier, int parity) {
    unsigned done = 0;
    while (!done)
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
}

// A box of the tensor [batch, head, row, column] that `map` describes, to shared memory; zeros beyond the tensor.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int column, int row,
                                         int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}

// --- registers: what a group of four warps, of which all have to say it, gives up and what another then takes ---

template <int kCount>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- products ---

template <int kSpan>
__device__ __forceinline__ uint64_t descriptor_of(const void* at, int leading_bytes) {
    constexpr uint64_t kMode = kSpan == 128 ? 1 : kSpan == 64 ? 2 : 3;
    return uint64_t{(shared_address(at) & 0x3FFFFu) >> 4} | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
           uint64_t{8 * kSpan >> 4} << 32 | kMode << 62;
}

// Before the first product, and after other instructions wrote registers that a product reads or adds to.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The end of a group of products; and until all groups are done.
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_done() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// The compiler does not know that products write registers later: these are written before this, and read after it.
template <int kCount>
__device__ __forceinline__ void hold(float (&sums)[kCount][4]) {
#pragma unroll
    for (int n = 0; n < kCount; ++n)
        asm volatile("" : "+f"(sums[n][0]), "+f"(sums[n][1]), "+f"(sums[n][2]), "+f"(sums[n][3])::"memory");
}
template <int kCount>
__device__ __forceinline__ void hold(unsigned (&words)[kCount][2]) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) asm volatile("" : "+r"(words[n][0]), "+r"(words[n][1])::"memory");
}

// Operands of the products, by the number of sums of a thread.
#define DIFUSORES_LIST_32                                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DIFUSORES_LIST_40 DIFUSORES_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define DIFUSORES_LIST_48 DIFUSORES_LIST_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define DIFUSORES_LIST_64 \
    DIFUSORES_LIST_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DIFUSORES_LIST_80 \
    DIFUSORES_LIST_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define DIFUSORES_SUMS_4(s, n) "+f"(s[n][0]), "+f"(s[n][1]), "+f"(s[n][2]), "+f"(s[n][3])
#define DIFUSORES_SUMS_8(s, n) DIFUSORES_SUMS_4(s, n), DIFUSORES_SUMS_4(s, n + 1)
#define DIFUSORES_SUMS_16(s, n) DIFUSORES_SUMS_8(s, n), DIFUSORES_SUMS_8(s, n + 2)
#define DIFUSORES_SUMS_32(s, n) DIFUSORES_SUMS_16(s, n), DIFUSORES_SUMS_16(s, n + 4)
#define DIFUSORES_SUMS_40(s) DIFUSORES_SUMS_32(s, 0), DIFUSORES_SUMS_8(s, 8)
#define DIFUSORES_SUMS_48(s) DIFUSORES_SUMS_32(s, 0), DIFUSORES_SUMS_16(s, 8)
#define DIFUSORES_SUMS_64(s) DIFUSORES_SUMS_32(s, 0), DIFUSORES_SUMS_32(s, 8)
#define DIFUSORES_SUMS_80(s) DIFUSORES_SUMS_64(s), DIFUSORES_SUMS_16(s, 16)

// sums = a b (+ sums), 64 x 128 over 16; both factors by descriptors along k.
template <DType T>
__device__ __forceinline__ void product_along_k(float (&sums)[16][4], uint64_t a, uint64_t b, bool add) {
#define DIFUSORES_PRODUCT(type)                                                             \
    asm volatile(                                                                           \
        "{\n.reg .pred p;\nsetp.ne.s32 p, %66, 0;\n"                                        \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" DIFUSORES_LIST_64 \
        "}, %64, %65, p, 1, 1, 0, 0;\n}"                                                    \
        : DIFUSORES_SUMS_64(sums)                                                           \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)))
    if constexpr (T == DType::f16) DIFUSORES_PRODUCT("f16");
    else DIFUSORES_PRODUCT("bf16");
#undef DIFUSORES_PRODUCT
}

// sums += a b, 64 x kWidth over 16; a in registers, b by a descriptor along n.
template <DType T, int kWidth>
__device__ __forceinline__ void add_product_along_n(float (&sums)[kWidth / 8][4], unsigned a0, unsigned a1, unsigned a2,
                                                    unsigned a3, uint64_t b) {
#define DIFUSORES_PRODUCT(type, width, list, operands, p0, p1, p2, p3, p4)                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" width "k16.f32." type "." type " {" list "}, {" p0 ", " p1 \
                 ", " p2 ", " p3 "}, " p4 ", 1, 1, 1, 1;"                                                       \
                 : operands                                                                                     \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))
#define DIFUSORES_OF_WIDTH(type)                                                                                       \
    if constexpr (kWidth == 64)                                                                                        \
        DIFUSORES_PRODUCT(type, "64", DIFUSORES_LIST_32, DIFUSORES_SUMS_32(sums, 0), "%32", "%33", "%34", "%35",       \
                          "%36");                                                                                      \
    else if constexpr (kWidth == 80)                                                                                   \
        DIFUSORES_PRODUCT(type, "80", DIFUSORES_LIST_40, DIFUSORES_SUMS_40(sums), "%40", "%41", "%42", "%43", "%44");  \
    else if constexpr (kWidth == 96)                                                                                   \
        DIFUSORES_PRODUCT(type, "96", DIFUSORES_LIST_48, DIFUSORES_SUMS_48(sums), "%48", "%49", "%50", "%51", "%52");  \
    else if constexpr (kWidth == 128)                                                                                  \
        DIFUSORES_PRODUCT(type, "128", DIFUSORES_LIST_64, DIFUSORES_SUMS_64(sums), "%64", "%65", "%66", "%67", "%68"); \
    else DIFUSORES_PRODUCT(type, "160", DIFUSORES_LIST_80, DIFUSORES_SUMS_80(sums), "%80", "%81", "%82", "%83", "%84")
    static_assert(kWidth == 64 || kWidth == 80 || kWidth == 96 || kWidth == 128 || kWidth == 160);
    if constexpr (T == DType::f16) {
        DIFUSORES_OF_WIDTH("f16");
    } else {
        DIFUSORES_OF_WIDTH("bf16");
    }
#undef DIFUSORES_OF_WIDTH
#undef DIFUSORES_PRODUCT
}

}  // namespace cuda
}  // namespace difusores
