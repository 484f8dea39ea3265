// out = softmax(scale * q k^T + mask) v, per batch and head, online over the keys (Milakov and Gimelshein 2018; Dao et
// al. 2022; Dao 2023): no L x S matrix anywhere.
//
// A block of threads takes 4 * 16 * kTiles queries of a head, a warp 16 * kTiles of them against 32 keys at a time:
// their scores stay in its registers, and become the left factor of p v where they are. Up to a width of 80 a warp has
// two tiles of queries, so that what it reads of k and v from shared memory serves twice: with one tile those reads
// alone, D / 512 cycles of a multiprocessor for a score, take longer than the products. Where there are few queries, a
// second group of warps takes every other 32 keys of the same queries; the groups' sums are joined in the end.
//
// Widths are multiples of 8: q k^T goes in steps of 16 and a last one of 8, p v in columns of 8, so 40, 64, 80, 96, 128
// and 160 multiply no zeros. Other widths take the next of these; fp32 and heads
// above 160 have kernels of their own. k and v come in tiles of 64 keys (32 where shared
// memory is small), three under way, by asynchronous copies of 16 bytes, which fill with zeros what is not there. A
// row in shared memory is an odd number of 16 bytes long: the eight rows of a fragment lie in different banks, and all
// of a tile is reached from one address by constants.
//
// Work for a score and head at D = 40, in cycles of a multiprocessor of sm_90: 160 operations in products at about 2500
// a cycle (mma.sync), 0.064; one exponential at 16 a cycle, 0.063; 6.7 instructions at 128 a cycle, 0.052. None is far
// from the others, so exponentials by polynomial (8 instructions each) would only move the load.
// Bytes: q and out once, k and v once per block of queries, after the first from L2: D / 32 bytes a score at two tiles.
//
// Softmax: weights are 2^(s c - top), c = scale * log2(e), where top is a whole number at least as high as the row's
// highest score less 8, and changes only when a score passes it by more: a weight is at most 2^8.5, which every dtype
// holds, and what was summed is seldom brought to a new top, then by an exact power of two. A row's numbers depend on
// that row and on how its keys are grouped (L, S and D), so neither on the batch nor on the size of the grid.
//
// Layouts: rows of q, k, v at any distance that is a multiple of 16 bytes, elements of a row side by side. The mask is
// read by its strides, where it is broadcast with stride 0.
#pragma once
#include "cuda/attention_fp32.cuh"
#include "cuda/attention_wide.cuh"

namespace difusores {
namespace cuda {

constexpr __host__ __device__ int tiles_of(int width) { return width <= 80 ? 2 : 1; }
// Threads whose registers fill a multiprocessor: what the compiler may use for one. sm_75 and sm_120 spill at less.
constexpr __host__ __device__ int threads_at_once(int width, bool mask) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    return 256;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    return mask || width > 64 ? 256 : 384;
#endif
    return mask || width > 64 ? 256 : width > 40 ? 384 : 512;
}

// What a warp has of its queries' result: the sums of weights, and of weights times v, where a weight is 2^(s c - top).
template <DType T, int kWidth, int kTiles>
struct Running {
    float out[kTiles][kWidth / 8][4], total[kTiles][2], top[kTiles][2];

