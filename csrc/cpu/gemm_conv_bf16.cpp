// gemm_conv in bf16, sums in fp32: for the levels with products of bf16 pairs.
//
// x, y, residual are [N, H, W, C] in memory. Weights come in panels of 32 columns, packed as pairs of input channels:
// [taps * C / 2][32][2], the channels of a tap rounded up to 32. A task is a run of rows and a panel. Rows of a 1x1
// convolution that fill whole tiles are read where they lie; others are gathered once per run as tiles of 16 rows by 32
// channels, zeros outside the image. The sum runs over taps and channels in order in blocks of kDepth, of which the
// panel's part stays in L1, and is never divided: an output's bits depend on its inputs alone, not on the batch or
// threads. Least bytes: x, y, residual and the weights once.
#include "amx.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kStep = kGemmPairStep;
constexpr int64_t kLine = kGemmPairColumns * 4;  // bytes of a row of packed pairs, and of a row of sums
constexpr int64_t kTileRows = 16, kTileBytes = 64 * kTileRows;

DIFUSORES_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
DIFUSORES_INLINE int64_t rounded(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

// bf16 rows in groups of 16: bytes from row to row, from group to group, and from 32 channels to the next.
struct Rows {
    const char* a;
    int64_t row, group, step;
};

#if defined(__AMX_BF16__)
// m[16 groups][32] (+)= rows[16 groups][depth] b[depth][32].
void multiply(const Rows& rows, const char* b, float* m, int64_t groups, int64_t depth, bool accumulate) {
    const TileProduct p{rows.a, rows.row, rows.group, rows.step, b, reinterpret_cast<char*>(m), kLine, depth / kStep};
    tiled_product<2>(p, groups, accumulate);
}
#else
void multiply(Rows rows, const char* b, float* m, int64_t groups, int64_t depth, bool accumulate) {
    constexpr int kRows = 8, kVectors = 2;
    for (int64_t r = 0; r < groups * kTileRows; r += kRows, m += kRows * kGemmPairColumns) {
        const char* a = rows.a + r / kTileRows * rows.group + r % kTileRows * rows.row;
        const char* w = b;
        __m512 sum[kRows][kVectors];
        for (int i = 0; i < kRows; ++i)
            for (int k = 0; k < kVectors; ++k)
                sum[i][k] =
                    accumulate ? (__m512)load<DType::f32>(m, i * kGemmPairColumns + k * kWidth) : _mm512_setzero_ps();
        for (int64_t step = 0; step < depth; step += kStep, a += rows.step)
            for (int64_t pair = 0; pair < 4 * kWidth; pair += 4, w += kLine)
                for (int i = 0; i < kRows; ++i) {
                    int32_t both;
                    __builtin_memcpy(&both, a + i * rows.row + pair, 4);
                    for (int k = 0; k < kVectors; ++k)
                        sum[i][k] = _mm512_dpbf16_ps(sum[i][k], (__m512bh)_mm512_set1_epi32(both),
                                                     (__m512bh)_mm512_loadu_si512(w + 64 * k));
                }
        for (int i = 0; i < kRows; ++i)
            for (int k = 0; k < kVectors; ++k) store<DType::f32>(m, i * kGemmPairColumns + k * kWidth, (f32v)sum[i][k]);
    }
}
#endif

// Steps [begin, end) of 32 channels of one tap each, of the rows of output pixels [first, first + count), in tiles that
// are written one after the other: groups of 16 rows, in each all steps.
void gather(const GemmConvArgs& a, int64_t first, int64_t count, int64_t begin, int64_t end, char* to) {
    static constexpr char kZeros[64] = {};
    const char* const x = static_cast<const char*>(a.x);
    const int64_t per_tap = (a.c + kStep - 1) / kStep;
    for (int64_t r = 0; r < count; r += kTileRows) {
        int64_t image[kTileRows], down[kTileRows], across[kTileRows];  // of each row: where its first tap is
        for (int64_t i = 0; i < kTileRows; ++i) {
            const int64_t p = at_most(first + r + i, first + count - 1);
            down[i] = p / a.out_w % a.out_h * a.stride_h - a.pad_h, across[i] = p % a.out_w * a.stride_w - a.pad_w;
            image[i] = p / (a.out_w * a.out_h) * a.h;
        }
        for (int64_t step = begin; step < end;) {
            const int64_t tap = step / per_tap, ky = tap / a.kernel_w, kx = tap % a.kernel_w;
            const char* from[kTileRows];
            int64_t size[kTileRows];  // bytes of a channel, 0 outside the image
            for (int64_t i = 0; i < kTileRows; ++i) {
                const int64_t iy = down[i] + ky, ix = across[i] + kx;
                const bool inside = r + i < count && iy >= 0 && iy < a.h && ix >= 0 && ix < a.w;
                from[i] = inside ? x + 2 * ((image[i] + iy) * a.w + ix) * a.c : kZeros;
                size[i] = inside ? 2 : 0;
            }
            for (const int64_t last = at_most(end, (tap + 1) * per_tap); step < last; ++step) {
                const int64_t c = (step - tap * per_tap) * kStep;
                const __mmask64 there = ~0ULL >> (64 - 2 * at_most(a.c - c, kStep));
                for (int64_t i = 0; i < kTileRows; ++i, to += 64)
                    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(there, from[i] + size[i] * c));
            }
        }
    }
}

