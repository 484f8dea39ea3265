// gemm_conv in bf16, sums in fp32: for the levels with products of bf16 pairs.
//
// y = conv(act(multiplier x + offset), weight) + bias + add + residual; x, y, residual are [N, H, W, C] in memory.
// Weights come in panels of 32 columns, packed as pairs of input channels: [C / 32][taps][16][32][2]. A tile of rows is
// 16 output pixels by 32 input channels. First the pixels are arranged, once, such that every tile of every tap lies at
// even distances: blocks of 32 channels, zeros around the image, act applied, and, where rows of the output are no
// whole tiles, a copy for each tap across (strides down: for each tap). 1x1 convolutions of whole tiles read x itself.
// Then a task multiplies a run of tiles by some panels: kChunk of the depth at a time, whose part of a panel stays in
// L1 while two tiles by two pass through the registers; what comes next of the weights is asked for meanwhile. The sum
// runs over channels and taps in order and is never divided: an output's bits depend on its inputs alone, not on the
// batch or threads. Least bytes: x, y, residual and the weights once; arranged pixels stay in L2 for usual images.
#include "amx.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kStep = kGemmPairStep, kColumns = kGemmPairColumns, kTile = kGemmTileRows;
constexpr int64_t kChunk = 16;                        // steps of 32 channels: 32 KB of a panel
constexpr int64_t kStepBytes = 2 * kStep * kColumns;  // of a panel
constexpr int64_t kLine = kColumns * 4;               // bytes of a row of packed pairs, and of a row of sums

DIFUSORES_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// One or two tiles of rows times a part of a panel.
struct Part {
    const char *a0, *a1;   // the tiles' first pixels; a1 is read of two tiles only
    int64_t row;           // bytes from pixel to pixel
    const int64_t* place;  // [steps] bytes from the first pixel to what a step reads of it
    const char* b;
    float* m;  // [tiles * 16][32]
    int64_t steps;
    bool accumulate;
    const char* ahead;  // of each step `lines` cache lines from here on are asked for
    int64_t lines;
};

DIFUSORES_INLINE void ask_ahead(const Part& p, int64_t step) {
    for (int64_t k = 0; k < p.lines; ++k) __builtin_prefetch(p.ahead + step * kStepBytes + 64 * k, 0, 2);
}

