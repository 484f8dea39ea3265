// What the kernels of attention share: how a call is cut, rows to shared memory, masks, the softmax of a warp's scores,
// rows of the result. Elements [m][n][e] of a warp's scores or results lie as a product leaves them: query
// 16 m + g + 8 (e / 2), key or column 8 n + 2 t + e % 2, with g = lane / 4, t = lane % 4.
#pragma once
#include "cuda/mma.cuh"

namespace difusores {
namespace cuda {

constexpr int kChunkKeys = 32;  // keys that a warp has scores of
constexpr int kTileStages = 3;
constexpr int kQueryWarps = 4;
constexpr int kWidestOfWarp = 160;  // heads whose results a warp holds
constexpr int kWidest = 512;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kNoTop = -3.402823466e38f;  // of a row without scores yet
constexpr float kSmallest = 1.175494351e-38f;
constexpr float kSlack = 8.0f;        // powers of two by which a score may pass the top
constexpr float kHuge = 16777216.0f;  // above it, s c - top is no longer exact enough in one operation

template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

// How a call is cut. `groups` and `tile_keys` decide the bits of the result; `warps` does not.
struct AttentionPlan {
    int width;      // of the instance
    int warps;      // along the queries
    int groups;     // of warps along the keys: 1 or 2
    int tile_keys;  // keys of a tile in shared memory
    int rows;       // queries of a block
    unsigned blocks, threads;
    int64_t shared_bytes;
};

constexpr __host__ __device__ int row_bytes(int width) { return (width / 8 | 1) * 16; }

__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
    return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}

__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(kAllLanes, v, 1);
    return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// Copies rows of tensors to shared memory. A thread has its piece of a row (two or four pieces of a long one) and goes
// down the rows by additions; those that are left over have nothing to do. Made for each tile: the thread's index is
// read anew, so that no register holds what follows from it while products run.
template <int kWidth>
struct RowCopies {
    static constexpr int kPieces = kWidth / 8, kOfThread = (kPieces + kWarp - 1) / kWarp;
    static constexpr int kThreads = kPieces / kOfThread;
    static_assert(kThreads * kOfThread == kPieces && kThreads <= kWarp, "a warp has threads for a row");
    int own, piece, step;  // first row, first piece, rows between two of the thread's

    __device__ __forceinline__ RowCopies() {
        const unsigned thread = thread_anew(), row = thread / kThreads;
        own = static_cast<int>(row), piece = static_cast<int>(thread - row * kThreads);
        step = static_cast<int>(threads_anew() / kThreads);
    }

    // Rows [first, first + count) of [rows, d], zeros beyond both. Of rows that are not there nothing is read,
    // wherever they would be.
    __device__ __forceinline__ void operator()(unsigned char* tile, const unsigned short* from, int64_t stride,
                                               int first, int count, int rows, int d) const {
        const int there = rows - first;
        const unsigned short* at = from + (first + own) * stride + piece * 8;
        unsigned char* to = tile + own * row_bytes(kWidth) + piece * 16;
        const int last = own < step ? count : 0;
        for (int row = own; row < last; row += step, at += step * stride, to += step * row_bytes(kWidth)) {
#pragma unroll
            for (int j = 0; j < kOfThread; ++j)
                copy_16(to + j * kThreads * 16, at + j * kThreads * 8, row < there && (piece + j * kThreads) * 8 < d);
        }
    }
};

template <int kWidth>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const unsigned short* from, int64_t stride, int first,
                                          int count, int rows, int d) {
    RowCopies<kWidth>{}(tile, from, stride, first, count, rows, d);
}

// Of a warp's queries and 32 keys.
template <int kTiles>
using Scores = float[kTiles][kChunkKeys / 8][4];

// 16 kTiles rows in registers, the left factor of products.
template <DType T, int kWidth, int kTiles>
struct Rows {
    unsigned words[kTiles][kWidth / 8][2];  // rows g and g + 8, elements 8 c + 2 t and the next

    // Rows first + 16 m + g (+ 8) of [rows, d], zeros beyond both; negated where asked.
    __device__ __forceinline__ void load(const unsigned short* from, int64_t stride, int first, int rows, int d,
                                         bool negate) {
        const int lane = static_cast<int>(thread_anew()) % kWarp, column = lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first + 16 * m + 8 * half + lane / 4;
                const unsigned short* const at = from + row * stride + column;
#pragma unroll
                for (int c = 0; c < kWidth / 8; ++c) {
                    const bool real = row < rows && 8 * c < d;
                    words[m][c][half] = real ? *reinterpret_cast<const unsigned*>(at + 8 * c) : 0;
                    if (negate) words[m][c][half] ^= 0x80008000u;
                }
            }
    }

    // s = these times, transposed, the 32 rows that begin at `keys` in shared memory.
    __device__ __forceinline__ void times_rows(Scores<kTiles>& s, const unsigned char* keys) const {
        const int lane = threadIdx.x % kWarp;
        // Two tiles of a row's neighbouring columns, then the two of the next eight keys: the words of a product over
        // 16 come side by side.
        const unsigned char* const pair = keys + (lane / 16 * 8 + lane % 8) * row_bytes(kWidth) + lane / 8 % 2 * 16;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int n = 0; n < kChunkKeys / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) s[m][n][e] = 0.0f;
