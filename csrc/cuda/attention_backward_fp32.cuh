// The gradients of attention (attention_backward.cuh) for fp32, in plain multiply-adds on every architecture, lanes as
// in attention_fp32.cuh: 4 by 8, a lane has 4 rows of its own factors, 4 of theirs (2 above a width of 80) and an
// eighth of the columns of a sum. Scores and sums stay in registers; ds and p go through shared memory.
//
//     dp = own1 their1^T  |  s = own0 their0^T  |  ds, p to shared memory  |  sum1 += p their1  |  sum0 += ds their0
//     copies of their0 go on here                                             copies of the next their1 go on here
//
// The passes are the 16-bit kernels': of q; of k and v, which above a width of 80 have one each. No atomics, so the
// same bits twice. 14 L S D operations (16 above 80). Reads of shared memory at D = 64 for the 64 multiply-adds of a
// lane in the scores: 8 of 16 bytes, 12 cycles of a multiprocessor beside 16. Bytes: all tensors once; theirs once per
// block of own rows (64, or fewer where shared memory is small, which no bit depends on), from L2.
#pragma once
#include "cuda/attention_fp32.cuh"

namespace difusores {
namespace cuda {

constexpr int kGradRows = 64, kGradThreads = 128;  // own rows and threads of a block
constexpr int kWidestPair = 80;                    // of dk and dv in one pass
constexpr int kLaneRows = 4, kGradRowsOfWarp = kQueryLanes * kLaneRows;

constexpr __host__ __device__ int fp32_their_rows(int width) { return kKeyLanes * (width <= 80 ? 4 : 2); }

// Their two tiles and their sums and deltas; own two; ds, p or both.
constexpr __host__ __device__ int fp32_grad_shared_bytes(int width, Pass pass, int warps) {
    const int tile = fp32_their_rows(width), rows = warps * kGradRowsOfWarp;
    const int weights = (pass == Pass::of_k_and_v ? 2 : 1) * rows * (tile + 4);
    return 2 * (rows + tile) * fp32_pitch(width) + (weights + 2 * tile) * static_cast<int>(sizeof(float));
}

inline __host__ int fp32_grad_warps(int width, Pass pass, int64_t shared_limit) {
    int warps = kGradThreads / kWarp;
    while (warps > 1 && fp32_grad_shared_bytes(width, pass, warps) > shared_limit) warps /= 2;
    return warps;
}

template <int kWidth, Pass kPass>
__global__ void __launch_bounds__(kGradThreads, 2)
    attention_gradient_fp32(const __grid_constant__ AttentionGradArgs args) {
    constexpr bool kOfKeys = kPass != Pass::of_q, kNeedsP = kPass == Pass::of_k_and_v || kPass == Pass::of_v;
    constexpr bool kNeedsDs = kPass != Pass::of_v;
    constexpr int kTile = fp32_their_rows(kWidth), kKeys = kTile / kKeyLanes, kPitch = fp32_pitch(kWidth);
    constexpr int kColumns = kWidth / kKeyLanes, kVec = kColumns % 4 == 0 ? 4 : kColumns % 2 == 0 ? 2 : 1;
    constexpr int kWeightPitch = kTile + 4;
    DIFUSORES_DYNAMIC_SHARED(shared);
    const int of_block = static_cast<int>(blockDim.x) / kWarp * kGradRowsOfWarp;
    unsigned char *const their_rows0 = shared, *const their_rows1 = their_rows0 + kTile * kPitch,
                         *const own_rows0 = their_rows1 + kTile * kPitch,
                         *const own_rows1 = own_rows0 + of_block * kPitch;
    float* const floats = reinterpret_cast<float*>(own_rows1 + of_block * kPitch);  // sums, then deltas, of their rows
    float *const of_ds = floats + 2 * kTile, *const of_p =
                                                 of_ds + (kPass == Pass::of_k_and_v ? of_block * kWeightPitch : 0);

    const GradBlock block(args, kOfKeys, of_block);
    const int columns = block.columns, d = static_cast<int>(args.d), dv = static_cast<int>(args.dv);
    const int lane = threadIdx.x % kWarp, of_keys = lane % kKeyLanes;
    const int row0 = static_cast<int>(threadIdx.x) / kWarp * kGradRowsOfWarp + lane / kKeyLanes;
    const float *const log2_sums = args.log2_sums + block.index * args.padded_l, *const delta =
                                                                                     args.delta +
                                                                                     block.index * args.padded_l;
    const auto copy = [&](unsigned char* to, const Heads& t, int first, int count, int rows, int width) {
        copy_rows<2 * kWidth>(to, reinterpret_cast<const unsigned short*>(block.rows_of<float>(t)), 2 * t.stride[2],
                              first, count, rows, 2 * width);
    };

    copy(own_rows0, block.own0, block.first, of_block, block.rows, d);
    if constexpr (kNeedsDs) copy(own_rows1, block.own1, block.first, of_block, block.rows, dv);
    copy(their_rows1, block.their1, 0, kTile, columns, dv);
    close_copies();
    float row_log2[kLaneRows] = {}, row_delta[kLaneRows] = {};
    if constexpr (!kOfKeys) {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            const int row = block.first + row0 + kQueryLanes * i;  // below padded_l
            row_log2[i] = log2_sums[row], row_delta[i] = delta[row];
        }
    }
    const bool masked = args.mask.ptr != nullptr;
    const MaskView mask = masked ? mask_of(args, block.batch, block.head) : MaskView{};
    const float c = masked ? kLog2E : args.scale * kLog2E;
    float sum0[kLaneRows][kColumns] = {}, sum1[kLaneRows][kColumns] = {};
    for (int column0 = 0; column0 < columns; column0 += kTile) {
        copies_done<0>();
        __syncthreads();  // their1 is there, and nobody reads their0, ds, p and the floats any more
        copy(their_rows0, block.their0, column0, kTile, columns, d);
        if (kOfKeys && threadIdx.x < 2 * kTile / 4) {
            const bool second = threadIdx.x >= kTile / 4;
            copy_16(floats + threadIdx.x * 4,
                    (second ? delta - kTile : log2_sums) + column0 + static_cast<int>(threadIdx.x) * 4, true);
        }
        close_copies();
        LaneScores<kLaneRows, kKeys> s = {}, dp = {};
        if constexpr (kNeedsDs)
            lane_scores<kLaneRows, kKeys, kWidth>(dp, own_rows1 + row0 * kPitch, their_rows1 + of_keys * kPitch);
        copies_done<0>();
        __syncthreads();  // their0 and the floats are there
        lane_scores<kLaneRows, kKeys, kWidth>(s, own_rows0 + row0 * kPitch, their_rows0 + of_keys * kPitch);
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i)
#pragma unroll
            for (int j = 0; j < kKeys; ++j) {
                const int own = row0 + kQueryLanes * i, their = of_keys + kKeyLanes * j;
                const int row = block.first + own, column = column0 + their;
                float score = s[i / 2][j / 2][i % 2 * 2 + j % 2], sum = row_log2[i], minus = row_delta[i];
                if constexpr (kOfKeys) sum = floats[their], minus = floats[kTile + their];
                if (masked && sum == -INFINITY) sum = 0.0f;  // all of its keys are masked: weights of 0
                if (masked && row < block.rows && column < columns)
                    score = mask.apply(score * args.scale, kOfKeys ? column : row, kOfKeys ? row : column);
                // Rows of zeros have scores of 0, not of minus infinity.
                const float p = column < columns ? exp2_fast(fmaf(score, c, -sum)) : 0.0f;
                const float ds = column < columns ? p * (dp[i / 2][j / 2][i % 2 * 2 + j % 2] - minus) : 0.0f;
                if constexpr (kNeedsP) of_p[own * kWeightPitch + their] = p;
                if constexpr (kNeedsDs) of_ds[own * kWeightPitch + their] = ds;
            }
        __syncthreads();  // ds and p are there
        if constexpr (kNeedsP) {
            add_lane_product<kLaneRows, kKeys, kWidth, kVec>(sum1, of_p + row0 * kWeightPitch,
                                                             their_rows1 + of_keys * kVec * 4);
            __syncthreads();  // nobody reads their1 any more
        }
        if (column0 + kTile < columns) copy(their_rows1, block.their1, column0 + kTile, kTile, columns, dv);
        close_copies();
        if constexpr (kNeedsDs)
            add_lane_product<kLaneRows, kKeys, kWidth, kVec>(sum0, of_ds + row0 * kWeightPitch,
                                                             their_rows0 + of_keys * kVec * 4);
    }

    const auto store = [&](const float (&sum)[kLaneRows][kColumns], const Gradient& to, int width, float factor) {
        float* const rows_to = block.rows_of<float>(to);
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            const int row = block.first + row0 + kQueryLanes * i;
            if (row >= block.rows) continue;
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                const int column = j / kVec * kVec * kKeyLanes + of_keys * kVec + j % kVec;
                if (column < width) rows_to[row * to.stride[2] + column] = sum[i][j] * factor;
            }
        }
    };
    if constexpr (kNeedsDs) store(sum0, kOfKeys ? args.grad_k : args.grad_q, d, args.scale);
    if constexpr (kNeedsP) store(sum1, args.grad_v, dv, 1.0f);
}

}  // namespace cuda
}  // namespace difusores
