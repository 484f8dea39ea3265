// y = output_scale * (conv3x3(act(multiplier * x + offset), weight) + bias + add + residual), stride 1, zeros around,
// by F(4x4, 3x3) (Lavin & Gray 2016): a tile of 4x4 outputs is  A^T [ (G g G^T) . (B^T d B) ] A  of its 6x6 inputs d
// and the weights g, the product summed over C: 36 multiplications instead of 144. Points 0, +-a, +-b and infinity. Or
// by F(6x6, 3x3): 64 instead of 324, points 0, +-p, +-q, +-r and infinity. What follows gives the numbers of the first.
//
// x and y are [N, H, W, C] and [N, H, W, O]; x may be half as high and wide, its pixels repeated as they are read.
// Tiles come in groups (whole images, or a rectangle of one). Of a group
//     input   act, then V = B^T d B             [C / 64][36][tiles][64]      read once, 2.25 times as large as x
//     product M = sum over C of V U             [36][tiles][64], of 64 output channels at a time, U = G g G^T by blocks
//             [36][64][64] in L2: read as it was packed, or transformed here from the weights, which are gathered in
//             blocks [4][64][9][16] (outputs, inputs, taps, outputs) here or beforehand
//     output  y = A^T M A and what follows; if asked for, sums of y around a pivot, for the norm that comes next
// The sum over C runs in order in blocks of 64, each summed from zero: a tile's bits depend on nothing but its inputs.
// Least bytes: x, y, residual once; the weights (or U, 4 times as large) once per group. With few tiles they decide:
// then U is made in registers (winograd_few.h), and the gathered weights that come next are asked for.
#include "winograd_few.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

// --- input ---

// V of one row of tiles, whose pixels begin at `patch`.
template <int kTile>
void patch_to_points(const Group& group, const float* patch, int64_t width, int64_t stride, float* v) {
    constexpr int kInner = kTile + 2;
    const int64_t columns = kTile * group.columns() + 2;
    for (int64_t tx = 0; tx < group.columns(); ++tx)
        for (int64_t c = 0; c < width; c += kWidth) {
            const float* const from = patch + tx * kTile * width + c;
            float* const to = v + tx * kBlock + c;
            f32v half[kInner][kInner];
            for (int x = 0; x < kInner; ++x) {
                f32v d[kInner], line[kInner];
                for (int y = 0; y < kInner; ++y) d[y] = get(from + (y * columns + x) * width);
                image_to_points(d, line);
                for (int y = 0; y < kInner; ++y) half[y][x] = line[y];
            }
            for (int y = 0; y < kInner; ++y) {
                f32v line[kInner];
                image_to_points(half[y], line);
                for (int x = 0; x < kInner; ++x) put(to + (kInner * y + x) * stride, line[x]);
            }
        }
}

// V of kBlock channels of a group: row of tiles by row of tiles, while its pixels are in L1.
template <int kTile>
void image_block(const WinogradConvArgs& args, const Group& group, int64_t c0, float* patch, float* v) {
    const int64_t count = at_most(args.c - c0, kBlock), width = rounded(count, kWidth);
    constexpr int kInner = kTile + 2;
    const int64_t row = (kTile * group.columns() + 2) * width;
    alignas(64) float a[kBlock], b[kBlock];
    for (int64_t n = group.n0; n < group.n1; ++n) {
        for (int64_t c = 0; c < kBlock; ++c) {
            a[c] = c < count ? param(args.multiplier, n, c0 + c, 1.0f) : 1.0f;
            b[c] = c < count ? param(args.offset, n, c0 + c, 0.0f) : 0.0f;
        }
        for (int64_t ty = 0, filled = 0; ty < group.rows(); ++ty, v += group.columns() * kBlock) {
            const int64_t last = kTile * ty + kInner;
            fill_rows(args, group, n, c0, width, a, b, filled, last, patch);
            filled = last;
            patch_to_points<kTile>(group, patch + kTile * ty * row, width, point_stride(args), v);
        }
    }
}

// --- weights ---