#pragma unroll
        for (int c = 0; c + 1 < kWidth / 8; c += 2)
#pragma unroll
            for (int n = 0; n < kChunkKeys / 8; n += 2) {
                unsigned k[4];
                ldmatrix(k, pair + n * 8 * row_bytes(kWidth) + c * 16);
#pragma unroll
                for (int m = 0; m < kTiles; ++m) {
                    const auto& a = words[m][c];
                    const auto& b = words[m][c + 1];
                    mma_k16<T>(s[m][n], a[0], a[1], b[0], b[1], k[0], k[1]);
                    mma_k16<T>(s[m][n + 1], a[0], a[1], b[0], b[1], k[2], k[3]);
                }
            }
        if constexpr (kWidth / 8 % 2) {
            constexpr int kLast = kWidth / 8 - 1;
            unsigned k[4];
            ldmatrix(k, keys + lane * row_bytes(kWidth) + kLast * 16);
#pragma unroll
            for (int n = 0; n < kChunkKeys / 8; ++n)
#pragma unroll
                for (int m = 0; m < kTiles; ++m) mma_k8<T>(s[m][n], words[m][kLast][0], words[m][kLast][1], k[n]);
        }
    }
};

// sum += p x for the 32 rows of x that begin at `values` in shared memory; p is rounded to T.
template <DType T, int kWidth, int kTiles>
__device__ __forceinline__ void add_product(float (&sum)[kTiles][kWidth / 8][4], const Scores<kTiles>& p,
                                            const unsigned char* values) {
    unsigned words[kTiles][kChunkKeys / 8][2];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < kChunkKeys / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                words[m][n][half] = pack_2<T>(p[m][n][2 * half], p[m][n][2 * half + 1]);
    const unsigned char* const row = values + threadIdx.x % kWarp * row_bytes(kWidth);
#pragma unroll
    for (int c = 0; c < kWidth / 8; ++c) {
        unsigned v[4];
        ldmatrix_transposed(v, row + c * 16);
#pragma unroll
        for (int n = 0; n < kChunkKeys / 8; n += 2)
#pragma unroll
            for (int m = 0; m < kTiles; ++m)
                mma_k16<T>(sum[m][c], words[m][n][0], words[m][n][1], words[m][n + 1][0], words[m][n + 1][1], v[n],
                           v[n + 1]);
    }
}

// Where a warp's queries and keys are in the mask.
struct MaskView {
    const void* at;
    int64_t query_stride, key_stride;
    DType dtype;
    bool is_bool;
    __device__ __forceinline__ float apply(float score, int query, int key) const {
        const int64_t i = query * query_stride + key * key_stride;
        if (is_bool) return static_cast<const bool*>(at)[i] ? score : -INFINITY;
        const float v = load_one(at, dtype, i);
        return score + (v == -INFINITY ? v : fmaxf(v, 0.5f * kNoTop));  // the lowest number is not minus infinity
    }
};

// Of a head; Args has a mask.
template <class Args>
__device__ __forceinline__ MaskView mask_of(const Args& args, unsigned batch, unsigned head) {
    const int64_t at = batch * args.mask.stride[0] + head * args.mask.stride[1];
    return {static_cast<const char*>(args.mask.ptr) + at * (args.mask_is_bool ? 1 : bytes_of(args.mask_dtype)),
            args.mask.stride[2], args.mask.stride[3], args.mask_dtype, args.mask_is_bool};
}

// Scores of keys that are not there become minus infinity; scores under a mask are scaled and get theirs.
template <bool kMask, int kTiles, int kCount>
__device__ __forceinline__ void hide_keys(float (&s)[kTiles][kCount][4], const MaskView& mask, float scale, int query0,
                                          int queries, int key0, int keys) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < kCount; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int query = query0 + 16 * m + 8 * (e / 2) + lane / 4;
                const int key = key0 + 8 * n + lane % 4 * 2 + e % 2;
                if (key >= keys) s[m][n][e] = -INFINITY;
                else if (kMask && query < queries) s[m][n][e] = mask.apply(s[m][n][e] * scale, query, key);
            }
}

