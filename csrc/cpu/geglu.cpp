// y = x[:, :D] * GELU(x[:, D:]),  GELU(g) = g / 2 * (1 + erf(g / sqrt(2))), or its approximation by tanh.
//
// Bytes: 2 D elements of a row in, D out, once each: at the widths of a UNet that is the time. Arithmetic is fp32,
// about 30 operations a vector, kEach vectors step by step together, because each is one chain. Layout: contiguous
// rows.
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int kEach = 4;  // vectors that are under way together

// x[k] = erf(x[k]) to 3e-7, relative: x P(x^2) / Q(x^2) up to 3.92, from where on fp32 rounds it to 1. The coefficients
// are a minimax fit of the relative error, 2e-8.
template <int kCount>
DIFUSORES_INLINE void erf_f32(f32v (&x)[kCount]) {
    f32v z[kCount], p[kCount], q[kCount];
    for (int k = 0; k < kCount; ++k) z[k] = x[k] * x[k];
    for (int k = 0; k < kCount; ++k) p[k] = z[k] * 2.0460274454e-6f + 2.8484317591e-4f;
    for (int k = 0; k < kCount; ++k) q[k] = z[k] * 3.8047758e-5f + 1.1638548455e-3f;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * z[k] + 3.7725386210e-3f;
    for (int k = 0; k < kCount; ++k) q[k] = q[k] * z[k] + 1.4983174391e-2f;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * z[k] + 5.2769258618e-2f;
    for (int k = 0; k < kCount; ++k) q[k] = q[k] * z[k] + 1.1418261379e-1f;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * z[k] + 1.9059351087e-1f;
    for (int k = 0; k < kCount; ++k) q[k] = q[k] * z[k] + 5.0224184990e-1f;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * z[k] + 1.1283791065f;
    for (int k = 0; k < kCount; ++k) q[k] = q[k] * z[k] + 1.0f;
    for (int k = 0; k < kCount; ++k) {
        const f32v one = x[k] < 0.0f ? splat(-1.0f) : splat(1.0f);
        x[k] = x[k] * x[k] > 15.3664f ? one : x[k] * p[k] / q[k];  // a NaN is not greater
    }
}

// v[k] *= GELU(g[k])
template <bool kTanh, int kCount>
DIFUSORES_INLINE void gate(f32v (&v)[kCount], const f32v (&g)[kCount]) {
    f32v t[kCount];
    if constexpr (kTanh) {  // (1 + tanh(a)) / 2 = 1 / (1 + exp(-2 a)), which fp32's tanh ends at 0 below -10
        for (int k = 0; k < kCount; ++k) t[k] = 1.5957691216057308f * (g[k] + 0.044715f * g[k] * g[k] * g[k]);
        exp_f32<kCount, true>(t);
        for (int k = 0; k < kCount; ++k) v[k] *= g[k] < -10.0f ? g[k] * 0.0f : g[k] / (1.0f + t[k]);
    } else {
        for (int k = 0; k < kCount; ++k) t[k] = g[k] * 0.70710678118654752f;
        erf_f32(t);
        for (int k = 0; k < kCount; ++k) v[k] *= g[k] * (0.5f * t[k] + 0.5f);
    }
}

template <DType D, bool kTanh>
void rows(const GegluArgs& a, int64_t begin, int64_t end) {
    const int64_t d = a.columns;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t from = 2 * row * d, to = row * d;
        int64_t i = 0;
        for (; i + kEach * kWidth <= d; i += kEach * kWidth) {
            f32v v[kEach], g[kEach];
            for (int k = 0; k < kEach; ++k) v[k] = load<D>(a.x, from + i + k * kWidth);
            for (int k = 0; k < kEach; ++k) g[k] = load<D>(a.x, from + d + i + k * kWidth);
            gate<kTanh>(v, g);
            store_all<D>(a.y, to + i, v);
        }
        for (; i < d; i += kWidth) {
            const int count = static_cast<int>(d - i < kWidth ? d - i : kWidth);
            f32v v[1] = {load_tail<D>(a.x, from + i, count)};
            const f32v g[1] = {load_tail<D>(a.x, from + d + i, count)};
            gate<kTanh>(v, g);
            store_tail<D>(a.y, to + i, v[0], count);
        }
    }
}

template <DType D>
void rows(const GegluArgs& a, int64_t begin, int64_t end) {
    a.tanh ? rows<D, true>(a, begin, end) : rows<D, false>(a, begin, end);
}

}  // namespace

void geglu(const GegluArgs& a, int64_t begin, int64_t end) {
    if (a.dtype == DType::f32) rows<DType::f32>(a, begin, end);
    else if (a.dtype == DType::bf16) rows<DType::bf16>(a, begin, end);
    else rows<DType::f16>(a, begin, end);
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
