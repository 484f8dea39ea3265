// What kernels of F(4x4, 3x3) and F(6x6, 3x3) share: the transforms of a line, groups of tiles, and the image on its
// way in and out. Lines of 6 and 4 values are of the first, of 8 and 6 of the second.
#pragma once
#include "product.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kBlock = kWinogradBlock;
constexpr int kTile = 4, kInner = 6, kPoints = 36;
constexpr float kA = 0.625f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB;
constexpr int64_t kPoint = kWinogradPoint;
constexpr int64_t kNine = 9 * kMaxWidth;  // the weights of an input channel and 16 output channels

// --- the three transforms, of one line ---

// B^T: values of the image to as many points.
DIFUSORES_INLINE void image_to_points(const f32v (&d)[6], f32v (&v)[6]) {
    const f32v even_a = d[4] - kB2 * d[2], odd_a = d[3] - kB2 * d[1];
    const f32v even_b = d[4] - kA2 * d[2], odd_b = d[3] - kA2 * d[1];
    v[0] = (d[0] * (kA2 * kB2) + d[4]) - (kA2 + kB2) * d[2];
    v[1] = even_a + kA * odd_a;
    v[2] = even_a - kA * odd_a;
    v[3] = even_b + kB * odd_b;
    v[4] = even_b - kB * odd_b;
    v[5] = (d[1] * (kA2 * kB2) + d[5]) - (kA2 + kB2) * d[3];
}

// Points 0, +-p, +-q, +-r and infinity: the parts of a pair are polynomials in the squares of the other two.
constexpr float kP = 0.5f, kQ = 1.0f, kR = 2.0f;
constexpr float kP2 = kP * kP, kQ2 = kQ * kQ, kR2 = kR * kR;
static_assert(kQ == 1.0f && kP * kR == 1.0f);  // so that two of the cubic's coefficients are one, and two the same
DIFUSORES_INLINE f32v cubic(f32v d0, f32v d2, f32v d4, f32v d6) { return (d6 - d0) + (kP2 + kQ2 + kR2) * (d2 - d4); }
DIFUSORES_INLINE void image_to_points(const f32v (&d)[8], f32v (&v)[8]) {
    const auto pair = [&](float at, float s, float t, f32v& above, f32v& below) __attribute__((always_inline)) {
        const f32v even = (d[6] - (s + t) * d[4]) + (s * t) * d[2], odd = (d[5] - (s + t) * d[3]) + (s * t) * d[1];
        above = even + at * odd, below = even - at * odd;
    };
    v[0] = cubic(d[0], d[2], d[4], d[6]);
    pair(kP, kQ2, kR2, v[1], v[2]);
    pair(kQ, kP2, kR2, v[3], v[4]);
    pair(kR, kP2, kQ2, v[5], v[6]);
    v[7] = cubic(d[1], d[3], d[5], d[7]);
}

// G: three weights to the points; the rows at a and -a, and at b and -b, are an even and an odd part.
constexpr float kNear = 1.0f / (2.0f * kA2 * (kA2 - kB2)), kFar = 1.0f / (2.0f * kB2 * (kB2 - kA2));
constexpr float kZero = 1.0f / (kA2 * kB2);
DIFUSORES_INLINE f32v even_near(f32v g0, f32v g2) { return g0 * kNear + g2 * (kA2 * kNear); }
DIFUSORES_INLINE f32v odd_near(f32v g1) { return g1 * (kA * kNear); }
DIFUSORES_INLINE f32v even_far(f32v g0, f32v g2) { return g0 * kFar + g2 * (kB2 * kFar); }
DIFUSORES_INLINE f32v odd_far(f32v g1) { return g1 * (kB * kFar); }
DIFUSORES_INLINE void weights_to_points(const f32v (&g)[3], f32v (&u)[6]) {
    const f32v even_a = even_near(g[0], g[2]), odd_a = odd_near(g[1]);
    const f32v even_b = even_far(g[0], g[2]), odd_b = odd_far(g[1]);
    u[0] = g[0] * kZero;
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
}