// The lane's highest score of row g + 8 half.
template <int kCount>
__device__ __forceinline__ float row_max(const float (&s)[kCount][4], int half) {
    float high = -INFINITY;
#pragma unroll
    for (int n = 0; n < kCount; ++n) high = fmaxf(high, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    return high;
}

// From scores to weights, 2^(s c - top), and their sums by row.
template <int kTiles, int kCount>
__device__ __forceinline__ void weigh(float (&s)[kTiles][kCount][4], const float (&top)[kTiles][2],
                                      float (&total)[kTiles][2], float c) {
    bool huge = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) huge = huge || fabsf(top[m][0]) >= kHuge || fabsf(top[m][1]) >= kHuge;
    if (huge) {  // weights of scores that were rounded: the highest is 1, which a fused operation would miss
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int n = 0; n < kCount; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float t = top[m][e / 2];
                    s[m][n][e] = fabsf(t) >= kHuge ? __fmul_rn(s[m][n][e], c) - t : fmaf(s[m][n][e], c, -t);
                }
    } else {
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int n = 0; n < kCount; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) s[m][n][e] = fmaf(s[m][n][e], c, -top[m][e / 2]);
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < kCount; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[m][n][e] = exp2_fast(s[m][n][e]);
                total[m][e / 2] += s[m][n][e];
            }
}

// The head and the queries of a block of threads.
struct BlockOf {
    unsigned batch, head;
    int first;
    __device__ __forceinline__ BlockOf(const AttentionArgs& args, const AttentionPlan& plan) {
        const unsigned heads = static_cast<unsigned>(args.h), index = blockIdx.x / plan.blocks;
        batch = index / heads, head = index - batch * heads;
        first = static_cast<int>(blockIdx.x - index * plan.blocks) * plan.rows;
    }
    __device__ __forceinline__ const unsigned short* rows_of(const Heads& t) const {
        return static_cast<const unsigned short*>(t.ptr) + batch * t.stride[0] + head * t.stride[1];
    }
    __device__ __forceinline__ unsigned short* out(const AttentionArgs& args) const {
        return static_cast<unsigned short*>(args.out) + batch * args.out_stride[0] + head * args.out_stride[1];
    }
    __device__ __forceinline__ MaskView mask(const AttentionArgs& args) const { return mask_of(args, batch, head); }
};

enum class Pass { of_q, of_k_and_v, of_k, of_v };

// What a block of threads has to do in a pass of the gradients: `of_block` rows of two factors of its own, q and grad
// or k and v, against all rows of the two others.
struct GradBlock {
    const Heads &own0, &own1, &their0, &their1;
    int rows, columns, first;
    unsigned index, batch, head;
    __device__ __forceinline__ GradBlock(const AttentionGradArgs& args, bool of_keys, int of_block)
        : own0(of_keys ? args.k : args.q),
          own1(of_keys ? args.v : args.grad),
          their0(of_keys ? args.q : args.k),
          their1(of_keys ? args.grad : args.v),
          rows(static_cast<int>(of_keys ? args.s : args.l)),
          columns(static_cast<int>(of_keys ? args.l : args.s)) {
        const unsigned blocks = (rows + of_block - 1) / of_block, heads = static_cast<unsigned>(args.h);
        index = blockIdx.x / blocks, batch = index / heads, head = index - batch * heads;
        first = static_cast<int>(blockIdx.x - index * blocks) * of_block;
    }
    template <class Element>
    __device__ __forceinline__ const Element* rows_of(const Heads& t) const {
        return static_cast<const Element*>(t.ptr) + batch * t.stride[0] + head * t.stride[1];
    }
    template <class Element>
    __device__ __forceinline__ Element* rows_of(const Gradient& t) const {
        return static_cast<Element*>(t.ptr) + batch * t.stride[0] + head * t.stride[1];
    }
};

// What a query's sums of weights times v are multiplied by: zero where all of its keys are masked.
__device__ __forceinline__ float inverse_of(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// Columns [first, first + 8 kCount) of a row, times a factor.
template <DType T, int kCount>
__device__ __forceinline__ void store_row(const float (&out)[kCount][4], int half, float factor, unsigned short* to,
                                          int64_t stride, int row, int rows, int first, int dv) {
    if (row >= rows) return;
    unsigned short* const at = to + row * stride + first + thread_anew() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kCount; ++n)
        if (first + 8 * n < dv)
            *reinterpret_cast<unsigned*>(at + 8 * n) =
                pack_2<T>(out[n][2 * half] * factor, out[n][2 * half + 1] * factor);
}

}  // namespace cuda
}  // namespace difusores
