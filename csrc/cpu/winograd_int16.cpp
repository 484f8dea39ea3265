// winograd_conv (see winograd_conv.cpp for the formula) with V and U as 16-bit fixed-point numbers, multiplied in pairs
// of channels by AVX512_VNNI: twice the multiply-adds of fp32 an instruction, and half the bytes.
//
//     input   V = B^T d B, times 16383 / its largest of a tile and a block of 64 channels, rounded
//             [groups][36][C / 64][tiles][64], and a scale for each tile and block
//     product M = sum over blocks of (integer sum of V U) * scale of V * scale of U      [36][tiles][64], in L2
//             U [O / 64][36][C / 64]: [32 pairs][64 outputs][2] and 64 scales, one for each output channel
//     output  as in fp32
// An integer sum cannot overflow: |V| <= 16383, and U is scaled so that its 64 absolute values add up to 131079 at
// most. A tile's scale is of its inputs alone, so an image's bits are its own. Where the largest is NaN or infinite,
// the scale is NaN, and so are all outputs of the tile. In a block channels lie as _mm512_packs_epi32 leaves them.
// Least bytes: x, y, residual once; the packed weights (72 a weight of 9 numbers) once per group.
#include "winograd_tiles.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kVectors16 = kBlock / kWidth, kPairs = kBlock / 2;
constexpr int64_t kLine16 = 32;  // int16 of a line of the cache
constexpr float kLargest = 16383.0f;
constexpr float kWeightSum = 131000.0f;  // and 1/2 for each of the 64: less than 2^31 / kLargest
constexpr float kLargestWeight = 32767.0f;
constexpr float kLeast = 1e-30f;  // what smaller numbers are scaled as: 1 / kLeast is finite

// --- input ---

// The 36 points of a tile, points[36][kBlock], and for each lane the bits of the largest absolute value: as integers
// those of infinity and NaN are beyond all others.
DIFUSORES_INLINE __m512i tile_to_points(const float* patch, int64_t columns, int64_t width, float* points) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t c = 0; c < width; c += kWidth) {
        f32v half[kInner][kInner];
        for (int x = 0; x < kInner; ++x) {
            f32v d[kInner], line[kInner];
            for (int y = 0; y < kInner; ++y) d[y] = get(patch + (y * columns + x) * width + c);
            image_to_points(d, line);
            for (int y = 0; y < kInner; ++y) half[y][x] = line[y];
        }
        for (int y = 0; y < kInner; ++y) {
            f32v line[kInner];
            image_to_points(half[y], line);
            for (int x = 0; x < kInner; ++x) {
                put(points + (kInner * y + x) * kBlock + c, line[x]);
                const __m512i bits = _mm512_and_si512((__m512i)line[x], _mm512_set1_epi32(0x7fffffff));
                largest = _mm512_max_epu32(largest, bits);
            }
        }
    }
    return largest;
}

// points[36][kBlock] to V, `stride` from point to point.
void points_to_pairs(const float* points, float factor, int16_t* v, int64_t stride) {
    const f32v by = splat(factor);
    for (int p = 0; p < kPoints; ++p, points += kBlock, v += stride)
        for (int half = 0; half < 2; ++half) {
            const float* const from = points + half * 2 * kWidth;
            const __m512i low = _mm512_cvtps_epi32((__m512)(get(from) * by));
            const __m512i high = _mm512_cvtps_epi32((__m512)(get(from + kWidth) * by));
            _mm512_storeu_si512(v + half * 2 * kWidth, _mm512_packs_epi32(low, high));
        }
}

// Where things of V lie, in int16.
struct Layout {
    int64_t tiles, blocks, point, group;  // point: a line more than a power of two
    DIFUSORES_INLINE explicit Layout(const WinogradInt16Args& args)
        : tiles(args.group_n * args.group_h * args.group_w),
          blocks((args.c + kBlock - 1) / kBlock),
          point(blocks * tiles * kBlock + 2 * kMaxWidth),
          group(winograd_int16_group(args)) {}
    DIFUSORES_INLINE float* scales(int16_t* v) const { return reinterpret_cast<float*>(v + kPoints * point); }
};

// --- product ---

// sum += v[kCount][pair] u[pair][64]
template <int kCount>
DIFUSORES_INLINE void add_pair(i32v (&sum)[kCount][kVectors16], const int16_t* v, const int16_t* u) {
    __m512i b[kVectors16];
    DIFUSORES_UNROLL
    for (int k = 0; k < kVectors16; ++k) b[k] = _mm512_loadu_si512(u + 2 * k * kWidth);
    DIFUSORES_UNROLL
    for (int i = 0; i < kCount; ++i) {
        int32_t both;
        __builtin_memcpy(&both, v + i * kBlock, 4);
        const __m512i a = _mm512_set1_epi32(both);
        DIFUSORES_UNROLL
        for (int k = 0; k < kVectors16; ++k) sum[i][k] = (i32v)_mm512_dpwssd_epi32((__m512i)sum[i][k], a, b[k]);
    }
}

