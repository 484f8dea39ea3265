// The AVX-512 intrinsics of csrc/cpu/simd.h on an AVX2 processor, so that the source of that level (16 lanes, four
// vectors together) runs where the instructions do not. Included before everything else by -include.
#pragma once
#include <immintrin.h>
#define __AVX512F__ 1

namespace emulation {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int i32x16 __attribute__((vector_size(64)));

// vmaxps and vminps return the second operand unless the first is greater (less): a NaN there stays.
inline __m512 max_ps(__m512 a, __m512 b) { return (__m512)((f32x16)a > (f32x16)b ? (f32x16)a : (f32x16)b); }
inline __m512 min_ps(__m512 a, __m512 b) { return (__m512)((f32x16)a < (f32x16)b ? (f32x16)a : (f32x16)b); }
inline __m512 set1_ps(float a) { return (__m512)(a - f32x16{}); }

inline __mmask16 mask_of(i32x16 lanes) {
    unsigned mask = 0;
    for (int k = 0; k < 16; ++k) mask |= (lanes[k] ? 1u : 0u) << k;
    return static_cast<__mmask16>(mask);
}
inline __mmask16 ordered(__m512 a, __m512 b) { return mask_of(((f32x16)a == (f32x16)a) & ((f32x16)b == (f32x16)b)); }
inline __mmask16 mask_test_epi32(__mmask16 mask, __m512i a, __m512i b) {
    return mask & mask_of(((i32x16)a & (i32x16)b) != 0);
}
inline __m512i mask_add_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
    i32x16 out = (i32x16)otherwise;
    for (int k = 0; k < 16; ++k)
        if (mask >> k & 1) out[k] = static_cast<int>(static_cast<unsigned>(((i32x16)a)[k]) + ((i32x16)b)[k]);
    return (__m512i)out;
}
inline __mmask16 not_less(__m512 a, __m512 b) { return mask_of(~((f32x16)a < (f32x16)b)); }
inline __mmask16 compare(__m512 a, __m512 b, int predicate) {  // these two are in use
    return predicate == _CMP_ORD_Q ? ordered(a, b) : not_less(a, b);
}
// a - floor(a), 0 for infinity: vreduceps as exp2_of asks for it
inline __m512 reduce_ps(__m512 a, int) {
    f32x16 out = (f32x16)a;
    for (int k = 0; k < 16; ++k) out[k] = __builtin_isinf(out[k]) ? 0.0f : out[k] - __builtin_floorf(out[k]);
    return (__m512)out;
}
inline __m512 maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
    f32x16 out{};
    for (int k = 0; k < 16; ++k)
        if (mask >> k & 1) out[k] = ((f32x16)a)[k] * __builtin_exp2f(__builtin_floorf(((f32x16)b)[k]));
    return (__m512)out;
}
inline __m512i set1_epi32(int a) { return (__m512i)(a - i32x16{}); }
inline __m512i permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    unsigned short words[64], where[32], out[32];
    __builtin_memcpy(words, &a, 64);
    __builtin_memcpy(words + 32, &b, 64);
    __builtin_memcpy(where, &index, 64);
    for (int k = 0; k < 32; ++k) out[k] = words[where[k] & 63];
    __m512i result;
    __builtin_memcpy(&result, out, 64);
    return result;
}

template <class Low, class High>
inline __m512i join(Low low, High high) {
    __m512i out;
    __builtin_memcpy(&out, &low, 32);
    __builtin_memcpy(reinterpret_cast<char*>(&out) + 32, &high, 32);
    return out;
}
inline __m512i cvtepu16_epi32(__m256i h) {
    return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(h)),
                _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1)));
}
inline __m256i cvtepi32_epi16(__m512i v) {
    const i32x16 lanes = (i32x16)v;
    __m256i out;
    for (int k = 0; k < 16; ++k) {
        const short low = static_cast<short>(lanes[k]);
        __builtin_memcpy(reinterpret_cast<char*>(&out) + 2 * k, &low, 2);
    }
    return out;
}
inline __m512 cvtph_ps(__m256i h) {
    return (__m512)join(_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)));
}
inline __m256i cvtps_ph(__m512 v) {
    __m256 half[2];
    __builtin_memcpy(half, &v, 64);
    const __m128i low = _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT);
    return _mm256_set_m128i(_mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT), low);
}

}  // namespace emulation

#undef _mm512_cvtps_ph
#undef _mm512_cmp_ps_mask
#undef _mm512_reduce_ps
#undef _mm512_maskz_scalef_ps
#define _mm512_max_ps emulation::max_ps
#define _mm512_min_ps emulation::min_ps
#define _mm512_set1_ps emulation::set1_ps
#define _mm512_cvtepu16_epi32 emulation::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulation::cvtepi32_epi16
#define _mm512_cvtph_ps emulation::cvtph_ps
#define _mm512_cvtps_ph(v, rounding) emulation::cvtps_ph(v)
#define _mm512_cmp_ps_mask emulation::compare
#define _mm512_reduce_ps emulation::reduce_ps
#define _mm512_maskz_scalef_ps emulation::maskz_scalef_ps
#define _mm512_mask_test_epi32_mask emulation::mask_test_epi32
#define _mm512_mask_add_epi32 emulation::mask_add_epi32
#define _mm512_set1_epi32 emulation::set1_epi32
#define _mm512_permutex2var_epi16 emulation::permutex2var_epi16
#define _mm512_storeu_si512(p, v) __builtin_memcpy(p, &(v), 64)