// y of rows [first, first + count) and of the panel's columns, from o0 on, of their sums m.
void finish(const GemmConvArgs& a, const float* m, int64_t first, int64_t count, int64_t o0) {
    const int64_t wide = at_most(a.o - o0, kGemmPairColumns);
    alignas(64) float bias[kGemmPairColumns] = {};
    for (int64_t o = 0; o < wide; ++o) bias[o] = param(a.bias, 0, o0 + o, 0.0f);
    for (int64_t r = 0; r < count; ++r, m += kGemmPairColumns)
        for (int64_t o = 0; o < wide; o += kWidth) {
            const int left = static_cast<int>(at_most(wide - o, kWidth));
            const int64_t place = (first + r) * a.o + o0 + o;
            f32v y = load<DType::f32>(m, o) + load<DType::f32>(bias, o);
            if (left == kWidth) {
                if (a.residual) y += load<DType::bf16>(a.residual, place);
                store<DType::bf16>(a.y, place, y);
            } else {
                if (a.residual) y += load_tail<DType::bf16>(a.residual, place, left);
                store_tail<DType::bf16>(a.y, place, y, left);
            }
        }
}

}  // namespace

void gemm_conv_bf16(const GemmConvArgs& a, float* scratch, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
    const Tiles tiles;
#endif
    const int64_t steps = a.kernel_h * a.kernel_w * ((a.c + kStep - 1) / kStep), depth = steps * kStep;
    const int64_t rows = a.n * a.out_h * a.out_w, columns = a.panels * kGemmPairColumns;
    const int64_t shares = (a.o + columns - 1) / columns;  // tasks of a run
    char* const gathered = reinterpret_cast<char*>(scratch + a.run * columns);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / shares * a.run, count = at_most(a.run, rows - first);
        const int64_t o0 = task % shares * columns, o1 = at_most(o0 + columns, a.o);
        const bool gathers = a.gathers || a.c % kStep || count % kTileRows;
        for (int64_t k = 0; k < depth; k += kGemmChunk) {
            const int64_t part = at_most(kGemmChunk, depth - k);
            Rows from{static_cast<const char*>(a.x) + 2 * (first * a.c + k), 2 * a.c, 2 * kTileRows * a.c, 64};
            if (gathers) {
                gather(a, first, count, k / kStep, (k + part) / kStep, gathered);
                from = {gathered, 64, part / kStep * kTileBytes, kTileBytes};
            }
            for (int64_t o = o0; o < o1; o += kGemmPairColumns)
                multiply(from, static_cast<const char*>(a.packed) + 2 * (o * depth + k * kGemmPairColumns),
                         scratch + (o - o0) * a.run, (count + kTileRows - 1) / kTileRows, part, k > 0);
        }
        for (int64_t o = o0; o < o1; o += kGemmPairColumns) finish(a, scratch + (o - o0) * a.run, first, count, o);
    }
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
