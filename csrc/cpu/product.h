// The fp32 micro-kernel of winograd_conv and gemm_conv: a few rows times a few vectors of columns, in registers.
#pragma once
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

// A micro-kernel keeps kRows rows times kVectors vectors of output channels in registers.
constexpr int kRows = 6, kVectors = kWidth == 16 ? 4 : 2;

DIFUSORES_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
DIFUSORES_INLINE int64_t rounded(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }
DIFUSORES_INLINE f32v get(const float* p) { return load<DType::f32>(p, 0); }
DIFUSORES_INLINE void put(float* p, f32v v) { store<DType::f32>(p, 0, v); }

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
    const float* const v = p.v + t * p.width;
    float* const m = p.m + t * p.wide;
    const float* const next_v = v + kCount * p.width;
    const float* const next_m = m + kCount * p.wide;
    const float* const next_u = p.ahead + t * p.channels * p.step;
    const int64_t step = kCount * p.step;
    f32v sum[kCount][kVectorCount] = {};
    for (int64_t c = 0; c < p.channels; ++c) {
        f32v b[kVectorCount];
        for (int k = 0; k < kVectorCount; ++k) b[k] = get(p.u + c * p.wide + k * kWidth);
        __builtin_prefetch(next_v + kCount * c);
        __builtin_prefetch(next_m + kCount * c);
        __builtin_prefetch(next_u + step * c);
        for (int i = 0; i < kCount; ++i) {
            const f32v a = splat(v[i * p.width + c]);
            for (int k = 0; k < kVectorCount; ++k) sum[i][k] += a * b[k];
        }
    }
    for (int i = 0; i < kCount; ++i)
        for (int k = 0; k < kVectorCount; ++k) {
            float* const to = m + i * p.wide + k * kWidth;
            put(to, kFirst ? sum[i][k] : get(to) + sum[i][k]);
        }
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
