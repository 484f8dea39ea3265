// gemm_conv in bf16, sums in fp32: for the levels with products of bf16 pairs. x, y and the residual may be fp32.
//
// y = conv(act(multiplier x + offset), weight) + bias + add + residual, or GEGLU of the product and bias, plus
// residual; x, y, residual are [N, H, W, C] in memory. Weights come in panels of 32 columns, packed as pairs of input
// channels: [C / 32][taps][16][32][2]; with GEGLU 16 values and their gates. A tile of rows is 16 output pixels by 32
// input channels. First the pixels are arranged, once, such that every tile of every tap lies at even distances: blocks
// of 32 channels, zeros around the image, act applied, and, where rows of the output are no whole tiles, a copy for
// each tap across (strides down: for each tap). 1x1 convolutions read x itself; there a last tile that is not whole
// begins earlier, and its first rows are computed twice.
// Then a task multiplies a run of tiles, two by two, by some panels. Where the depth is short, all of two tiles stays
// in L1 while a group of panels passes; else a chunk of a panel stays near while the run passes, and sums wait between
// chunks. What comes next is asked for meanwhile: weights, x, and the lines of y, which are written while the next two
// tiles are multiplied. The sum runs over channels and taps in order and is never divided: an output's bits depend on
// its inputs alone, not on the batch or threads. Least bytes: x, y, residual and the weights once; arranged pixels and
// a run of x stay in L2 for usual sizes.
#include "gemm_pairs.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kChunk = 20;               // steps of 32 channels at most: 40 KB of a panel
constexpr int64_t kShort = 10, kGroup = 16;  // depth in steps up to which this many panels are a group

// One or two tiles of a run: where their pixels are, and which rows of y they become.
struct Block {
    const char* a[2];
    int64_t image[2], row[2], rows[2];  // row: among those of all images
    int64_t tiles;
};

// Of the images' tiles from `tile` on.
Block block_of(const GemmPairsArgs& a, int64_t tile, int64_t tiles) {
    const int64_t pixels = a.down * a.out_w, of_image = (pixels + kTile - 1) / kTile;
    Block b{};
    b.tiles = tiles;
    for (int k = 0; k < tiles; ++k, ++tile) {
        const int64_t image = tile / of_image;
        int64_t q = tile % of_image * kTile;
        if (!a.arranged) {
            q = at_most(q, pixels - kTile);
            b.a[k] = static_cast<const char*>(a.x) + ((a.first + image) * pixels + q) * 2 * a.c;
        } else if (a.split_w) {
            b.a[k] = a.arranged + image * a.image_bytes + q * 2 * kStep;
        } else {
            const int64_t pixel = q / a.out_w * a.stride_h * a.pitch + q % a.out_w * a.stride_w;
            b.a[k] = a.arranged + image * a.image_bytes + pixel * 2 * kStep;
        }
        b.image[k] = a.first + image, b.row[k] = (b.image[k] * a.out_h + a.top) * a.out_w + q,
        b.rows[k] = at_most(kTile, pixels - q);
    }
    return b;
}

// Up to 16 of a parameter's columns, of an image.
DIFUSORES_INLINE f32v columns_of(const Param& p, int64_t n, int64_t o, int count) {
    const int64_t at = n * p.row_stride + o;
    if (!p.ptr) return f32v{};
    if (p.dtype == DType::bf16) return load_tail<DType::bf16>(p.ptr, at, count);
    return p.dtype == DType::f32 ? load_tail<DType::f32>(p.ptr, at, count) : load_tail<DType::f16>(p.ptr, at, count);
}

// What is added to every pixel of an image, of a panel's columns.
struct Terms {
    alignas(64) float value[kColumns];
    int64_t image = -1;

    const float* of(const GemmPairsArgs& a, int64_t n, int64_t panel) {
        if (image == n) return value;
        image = n;
        for (int64_t k = 0; k < 2; ++k) {
            const int64_t o = a.geglu ? panel * kWidth + k * (a.o / 2) : panel * kColumns + k * kWidth;
            const int count = static_cast<int>(o < a.o ? at_most(a.o - o, kWidth) : 0);
            const f32v sum = columns_of(a.bias, 0, o, count) + columns_of(a.add, n, o, count);
            store<DType::f32>(value, k * kWidth, sum);
        }
        return value;
    }
};