// The even and the odd part of the pair +-p, +-q or +-r, and the row at 0, of three weights.
constexpr float kPairAt[3] = {kP, kQ, kR};
constexpr float kPairScale[3] = {1.0f / (2.0f * kP2 * (kP2 - kQ2) * (kP2 - kR2)),
                                 1.0f / (2.0f * kQ2 * (kQ2 - kP2) * (kQ2 - kR2)),
                                 1.0f / (2.0f * kR2 * (kR2 - kP2) * (kR2 - kQ2))};
constexpr float kOrigin = -1.0f / (kP2 * kQ2 * kR2);
template <int kPair>
DIFUSORES_INLINE f32v even_part(f32v g0, f32v g2) {
    constexpr float kScale = kPairScale[kPair], kAt = kPairAt[kPair];
    return g0 * kScale + g2 * (kAt * kAt * kScale);
}
template <int kPair>
DIFUSORES_INLINE f32v odd_part(f32v g1) {
    return g1 * (kPairAt[kPair] * kPairScale[kPair]);
}
DIFUSORES_INLINE void weights_to_points(const f32v (&g)[3], f32v (&u)[8]) {
    const f32v even[3] = {even_part<0>(g[0], g[2]), even_part<1>(g[0], g[2]), even_part<2>(g[0], g[2])};
    const f32v odd[3] = {odd_part<0>(g[1]), odd_part<1>(g[1]), odd_part<2>(g[1])};
    u[0] = g[0] * kOrigin;
    for (int k = 0; k < 3; ++k) u[2 * k + 1] = even[k] + odd[k], u[2 * k + 2] = even[k] - odd[k];
    u[7] = g[2];
}

// A^T: points to two outputs fewer.
DIFUSORES_INLINE void points_to_outputs(const f32v (&m)[6], f32v (&y)[4]) {
    const f32v sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const f32v sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = (m[0] + sum_a) + sum_b;
    y[1] = kA * difference_a + kB * difference_b;
    y[2] = kA2 * sum_a + kB2 * sum_b;
    y[3] = (kA2 * kA) * difference_a + ((kB2 * kB) * difference_b + m[5]);
}
DIFUSORES_INLINE void points_to_outputs(const f32v (&m)[8], f32v (&y)[6]) {
    const f32v sum_p = m[1] + m[2], sum_q = m[3] + m[4], sum_r = m[5] + m[6];
    const f32v difference_p = m[1] - m[2], difference_q = m[3] - m[4], difference_r = m[5] - m[6];
    y[0] = (m[0] + sum_p) + (sum_q + sum_r);
    y[1] = kP * difference_p + (kR * difference_r + kQ * difference_q);
    y[2] = kP2 * sum_p + (kR2 * sum_r + kQ2 * sum_q);
    y[3] = (kP2 * kP) * difference_p + ((kR2 * kR) * difference_r + (kQ2 * kQ) * difference_q);
    y[4] = (kP2 * kP2) * sum_p + ((kR2 * kR2) * sum_r + (kQ2 * kQ2) * sum_q);
    y[5] =
        (kP2 * kP2 * kP) * difference_p + ((kR2 * kR2 * kR) * difference_r + ((kQ2 * kQ2 * kQ) * difference_q + m[7]));
}

// --- groups of tiles ---

// Tiles [ty0, ty1) x [tx0, tx1) of images [n0, n1).
struct Group {
    int64_t n0, n1, ty0, ty1, tx0, tx1;
    int64_t rows() const { return ty1 - ty0; }
    int64_t columns() const { return tx1 - tx0; }
    int64_t tiles() const { return (n1 - n0) * rows() * columns(); }
};

DIFUSORES_INLINE Group group_of(const WinogradConvArgs& args, int64_t g) {
    const int64_t tiles_h = (args.h + args.tile - 1) / args.tile, tiles_w = (args.w + args.tile - 1) / args.tile;
    const int64_t down = (tiles_h + args.group_h - 1) / args.group_h,
                  across = (tiles_w + args.group_w - 1) / args.group_w;
    const int64_t n0 = g / (down * across) * args.group_n;
    const int64_t ty0 = g / across % down * args.group_h, tx0 = g % across * args.group_w;
    return {n0,  at_most(n0 + args.group_n, args.n),  ty0, at_most(ty0 + args.group_h, tiles_h),
            tx0, at_most(tx0 + args.group_w, tiles_w)};
}

