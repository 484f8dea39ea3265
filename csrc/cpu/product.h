// The fp32 micro-kernel of winograd_conv and gemm_conv: a few rows times a few vectors of columns, in registers.
#pragma once
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

// A micro-kernel keeps kRows rows times kVectors vectors of output channels in registers.
constexpr int kRows = 6, kVectors = kWidth == 16 ? 4 : 2;
constexpr int64_t kLine = 16;  // floats of a line of the cache

DIFUSORES_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
DIFUSORES_INLINE int64_t rounded(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }
DIFUSORES_INLINE f32v get(const float* p) { return load<DType::f32>(p, 0); }
DIFUSORES_INLINE void put(float* p, f32v v) { store<DType::f32>(p, 0, v); }

// kCount rows of floats, `width` apart, as addresses that take few registers: every third row, and one distance.
template <int kCount>
struct Rows {
    const float* at[(kCount + 2) / 3];
    int64_t width;
    DIFUSORES_INLINE Rows(const float* v, int64_t apart) : width(apart) {
        DIFUSORES_UNROLL
        for (int j = 0; j < (kCount + 2) / 3; ++j) at[j] = v + 3 * j * apart;
    }
    DIFUSORES_INLINE float get(int row, int64_t c) const { return at[row / 3][row % 3 * width + c]; }
    DIFUSORES_INLINE void advance(int64_t count) {
        DIFUSORES_UNROLL
        for (int j = 0; j < (kCount + 2) / 3; ++j) at[j] += count;
    }
};

template <int kCount, int kVectorCount>
using Accumulators = f32v[kCount][kVectorCount];

template <int kCount, int kVectorCount>
DIFUSORES_INLINE void clear(Accumulators<kCount, kVectorCount>& sum) {
    DIFUSORES_UNROLL
    for (int i = 0; i < kCount; ++i) {
        DIFUSORES_UNROLL
        for (int k = 0; k < kVectorCount; ++k) sum[i][k] = f32v{};
    }
}

// sum = m + sum, rows of m `wide` apart.
template <int kCount, int kVectorCount>
DIFUSORES_INLINE void add(Accumulators<kCount, kVectorCount>& sum, const float* m, int64_t wide) {
    DIFUSORES_UNROLL
    for (int i = 0; i < kCount; ++i) {
        DIFUSORES_UNROLL
        for (int k = 0; k < kVectorCount; ++k) sum[i][k] = get(m + i * wide + k * kWidth) + sum[i][k];
    }
}

template <int kCount, int kVectorCount>
DIFUSORES_INLINE void add_row(Accumulators<kCount, kVectorCount>& sum, const float* row) {
    DIFUSORES_UNROLL
    for (int k = 0; k < kVectorCount; ++k) {
        const f32v b = get(row + k * kWidth);
        DIFUSORES_UNROLL
        for (int i = 0; i < kCount; ++i) sum[i][k] += b;
    }
}

template <int kCount, int kVectorCount>
DIFUSORES_INLINE void store(const Accumulators<kCount, kVectorCount>& sum, float* m, int64_t wide) {
    DIFUSORES_UNROLL
    for (int i = 0; i < kCount; ++i) {
        DIFUSORES_UNROLL
        for (int k = 0; k < kVectorCount; ++k) put(m + i * wide + k * kWidth, sum[i][k]);
    }
}

// sum += v[kCount][channels] u[channels][kVectorCount], rows of v `width` and of u `wide` apart; v goes on by
// kChannels.
template <int kChannels, int kCount, int kVectorCount>
DIFUSORES_INLINE void multiply_add(Accumulators<kCount, kVectorCount>& sum, Rows<kCount>& v, const float* u,
                                   int64_t wide) {
    DIFUSORES_UNROLL
    for (int c = 0; c < kChannels; ++c) {
        f32v b[kVectorCount];
        DIFUSORES_UNROLL
        for (int k = 0; k < kVectorCount; ++k) b[k] = get(u + c * wide + k * kWidth);
        DIFUSORES_UNROLL
        for (int i = 0; i < kCount; ++i) {
            const f32v a = splat(v.get(i, c));
            DIFUSORES_UNROLL
            for (int k = 0; k < kVectorCount; ++k) sum[i][k] += a * b[k];
        }
    }
    v.advance(kChannels);
}