// y of a block of which a tile has fewer than 16 rows, or of a panel of fewer than 32 columns, from its sums.
template <bool kGeglu, DType kY>
void finish_tail(const Pending& p, const Block& block, int64_t wide) {
    for (int64_t k = 0; k < block.tiles; ++k)
        for (int64_t r = 0; r < block.rows[k]; ++r)
            for (int64_t o = 0; o < wide; o += kWidth) {
                const int64_t at = p.place[k] + r * p.apart;
                const float* const m = p.m + (k * kTile + r) * kColumns;
                const int left = static_cast<int>(at_most(wide - o, kWidth));
                f32v y[1] = {load<DType::f32>(m, o) + load<DType::f32>(p.terms[k], o)};
                if constexpr (kGeglu) {
                    const f32v gates[1] = {load<DType::f32>(m, kWidth) + load<DType::f32>(p.terms[k], kWidth)};
                    gate<false, true>(y, gates);
                }
                if (p.residual) y[0] += load_tail<kY>(p.residual + at, o, left);
                const auto there = static_cast<__mmask16>((1 << left) - 1);
                if constexpr (kY == DType::f32) _mm512_mask_storeu_ps(p.y + at + 4 * o, there, (__m512)y[0]);
                else _mm256_mask_storeu_epi16(p.y + at + 2 * o, there, (__m256i)_mm512_cvtneps_pbh((__m512)y[0]));
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
// channels from C on are zero. Without a multiplier x itself.
template <int kBlocks, bool kAffine, bool kSilu, DType kX>
DIFUSORES_INLINE void activate(const GemmPairsArgs& a, const char* x, int64_t n, int64_t c, char* to, int64_t bytes) {
    constexpr int kVectors = 2 * kBlocks;
    const float* const multiplier = static_cast<const float*>(a.multiplier.ptr) + n * a.multiplier.row_stride;
    const float* const offset = static_cast<const float*>(a.offset.ptr) + n * a.offset.row_stride;
    f32v t[kVectors];
    for (int k = 0; k < kVectors; ++k) {
        const int64_t at = c + k * kWidth;
        if (at + kWidth <= a.c) {
            t[k] = load<kX>(x, at);
            if constexpr (kAffine) t[k] = t[k] * load<DType::f32>(multiplier, at) + load<DType::f32>(offset, at);
        } else {
            const int left = at < a.c ? static_cast<int>(a.c - at) : 0;
            t[k] = load_tail<kX>(x, at, left);
            if constexpr (kAffine)
                t[k] = t[k] * load_tail<DType::f32>(multiplier, at, left) + load_tail<DType::f32>(offset, at, left);
        }
    }
    if constexpr (kSilu) rounded_silu(t);
    for (int k = 0; k < kBlocks; ++k) {
        const f32v pair[2] = {t[2 * k], t[2 * k + 1]};
        store_all<DType::bf16>(to + k * bytes, 0, pair);
    }
}

template <bool kAffine, bool kSilu, DType kX>
void activate_pixel(const GemmPairsArgs& a, const char* x, int64_t n, char* to, int64_t bytes) {
    int64_t c = 0;
    for (; c + kStep < a.c; c += 2 * kStep, to += 2 * bytes) activate<2, kAffine, kSilu, kX>(a, x, n, c, to, bytes);
    if (c < a.c) activate<1, kAffine, kSilu, kX>(a, x, n, c, to, bytes);
}

// A pixel's channels, or zeros where x is nullptr, to `to`, `bytes` from one block of 32 to the next.
void arrange_pixel(const GemmPairsArgs& a, const char* x, int64_t n, char* to, int64_t bytes) {
    const bool rounds = a.dtype == DType::f32;
    if (x && a.multiplier.ptr) {
        if (rounds)
            (a.silu ? activate_pixel<true, true, DType::f32> : activate_pixel<true, false, DType::f32>)(a, x, n, to,
                                                                                                        bytes);
        else
            (a.silu ? activate_pixel<true, true, DType::bf16> : activate_pixel<true, false, DType::bf16>)(a, x, n, to,
                                                                                                          bytes);
    } else if (x && rounds) {
        activate_pixel<false, false, DType::f32>(a, x, n, to, bytes);
    } else {
        for (int64_t c = 0; c < a.c; c += kStep, to += bytes) {
            const __mmask64 there = x ? ~0ULL >> (64 - 2 * at_most(a.c - c, kStep)) : 0;
            _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(there, x + 2 * c));
        }
    }
}

// The blocks of a run times the panels [p0, p1).
template <bool kGeglu, DType kY>
void multiply_run(const GemmPairsArgs& a, const Block* blocks, int64_t count, int64_t p0, int64_t p1, float* scratch) {
    const int64_t steps = a.kernel_h * a.kernel_w * ((a.c + kStep - 1) / kStep);
    const int64_t chunks = (steps + kChunk - 1) / kChunk, chunk = (steps + chunks - 1) / chunks;
    const int64_t panels = (a.o + kColumns - 1) / kColumns, group = steps <= kShort ? kGroup : 1,
                  columns = kGeglu ? kWidth : kColumns;
    alignas(64) float sums[2][2 * kTileSums];
    Pending pending{};
    pending.y = static_cast<char*>(a.y), pending.residual = static_cast<const char*>(a.residual);
    pending.apart = kBytes<kY> * (kGeglu ? a.o / 2 : a.o);
    Part part{};
    part.row = 2 * (a.arranged ? kStep * (a.split_w ? 1 : a.stride_w) : a.c), part.y_row = pending.apart;
    for (int64_t q0 = p0, which = 0; q0 < p1; q0 += group) {
        const int64_t q1 = at_most(q0 + group, p1), passes = count * (q1 - q0);
        Terms terms[kGroup][2];  // of the first and second tile, where they are of two images
        for (int64_t step = 0; step < steps; step += chunk) {
            const char* const b = static_cast<const char*>(a.packed) + (q0 * steps + step) * kStepBytes;
            const bool last = step + chunk >= steps;
            part.steps = at_most(chunk, steps - step), part.place = a.place + step;
            // What comes next, the next chunk or panels, is asked for over all blocks.
            const int64_t more = last ? at_most(q1 - q0, panels - q1) : 1;
            part.ahead = b + ((q1 - q0 - 1) * steps + part.steps) * kStepBytes;
            part.lines = (32 * more + passes - 1) / passes;
            const char* const end = part.ahead + more * part.steps * kStepBytes;
            for (int64_t t = 0; t < count; ++t) {
                const Block& block = blocks[t];
                part.a0 = block.a[0], part.a1 = block.a[1];
                float* const kept = scratch + 2 * t * kTileSums;
                part.before = step ? kept : nullptr;
                for (int64_t p = q0; p < q1; ++p) {
                    part.b = b + (p - q0) * steps * kStepBytes;
                    part.m = last ? sums[which] : kept;
                    part.next = p == p0 && !a.arranged && t + 1 < count ? blocks[t + 1].a[0] : nullptr;
                    if (part.ahead >= end) part.lines = 0;
                    const int64_t first = pending.apart * block.row[0] + kBytes<kY> * p * columns;
                    const bool whole = block.rows[0] == kTile && (block.tiles == 1 || block.rows[1] == kTile) &&
                                       (p + 1) * kColumns <= a.o;
                    part.y = last && whole ? pending.y + first : nullptr;
                    part.residual = pending.residual ? pending.residual + first : nullptr;
                    if (block.tiles == 2) multiply<2, kGeglu, kY>(part, pending);
                    else multiply<1, kGeglu, kY>(part, pending);
                    part.ahead += 64 * part.lines * part.steps;
                    if (!last) continue;
                    finish_rest<kGeglu, kY>(pending);
                    pending.m = part.m, pending.unit = 0, pending.units = whole ? block.tiles * kUnits : 0;
                    for (int64_t k = 0; k < block.tiles; ++k) {
                        const int64_t image = a.add.ptr ? block.image[k] : 0;
                        pending.terms[k] = terms[p - q0][a.add.ptr && image != block.image[0]].of(a, image, p);
                        pending.place[k] = pending.apart * block.row[k] + kBytes<kY> * p * columns;
                    }
                    if (!whole)
                        finish_tail<kGeglu, kY>(pending, block,
                                                kGeglu ? kWidth : at_most(a.o - p * kColumns, kColumns));
                    which ^= 1;
                }
            }
        }
        finish_rest<kGeglu, kY>(pending);
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
            const int64_t at = (((a.first + n) * a.h + iy) * a.w + ix) * a.c * (a.dtype == DType::f32 ? 4 : 2);
            const char* const x = inside ? static_cast<const char*>(a.x) + at : nullptr;
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
    const int64_t total = a.images * ((a.down * a.out_w + kTile - 1) / kTile);
    const int64_t panels = (a.o + kColumns - 1) / kColumns, shares = (panels + a.panels - 1) / a.panels;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / shares * a.run, count = at_most(a.run, total - first);
        const int64_t p0 = task % shares * a.panels, p1 = at_most(p0 + a.panels, panels);
        Block blocks[(kGemmRunTiles + 1) / 2];
        for (int64_t t = 0; t < count; t += 2) blocks[t / 2] = block_of(a, first + t, at_most(2, count - t));
        constexpr auto kF32 = DType::f32, kBf16 = DType::bf16;
        const auto run = a.geglu ? (a.dtype == kF32 ? multiply_run<true, kF32> : multiply_run<true, kBf16>)
                                 : (a.dtype == kF32 ? multiply_run<false, kF32> : multiply_run<false, kBf16>);
        run(a, blocks, (count + 1) / 2, p0, p1, scratch);
    }
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
