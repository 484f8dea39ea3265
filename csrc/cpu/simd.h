// Vectors of kWidth floats in the compiler's vector extension: the same source for every ISA level, so that what is
// proved at one width holds at another. Included by files compiled per ISA, which see no STL and no torch header: an
// inline function compiled with AVX-512 could be the copy that the linker keeps for an older processor.
#pragma once
#include <cstdint>

#include "kernels.h"
#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float f32v __attribute__((vector_size(4 * kWidth)));
typedef int32_t i32v __attribute__((vector_size(4 * kWidth)));
typedef uint32_t u32v __attribute__((vector_size(4 * kWidth)));
typedef uint16_t u16v __attribute__((vector_size(2 * kWidth)));
typedef f32v f32v_mem __attribute__((aligned(4), may_alias));
typedef u16v u16v_mem __attribute__((aligned(2), may_alias));

#define DIFUSORES_INLINE inline __attribute__((always_inline))
// Before a loop over registers: left as a loop, their array would go through memory.
#if defined(__clang__)
#define DIFUSORES_UNROLL _Pragma("unroll")
#else
#define DIFUSORES_UNROLL _Pragma("GCC unroll 16")
#endif

DIFUSORES_INLINE f32v splat(float a) { return a - f32v{}; }

// --- loads and stores: element type D in memory, fp32 in registers ---

template <DType D>
DIFUSORES_INLINE f32v load(const void* p, int64_t i);
template <DType D>
DIFUSORES_INLINE void store(void* p, int64_t i, f32v v);

template <>
DIFUSORES_INLINE f32v load<DType::f32>(const void* p, int64_t i) {
    return *reinterpret_cast<const f32v_mem*>(static_cast<const float*>(p) + i);
}
template <>
DIFUSORES_INLINE void store<DType::f32>(void* p, int64_t i, f32v v) {
    *reinterpret_cast<f32v_mem*>(static_cast<float*>(p) + i) = v;
}

template <>
DIFUSORES_INLINE f32v load<DType::bf16>(const void* p, int64_t i) {
    const uint16_t* q = static_cast<const uint16_t*>(p) + i;
#if defined(__AVX512F__)
    return (f32v)((u32v)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)q)) << 16);
#elif defined(__AVX2__)
    return (f32v)((u32v)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q)) << 16);
#else
    return (f32v)(__builtin_convertvector(*reinterpret_cast<const u16v_mem*>(q), u32v) << 16);
#endif
}
// bf16 bits in the high half. Rounds to nearest even in integers: vcvtneps2bf16 flushes subnormal numbers, and the
// levels would differ in bits. A NaN keeps its high half, which is a NaN's: arithmetic makes quiet ones.
DIFUSORES_INLINE u32v round_bf16(f32v v) {
    const u32v bits = (u32v)v;
#if defined(__AVX512F__)
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    const __mmask16 odd = _mm512_mask_test_epi32_mask(number, (__m512i)bits, _mm512_set1_epi32(0x10000));
    const __m512i up = _mm512_mask_add_epi32((__m512i)bits, number, (__m512i)bits, _mm512_set1_epi32(0x7fff));
    return (u32v)_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
#else
    return (v == v) ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits;
#endif
}
template <>
DIFUSORES_INLINE void store<DType::bf16>(void* p, int64_t i, f32v v) {
    uint16_t* q = static_cast<uint16_t*>(p) + i;
    const u32v high = round_bf16(v) >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)q, _mm512_cvtepi32_epi16((__m512i)high));
#elif defined(__AVX2__)
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)high, (__m256i)high), 0x08);
    _mm_storeu_si128((__m128i*)q, _mm256_castsi256_si128(packed));
#else
    *reinterpret_cast<u16v_mem*>(q) = __builtin_convertvector(high, u16v);
#endif
}

template <>
DIFUSORES_INLINE f32v load<DType::f16>(const void* p, int64_t i) {
    const uint16_t* q = static_cast<const uint16_t*>(p) + i;
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)q));
#elif defined(__F16C__)
    return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)q));
#else
    f32v v;
    for (int k = 0; k < kWidth; ++k) {
        _Float16 h;
        __builtin_memcpy(&h, q + k, 2);
        v[k] = static_cast<float>(h);
    }
    return v;
#endif
}
template <>
DIFUSORES_INLINE void store<DType::f16>(void* p, int64_t i, f32v v) {
    uint16_t* q = static_cast<uint16_t*>(p) + i;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)q, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)q, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int k = 0; k < kWidth; ++k) {
        const _Float16 h = static_cast<_Float16>(v[k]);
        __builtin_memcpy(q + k, &h, 2);
    }
