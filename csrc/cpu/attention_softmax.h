// Softmax over blocks of keys: maxima that move, exponentials, sums. A vector holds kWidth queries.
#pragma once
#include "attention_product.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

// d[k] = 2^(d[k] c), 0 where d[k] < low = -125 / c; NaN stays. `short`: a polynomial of degree 3 (relative error 1e-4)
// for weights that are rounded to bf16, else 5 (1.4e-7). 2^0 is 1 exactly: what a query has summed must not change when
// another query's maximum moves. With AVX-512 2^x is 2^(x - floor x) times 2^(floor x), an instruction each for the
// difference and the product; else the exponent is taken apart as in exp_f32.
#if defined(__AVX512F__)
template <int kCount, bool kShort>
DIFUSORES_INLINE void exp2_of(f32v (&d)[kCount], float c, float low) {
    constexpr int kFloor = 9;  // round down, raise nothing
    f32v x[kCount], r[kCount], p[kCount];
    for (int k = 0; k < kCount; ++k) x[k] = d[k] * c;
    for (int k = 0; k < kCount; ++k) r[k] = (f32v)_mm512_reduce_ps((__m512)x[k], kFloor);
    if constexpr (kShort) {
        for (int k = 0; k < kCount; ++k) p[k] = r[k] * 0.0770669878f + 0.227645054f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.695116758f;
    } else {
        for (int k = 0; k < kCount; ++k) p[k] = r[k] * 0.00186713168f + 0.00901702698f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.0557999164f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.240164444f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.693151295f;
    }
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 1.0f;
    for (int k = 0; k < kCount; ++k) {
        const __mmask16 counts = _mm512_cmp_ps_mask((__m512)d[k], _mm512_set1_ps(low), _CMP_NLT_UQ);
        d[k] = (f32v)_mm512_maskz_scalef_ps(counts, (__m512)p[k], (__m512)x[k]);
    }
}
#else
template <int kCount, bool kShort>
DIFUSORES_INLINE void exp2_of(f32v (&d)[kCount], float c, float low) {
    constexpr float kMagic = 12582912.0f;
    f32v t[kCount], r[kCount], p[kCount];
    for (int k = 0; k < kCount; ++k) t[k] = d[k] * c + kMagic;
    for (int k = 0; k < kCount; ++k) r[k] = d[k] * c - (t[k] - kMagic);
    if constexpr (kShort) {
        for (int k = 0; k < kCount; ++k) p[k] = r[k] * 0.0550089329f + 0.242210969f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.693282902f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 1.0f;
    } else {
        for (int k = 0; k < kCount; ++k) p[k] = r[k] * 0.00132647273f + 0.00967151299f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.0555073358f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.240222424f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.693147004f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 1.0f;
    }
    for (int k = 0; k < kCount; ++k) {
        const i32v bits = (i32v)p[k] + ((i32v)t[k] << 23);
        d[k] = (f32v)((d[k] < low) ? i32v{} : bits);
    }
}
#endif

// What a block of queries carries from block to block of keys.
struct State {
    float *max, *sum;     // [kQueries]
    float* out;           // [Dv rounded up to kWidth, kQueries]
    float c, low, reach;  // exponents are c (score - max)
};

// A query's weights are relative to 2^(c max), and max moves only to a score above max + reach, an exponent of kReach:
// so hardly ever after the first block. What was summed so far is then brought to it.
constexpr float kReach = 8.0f, kFar = 1e30f;

template <int V>
void move_maxima(const State& state, const float* scores, int64_t keys, int64_t dv, bool first) {
    f32v max[V], old[V];
    for (int v = 0; v < V; ++v) max[v] = splat(kLowest);
    for (int64_t n = 0; n < keys; ++n)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) max[v] = larger(max[v], load<DType::f32>(scores, n * kQueries + v * kWidth));
    i32v any = {};
    for (int v = 0; v < V; ++v) {
        old[v] = load<DType::f32>(state.max, v * kWidth);
        const i32v moves = max[v] > (first ? old[v] : old[v] + state.reach);
        max[v] = moves ? max[v] : old[v];
        store<DType::f32>(state.max, v * kWidth, max[v]);
        any |= moves;
    }
    if (first) return;
    int moved = 0;
    for (int k = 0; k < kWidth; ++k) moved |= any[k];
    if (!moved) return;
    for (int v = 0; v < V; ++v) old[v] -= max[v];
    exp2_of<V, false>(old, state.c, state.low);
    for (int v = 0; v < V; ++v)
        store<DType::f32>(state.sum, v * kWidth, load<DType::f32>(state.sum, v * kWidth) * old[v]);
    for (int64_t d = 0; d < dv; ++d)
        for (int v = 0; v < V; ++v) {
            const int64_t i = d * kQueries + v * kWidth;
            store<DType::f32>(state.out, i, load<DType::f32>(state.out, i) * old[v]);
        }
}

// Scores to weights in place, and their sums.
template <int V, bool kShort>
void exponentials(const State& state, float* scores, int64_t keys) {
    f32v max[V], sum[V] = {};
    for (int v = 0; v < V; ++v) max[v] = load<DType::f32>(state.max, v * kWidth);
    for (int64_t n = 0; n < keys; ++n, scores += kQueries) {
        f32v p[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) p[v] = load<DType::f32>(scores, v * kWidth) - max[v];
        exp2_of<V, kShort>(p, state.c, state.low);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            sum[v] += p[v];
            store<DType::f32>(scores, v * kWidth, p[v]);
        }
    }
    for (int v = 0; v < V; ++v)
        store<DType::f32>(state.sum, v * kWidth, load<DType::f32>(state.sum, v * kWidth) + sum[v]);
}

#if defined(__AVX512BF16__)
// The same, weights to pairs of bf16 of two keys; from `keys` on to a whole chunk they are zero.
template <int V, bool kShort>
void exponentials_in_pairs(const State& state, const float* scores, float* pairs, int64_t keys) {
    u32v order{};  // bf16 of both keys in turn
    for (int k = 0; k < kWidth; ++k) order[k] = static_cast<uint32_t>(k | (k + 16) << 16);
    f32v max[V], sum[V] = {};
    for (int v = 0; v < V; ++v) max[v] = load<DType::f32>(state.max, v * kWidth);
    for (int64_t n = 0; n < round_up(keys, kChunk); n += 2, scores += 2 * kQueries, pairs += kQueries) {
        f32v p[2][V] = {};
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            if (n + k >= keys) break;
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) p[k][v] = load<DType::f32>(scores, k * kQueries + v * kWidth) - max[v];
            exp2_of<V, kShort>(p[k], state.c, state.low);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[v] += p[k][v];
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1][v], (__m512)p[0][v]);
            store<DType::f32>(pairs, v * kWidth, (f32v)_mm512_permutexvar_epi16((__m512i)order, both));
        }
    }
    for (int v = 0; v < V; ++v)
        store<DType::f32>(state.sum, v * kWidth, load<DType::f32>(state.sum, v * kWidth) + sum[v]);
}
#endif

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