#if defined(__AMX_BF16__)
template <int kTiles>
void multiply(const Part& p) {
    float* const m1 = p.m + kTile * kColumns;
    settle_memory();
    if (p.accumulate) {
        _tile_loadd(0, p.m, kLine);
        _tile_loadd(1, p.m + 16, kLine);
        if constexpr (kTiles == 2) _tile_loadd(2, m1, kLine);
        if constexpr (kTiles == 2) _tile_loadd(3, m1 + 16, kLine);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (kTiles == 2) _tile_zero(2);
        if constexpr (kTiles == 2) _tile_zero(3);
    }
    const char* b = p.b;
    for (int64_t step = 0; step < p.steps; ++step, b += kStepBytes) {
        _tile_loadd(4, p.a0 + p.place[step], p.row);
        _tile_loadd(6, b, kLine);
        _tile_loadd(7, b + 64, kLine);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kTiles == 2) _tile_loadd(5, p.a1 + p.place[step], p.row);
        _tile_dpbf16ps(1, 4, 7);
        ask_ahead(p, step);
        if constexpr (kTiles == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (kTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, p.m, kLine);
    _tile_stored(1, p.m + 16, kLine);
    if constexpr (kTiles == 2) _tile_stored(2, m1, kLine);
    if constexpr (kTiles == 2) _tile_stored(3, m1 + 16, kLine);
    settle_memory();
}
#else
template <int kTiles>
void multiply(const Part& p) {
    constexpr int kRows = 8, kVectors = 2;
    float* m = p.m;
    for (int64_t r = 0; r < kTiles * kTile; r += kRows, m += kRows * kColumns) {
        const char *const a = (r < kTile ? p.a0 : p.a1) + r % kTile * p.row, *b = p.b;
        __m512 sum[kRows][kVectors];
        for (int i = 0; i < kRows; ++i)
            for (int k = 0; k < kVectors; ++k)
                sum[i][k] = p.accumulate ? _mm512_loadu_ps(m + i * kColumns + k * kWidth) : _mm512_setzero_ps();
        for (int64_t step = 0; step < p.steps; ++step) {
            const char* const at = a + p.place[step];
            if (r == 0) ask_ahead(p, step);
            for (int64_t pair = 0; pair < 2 * kStep; pair += 4, b += kLine)
                for (int i = 0; i < kRows; ++i) {
                    int32_t both;
                    __builtin_memcpy(&both, at + i * p.row + pair, 4);
                    for (int k = 0; k < kVectors; ++k)
                        sum[i][k] = _mm512_dpbf16_ps(sum[i][k], (__m512bh)_mm512_set1_epi32(both),
                                                     (__m512bh)_mm512_loadu_si512(b + 64 * k));
                }
        }
        for (int i = 0; i < kRows; ++i)
            for (int k = 0; k < kVectors; ++k) _mm512_storeu_ps(m + i * kColumns + k * kWidth, sum[i][k]);
    }
}
#endif

// Where the tiles of an image are and how far apart.
struct Geometry {
    const char* base;
    int64_t image, row;  // bytes
    int64_t tiles;       // of an image
    bool whole;          // tiles within a row of the output
};

DIFUSORES_INLINE Geometry geometry_of(const GemmPairsArgs& a) {
    const int64_t pixels = a.down * a.out_w, tiles = (pixels + kTile - 1) / kTile;
    if (!a.arranged) {
        const int64_t image = 2 * a.c * pixels;
        return {static_cast<const char*>(a.x) + a.first * image, image, 2 * a.c, tiles, false};
    }
    const bool whole = !a.split_w;
    return {a.arranged, a.image_bytes, 2 * kStep * (whole ? a.stride_w : 1), tiles, whole};
}

DIFUSORES_INLINE const char* tile_of(const GemmPairsArgs& a, const Geometry& g, int64_t tile) {
    const char* const image = g.base + tile / g.tiles * g.image;
    const int64_t q = tile % g.tiles * kTile;
    if (!g.whole) return image + q * g.row;
    return image + 2 * kStep * (q / a.out_w * a.stride_h * a.pitch) + q % a.out_w * g.row;
}

// What is added to every pixel of an image, of a panel's columns.
struct Terms {
    alignas(64) float value[kColumns] = {};
    int64_t image = -1;
};

// y of a tile and of a panel's columns, from o0 on, of their sums m.
void finish(const GemmPairsArgs& a, const Geometry& g, const float* m, int64_t tile, int64_t o0, Terms& of_image) {
    const int64_t n = a.first + tile / g.tiles, first = tile % g.tiles * kTile, pixels = a.down * a.out_w;
    const int64_t count = at_most(kTile, pixels - first), wide = at_most(a.o - o0, kColumns);
    const float* const terms = of_image.value;
    if (of_image.image != n) {
        of_image.image = n;
        for (int64_t o = 0; o < wide; ++o)
            of_image.value[o] = param(a.bias, 0, o0 + o, 0.0f) + param(a.add, n, o0 + o, 0.0f);
    }
    int64_t place = ((n * a.out_h + a.top) * a.out_w + first) * a.o + o0;
    for (int64_t r = 0; r < count; ++r, m += kColumns, place += a.o) {
        if (wide == kColumns) {
            f32v y[2];
            for (int k = 0; k < 2; ++k) {
                y[k] = load<DType::f32>(m, k * kWidth) + load<DType::f32>(terms, k * kWidth);
                if (a.residual) y[k] += load<DType::bf16>(a.residual, place + k * kWidth);
            }
            store_all<DType::bf16>(a.y, place, y);
            continue;
        }
        for (int64_t o = 0; o < wide; o += kWidth) {
            const int left = static_cast<int>(at_most(wide - o, kWidth));
            f32v y = load<DType::f32>(m, o) + load<DType::f32>(terms, o);
            if (a.residual) y += load_tail<DType::bf16>(a.residual, place + o, left);
            store_tail<DType::bf16>(a.y, place + o, y, left);
        }
    }
}

// SiLU that is to be rounded to bf16. Intel's division takes longer than all the rest of it; an estimate of the
// reciprocal, right to 2^-14, does not.
template <int kCount>
DIFUSORES_INLINE void rounded_silu(f32v (&x)[kCount]) {
#if defined(__AMX_BF16__)
    f32v e[kCount];
    for (int k = 0; k < kCount; ++k) e[k] = x[k];
    exp_f32<kCount, true>(e);
    for (int k = 0; k < kCount; ++k) x[k] *= (f32v)_mm512_rcp14_ps((__m512)(1.0f + e[k]));
#else
    silu(x);
#endif
}

// act(multiplier x + offset) of kBlocks blocks of 32 channels from c on, `bytes` from one block to the next in `to`;
// channels from C on are zero.
template <int kBlocks, bool kSilu>
DIFUSORES_INLINE void activate(const GemmPairsArgs& a, const char* x, int64_t n, int64_t c, char* to, int64_t bytes) {
    constexpr int kVectors = 2 * kBlocks;
    const float* const multiplier = static_cast<const float*>(a.multiplier.ptr) + n * a.multiplier.row_stride;
    const float* const offset = static_cast<const float*>(a.offset.ptr) + n * a.offset.row_stride;
    f32v t[kVectors];
    for (int k = 0; k < kVectors; ++k) {
        const int64_t at = c + k * kWidth;
        if (at + kWidth <= a.c) {
            t[k] = load<DType::bf16>(x, at) * load<DType::f32>(multiplier, at) + load<DType::f32>(offset, at);
        } else {
            const int left = at < a.c ? static_cast<int>(a.c - at) : 0;
            t[k] = load_tail<DType::bf16>(x, at, left) * load_tail<DType::f32>(multiplier, at, left) +
                   load_tail<DType::f32>(offset, at, left);
        }
    }
    if constexpr (kSilu) rounded_silu(t);
    for (int k = 0; k < kBlocks; ++k) {
        const f32v pair[2] = {t[2 * k], t[2 * k + 1]};
        store_all<DType::bf16>(to + k * bytes, 0, pair);
    }
}

// A pixel's channels, or zeros where x is nullptr, to `to`, `bytes` from one block of 32 to the next.
void arrange_pixel(const GemmPairsArgs& a, const char* x, int64_t n, char* to, int64_t bytes) {
    int64_t c = 0;
    if (x && a.multiplier.ptr) {
        const auto two = a.silu ? activate<2, true> : activate<2, false>;
        const auto one = a.silu ? activate<1, true> : activate<1, false>;
        for (; c + kStep < a.c; c += 2 * kStep, to += 2 * bytes) two(a, x, n, c, to, bytes);
        if (c < a.c) one(a, x, n, c, to, bytes);
        return;
    }
    for (; c < a.c; c += kStep, to += bytes) {
        const __mmask64 there = x ? ~0ULL >> (64 - 2 * at_most(a.c - c, kStep)) : 0;
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(there, x + 2 * c));
    }
}

}  // namespace