#endif
}

// kCount consecutive vectors. Pairs of bf16 vectors are packed by one shuffle of both.
template <DType D, int kCount>
DIFUSORES_INLINE void store_all(void* p, int64_t i, const f32v (&v)[kCount]) {
#if defined(__AVX2__)
    if constexpr (D == DType::bf16 && kCount % 2 == 0) {
#if defined(__AVX512F__)
        u32v words;  // the odd ones of both
        for (int k = 0; k < kWidth; ++k) words[k] = (4 * k + 1) | (4 * k + 3) << 16;
        const __m512i odd_words = (__m512i)words;
#endif
        for (int k = 0; k < kCount; k += 2) {
            uint16_t* q = static_cast<uint16_t*>(p) + i + k * kWidth;
#if defined(__AVX512F__)
            const __m512i low = (__m512i)round_bf16(v[k]), high = (__m512i)round_bf16(v[k + 1]);
            const __m512i packed = _mm512_permutex2var_epi16(low, odd_words, high);
            _mm512_storeu_si512(q, packed);
#else
            const __m256i low = (__m256i)(round_bf16(v[k]) >> 16), high = (__m256i)(round_bf16(v[k + 1]) >> 16);
            _mm256_storeu_si256((__m256i*)q, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
#endif
        }
        return;
    }
#endif
    for (int k = 0; k < kCount; ++k) store<D>(p, i + k * kWidth, v[k]);
}

// Asks for the cache lines of [p, p + kCount), to read or to write; any address is allowed.
template <int64_t kCount, bool kWrite = false>
DIFUSORES_INLINE void prefetch(const char* p) {
    for (int64_t o = 0; o < kCount; o += 64) __builtin_prefetch(p + o, kWrite);
}

template <DType D>
constexpr int64_t kBytes = D == DType::f32 ? 4 : 2;

// The last `count` < kWidth elements; the other lanes are zero. A vector's lanes do not interact, so an element gets
// the same bits in a tail as in a full vector.
template <DType D>
DIFUSORES_INLINE f32v load_tail(const void* p, int64_t i, int count) {
    alignas(64) unsigned char buffer[4 * kWidth] = {};
    __builtin_memcpy(buffer, static_cast<const unsigned char*>(p) + i * kBytes<D>, count * kBytes<D>);
    return load<D>(buffer, 0);
}
template <DType D>
DIFUSORES_INLINE void store_tail(void* p, int64_t i, f32v v, int count) {
    alignas(64) unsigned char buffer[4 * kWidth];
    store<D>(buffer, 0, v);
    __builtin_memcpy(static_cast<unsigned char*>(p) + i * kBytes<D>, buffer, count * kBytes<D>);
}

DIFUSORES_INLINE float load_scalar(const void* p, DType dtype, int64_t i) {
    if (dtype == DType::f32) return static_cast<const float*>(p)[i];
    uint16_t half;
    __builtin_memcpy(&half, static_cast<const uint16_t*>(p) + i, 2);
    if (dtype == DType::bf16) {
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float value;
        __builtin_memcpy(&value, &bits, 4);
        return value;
    }
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    _Float16 value;
    __builtin_memcpy(&value, &half, 2);
    return static_cast<float>(value);
#endif
}
// Element (n, c) of a per-channel parameter, or `absent`.
DIFUSORES_INLINE float param(const Param& a, int64_t n, int64_t c, float absent) {
    return a.ptr ? load_scalar(a.ptr, a.dtype, n * a.row_stride + c) : absent;
}

// 1 in the first `count` lanes, 0 in the others.
DIFUSORES_INLINE f32v lane_mask(int count) {
    f32v m;
    for (int k = 0; k < kWidth; ++k) m[k] = k < count ? 1.0f : 0.0f;
    return m;
}

// Sum of the lanes in a fixed order: the upper half onto the lower one, until one is left.
DIFUSORES_INLINE float sum_lanes(f32v v) {
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x4 part[kWidth / 4];
    __builtin_memcpy(part, &v, sizeof v);
    for (int half = kWidth / 8; half; half /= 2)
        for (int k = 0; k < half; ++k) part[k] += part[k + half];
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

// --- functions ---

// max and min that keep a NaN in `x`.
DIFUSORES_INLINE f32v at_least(float low, f32v x) {
#if defined(__AVX512F__)
    return (f32v)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
#elif defined(__AVX2__)
    return (f32v)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
#else
    return x < low ? splat(low) : x;
#endif
}
DIFUSORES_INLINE f32v at_most(float high, f32v x) {
#if defined(__AVX512F__)
    return (f32v)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
#elif defined(__AVX2__)
    return (f32v)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
#else
    return x > high ? splat(high) : x;
#endif
}

// The larger of each lane; where either is NaN, b.
DIFUSORES_INLINE f32v larger(f32v a, f32v b) {
#if defined(__AVX512F__)
    return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// x[k] = e^x[k], or e^-x[k], to about 2 ulp where that is finite and normal, saturating outside; NaN stays NaN.
// The exponent is n ln 2 + r, |r| <= ln 2 / 2, n by the magic-number rounding; e^r by a degree-5 polynomial whose
// relative error is at most 1.05e-7 there. kCount vectors go step by step together: one chain of dependent operations
// is longer than the processor can look ahead.
template <int kCount, bool kNegative = false>
DIFUSORES_INLINE void exp_f32(f32v (&x)[kCount]) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    constexpr float sign = kNegative ? -1.0f : 1.0f;
    constexpr float low = kNegative ? -88.37f : -87.33f, high = kNegative ? 87.33f : 88.37f;
    f32v t[kCount], p[kCount];
    for (int k = 0; k < kCount; ++k) x[k] = at_most(high, at_least(low, x[k]));
    for (int k = 0; k < kCount; ++k) t[k] = x[k] * (sign * 1.44269504088896341f) + kMagic;
    for (int k = 0; k < kCount; ++k) x[k] -= (t[k] - kMagic) * (sign * 0.693147180559945309f);  // sign * r
    for (int k = 0; k < kCount; ++k) p[k] = x[k] * (sign * 8.312520571053028e-3f) + 4.1890159249305725e-2f;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * x[k] + sign * 1.6667114198207855e-1f;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * x[k] + 4.99992311000824e-1f;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * x[k] + sign;
    for (int k = 0; k < kCount; ++k) p[k] = p[k] * x[k] + 1.0f;
    for (int k = 0; k < kCount; ++k) x[k] = p[k] * (f32v)(((i32v)t[k] << 23) + (127 << 23));
}

// x[k] = x[k] / (1 + e^-x[k])
template <int kCount>
DIFUSORES_INLINE void silu(f32v (&x)[kCount]) {
    f32v e[kCount];
    for (int k = 0; k < kCount; ++k) e[k] = x[k];
    exp_f32<kCount, true>(e);
    for (int k = 0; k < kCount; ++k) x[k] /= 1.0f + e[k];
}

// ln x for positive normal x; Cephes' logf.
DIFUSORES_INLINE f32v log_f32(f32v x) {
    i32v e = (i32v)((u32v)x >> 23) - 126;
    f32v m = (f32v)(((i32v)x & 0x007fffff) | 0x3f000000);  // [0.5, 1)
    const i32v low = m < 0.707106781186547524f;
    e += low;  // true is -1
    m = (low ? m + m : m) - 1.0f;
    const f32v z = m * m;
    f32v p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const f32v ef = __builtin_convertvector(e, f32v);
    f32v y = p * z * m;
    y = y + ef * -2.12194440e-4f;
    y = y - 0.5f * z;
    return m + y + ef * 0.693359375f;
}

// cos and sin of 2 pi t for t in [0, 1]: quarter turns are exact, the rest by Cephes' polynomials on [-pi/4, pi/4].
DIFUSORES_INLINE void cos_sin_turns(f32v t, f32v* cosine, f32v* sine) {
    const f32v q4 = t * 4.0f + 12582912.0f;
    const i32v q = (i32v)q4;
    const f32v a = (t - (q4 - 12582912.0f) * 0.25f) * 6.28318530717958648f;
    const f32v z = a * a;
    const f32v s = ((z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * a + a;
    const f32v c =
        ((z * 2.443315711809948e-5f - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * (z * z) - 0.5f * z + 1.0f;
    const i32v odd = (q & 1) != 0;
    const u32v sign_c = (u32v)((q + 1) & 2) << 30;
    const u32v sign_s = (u32v)(q & 2) << 30;
    *cosine = (f32v)((u32v)(odd ? s : c) ^ sign_c);
    *sine = (f32v)((u32v)(odd ? c : s) ^ sign_s);
}

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