// Floats of one point of V in a block of C, and of M: a line more than a power of two, so that the 36 points of a tile
// do not meet in one set of the cache.
DIFUSORES_INLINE int64_t point_stride(const WinogradConvArgs& args) {
    return args.group_n * args.group_h * args.group_w * kBlock + kMaxWidth;
}

// --- input ---

constexpr int64_t kPixelsAhead = 8;  // asked for while one is mapped: a few lines of each, far apart

// act(multiplier * x + offset) of kBlock channels from c0 on: rows [first, last) of the pixels that the tiles of image
// n read, zeros outside, into patch[rows][columns][width]. a, b: the affine map of these channels. A doubled image is
// never written down: four pixels are read in one place.
void fill_rows(const WinogradConvArgs& args, const Group& group, int64_t n, int64_t c0, int64_t width, const float* a,
               const float* b, int64_t first, int64_t last, float* patch) {
    constexpr int kTogether = kWidth == 16 ? 4 : 2;
    const int64_t count = at_most(args.c - c0, kBlock);
    const bool affine = args.multiplier.ptr || args.offset.ptr;
    const int64_t columns = args.tile * group.columns() + 2;
    const int half = args.doubled ? 1 : 0;
    const int64_t x_h = args.h >> half, x_w = args.w >> half;
    for (int64_t row = first; row < last; ++row) {
        const int64_t iy = args.tile * group.ty0 + row - 1;
        for (int64_t column = 0; column < columns; ++column) {
            const int64_t ix = args.tile * group.tx0 + column - 1;
            float* const out = patch + (row * columns + column) * width;
            if (iy < 0 || iy >= args.h || ix < 0 || ix >= args.w) {
                for (int64_t c = 0; c < width; c += kWidth) put(out + c, f32v{});
                continue;
            }
            const float* const in = args.x + ((n * x_h + (iy >> half)) * x_w + (ix >> half)) * args.c + c0;
            const float* const next = in + kPixelsAhead * args.c;
            for (int64_t k = 0; k < count; k += kLine) __builtin_prefetch(next + k);
            int64_t c = 0;
            for (; c + kTogether * kWidth <= count; c += kTogether * kWidth) {
                f32v t[kTogether];
                for (int k = 0; k < kTogether; ++k) t[k] = get(in + c + k * kWidth);
                if (affine)
                    for (int k = 0; k < kTogether; ++k) t[k] = t[k] * get(a + c + k * kWidth) + get(b + c + k * kWidth);
                if (args.silu) silu(t);
                for (int k = 0; k < kTogether; ++k) put(out + c + k * kWidth, t[k]);
            }
            for (; c < count; c += kWidth) {
                const int left = static_cast<int>(at_most(count - c, kWidth));
                f32v t[1] = {left == kWidth ? get(in + c) : load_tail<DType::f32>(in, c, left)};
                if (affine) t[0] = t[0] * get(a + c) + get(b + c);
                if (args.silu) silu(t);
                if (left < kWidth) t[0] = lane_mask(left) > 0.0f ? t[0] : f32v{};
                put(out + c, t[0]);
            }
        }
    }
}

// --- output ---

// For mean and variance of the outputs of each lane: sums of deviations from the mean of the first of T tiles, and of
// their squares. The mean of all is at most sqrt(T - 1) standard deviations away, so little cancels wherever it is.
struct OutputSums {
    f32v pivot, sum, squares;

    template <int kTile>
    DIFUSORES_INLINE void join(const f32v (&y)[kTile][kTile], int64_t rows, int64_t columns, bool first) {
        if (first) {
            pivot = sum = squares = f32v{};
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < columns; ++j) pivot += y[i][j];
            pivot *= 1.0f / static_cast<float>(rows * columns);
        }
        f32v of_tile = {};
        for (int64_t i = 0; i < rows; ++i) {
            f32v of_row = {};
            for (int64_t j = 0; j < columns; ++j) {
                const f32v d = y[i][j] - pivot;
                of_tile += d, of_row += d * d;
            }
            squares += of_row;
        }
        sum += of_tile;
    }
};