constexpr int kChannelsAtOnce = 4;

// Asks for the lines that begin in [p, p + count).
DIFUSORES_INLINE void ask(const float* p, int64_t count) {
    for (int64_t k = 0; k < count; k += kLine) __builtin_prefetch(p + k);
}

// Rows of v `width` apart, of u and m `wide`. `ahead` is what weights come next: `step` floats of them are asked for
// with each row and channel.
struct Panel {
    const float *v, *u;
    float* m;
    int64_t width, wide, channels;
    const float* ahead;
    int64_t step = 1;
};

// m[kCount][kVectors] (+)= v[kCount][channels] u[channels][kVectors]. Meanwhile the next rows of v and m, and a part of
// the next u, come nearer: v is read from beyond L2, u and m from L2.
template <int kCount, int kVectorCount, bool kFirst>
DIFUSORES_INLINE void multiply(const Panel& p, int64_t t) {
    constexpr int kAsked = kCount * kChannelsAtOnce;  // floats of each that are asked for at a time
    float* const m = p.m + t * p.wide;
    const float* next_v = p.v + (t + kCount) * p.width;
    const float* next_m = m + kCount * p.wide;
    const float* next_u = p.ahead + t * p.channels * p.step;
    const float* u = p.u;
    Rows<kCount> v(p.v + t * p.width, p.width);
    Accumulators<kCount, kVectorCount> sum;
    clear<kCount, kVectorCount>(sum);
    int64_t c = 0;
    for (; c + kChannelsAtOnce <= p.channels; c += kChannelsAtOnce, u += kChannelsAtOnce * p.wide) {
        ask(next_v, kAsked), ask(next_m, kAsked), ask(next_u, kAsked * p.step);
        next_v += kAsked, next_m += kAsked, next_u += kAsked * p.step;
        multiply_add<kChannelsAtOnce, kCount, kVectorCount>(sum, v, u, p.wide);
    }
    for (; c < p.channels; ++c, u += p.wide) multiply_add<1, kCount, kVectorCount>(sum, v, u, p.wide);
    if constexpr (!kFirst) add<kCount, kVectorCount>(sum, m, p.wide);
    store<kCount, kVectorCount>(sum, m, p.wide);
}

// Rows in runs of kRows at most and of even lengths: a short run waits for its own sums.
template <int kVectorCount, bool kFirst>
void multiply_panel(const Panel& p, int64_t rows) {
    int64_t t = 0;
    for (int64_t runs = (rows + kRows - 1) / kRows; runs; --runs) {
        const int64_t count = (rows - t + runs - 1) / runs;
        switch (count) {
            case 6: multiply<6, kVectorCount, kFirst>(p, t); break;
            case 5: multiply<5, kVectorCount, kFirst>(p, t); break;
            case 4: multiply<4, kVectorCount, kFirst>(p, t); break;
            case 3: multiply<3, kVectorCount, kFirst>(p, t); break;
            case 2: multiply<2, kVectorCount, kFirst>(p, t); break;
            case 1: multiply<1, kVectorCount, kFirst>(p, t); break;
        }
        t += count;
    }
}

// All columns of a panel, `wide` of them.
template <bool kFirst>
void multiply_columns(const Panel& p, int64_t rows) {
    int64_t o = 0;
    const auto panel = [&] { return Panel{p.v, p.u + o, p.m + o, p.width, p.wide, p.channels, p.ahead, p.step}; };
    for (; o + kVectors * kWidth <= p.wide; o += kVectors * kWidth) multiply_panel<kVectors, kFirst>(panel(), rows);
    if constexpr (kVectors == 4) {
        switch ((p.wide - o) / kWidth) {
            case 3: multiply_panel<3, kFirst>(panel(), rows); break;
            case 2: multiply_panel<2, kFirst>(panel(), rows); break;
            case 1: multiply_panel<1, kFirst>(panel(), rows); break;
        }
    }
}

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