    __device__ __forceinline__ Running() {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) total[m][half] = 0.0f, top[m][half] = kNoTop;
#pragma unroll
            for (int c = 0; c < kWidth / 8; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e) out[m][c][e] = 0.0f;
        }
    }

    __device__ __forceinline__ void scale_row(int m, int half, float factor) {
        total[m][half] *= factor;
#pragma unroll
        for (int c = 0; c < kWidth / 8; ++c) out[m][c][2 * half] *= factor, out[m][c][2 * half + 1] *= factor;
    }

    // New tops for the rows with a score that passes theirs by more than the slack.
    template <int kCount>
    __device__ __forceinline__ void raise_tops(const float (&s)[kTiles][kCount][4], float c) {
        float highest[kTiles][2];
        bool above = false;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                highest[m][half] = row_max(s[m], half) * c;
                above = above || highest[m][half] > top[m][half] + kSlack;
            }
        if (!__any_sync(kAllLanes, above)) return;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float high = quad_max(highest[m][half]);
                if (high > top[m][half] + kSlack) {
                    const float higher = rintf(high);
                    scale_row(m, half, exp2_fast(top[m][half] - higher));
                    top[m][half] = higher;
                }
            }
    }

    // What the second group of warps has of the same queries, into the first group's. `memory` is not in use.
    __device__ __forceinline__ void join(float* memory, int threads) {
        const int self = threadIdx.x;
        const bool gives = self >= threads;
        float* at = memory + (gives ? self - threads : self);
        __syncthreads();
        if (gives) {
#pragma unroll
            for (int m = 0; m < kTiles; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    at[0] = top[m][half], at[threads] = total[m][half], at += 2 * threads;
#pragma unroll
                    for (int k = 0; k < kWidth / 4; ++k, at += threads) *at = out[m][k / 2][2 * half + k % 2];
                }
        }
        __syncthreads();
        if (gives) return;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float theirs = at[0], higher = fmaxf(top[m][half], theirs), factor = exp2_fast(theirs - higher);
                scale_row(m, half, exp2_fast(top[m][half] - higher));
                top[m][half] = higher;
                total[m][half] = fmaf(at[threads], factor, total[m][half]), at += 2 * threads;
#pragma unroll
                for (int k = 0; k < kWidth / 4; ++k, at += threads)
                    out[m][k / 2][2 * half + k % 2] = fmaf(*at, factor, out[m][k / 2][2 * half + k % 2]);
            }
    }

    __device__ __forceinline__ void store(const AttentionArgs& args, const BlockOf& block, int first) {
        const int lane = threadIdx.x % kWarp;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first + 16 * m + 8 * half + lane / 4;
                const float sum = quad_sum(total[m][half]);
                store_row<T>(out[m], half, inverse_of(sum), block.out(args), args.out_stride[2], row,
                             static_cast<int>(args.l), 0, static_cast<int>(args.dv));
                if (args.log2_sums && row < args.l && lane % 4 == 0)
                    args.log2_sums[(block.batch * args.h + block.head) * args.padded_l + row] =
                        top[m][half] + log2f(sum);
            }
    }
};