// m[kCount][64] (+)= v[kCount][64] u[32][64][2], times the scales of both. Meanwhile it asks for what
// comes next in v and, from next_u on, kLines for each two pairs.
template <int kCount, bool kFirst, int kLines>
void multiply_pairs(const int16_t* v, const int16_t* u, const float* v_scale, float* m, const int16_t* next_u) {
    i32v sum[kCount][kVectors16];
    DIFUSORES_UNROLL
    for (int i = 0; i < kCount; ++i) {
        DIFUSORES_UNROLL
        for (int k = 0; k < kVectors16; ++k) sum[i][k] = i32v{};
    }
    const float* const u_scale = reinterpret_cast<const float*>(u + kPairs * 2 * kBlock);
    const int16_t* next_v = v + kCount * kBlock;
    for (int64_t pair = 0; pair < kPairs; pair += 2) {
        __builtin_prefetch(next_v), next_v += kLine16;
        add_pair<kCount>(sum, v + 2 * pair, u + 2 * pair * kBlock);
        DIFUSORES_UNROLL
        for (int line = 0; line < kLines; ++line) __builtin_prefetch(next_u + line * kLine16);
        next_u += kLines * kLine16;
        add_pair<kCount>(sum, v + 2 * pair + 2, u + 2 * (pair + 1) * kBlock);
    }
    DIFUSORES_UNROLL
    for (int k = 0; k < kVectors16; ++k) {
        const f32v scale = get(u_scale + k * kWidth);
        DIFUSORES_UNROLL
        for (int i = 0; i < kCount; ++i) {
            const f32v product = (f32v)_mm512_cvtepi32_ps((__m512i)sum[i][k]), by = scale * splat(v_scale[i]);
            float* const to = m + i * kBlock + k * kWidth;
            put(to, kFirst ? product * by : product * by + get(to));
        }
    }
}

// A block of channels of one point, all tiles in runs of even lengths, while all of the next u is asked for.
template <bool kFirst, int kLines>
void multiply_runs(const int16_t* v, const int16_t* u, const float* v_scale, float* m, int64_t tiles, int64_t runs) {
    const int16_t* next_u = u + kWinogradPairs;
    for (int64_t t = 0; runs; --runs) {
        const int64_t count = (tiles - t + runs - 1) / runs;
        switch (count) {
            case 6: multiply_pairs<6, kFirst, kLines>(v, u, v_scale, m, next_u); break;
            case 5: multiply_pairs<5, kFirst, kLines>(v, u, v_scale, m, next_u); break;
            case 4: multiply_pairs<4, kFirst, kLines>(v, u, v_scale, m, next_u); break;
            case 3: multiply_pairs<3, kFirst, kLines>(v, u, v_scale, m, next_u); break;
            case 2: multiply_pairs<2, kFirst, kLines>(v, u, v_scale, m, next_u); break;
            case 1: multiply_pairs<1, kFirst, kLines>(v, u, v_scale, m, next_u); break;
        }
        t += count, v += count * kBlock, v_scale += count, m += count * kBlock;
        next_u += kPairs / 2 * kLines * kLine16;
    }
}

template <bool kFirst>
void multiply_block16(const int16_t* v, const int16_t* u, const float* v_scale, float* m, int64_t tiles) {
    const int64_t runs = (tiles + 5) / 6;
    (runs < 9 ? multiply_runs<kFirst, 3> : multiply_runs<kFirst, 1>)(v, u, v_scale, m, tiles, runs);
}

// --- weights ---

// The channel of a block at place `pair`, `second` of V's pairs.
DIFUSORES_INLINE int64_t channel_of(int64_t pair, int64_t second) {
    const int64_t within = pair % kWidth, lane = within / 4, word = within % 4;
    return pair / kWidth * 2 * kWidth + word / 2 * kWidth + lane * 4 + word % 2 * 2 + second;
}