// `rows` x `columns` outputs of a tile for kWidth channels from o on, `count` of which exist; y becomes what is stored.
template <int kTile>
DIFUSORES_INLINE void store_tile(const WinogradConvArgs& args, f32v (&y)[kTile][kTile], int64_t n, int64_t ty,
                                 int64_t tx, int64_t rows, int64_t columns, int64_t o, int count, f32v constant,
                                 OutputSums& sums, bool first) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            const int64_t place = ((n * args.h + kTile * ty + i) * args.w + kTile * tx + j) * args.o + o;
            __builtin_prefetch(args.y + place + kTile * args.o, 1);  // of the next tile
            if (args.residual) __builtin_prefetch(args.residual + place + kTile * args.o);
            f32v value = y[i][j] + constant;
            if (count == kWidth) {
                if (args.residual) value += get(args.residual + place);
                put(args.y + place, y[i][j] = value * args.output_scale);
            } else {
                if (args.residual) value += load_tail<DType::f32>(args.residual, place, count);
                store_tail<DType::f32>(args.y, place, y[i][j] = value * args.output_scale, count);
            }
        }
    if (args.sums) sums.join(y, rows, columns, first);
}

// Those of image n in a group, for the output channels [o0, o0 + wide).
DIFUSORES_INLINE void store_sums(const WinogradConvArgs& args, const Group& group, const OutputSums* of, int64_t n,
                                 int64_t o0, int64_t wide) {
    const int64_t down = (args.h + args.tile * args.group_h - 1) / (args.tile * args.group_h),
                  across = (args.w + args.tile * args.group_w - 1) / (args.tile * args.group_w);
    const int64_t part = group.ty0 / args.group_h * across + group.tx0 / args.group_w;
    float* const to = args.sums + (n * down * across + part) * 3 * args.o + o0;
    for (int64_t o = 0; o < wide && o0 + o < args.o; o += kWidth, ++of) {
        const int left = static_cast<int>(at_most(args.o - o0 - o, kWidth));
        store_tail<DType::f32>(to, o, of->pivot, left);
        store_tail<DType::f32>(to, args.o + o, of->sum, left);
        store_tail<DType::f32>(to, 2 * args.o + o, of->squares, left);
    }
}

// y of a group for the output channels [o0, o0 + wide), from M, whose points are `stride` apart.
template <int kTile>
void points_to_image(const WinogradConvArgs& args, const Group& group, const float* m, int64_t stride, int64_t o0,
                     int64_t wide) {
    constexpr int kInner = kTile + 2;
    for (int64_t n = group.n0; n < group.n1; ++n) {
        alignas(64) float constant[kBlock];
        for (int64_t o = 0; o < wide; ++o)
            constant[o] = o0 + o < args.o ? param(args.bias, 0, o0 + o, 0.0f) + param(args.add, n, o0 + o, 0.0f) : 0.0f;
        OutputSums sums[kBlock / kWidth];
        for (int64_t ty = group.ty0; ty < group.ty1; ++ty)
            for (int64_t tx = group.tx0; tx < group.tx1; ++tx, m += wide)
                for (int64_t o = 0; o < wide && o0 + o < args.o; o += kWidth) {
                    f32v half[kTile][kInner], y[kTile][kTile];
                    for (int x = 0; x < kInner; ++x) {
                        f32v line[kInner], out[kTile];
                        for (int k = 0; k < kInner; ++k) {
                            const float* const from = m + (kInner * k + x) * stride + o;
                            line[k] = get(from);
                            __builtin_prefetch(from + wide);  // of the next tile
                        }
                        points_to_outputs(line, out);
                        for (int k = 0; k < kTile; ++k) half[k][x] = out[k];
                    }
                    for (int k = 0; k < kTile; ++k) points_to_outputs(half[k], y[k]);
                    const int count = static_cast<int>(at_most(args.o - o0 - o, kWidth));
                    const auto store = [&](int64_t rows, int64_t columns, int count) __attribute__((always_inline)) {
                        store_tile<kTile>(args, y, n, ty, tx, rows, columns, o0 + o, count, get(constant + o),
                                          sums[o / kWidth], ty == group.ty0 && tx == group.tx0);
                    };
                    const int64_t rows = args.h - kTile * ty, columns = args.w - kTile * tx;
                    if (rows >= kTile && columns >= kTile && count == kWidth) store(kTile, kTile, kWidth);
                    else store(at_most(rows, kTile), at_most(columns, kTile), count);
                }
        if (args.sums) store_sums(args, group, sums, n, o0, wide);
    }
}

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
