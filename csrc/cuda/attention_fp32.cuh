// The same for fp32, in plain multiply-adds on every architecture. Three products of TF32 in the place of one reach
// more only on an A100; elsewhere matrix units multiply TF32 little more than three times as fast as the others fp32,
// or less.
//
// A warp has 4 kRows queries against 8 kKeys keys at a time. Its lanes lie 4 by 8: a lane has kRows queries (l / 8, and
// every fourth from there), kKeys keys (l % 8, and every eighth) and an eighth of the columns of the result. Scores and
// results stay in registers; the weights, of which a lane needs those of seven others, go through shared memory.
//
//     copy k  |  scores  |  weights to shared memory  |  barrier  |  p v
//                copies of v go on here                            copies of the next k go on from here on
//
// Reads of shared memory at D = 64 for four multiply-adds of each score: 8 + 4 of 16 bytes a lane for 128 of them, 32
// cycles of a multiprocessor; the reads take 24 where lanes with the same address share a wavefront, 48 where not. At
// 512, where a lane has 2 by 2 scores, they decide. Operations: 2 L S (D + Dv). Bytes: q and out once, k and v once per
// block of queries, after the first from L2: 2 D / rows bytes a score and element's size.
//
// Rows in shared memory are an odd number of 16 bytes long, weights' too; so no read meets a bank twice.
#pragma once
#include "cuda/attention_parts.cuh"

namespace difusores {
namespace cuda {

constexpr __host__ __device__ int fp32_rows(int width) { return width <= 64 ? 8 : width <= 256 ? 4 : 2; }
constexpr __host__ __device__ int fp32_keys(int width) { return width <= 160 ? 4 : 2; }
constexpr __host__ __device__ int fp32_pitch(int width) { return row_bytes(2 * width); }
constexpr int kQueryLanes = 4, kKeyLanes = 8;

// Blocks on a multiprocessor for which registers are to suffice: where shared memory has room for three.
constexpr __host__ __device__ int fp32_blocks([[maybe_unused]] int width) {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900)
    return width <= 96 ? 3 : 2;
#endif
    return 2;
}

constexpr __host__ __device__ int fp32_shared_bytes(int width, int warps) {
    const int rows = warps * kQueryLanes * fp32_rows(width), keys = kKeyLanes * fp32_keys(width);
    return (rows + 2 * keys) * fp32_pitch(width) + rows * (keys + 4) * static_cast<int>(sizeof(float));
}

template <int kCount>
__device__ __forceinline__ void read_floats(const void* at, float (&to)[kCount]) {
    if constexpr (kCount == 4) {
        const float4 v = *static_cast<const float4*>(at);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (kCount == 2) {
        const float2 v = *static_cast<const float2*>(at);
        to[0] = v.x, to[1] = v.y;
    } else {
        to[0] = *static_cast<const float*>(at);
    }
}

// The highest or the sum over the eight lanes of a row.
template <class Join>
__device__ __forceinline__ float over_key_lanes(float v, const Join& join) {
#pragma unroll
    for (int other = 1; other < kKeyLanes; other *= 2) v = join(v, __shfl_xor_sync(kAllLanes, v, other));
    return v;
}

// Elements [m][n][e] of a lane's scores: its row 2 m + e / 2, its key 2 n + e % 2.
template <int kRows, int kKeys>
using LaneScores = float[kRows / 2][kKeys / 2][4];

template <int kRows, int kKeys, int kWidth>
__device__ __forceinline__ void lane_scores(LaneScores<kRows, kKeys>& s, const unsigned char* q,
                                            const unsigned char* k) {
#pragma unroll 1
    for (int d = 0; d < kWidth; d += 4) {
        float a[kRows][4], b[kKeys][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) read_floats(q + i * kQueryLanes * fp32_pitch(kWidth) + d * 4, a[i]);
#pragma unroll
        for (int j = 0; j < kKeys; ++j) read_floats(k + j * kKeyLanes * fp32_pitch(kWidth) + d * 4, b[j]);
#pragma unroll
        for (int x = 0; x < 4; ++x)
#pragma unroll
            for (int i = 0; i < kRows; ++i)
#pragma unroll
                for (int j = 0; j < kKeys; ++j) {
                    float& sum = s[i / 2][j / 2][i % 2 * 2 + j % 2];
                    sum = fmaf(a[i][x], b[j][x], sum);
                }
    }
}

// out += p v for 8 kKeys keys; columns of a lane in pieces of kVec.
template <int kRows, int kKeys, int kWidth, int kVec>
__device__ __forceinline__ void add_lane_product(float (&out)[kRows][kWidth / kKeyLanes], const float* weights,
                                                 const unsigned char* v) {
    constexpr int kTile = kKeyLanes * kKeys, kPitch = kTile + 4;
#pragma unroll 1
    for (int key = 0; key < kTile; key += 4) {
        float p[kRows][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) read_floats(weights + i * kQueryLanes * kPitch + key, p[i]);
#pragma unroll
        for (int y = 0; y < 4; ++y)
#pragma unroll
            for (int j = 0; j < kWidth / kKeyLanes; j += kVec) {
                float of_v[kVec];
                read_floats(v + (key + y) * fp32_pitch(kWidth) + j * kKeyLanes * 4, of_v);
#pragma unroll
                for (int i = 0; i < kRows; ++i)
#pragma unroll
                    for (int e = 0; e < kVec; ++e) out[i][j + e] = fmaf(p[i][y], of_v[e], out[i][j + e]);
            }
    }
}

template <int kWidth>
__global__ void __launch_bounds__(kQueryWarps* kWarp, fp32_blocks(kWidth))
    attention_fp32(const __grid_constant__ AttentionArgs args, const __grid_constant__ AttentionPlan plan) {
    constexpr int kRows = fp32_rows(kWidth), kKeys = fp32_keys(kWidth), kTile = kKeyLanes * kKeys;
    constexpr int kColumns = kWidth / kKeyLanes, kVec = kColumns % 4 == 0 ? 4 : kColumns % 2 == 0 ? 2 : 1;
    constexpr int kPitch = fp32_pitch(kWidth), kWeightPitch = kTile + 4;
    DIFUSORES_DYNAMIC_SHARED(shared);
    unsigned char *const q_rows = shared, *const k_rows = q_rows + plan.rows * kPitch,
                         *const v_rows = k_rows + kTile * kPitch;
    float* const weights = reinterpret_cast<float*>(v_rows + kTile * kPitch);

    const BlockOf block(args, plan);
    const int lane = threadIdx.x % kWarp, of_keys = lane % kKeyLanes;
    const int row0 = static_cast<int>(threadIdx.x) / kWarp * kQueryLanes * kRows + lane / kKeyLanes;
    const int queries = static_cast<int>(args.l), keys = static_cast<int>(args.s);
    const int d = static_cast<int>(args.d), dv = static_cast<int>(args.dv);
    const auto copy = [&](unsigned char* to, const Heads& t, int first, int count, int rows, int width) {
        const float* const from =
            static_cast<const float*>(t.ptr) + block.batch * t.stride[0] + block.head * t.stride[1];
        copy_rows<2 * kWidth>(to, reinterpret_cast<const unsigned short*>(from), 2 * t.stride[2], first, count, rows,
                              2 * width);
    };
    const bool masked = args.mask.ptr != nullptr;
    const MaskView mask = masked ? block.mask(args) : MaskView{};
    // As for 16 bits: a mask is added to scores that are scaled already.
    const float c = masked ? kLog2E : fmaxf(fabsf(args.scale) * kLog2E, kSmallest);

    float out[kRows][kColumns] = {}, total[kRows / 2][2] = {}, top[kRows / 2][2];
#pragma unroll
    for (int i = 0; i < kRows; ++i) top[i / 2][i % 2] = kNoTop;
    copy(q_rows, args.q, block.first, plan.rows, queries, d);
    copy(k_rows, args.k, 0, kTile, keys, d);
    close_copies();
    for (int key0 = 0; key0 < keys; key0 += kTile) {
        copies_done<0>();
        __syncthreads();  // k is there, and nobody reads v and the weights any more
        copy(v_rows, args.v, key0, kTile, keys, dv);
        close_copies();

        LaneScores<kRows, kKeys> s = {};
        lane_scores<kRows, kKeys, kWidth>(s, q_rows + row0 * kPitch, k_rows + of_keys * kPitch);
        float highest[kRows];
        bool above = false;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            highest[i] = -INFINITY;
#pragma unroll
            for (int j = 0; j < kKeys; ++j) {
                float& score = s[i / 2][j / 2][i % 2 * 2 + j % 2];
                const int query = block.first + row0 + kQueryLanes * i, key = key0 + of_keys + kKeyLanes * j;
                if (args.scale < 0.0f) score = -score;
                const bool known = key < keys;
                if (!known) score = -INFINITY;
                else if (masked && query < queries) score = mask.apply(score * fabsf(args.scale), query, key);
                highest[i] = fmaxf(highest[i], score);
            }
            highest[i] *= c;
            above = above || highest[i] > top[i / 2][i % 2] + kSlack;
        }
        if (__any_sync(kAllLanes, above)) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const float high = over_key_lanes(highest[i], [](float a, float b) { return fmaxf(a, b); });
                float& of_row = top[i / 2][i % 2];
                if (high > of_row + kSlack) {
                    const float higher = rintf(high), factor = exp2_fast(of_row - higher);
                    of_row = higher, total[i / 2][i % 2] *= factor;
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) out[i][j] *= factor;
                }
            }
        }
        float part[kRows / 2][2] = {};  // fewer roundings than in one sum over all keys
        weigh(s, top, part, c);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            total[i / 2][i % 2] += part[i / 2][i % 2];