template <int kHalf, bool kHigh>
DIFUSORES_INLINE f32v exchange(f32v a, f32v b) {
#if defined(__clang__)
    f32v r;
    for (int k = 0; k < kWidth; ++k)
        r[k] = kHigh ? (k & kHalf ? b[k] : a[k | kHalf]) : (k & kHalf ? b[k & ~kHalf] : a[k]);
    return r;
#else
    i32v from;
    for (int k = 0; k < kWidth; ++k)
        from[k] = kHigh ? (k & kHalf ? kWidth + k : k | kHalf) : (k & kHalf ? kWidth + (k & ~kHalf) : k);
    return __builtin_shuffle(a, b, from);
#endif
}

template <int kHalf>
DIFUSORES_INLINE void transpose(f32v (&r)[kWidth]) {
    for (int k = 0; k < kWidth; ++k)
        if (!(k & kHalf)) {
            const f32v a = r[k], b = r[k + kHalf];
            r[k] = exchange<kHalf, false>(a, b);
            r[k + kHalf] = exchange<kHalf, true>(a, b);
        }
    if constexpr (kHalf > 1) transpose<kHalf / 2>(r);
}

// kWidth rows of kWidth floats, `pitch` apart, into columns: to[k * step].
DIFUSORES_INLINE void transpose_rows(const float* from, int64_t pitch, float* to, int64_t step) {
    f32v r[kWidth];
    for (int o = 0; o < kWidth; ++o) r[o] = get(from + o * pitch);
    transpose<kWidth / 2>(r);
    for (int k = 0; k < kWidth; ++k) put(to + k * step, r[k]);
}

// The weights of `wide` output channels at o0 and of the input channels of a block at c0, zeros where there are none:
// g[wide / 16][channels][9][16].
void gather_weights(const WinogradConvArgs& args, int64_t o0, int64_t wide, int64_t c0, float* g) {
    const int64_t channels = at_most(args.c - c0, kBlock), pitch = 9 * args.c;
    for (int64_t o = 0; o < wide; o += kWidth)
        for (int64_t c = 0; c < channels; c += kWidth) {
            const float* from = args.weight + (o0 + o) * pitch + (args.weight_last ? c0 + c : 9 * (c0 + c));
            const int64_t outputs = at_most(args.o - o0 - o, kWidth), inputs = at_most(channels - c, kWidth);
            float* const to = g + (o / kMaxWidth * channels + c) * kNine + o % kMaxWidth;
            if (outputs < kWidth || inputs < kWidth) {
                for (int64_t k = 0; k < 9; ++k)
                    for (int64_t i = 0; i < inputs; ++i)
                        for (int64_t lane = 0; lane < kWidth; ++lane)
                            to[i * kNine + k * kMaxWidth + lane] =
                                lane < outputs ? from[lane * pitch + (args.weight_last ? k * args.c + i : 9 * i + k)]
                                               : 0.0f;
            } else if (args.weight_last) {
                for (int64_t k = 0; k < 9; ++k) transpose_rows(from + k * args.c, pitch, to + k * kMaxWidth, kNine);
            } else {
                alignas(64) float columns[9 * kWidth * kWidth];
                for (int64_t part = 0; part < 9; ++part) {
                    for (int64_t lane = 0; lane < kWidth; ++lane)
                        __builtin_prefetch(from + lane * pitch + (9 + part) * kWidth);
                    transpose_rows(from + part * kWidth, pitch, columns + part * kWidth * kWidth, kWidth);
                }
                for (int64_t i = 0; i < kWidth; ++i)
                    for (int64_t k = 0; k < 9; ++k)
                        put(to + i * kNine + k * kMaxWidth, get(columns + (9 * i + k) * kWidth));
            }
        }
}