template <DType T, int kWidth, bool kMask>
__global__ void __launch_bounds__(threads_at_once(kWidth, kMask), 1)
    attention_forward(const __grid_constant__ AttentionArgs args, const __grid_constant__ AttentionPlan plan) {
    constexpr int kTiles = tiles_of(kWidth);
    DIFUSORES_DYNAMIC_SHARED(shared);
    const BlockOf block(args, plan);
    const int group = static_cast<int>(thread_anew()) / kWarp >= plan.warps;
    // The warp's first query. As other numbers that are seldom needed it is found anew each time: registers are few.
    const auto first = [&] {
        const int warp = static_cast<int>(thread_anew()) / kWarp;
        return block.first + (warp >= plan.warps ? warp - plan.warps : warp) * 16 * kTiles;
    };
    const int keys = static_cast<int>(args.s), d = static_cast<int>(args.d), dv = static_cast<int>(args.dv);
    const unsigned short *const k = block.rows_of(args.k), *const v = block.rows_of(args.v);
    const int half_stage = plan.tile_keys * row_bytes(kWidth);
    const auto copy_tile = [&](int tile) {
        const int key = tile * plan.tile_keys;
        if (key < keys) {
            unsigned char* const to = shared + tile % kTileStages * 2 * half_stage;
            const RowCopies<kWidth> copy;
            copy(to, k, args.k.stride[2], key, plan.tile_keys, keys, d);
            copy(to + half_stage, v, args.v.stride[2], key, plan.tile_keys, keys, dv);
        }
        close_copies();
    };
#pragma unroll
    for (int tile = 0; tile < kTileStages - 1; ++tile) copy_tile(tile);

    // With a mask, scores are multiplied before it is added; without, all at once when they become exponents. A
    // negative scale goes into q, so that the highest score stays the highest; one of 0 becomes a number that leaves
    // the minus infinity of keys which are not there what it is.
    const float scale = fabsf(args.scale), c = kMask ? kLog2E : fmaxf(scale * kLog2E, kSmallest);
    Rows<T, kWidth, kTiles> q;
    q.load(block.rows_of(args.q), args.q.stride[2], first(), static_cast<int>(args.l), d, args.scale < 0.0f);
    Running<T, kWidth, kTiles> running;
    const MaskView mask = kMask ? block.mask(args) : MaskView{};

    for (int tile = 0; tile * plan.tile_keys < keys; ++tile) {
        copies_done<kTileStages - 2>();
        __syncthreads();  // this tile is there for all, and nobody reads the last one any more, whose place is next
        copy_tile(tile + kTileStages - 1);
        for (int part = group * kChunkKeys; part < plan.tile_keys; part += plan.groups * kChunkKeys) {
            const int key0 = tile * plan.tile_keys + part;
            if (key0 >= keys) break;
            // At 40 a register for the tile's place would spill.
            const unsigned char* const at = shared + (kWidth == 40 ? anew(tile) : tile) % kTileStages * 2 * half_stage;
            float s[kTiles][kChunkKeys / 8][4];
            q.times_rows(s, at + part * row_bytes(kWidth));
            if (kMask || key0 + kChunkKeys > keys)
                hide_keys<kMask>(s, mask, scale, first(), static_cast<int>(args.l), key0, keys);
            running.raise_tops(s, c);
            weigh(s, running.top, running.total, c);
            add_product<T, kWidth>(running.out, s, at + half_stage + part * row_bytes(kWidth));
        }
    }
    if (plan.groups > 1) running.join(reinterpret_cast<float*>(shared), plan.warps * kWarp);
    if (!group) running.store(args, block, first());
}

// nullptr, or what the kernel takes and this is not.
inline __host__ const char* refuses_attention(const AttentionArgs& args, int64_t shared_limit) {
    const bool fp32 = args.dtype == DType::f32;
    if (fp32 && (args.d % 4 || args.dv % 4)) return "heads of a multiple of 4 elements in float32";
    if (!fp32 && (args.d % 8 || args.dv % 8)) return "heads of a multiple of 8 elements";
    if (args.d > kWidest || args.dv > kWidest) return "heads of at most 512 elements";
    const int wide = args.d > 256 || args.dv > 256 ? 512 : 256;
    const int needed = fp32 ? fp32_shared_bytes(wide, 1) : wide_shared_bytes(wide);
    if ((args.d > kWidestOfWarp || args.dv > kWidestOfWarp) && needed > shared_limit)
        return "narrower heads on this GPU, whose shared memory is too small for these";
    for (const Heads* t : {&args.q, &args.k, &args.v}) {
        const int64_t sizes[] = {args.b, args.h, t == &args.q ? args.l : args.s};
        bool fits = aligned(t->ptr, 0, args.dtype, 16) && t->stride[3] == 1;
        for (int dim = 0; dim < 3; ++dim)
            fits = fits && (sizes[dim] == 1 || aligned(nullptr, t->stride[dim], args.dtype, 16));
        if (!fits) return "rows without gaps between their elements, each at a multiple of 16 bytes";
    }
    constexpr int64_t kMost = int64_t{1} << 31;
    if (args.l >= kMost - kChunkKeys || args.s >= kMost - 256 || (args.l + 7) / 8 * args.b * args.h >= kMost)
        return "fewer than 2^31 queries, keys, and eighths of all queries";
    return nullptr;
}