// A vector of outputs of one point of a block, u[channels], rows `wide` apart, to pairs and their scale.
void weights_to_pairs(const float* u, int64_t channels, int64_t wide, int16_t* to, float* scale) {
    f32v sum{}, largest = splat(kLeast);
    for (int64_t c = 0; c < channels; ++c) {
        const f32v absolute = (f32v)((u32v)get(u + c * wide) & 0x7fffffffu);
        sum += absolute, largest = larger(absolute, largest);
    }
    // a unit is the larger of what either bound asks for
    const f32v unit = larger(largest * (1.0f / kLargestWeight), sum * (1.0f / kWeightSum)), by = 1.0f / unit;
    put(scale, unit);
    const auto rounded = [&](int64_t c) {
        return c < channels ? _mm512_cvtps_epi32((__m512)(get(u + c * wide) * by)) : _mm512_setzero_si512();
    };
    for (int64_t pair = 0; pair < kPairs; ++pair, to += 2 * kBlock) {
        const __m512i low = rounded(channel_of(pair, 0)), high = rounded(channel_of(pair, 1));
        _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16)));
    }
}

}  // namespace

void winograd_int16_input(const WinogradInt16Args& args, float* scratch, int64_t begin, int64_t end) {
    const Layout layout(args);
    float *const points = scratch, *const patch = scratch + kPoints * kBlock;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t index = task / layout.blocks, block = task % layout.blocks, c0 = block * kBlock;
        const Group group = group_of(args, args.first_group + index);
        const int64_t count = at_most(args.c - c0, kBlock), width = rounded(count, kWidth);
        const int64_t columns = kTile * group.columns() + 2;
        int16_t* v = args.v16 + index * layout.group;
        float* scale = layout.scales(v) + block * layout.tiles;
        v += block * layout.tiles * kBlock;
        for (int64_t k = 0; k < kPoints * kBlock; k += kWidth) put(points + k, f32v{});
        alignas(64) float a[kBlock], b[kBlock];
        for (int64_t n = group.n0; n < group.n1; ++n) {
            for (int64_t c = 0; c < kBlock; ++c) {
                a[c] = c < count ? param(args.multiplier, n, c0 + c, 1.0f) : 1.0f;
                b[c] = c < count ? param(args.offset, n, c0 + c, 0.0f) : 0.0f;
            }
            for (int64_t ty = 0, filled = 0; ty < group.rows(); ++ty) {
                fill_rows(args, group, n, c0, width, a, b, filled, kTile * ty + kInner, patch);
                filled = kTile * ty + kInner;
                for (int64_t tx = 0; tx < group.columns(); ++tx, v += kBlock, ++scale) {
                    const float* const from = patch + kTile * (ty * columns + tx) * width;
                    const uint32_t bits = _mm512_reduce_max_epu32(tile_to_points(from, columns, width, points));
                    float largest;
                    __builtin_memcpy(&largest, &bits, 4);
                    if (largest < kLeast) largest = kLeast;
                    *scale = largest / kLargest;
                    points_to_pairs(points, kLargest / largest, v, layout.point);
                }
            }
        }
    }
}

void winograd_int16_output(const WinogradInt16Args& args, float* m, int64_t begin, int64_t end) {
    const Layout layout(args);
    const int64_t wide_blocks = (args.o + kBlock - 1) / kBlock, stride = point_stride(args);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t index = task / wide_blocks, block = task % wide_blocks;
        const Group group = group_of(args, args.first_group + index);
        const int16_t* const v = args.v16 + index * layout.group;
        const float* const scales = layout.scales(args.v16 + index * layout.group);
        const int16_t* u = args.packed16 + block * kPoints * layout.blocks * kWinogradPairs;
        for (int64_t p = 0; p < kPoints; ++p)
            for (int64_t k = 0; k < layout.blocks; ++k, u += kWinogradPairs)
                (k ? multiply_block16<false> : multiply_block16<true>)(v + p * layout.point + k * layout.tiles * kBlock,
                                                                       u, scales + k * layout.tiles, m + p * stride,
                                                                       group.tiles());
        points_to_image<kTile>(args, group, m, stride, block * kBlock, kBlock);
    }
}

void winograd_int16_pack(const WinogradInt16Args& args, const float* points, int16_t* packed, int64_t task) {
    const int64_t blocks = (args.c + kBlock - 1) / kBlock, o0 = task / blocks * kBlock, block = task % blocks;
    const int64_t channels = at_most(args.c - block * kBlock, kBlock);
    const int64_t wide = at_most(rounded(args.o, kMaxWidth) - o0, kBlock);
    int16_t* to = packed + (o0 / kBlock * kPoints * blocks + block) * kWinogradPairs;
    for (int64_t p = 0; p < kPoints; ++p, points += kPoint, to += blocks * kWinogradPairs)
        for (int64_t o = 0; o < kBlock; o += kWidth)
            weights_to_pairs(points + o, o < wide ? channels : 0, wide, to + 2 * o,
                             reinterpret_cast<float*>(to + kPairs * 2 * kBlock) + o);
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