// Two rows of U = G g G^T, whose parts are the same: their points kPoint apart, of a vector or of a block
// [channels][wide]. The first pair is the row at 0 and that at infinity.
template <int kTile>
constexpr int pair_row(int pair, int half) {
    return pair ? 2 * pair - 1 + half : half * (kTile + 1);
}
template <int kTile, int kPair>
DIFUSORES_INLINE void weights_pair(const float* g, float* first, float* second) {
    constexpr int kInner = kTile + 2;
    f32v above[3], below[3], points[kInner];
    for (int x = 0; x < 3; ++x) {
        const float* const from = g + x * kMaxWidth;
        const f32v g0 = get(from), g2 = get(from + 6 * kMaxWidth);
        if constexpr (kPair == 0) {
            above[x] = g0 * (kTile == 4 ? kZero : kOrigin), below[x] = g2;
        } else if constexpr (kTile == 6) {
            const f32v even = even_part<kPair - 1>(g0, g2), odd = odd_part<kPair - 1>(get(from + 3 * kMaxWidth));
            above[x] = even + odd, below[x] = even - odd;
        } else {
            const f32v g1 = get(from + 3 * kMaxWidth);
            const f32v even = kPair == 1 ? even_near(g0, g2) : even_far(g0, g2);
            const f32v odd = kPair == 1 ? odd_near(g1) : odd_far(g1);
            above[x] = even + odd, below[x] = even - odd;
        }
    }
    weights_to_points(above, points);
    for (int x = 0; x < kInner; ++x) put(first + x * kPoint, points[x]);
    weights_to_points(below, points);
    for (int x = 0; x < kInner; ++x) put(second + x * kPoint, points[x]);
}

template <int kTile, int kPair>
void weights_rows(const float* g, int64_t channels, int64_t wide, float* first, float* second) {
    for (int64_t o = 0; o < wide; o += kWidth) {
        const float* const from = g + o / kMaxWidth * channels * kNine + o % kMaxWidth;
        for (int64_t c = 0; c < channels; ++c)
            weights_pair<kTile, kPair>(from + c * kNine, first + c * wide + o, second + c * wide + o);
    }
}

template <int kTile>
void weights_rows(int pair, const float* g, int64_t channels, int64_t wide, float* first, float* second) {
    if (pair == 0) weights_rows<kTile, 0>(g, channels, wide, first, second);
    if (pair == 1) weights_rows<kTile, 1>(g, channels, wide, first, second);
    if (pair == 2) weights_rows<kTile, 2>(g, channels, wide, first, second);
    if constexpr (kTile == 6)
        if (pair == 3) weights_rows<kTile, 3>(g, channels, wide, first, second);
}

// --- product ---

// Weights are asked for while a group of so many tiles is multiplied: kAhead floats of the gathered ones for each
// point of a 4x4 tile.
constexpr int64_t kAskTiles = 16, kAhead = 9 * kPoint / kPoints;

// kCount points. ahead: what weights to ask for meanwhile; nullptr: the points of u that follow.
template <int kCount, bool kFirst>
void multiply_row(const float* v, const float* u, float* m, int64_t stride, int64_t wide, int64_t channels,
                  int64_t tiles, const float* ahead) {
    const int64_t step = ((ahead ? kAhead / kBlock : wide) + tiles - 1) / tiles;
    for (int64_t f = 0; f < kCount; ++f, v += stride, m += stride, u += kPoint)
        multiply_columns<kFirst>(Panel{v, u, m, kBlock, wide, channels, ahead ? ahead + f * kAhead : u + kPoint, step},
                                 tiles);
}

// Levels of fewer than 32 registers have no tiles of 6x6.
constexpr bool kHasLarge = kWidth == 16;
constexpr int kLarge = kHasLarge ? 6 : 4;

template <int kTile>
void input(const WinogradConvArgs& args, float* scratch, int64_t begin, int64_t end) {
    constexpr int kPoints = (kTile + 2) * (kTile + 2);
    const int64_t blocks = (args.c + kBlock - 1) / kBlock;
    for (int64_t task = begin; task < end; ++task)
        image_block<kTile>(args, group_of(args, args.first_group + task / blocks), task % blocks * kBlock, scratch,
                           args.v + task * kPoints * point_stride(args));
}

