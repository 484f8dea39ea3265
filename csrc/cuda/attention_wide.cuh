// The same for heads too wide for one warp's registers, 168 to 512 elements: a block of eight warps has 64 queries, 64
// keys at a time. Four warps share 32 queries: each has the scores of 16 of the keys, and a quarter of the columns of
// the result. What they must know of each other, the rows' highest scores and the weights, goes through shared memory.
//
//     copy k  |  scores of 16 keys  |  barrier  |  tops, weights to shared memory  |  barrier  |  p v, a quarter each
//                copies of v go on here            copies of the next k go on from here on
//
// One buffer for k and one for v are enough for both copies to go on while products run. Reads of shared memory for 64
// keys at D = 512: q 256 KB, k 64, v 64, at 128 bytes a cycle 3072 cycles beside 3300 of products at 2500 operations.
// Bytes: q and out once, k and v once per 64 queries: D / 16 bytes a score.
#pragma once
#include "cuda/attention_parts.cuh"

namespace difusores {
namespace cuda {

constexpr int kWideRows = 64, kWideKeys = 64, kWideThreads = 256;
constexpr int kKeyWarps = 4;  // warps that share queries

constexpr __host__ __device__ int wide_shared_bytes(int width) {
    return (kWideRows + 2 * kWideKeys) * row_bytes(width) + kWideRows * row_bytes(kWideKeys) +
           kWideRows * kKeyWarps * static_cast<int>(sizeof(float));
}

// The left factor of a product over 16: rows [0, 16) and pieces 0, 1 of what lies at `rows` with `pitch` bytes a row.
__device__ __forceinline__ void load_left(unsigned (&a)[4], const unsigned char* rows, int pitch) {
    const int lane = threadIdx.x % kWarp;
    ldmatrix(a, rows + lane % 16 * pitch + lane / 16 * 16);
}

template <DType T, int kWidth, bool kMask>
__global__ void __launch_bounds__(kWideThreads, 1)
    attention_wide(const __grid_constant__ AttentionArgs args, const __grid_constant__ AttentionPlan plan) {
    constexpr int kTiles = 2, kPitch = row_bytes(kWidth), kWeightPitch = row_bytes(kWideKeys);
    constexpr int kColumns = kWidth / kKeyWarps;  // of a warp
    DIFUSORES_DYNAMIC_SHARED(shared);
    unsigned char *const q_rows = shared, *const k_rows = q_rows + kWideRows * kPitch,
                         *const v_rows = k_rows + kWideKeys * kPitch, *const weights = v_rows + kWideKeys * kPitch;
    float* const highest = reinterpret_cast<float*>(weights + kWideRows * kWeightPitch);  // [row][warp]

    const BlockOf at(args, plan);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, part = warp % kKeyWarps;
    const int row0 = warp / kKeyWarps * 16 * kTiles, first = at.first + row0;
    const int keys = static_cast<int>(args.s), d = static_cast<int>(args.d), dv = static_cast<int>(args.dv);
    const unsigned short *const k = at.rows_of(args.k), *const v = at.rows_of(args.v);
    const float scale = fabsf(args.scale), c = kMask ? kLog2E : fmaxf(scale * kLog2E, kSmallest);
    const MaskView mask = kMask ? at.mask(args) : MaskView{};

    float out[kTiles][kColumns / 8][4] = {}, total[kTiles][2] = {}, top[kTiles][2];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) top[m][0] = top[m][1] = kNoTop;