#pragma unroll
            for (int j = 0; j < kKeys; ++j)
                weights[(row0 + kQueryLanes * i) * kWeightPitch + of_keys + kKeyLanes * j] =
                    s[i / 2][j / 2][i % 2 * 2 + j % 2];
        }
        copies_done<0>();
        __syncthreads();  // v and weights are there, and nobody reads k any more
        if (key0 + kTile < keys) copy(k_rows, args.k, key0 + kTile, kTile, keys, d);
        close_copies();
        add_lane_product<kRows, kKeys, kWidth, kVec>(out, weights + row0 * kWeightPitch, v_rows + of_keys * kVec * 4);
    }

    float* const to =
        static_cast<float*>(args.out) + block.batch * args.out_stride[0] + block.head * args.out_stride[1];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int query = block.first + row0 + kQueryLanes * i;
        const float sum = over_key_lanes(total[i / 2][i % 2], [](float a, float b) { return a + b; });
        const float factor = inverse_of(sum);
        if (query >= queries) continue;  // after the exchange, in which all lanes take part
        if (args.log2_sums && of_keys == 0)
            args.log2_sums[(block.batch * args.h + block.head) * args.padded_l + query] =
                top[i / 2][i % 2] + log2f(sum);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const int column = j / kVec * kVec * kKeyLanes + of_keys * kVec + j % kVec;
            if (column < dv) to[query * args.out_stride[2] + column] = out[i][j] * factor;
        }
    }
}

}  // namespace cuda
}  // namespace difusores
