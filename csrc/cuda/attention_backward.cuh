// The gradients of attention: with p = softmax(scale q k^T), dp = grad v^T and delta = sum of grad * out over a row,
//     ds = p (dp - delta)      dq = scale ds k      dk = scale ds^T q      dv = p^T grad
// (Dao et al. 2022, algorithm 4). p is computed again from the forward pass's log2 of the sums of weights.
//
// Two passes and no atomics, so the same bits twice: one over blocks of queries for dq, one over blocks of keys for dk
// and dv, which holds everything transposed. In both a warp keeps 16 rows of two factors ("own": q and grad, or k and
// v) and takes the other two ("theirs": k and v, or q and grad) 32 rows at a time from shared memory:
//     s = own0 theirs0^T    dp = own1 theirs1^T    sum0 += ds theirs0    (keys only) sum1 += p theirs1
// Above a width of 80 the registers of a warp hold one sum: dk and dv have a pass each, and s is made once more.
// 14 L S D operations in 7 products (16 in 8 above 80), where one pass with atomics has 10 in 5. Reads of shared
// memory: 2 D cycles for 16 x 32 scores, products 1.2 D to 1.6 D. Bytes: all tensors once; theirs once per 64 own rows,
// from L2.
#pragma once
#include <type_traits>

#include "cuda/attention_backward_fp32.cuh"