// shared_limit: bytes of shared memory that a block may have.
inline __host__ AttentionPlan plan_attention(const AttentionArgs& args, int64_t shared_limit, int multiprocessors) {
    constexpr int kWidths[] = {40, 64, 80, 96, 128, 160, 256, 512};
    const int64_t wanted = args.d > args.dv ? args.d : args.dv;
    AttentionPlan plan{};
    for (const int width : kWidths)
        if (wanted <= width) {
            plan.width = width;
            break;
        }
    if (args.dtype == DType::f32) {
        plan.groups = 1, plan.tile_keys = kKeyLanes * fp32_keys(plan.width);
        // Fewer queries to a block where shared memory is small, or for the reason below.
        for (plan.warps = kQueryWarps;; plan.warps /= 2) {
            plan.rows = plan.warps * kQueryLanes * fp32_rows(plan.width);
            plan.blocks = static_cast<unsigned>((args.l + plan.rows - 1) / plan.rows);
            plan.shared_bytes = fp32_shared_bytes(plan.width, plan.warps);
            const bool many = 2 * plan.blocks * args.b * args.h > multiprocessors;
            if (plan.warps == 1 || (plan.shared_bytes <= shared_limit && many)) break;
        }
        plan.threads = static_cast<unsigned>(plan.warps * kWarp);
        return plan;
    }
    if (plan.width > kWidestOfWarp) {
        plan.rows = kWideRows, plan.tile_keys = kWideKeys, plan.threads = kWideThreads;
        plan.warps = kWideThreads / kWarp / kKeyWarps, plan.groups = 1;
        plan.blocks = static_cast<unsigned>((args.l + plan.rows - 1) / plan.rows);
        plan.shared_bytes = wide_shared_bytes(plan.width);
        return plan;
    }
    const auto bytes = [&](int64_t keys) { return kTileStages * 2 * keys * row_bytes(plan.width); };
    plan.tile_keys = bytes(64) <= shared_limit ? 64 : 32;
    plan.shared_bytes = bytes(plan.tile_keys);
    plan.groups = args.l <= 1024 && plan.tile_keys > kChunkKeys && args.s > kChunkKeys ? 2 : 1;
    // Fewer queries to a block where there would be blocks for less than half of the multiprocessors.
    for (plan.warps = kQueryWarps;; plan.warps /= 2) {
        plan.rows = plan.warps * 16 * tiles_of(plan.width);
        plan.blocks = static_cast<unsigned>((args.l + plan.rows - 1) / plan.rows);
        if (plan.warps == 1 || 2 * plan.blocks * args.b * args.h > multiprocessors) break;
    }
    plan.threads = static_cast<unsigned>(plan.warps * plan.groups * kWarp);
    return plan;
}

// launch(kernel, grid, threads, dynamic shared bytes, arguments of the kernel …)
template <class Launch>
__host__ auto launch_attention(const AttentionArgs& args, const AttentionPlan& plan, const Launch& launch) {
    const dim3 grid = {static_cast<unsigned>(plan.blocks * args.b * args.h), 1, 1};
    const auto go = [&](auto kernel) {
        return launch(kernel, grid, plan.threads, static_cast<size_t>(plan.shared_bytes), args, plan);
    };
    const auto of_width = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        if (args.dtype == DType::f32) return go(attention_fp32<kWidth>);
        const bool half = args.dtype == DType::f16, mask = args.mask.ptr != nullptr;
        if constexpr (kWidth > kWidestOfWarp) {
            if (half)
                return mask ? go(attention_wide<DType::f16, kWidth, true>)
                            : go(attention_wide<DType::f16, kWidth, false>);
            return mask ? go(attention_wide<DType::bf16, kWidth, true>)
                        : go(attention_wide<DType::bf16, kWidth, false>);
        } else {
            if (half)
                return mask ? go(attention_forward<DType::f16, kWidth, true>)
                            : go(attention_forward<DType::f16, kWidth, false>);
            return mask ? go(attention_forward<DType::bf16, kWidth, true>)
                        : go(attention_forward<DType::bf16, kWidth, false>);
        }
    };
    switch (plan.width) {
        case 40: return of_width(Constant<40>{});
        case 64: return of_width(Constant<64>{});
        case 80: return of_width(Constant<80>{});
        case 96: return of_width(Constant<96>{});
        case 128: return of_width(Constant<128>{});
        case 160: return of_width(Constant<160>{});
        case 256: return of_width(Constant<256>{});
        default: return of_width(Constant<512>{});
    }
}

}  // namespace cuda
}  // namespace difusores
