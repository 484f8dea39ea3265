// value * GELU(gate), the arithmetic of geglu and of a product that ends in it.
#pragma once
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

// p / q; rounded: to 2^-14, before it is rounded to bf16. Intel's division takes longer than all the rest of erf.
template <bool kRounded>
DIFUSORES_INLINE f32v quotient(f32v p, f32v q) {
#if defined(__AVX512F__)
    if constexpr (kRounded) return p * (f32v)_mm512_rcp14_ps((__m512)q);
#endif
    return p / q;
}

// x[k] = erf(x[k]) to 3e-7, relative: x P(x^2) / Q(x^2) up to 3.92, from where on fp32 rounds it to 1. The coefficients
// are a minimax fit of the relative error, 2e-8.
template <bool kRounded, int kCount>
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
        x[k] = x[k] * x[k] > 15.3664f ? one : x[k] * quotient<kRounded>(p[k], q[k]);  // a NaN is not greater
    }
}

// v[k] *= GELU(g[k])
template <bool kTanh, bool kRounded = false, int kCount>
DIFUSORES_INLINE void gate(f32v (&v)[kCount], const f32v (&g)[kCount]) {
    f32v t[kCount];
    if constexpr (kTanh) {  // (1 + tanh(a)) / 2 = 1 / (1 + exp(-2 a)), which fp32's tanh ends at 0 below -10
        for (int k = 0; k < kCount; ++k) t[k] = 1.5957691216057308f * (g[k] + 0.044715f * g[k] * g[k] * g[k]);
        exp_f32<kCount, true>(t);
        for (int k = 0; k < kCount; ++k) v[k] *= g[k] < -10.0f ? g[k] * 0.0f : g[k] / (1.0f + t[k]);
    } else {
        for (int k = 0; k < kCount; ++k) t[k] = g[k] * 0.70710678118654752f;
        erf_f32<kRounded>(t);
        for (int k = 0; k < kCount; ++k) v[k] *= g[k] * (0.5f * t[k] + 0.5f);
    }
}

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