namespace difusores {
namespace cuda {

constexpr int kWidestGradient = 160;
constexpr int kGradTile = 64, kGradStages = 2;
constexpr int kDeltaLanes = 8;  // lanes of a row

// Bytes of a stage: two tiles of rows and two of floats, log2 sums and deltas.
constexpr __host__ __device__ int grad_stage_bytes(int width) { return 2 * kGradTile * (row_bytes(width) + 4); }

// delta[b, h, l] = sum over a row of grad * out; 0 beyond L.
template <DType T>
__global__ void __launch_bounds__(kGradThreads) attention_delta(const __grid_constant__ AttentionGradArgs args) {
    const int64_t row = (int64_t{blockIdx.x} * kGradThreads + threadIdx.x) / kDeltaLanes;
    const int64_t index = row / args.padded_l, query = row - index * args.padded_l;
    const int64_t batch = index / args.h, head = index - batch * args.h;
    if (index >= args.b * args.h) return;  // whole warps: padded_l is a multiple of 64
    float sum = 0.0f;
    if (query < args.l) {
        const auto at = [&](const Heads& t) { return batch * t.stride[0] + head * t.stride[1] + query * t.stride[2]; };
        constexpr int kVec = 16 / bytes_of(T);
        const int64_t of_grad = at(args.grad), of_out = at(args.out);
        for (int i = threadIdx.x % kDeltaLanes * kVec; i < args.dv; i += kDeltaLanes * kVec) {
            float a[kVec], b[kVec];
            unpack<T, kVec>({get<kVec>(args.grad.ptr, of_grad + i, T).v}, a);
            unpack<T, kVec>({get<kVec>(args.out.ptr, of_out + i, T).v}, b);
#pragma unroll
            for (int k = 0; k < kVec; ++k) sum = fmaf(a[k], b[k], sum);
        }
    }
#pragma unroll
    for (int other = kDeltaLanes / 2; other; other /= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
    if (threadIdx.x % kDeltaLanes == 0) args.delta[row] = sum;
}

// Scores, scaled, with their mask. Rows are keys where `of_keys`, else queries.
__device__ __forceinline__ void add_mask(Scores<1>& s, const MaskView& mask, float scale, int row0, int rows,
                                         int column0, int columns, bool of_keys) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kChunkKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = row0 + 8 * (e / 2) + lane / 4, column = column0 + 8 * n + lane % 4 * 2 + e % 2;
            if (row < rows && column < columns)
                s[0][n][e] = mask.apply(s[0][n][e] * scale, of_keys ? column : row, of_keys ? row : column);
        }
}

template <DType T, int kWidth, Pass kPass>
__global__ void __launch_bounds__(256, 1) attention_gradient(const __grid_constant__ AttentionGradArgs args) {
    constexpr bool kOfKeys = kPass != Pass::of_q;
    constexpr int kHalf = kGradTile * row_bytes(kWidth), kStage = grad_stage_bytes(kWidth);
    DIFUSORES_DYNAMIC_SHARED(shared);
    const GradBlock block(args, kOfKeys, kGradRows);
    const Heads &own0 = block.own0, &own1 = block.own1, &their0 = block.their0, &their1 = block.their1;
    const int rows = block.rows, columns = block.columns, d = static_cast<int>(args.d), dv = static_cast<int>(args.dv);
    const int lane = threadIdx.x % kWarp, first = block.first + static_cast<int>(threadIdx.x) / kWarp * 16;
    const unsigned short *const theirs0 = block.rows_of<unsigned short>(their0), *const theirs1 =
                                                                                     block.rows_of<unsigned short>(
                                                                                         their1);
    const float *const log2_sums = args.log2_sums + block.index * args.padded_l, *const delta =
                                                                                     args.delta +
                                                                                     block.index * args.padded_l;

    const int tiles = (columns + kGradTile - 1) / kGradTile;
    const auto copy_tile = [&](int tile) {
        if (tile < tiles) {
            unsigned char* const to = shared + tile % kGradStages * kStage;
            copy_rows<kWidth>(to, theirs0, their0.stride[2], tile * kGradTile, kGradTile, columns, d);
            copy_rows<kWidth>(to + kHalf, theirs1, their1.stride[2], tile * kGradTile, kGradTile, columns, dv);
            if (kOfKeys && threadIdx.x < 2 * kGradTile / 4) {
                const int i = threadIdx.x % (kGradTile / 4) * 4;
                const bool second = threadIdx.x >= kGradTile / 4;
                copy_16(to + 2 * kHalf + threadIdx.x * 16, (second ? delta : log2_sums) + tile * kGradTile + i, true);
            }
        }
        close_copies();
    };
    copy_tile(0);

    Rows<T, kWidth, 1> mine0, mine1;
    mine0.load(block.rows_of<unsigned short>(own0), own0.stride[2], first, rows, d, false);
    if constexpr (kPass != Pass::of_v)
        mine1.load(block.rows_of<unsigned short>(own1), own1.stride[2], first, rows, dv, false);
    float sum0[1][kWidth / 8][4] = {}, sum1[1][kWidth / 8][4] = {}, row_log2[2] = {}, row_delta[2] = {};
    if constexpr (!kOfKeys) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first + 8 * half + lane / 4;  // at most padded_l
            row_log2[half] = log2_sums[row], row_delta[half] = delta[row];
        }
    }
    const bool masked = args.mask.ptr != nullptr;
    const float c = masked ? kLog2E : args.scale * kLog2E;
    for (int tile = 0; tile < tiles; ++tile) {
        copies_done<0>();
        __syncthreads();  // this tile is there for all, and nobody reads the last one any more
        copy_tile(tile + 1);
        const unsigned char* const at = shared + tile % kGradStages * kStage;
        for (int part = 0; part < kGradTile; part += kChunkKeys) {
            const int column0 = tile * kGradTile + part;
            if (column0 >= columns) break;
            const unsigned char *const at0 = at + part * row_bytes(kWidth), *const at1 = at0 + kHalf;
            float s[1][kChunkKeys / 8][4], dp[1][kChunkKeys / 8][4] = {};
            mine0.times_rows(s, at0);
            if constexpr (kPass != Pass::of_v) mine1.times_rows(dp, at1);
            if (masked)
                add_mask(s, mask_of(args, block.batch, block.head), args.scale, first, rows, column0, columns, kOfKeys);
#pragma unroll
            for (int n = 0; n < kChunkKeys / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float sum = row_log2[e / 2], minus = row_delta[e / 2];
                    if constexpr (kOfKeys) {
                        const float* const of =
                            reinterpret_cast<const float*>(at + 2 * kHalf) + part + 8 * n + lane % 4 * 2 + e % 2;
                        sum = of[0], minus = of[kGradTile];
                    }
                    if (masked && sum == -INFINITY) sum = 0.0f;  // all of its keys are masked: weights of 0
                    s[0][n][e] = exp2_fast(fmaf(s[0][n][e], c, -sum));
                    dp[0][n][e] = s[0][n][e] * (dp[0][n][e] - minus);
                }
            if (column0 + kChunkKeys > columns) {  // rows of zeros have scores of 0, not of minus infinity
#pragma unroll
                for (int n = 0; n < kChunkKeys / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        if (column0 + 8 * n + lane % 4 * 2 + e % 2 >= columns) s[0][n][e] = dp[0][n][e] = 0.0f;
            }
            if constexpr (kPass == Pass::of_k_and_v || kPass == Pass::of_v) add_product<T, kWidth>(sum1, s, at1);
            if constexpr (kPass != Pass::of_v) add_product<T, kWidth>(sum0, dp, at0);
        }
    }

    const auto store = [&](const float (&sum)[1][kWidth / 8][4], const Gradient& to, int width, float factor) {
        unsigned short* const rows_to = block.rows_of<unsigned short>(to);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            store_row<T>(sum[0], half, factor, rows_to, to.stride[2], first + 8 * half + lane / 4, rows, 0, width);
    };
    if constexpr (kPass != Pass::of_v) store(sum0, kOfKeys ? args.grad_k : args.grad_q, d, args.scale);
    if constexpr (kPass == Pass::of_k_and_v || kPass == Pass::of_v) store(sum1, args.grad_v, dv, 1.0f);
}