    copy_rows<kWidth>(q_rows, at.rows_of(args.q), args.q.stride[2], at.first, kWideRows, static_cast<int>(args.l), d);
    copy_rows<kWidth>(k_rows, k, args.k.stride[2], 0, kWideKeys, keys, d);
    close_copies();
    for (int key0 = 0; key0 < keys; key0 += kWideKeys) {
        copies_done<0>();
        __syncthreads();  // k is there, and nobody reads v and the weights any more
        copy_rows<kWidth>(v_rows, v, args.v.stride[2], key0, kWideKeys, keys, dv);
        close_copies();

        float s[kTiles][2][4] = {};
#pragma unroll 4
        for (int x = 0; x < kWidth / 8; x += 2) {
            unsigned b[4], a[4];
            ldmatrix(b, k_rows + (part * 16 + lane / 16 * 8 + lane % 8) * kPitch + (x + lane / 8 % 2) * 16);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
                load_left(a, q_rows + (row0 + 16 * m) * kPitch + x * 16, kPitch);
                mma_k16<T>(s[m][0], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_k16<T>(s[m][1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
        if (args.scale < 0.0f) {
#pragma unroll
            for (int m = 0; m < kTiles; ++m)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[m][n][e] = -s[m][n][e];
        }
        if (kMask || key0 + kWideKeys > keys)
            hide_keys<kMask>(s, mask, scale, first, static_cast<int>(args.l), key0 + part * 16, keys);
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float high = quad_max(row_max(s[m], half)) * c;
                if (lane % 4 == 0) highest[(row0 + 16 * m + 8 * half + lane / 4) * kKeyWarps + part] = high;
            }
        __syncthreads();  // the highest scores are there, and nobody reads k any more
        if (key0 + kWideKeys < keys)
            copy_rows<kWidth>(k_rows, k, args.k.stride[2], key0 + kWideKeys, kWideKeys, keys, d);
        close_copies();

#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 of =
                    *reinterpret_cast<const float4*>(highest + (row0 + 16 * m + 8 * half + lane / 4) * kKeyWarps);
                const float high = fmaxf(fmaxf(of.x, of.y), fmaxf(of.z, of.w));
                if (high > top[m][half] + kSlack) {
                    const float higher = rintf(high), factor = exp2_fast(top[m][half] - higher);
                    top[m][half] = higher, total[m][half] *= factor;
#pragma unroll
                    for (int x = 0; x < kColumns / 8; ++x)
                        out[m][x][2 * half] *= factor, out[m][x][2 * half + 1] *= factor;
                }
            }
        weigh(s, top, total, c);
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    *reinterpret_cast<unsigned*>(weights + (row0 + 16 * m + 8 * half + lane / 4) * kWeightPitch +
                                                 (part * 16 + n * 8 + lane % 4 * 2) * 2) =
                        pack_2<T>(s[m][n][2 * half], s[m][n][2 * half + 1]);
        copies_done<1>();
        __syncthreads();  // v and the weights are there
#pragma unroll
        for (int x = 0; x < kWideKeys; x += 16) {
            unsigned a[kTiles][4];
#pragma unroll
            for (int m = 0; m < kTiles; ++m)
                load_left(a[m], weights + (row0 + 16 * m) * kWeightPitch + x * 2, kWeightPitch);
            const unsigned char* const values =
                v_rows + (x + lane % 16) * kPitch + part * kColumns * 2 + lane / 16 * 16;
#pragma unroll
            for (int n = 0; n < kColumns / 8; n += 2) {
                unsigned b[4];
                ldmatrix_transposed(b, values + n * 16);
#pragma unroll
                for (int m = 0; m < kTiles; ++m) {
                    mma_k16<T>(out[m][n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                    mma_k16<T>(out[m][n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = quad_sum(total[m][half]);
            if (lane % 4 == 0) highest[(row0 + 16 * m + 8 * half + lane / 4) * kKeyWarps + part] = sum;
        }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 of =
                *reinterpret_cast<const float4*>(highest + (row0 + 16 * m + 8 * half + lane / 4) * kKeyWarps);
            const float sum = of.x + of.y + of.z + of.w;
            store_row<T>(out[m], half, inverse_of(sum), at.out(args), args.out_stride[2],
                         first + 16 * m + 8 * half + lane / 4, static_cast<int>(args.l), part * kColumns, dv);
        }
}

}  // namespace cuda
}  // namespace difusores