// Tasks: images * rows that taps reach.
void gemm_conv_bf16_arrange(const GemmPairsArgs& a, int64_t begin, int64_t end) {
    const int64_t reach_h = (a.down - 1) * a.stride_h + a.kernel_h, reach_w = (a.out_w - 1) * a.stride_w + a.kernel_w;
    const int64_t copy = a.rows * a.pitch * 2 * kStep, block = a.copies * copy;
    const int64_t across = a.split_w ? a.kernel_w : 1, down = a.split_h ? a.kernel_h : 1;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / reach_h, v = task % reach_h, iy = a.top * a.stride_h + v - a.pad_h;
        char* const image = a.arranged + n * a.image_bytes;
        for (int64_t u = 0; u < reach_w; ++u) {
            const int64_t ix = u - a.pad_w;
            const bool inside = iy >= 0 && iy < a.h && ix >= 0 && ix < a.w;
            const char* const x =
                inside ? static_cast<const char*>(a.x) + 2 * (((a.first + n) * a.h + iy) * a.w + ix) * a.c : nullptr;
            const char* made = nullptr;
            for (int64_t ky = 0; ky < down; ++ky)
                for (int64_t kx = 0; kx < across; ++kx) {
                    int64_t row = v, column = u;
                    if (a.split_h) {
                        if (v < ky || (v - ky) % a.stride_h || (v - ky) / a.stride_h >= a.down) continue;
                        row = (v - ky) / a.stride_h;
                    }
                    if (a.split_w) {
                        if (u < kx || (u - kx) % a.stride_w || (u - kx) / a.stride_w >= a.out_w) continue;
                        column = (u - kx) / a.stride_w;
                    }
                    char* const to = image + (ky * across + kx) * copy + (row * a.pitch + column) * 2 * kStep;
                    if (!made) arrange_pixel(a, x, a.first + n, to, block);
                    else
                        for (int64_t c = 0; c < a.c; c += kStep)
                            _mm512_storeu_si512(to + c / kStep * block, _mm512_loadu_si512(made + c / kStep * block));
                    made = to;
                }
        }
    }
}

void gemm_conv_bf16(const GemmPairsArgs& a, float* scratch, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
    const Tiles tiles;
#endif
    const Geometry g = geometry_of(a);
    const int64_t steps = a.kernel_h * a.kernel_w * ((a.c + kStep - 1) / kStep), total = a.images * g.tiles;
    const int64_t panels = (a.o + kColumns - 1) / kColumns, shares = (panels + a.panels - 1) / a.panels;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / shares * a.run, count = at_most(a.run, total - first);
        const int64_t p0 = task % shares * a.panels, p1 = at_most(p0 + a.panels, panels);
        const int64_t pairs = (count + 1) / 2, lines = pairs < 32 ? (32 + pairs - 1) / pairs : 1;
        for (int64_t p = p0; p < p1; ++p) {
            Terms terms;
            for (int64_t step = 0; step < steps; step += kChunk) {
                const char* const b = static_cast<const char*>(a.packed) + (p * steps + step) * kStepBytes;
                const bool last = step + kChunk >= steps;
                Part part{nullptr,
                          nullptr,
                          g.row,
                          a.place + step,
                          b,
                          scratch,
                          at_most(kChunk, steps - step),
                          step > 0,
                          b + kChunk * kStepBytes,
                          lines};
                for (int64_t t = 0; t < count; t += 2, part.m += 2 * kTile * kColumns, part.ahead += 64 * lines) {
                    if (t == 2 * 32) part.lines = 0;
                    part.a0 = tile_of(a, g, first + t);
                    if (t + 1 < count) {
                        part.a1 = tile_of(a, g, first + t + 1);
                        multiply<2>(part);
                    } else {
                        multiply<1>(part);
                    }
                    if (!last) continue;
                    finish(a, g, part.m, first + t, p * kColumns, terms);
                    if (t + 1 < count) finish(a, g, part.m + kTile * kColumns, first + t + 1, p * kColumns, terms);
                }
            }
        }
    }
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