template <int kTile>
void output(const WinogradConvArgs& args, float* scratch, int64_t begin, int64_t end) {
    constexpr int kInner = kTile + 2, kPoints = kInner * kInner;
    const int64_t padded = rounded(args.o, kMaxWidth), wide_blocks = (args.o + kBlock - 1) / kBlock;
    const int64_t blocks = (args.c + kBlock - 1) / kBlock, stride = point_stride(args);
    float *const here = scratch, *const rows = here + 9 * kPoint, *const m = rows + 2 * kInner * kPoint;
    for (int64_t task = begin; task < end; ++task) {
        const Group group = group_of(args, args.first_group + task / wide_blocks);
        const int64_t o0 = task % wide_blocks * kBlock, wide = at_most(padded - o0, kBlock);
        for (int64_t k = 0; k < blocks; ++k) {
            const int64_t c0 = k * kBlock, channels = at_most(args.c - c0, kBlock);
            const float* const v = args.v + (task / wide_blocks * blocks + k) * kPoints * stride;
            const int64_t block = o0 / kBlock * blocks + k;
            const float* const ready = args.packed ? args.packed + block * kPoints * kPoint : nullptr;
            const float* const g = args.gathered ? args.gathered + block * 9 * kPoint : here;
            if (!ready && !args.gathered) gather_weights(args, o0, wide, c0, here);
            if constexpr (kTile == 4)
                if (!ready && group.tiles() <= kFewTiles) {
                    multiply_block(v, g, m, stride, wide, channels, group.tiles(), k == 0,
                                   args.gathered ? g + 9 * kPoint : nullptr);
                    continue;
                }
            const bool asks = kTile == 4 && !ready && args.gathered && group.tiles() <= kAskTiles;
            for (int pair = 0; pair < kInner / 2; ++pair) {
                if (!ready) weights_rows<kTile>(pair, g, channels, wide, rows, rows + kInner * kPoint);
                for (int half = 0; half < 2; ++half) {
                    const int64_t y = pair_row<kTile>(pair, half);
                    const float* const u = ready ? ready + y * kInner * kPoint : rows + half * kInner * kPoint;
                    (k ? multiply_row<kInner, false>
                       : multiply_row<kInner, true>)(v + y * kInner * stride, u, m + y * kInner * stride, stride, wide,
                                                     channels, group.tiles(),
                                                     asks ? g + 9 * kPoint + (2 * pair + half) * kInner * kAhead
                                                          : nullptr);
                }
            }
        }
        points_to_image<kTile>(args, group, m, stride, o0, wide);
    }
}

template <int kTile>
void pack(const WinogradConvArgs& args, float* packed, float* scratch, int64_t begin, int64_t end) {
    constexpr int kInner = kTile + 2;
    const int64_t padded = rounded(args.o, kMaxWidth), blocks = (args.c + kBlock - 1) / kBlock;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t o0 = task / blocks * kBlock, wide = at_most(padded - o0, kBlock), c0 = task % blocks * kBlock;
        if (!args.gathered) gather_weights(args, o0, wide, c0, scratch);
        const float* const g = args.gathered ? args.gathered + task * 9 * kPoint : scratch;
        float* const block = packed + (task - begin) * kInner * kInner * kPoint;
        for (int pair = 0; pair < kInner / 2; ++pair)
            weights_rows<kTile>(pair, g, at_most(args.c - c0, kBlock), wide,
                                block + pair_row<kTile>(pair, 0) * kInner * kPoint,
                                block + pair_row<kTile>(pair, 1) * kInner * kPoint);
    }
}

}  // namespace

void winograd_conv_input(const WinogradConvArgs& args, float* scratch, int64_t begin, int64_t end) {
    (kHasLarge && args.tile == 6 ? input<kLarge> : input<4>)(args, scratch, begin, end);
}

void winograd_conv_output(const WinogradConvArgs& args, float* scratch, int64_t begin, int64_t end) {
    (kHasLarge && args.tile == 6 ? output<kLarge> : output<4>)(args, scratch, begin, end);
}

void winograd_conv_pack(const WinogradConvArgs& args, float* packed, float* scratch, int64_t begin, int64_t end) {
    (kHasLarge && args.tile == 6 ? pack<kLarge> : pack<4>)(args, packed, scratch, begin, end);
}

void winograd_conv_gather(const WinogradConvArgs& args, float* gathered, int64_t begin, int64_t end) {
    const int64_t padded = rounded(args.o, kMaxWidth), blocks = (args.c + kBlock - 1) / kBlock;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t o0 = task / blocks * kBlock, wide = at_most(padded - o0, kBlock), c0 = task % blocks * kBlock;
        gather_weights(args, o0, wide, c0, gathered + task * 9 * kPoint);
    }
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
