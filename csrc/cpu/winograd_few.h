// The product of F(4x4, 3x3) with few tiles, where reading and transforming the weights decides: each row of U = G g
// G^T is made in registers and multiplied at once, so that U is never written. A row at a time takes 93 vector
// operations a pair of vectors where two rows that share their parts take 81; the accumulators of six points leave no
// room for more.
#pragma once
#include "winograd_tiles.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kTogether = kWidth == 16 ? 4 : 2;  // tiles whose sums of six points stay in registers
constexpr int64_t kFewTiles = kWidth == 16 ? 8 : 2;

// Six points of U, of the nine weights of a vector of output channels: row kRow of G g, times G^T.
template <int kRow>
DIFUSORES_INLINE void weights_row(const float* g, f32v (&u)[kInner]) {
    f32v line[3];
    for (int x = 0; x < 3; ++x) {
        const float* const from = g + x * kMaxWidth;
        const f32v g0 = get(from), g2 = get(from + 6 * kMaxWidth);
        if constexpr (kRow == 0) {
            line[x] = g0 * kZero;
        } else if constexpr (kRow == 5) {
            line[x] = g2;
        } else {
            const f32v g1 = get(from + 3 * kMaxWidth);
            const f32v even = kRow < 3 ? even_near(g0, g2) : even_far(g0, g2);
            const f32v odd = kRow < 3 ? odd_near(g1) : odd_far(g1);
            line[x] = kRow % 2 ? even + odd : even - odd;
        }
    }
    weights_to_points(line, u);
}

// Weights g[channels][9][16] of a vector of output channels times the points of row kRow of kCount tiles, into m or,
// not `first`, onto it. ahead: weights that come next, a share of which is asked for, or nullptr.
template <int kRow, int kCount>
void multiply_few(const float* v, const float* g, float* m, int64_t stride, int64_t wide, int64_t channels, bool first,
                  const float* ahead) {
    constexpr int kBegin = 2 * kRow, kEnd = kBegin + 2 < 9 ? kBegin + 2 : 9;  // lines of a channel's nine
    f32v sum[kInner][kCount] = {};
    for (int64_t c = 0; c < channels; ++c, g += kNine) {
        if (ahead) {
            for (int line = kBegin; line < kEnd; ++line) __builtin_prefetch(ahead + line * kMaxWidth, 0, 2);
            ahead += kNine;
        }
        f32v u[kInner];
        weights_row<kRow>(g, u);
        for (int x = 0; x < kInner; ++x)
            for (int i = 0; i < kCount; ++i) sum[x][i] += splat(v[x * stride + i * kBlock + c]) * u[x];
    }
    for (int x = 0; x < kInner; ++x)
        for (int i = 0; i < kCount; ++i) {
            float* const to = m + x * stride + i * wide;
            put(to, first ? sum[x][i] : get(to) + sum[x][i]);
        }
}

template <int kRow>
void multiply_few_row(const float* v, const float* g, float* m, int64_t stride, int64_t wide, int64_t channels,
                      int64_t tiles, bool first, const float* ahead) {
    v += kRow * kInner * stride, m += kRow * kInner * stride;
    for (int64_t runs = (tiles + kTogether - 1) / kTogether; runs; --runs) {
        const int64_t count = (tiles + runs - 1) / runs;
        const auto run = [&](const auto& multiply) { multiply(v, g, m, stride, wide, channels, first, ahead); };
        if (count == 1) run(multiply_few<kRow, 1>);
        if (count == 2) run(multiply_few<kRow, 2>);
        if constexpr (kTogether == 4) {
            if (count == 3) run(multiply_few<kRow, 3>);
            if (count == 4) run(multiply_few<kRow, 4>);
        }
        tiles -= count, v += count * kBlock, m += count * wide, ahead = nullptr;
    }
}

// A block of channels of all 36 points of a few tiles: m (+)= v U of the weights g[wide / 16][channels][9][16]. next:
// the block that comes then.
void multiply_block(const float* v, const float* g, float* m, int64_t stride, int64_t wide, int64_t channels,
                    int64_t tiles, bool first, const float* next) {
    for (int64_t o = 0; o < wide; o += kWidth) {
        const float* const from = g + o / kMaxWidth * channels * kNine + o % kMaxWidth;
        const float* const ahead = o + kMaxWidth < wide ? from + channels * kNine : next;
        multiply_few_row<0>(v, from, m + o, stride, wide, channels, tiles, first, ahead);
        multiply_few_row<1>(v, from, m + o, stride, wide, channels, tiles, first, ahead);
        multiply_few_row<2>(v, from, m + o, stride, wide, channels, tiles, first, ahead);
        multiply_few_row<3>(v, from, m + o, stride, wide, channels, tiles, first, ahead);
        multiply_few_row<4>(v, from, m + o, stride, wide, channels, tiles, first, ahead);
        multiply_few_row<5>(v, from, m + o, stride, wide, channels, tiles, first, ahead);
    }
}

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