// nullptr, or what the kernels take and this is not; beyond what the forward pass refuses.
inline __host__ const char* refuses_attention_gradients(const AttentionGradArgs& args, int64_t shared_limit) {
    const int64_t widest = args.d > args.dv ? args.d : args.dv;
    if (widest > kWidestGradient) return "heads of at most 160 elements";
    if (args.dtype != DType::f32 && widest > 96 &&
        kGradStages * grad_stage_bytes(widest > 128 ? 160 : 128) > shared_limit)
        return "heads of at most 96 elements on this GPU, whose shared memory is too small for more";
    for (const Heads* t : {&args.grad, &args.out}) {
        const int64_t sizes[] = {args.b, args.h, args.l};
        bool fits = aligned(t->ptr, 0, args.dtype, 16) && t->stride[3] == 1;
        for (int dim = 0; dim < 3; ++dim)
            fits = fits && (sizes[dim] == 1 || aligned(nullptr, t->stride[dim], args.dtype, 16));
        if (!fits) return "rows without gaps between their elements, each at a multiple of 16 bytes";
    }
    return nullptr;
}

// The blocks of a launch: of_block rows of a head for each.
inline __host__ dim3 grad_grid(const AttentionGradArgs& args, int64_t rows, int64_t of_block) {
    return {static_cast<unsigned>((rows + of_block - 1) / of_block * args.b * args.h), 1, 1};
}

template <DType T, int kWidth, class Launch>
__host__ auto launch_gradients(const AttentionGradArgs& args, int64_t shared_limit, const Launch& launch) {
    auto result = launch(attention_delta<T>, grad_grid(args, args.padded_l, kGradThreads / kDeltaLanes), kGradThreads,
                         size_t{0}, args);
    const auto pass = [&](auto which) {
        constexpr Pass kPass = decltype(which)::value;
        const int64_t rows = kPass == Pass::of_q ? args.l : args.s;
        if (!Launch::ok(result)) return;
        if constexpr (T == DType::f32) {
            const int warps = fp32_grad_warps(kWidth, kPass, shared_limit);
            const size_t shared = static_cast<size_t>(fp32_grad_shared_bytes(kWidth, kPass, warps));
            result = launch(attention_gradient_fp32<kWidth, kPass>, grad_grid(args, rows, warps * kGradRowsOfWarp),
                            static_cast<unsigned>(warps * kWarp), shared, args);
        } else {
            const size_t shared = static_cast<size_t>(kGradStages * grad_stage_bytes(kWidth));
            result = launch(attention_gradient<T, kWidth, kPass>, grad_grid(args, rows, kGradRows), kGradThreads,
                            shared, args);
        }
    };
    pass(std::integral_constant<Pass, Pass::of_q>{});
    if constexpr (kWidth <= kWidestPair) {
        pass(std::integral_constant<Pass, Pass::of_k_and_v>{});
    } else {
        pass(std::integral_constant<Pass, Pass::of_k>{});
        pass(std::integral_constant<Pass, Pass::of_v>{});
    }
    return result;
}

// launch(kernel, grid, threads, dynamic shared bytes, arguments of the kernel …). Queries and keys there must be.
// shared_limit: bytes of shared memory that a block may have.
template <class Launch>
__host__ auto launch_attention_gradients(const AttentionGradArgs& args, int64_t shared_limit, const Launch& launch) {
    const auto of_width = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        if (args.dtype == DType::f32)
            return launch_gradients<DType::f32, kWidth == 96 ? 128 : kWidth>(args, shared_limit, launch);
        return args.dtype == DType::f16 ? launch_gradients<DType::f16, kWidth>(args, shared_limit, launch)
                                        : launch_gradients<DType::bf16, kWidth>(args, shared_limit, launch);
    };
    const int64_t wanted = args.d > args.dv ? args.d : args.dv;
    if (wanted <= 40) return of_width(Constant<40>{});
    if (wanted <= 64) return of_width(Constant<64>{});
    if (wanted <= 80) return of_width(Constant<80>{});
    if (wanted <= 96) return of_width(Constant<96>{});
    if (wanted <= 128) return of_width(Constant<128>{});
    return of_width(Constant<160>{});
}

}  // namespace cuda
}  // namespace difusores
