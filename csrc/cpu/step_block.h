// Blocks of kStepBlock elements of an image, as the ops of a scheduler's step take them: operands as fp32 in L1, sums
// of operands, and the mixture of the model's outputs.
#pragma once
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

struct alignas(64) Block {
    float v[kStepBlock];
};

template <DType D>
void widen(const void* p, int64_t first, int64_t count, float* out) {
    const int64_t full = count / kWidth * kWidth;
    const int tail = static_cast<int>(count - full);
    for (int64_t k = 0; k < full; k += kWidth) store<DType::f32>(out, k, load<D>(p, first + k));
    if (tail) store<DType::f32>(out, full, load_tail<D>(p, first + full, tail));
}

// out[first + k ...] = vector(k) for `count` elements: two vectors at a time, then one, then the tail.
template <DType D, class Vector>
DIFUSORES_INLINE void store_each(void* out, int64_t first, int64_t count, const Vector& vector) {
    int64_t k = 0;
    for (; k + 2 * kWidth <= count; k += 2 * kWidth) {
        const f32v v[2] = {vector(k), vector(k + kWidth)};
        store_all<D>(out, first + k, v);
    }
    for (; k + kWidth <= count; k += kWidth) store<D>(out, first + k, vector(k));
    if (k < count) store_tail<D>(out, first + k, vector(k), static_cast<int>(count - k));
}

template <DType D>
void narrow(void* p, int64_t first, int64_t count, const float* v) {
    store_each<D>(p, first, count, [v](int64_t k) __attribute__((always_inline)) { return load<DType::f32>(v, k); });
}

// Asks for the next block of a 16-bit operand or output, whose conversion would keep memory waiting.
template <bool kWrite = false>
void fetch_next(const void* p, DType dtype, int64_t first) {
    if (dtype != DType::f32) prefetch<2 * kStepBlock, kWrite>(static_cast<const char*>(p) + (first + kStepBlock) * 2);
}

// Operand elements [i, i + count) of image b as fp32, zero-padded to whole vectors; in place where they are fp32.
const float* read(const Operand& o, int64_t b, int64_t i, int64_t count, Block& scratch) {
    const int64_t first = b * o.batch_stride + i;
    fetch_next(o.ptr, o.dtype, first);
    switch (o.dtype) {
        case DType::f32:
            if (count % kWidth == 0) return static_cast<const float*>(o.ptr) + first;
            widen<DType::f32>(o.ptr, first, count, scratch.v);
            break;
        case DType::bf16: widen<DType::bf16>(o.ptr, first, count, scratch.v); break;
        case DType::f16: widen<DType::f16>(o.ptr, first, count, scratch.v); break;
    }
    return scratch.v;
}

// out[first + k] = sum_j c[j] * p[j][k]. `out` may be one of the p.
template <int kTerms, DType D>
void combine(const float* const* p, const float* c, int64_t count, void* out, int64_t first) {
    f32v weights[kTerms ? kTerms : 1];
    for (int j = 0; j < kTerms; ++j) weights[j] = splat(c[j]);
    store_each<D>(out, first, count, [&](int64_t k) __attribute__((always_inline)) {
        f32v total = {};
        if constexpr (kTerms > 0) total = weights[0] * load<DType::f32>(p[0], k);
        for (int j = 1; j < kTerms; ++j) total += weights[j] * load<DType::f32>(p[j], k);
        return total;
    });
}

template <DType D>
void combine(int terms, const float* const* p, const float* c, int64_t count, void* out, int64_t first = 0) {
    switch (terms) {
        case 0: return combine<0, D>(p, c, count, out, first);
        case 1: return combine<1, D>(p, c, count, out, first);
        case 2: return combine<2, D>(p, c, count, out, first);
        case 3: return combine<3, D>(p, c, count, out, first);
        case 4: return combine<4, D>(p, c, count, out, first);
        case 5: return combine<5, D>(p, c, count, out, first);
        case 6: return combine<6, D>(p, c, count, out, first);
        case 7: return combine<7, D>(p, c, count, out, first);
        case 8: return combine<8, D>(p, c, count, out, first);
        case 9: return combine<9, D>(p, c, count, out, first);
        default: return combine<10, D>(p, c, count, out, first);
    }
}

// e = sum_k g_k e_k of a block: in `sum`, or where one output counts as it is, where `read` finds it. others: of two
// more.
DIFUSORES_INLINE const float* mix(const Operand (&e)[3], const float* g, int64_t b, int64_t i, int64_t count,
                                  int64_t padded, Block& sum, Block* others) {
    const float* outputs[3];
    float weights[3];
    int terms = 0;
    for (int k = 0; k < 3; ++k)
        if (e[k].ptr && g[k] != 0.0f) {
            Block& own = terms ? others[terms - 1] : sum;
            weights[terms] = g[k];
            outputs[terms++] = read(e[k], b, i, count, own);
        }
    if (terms == 1 && weights[0] == 1.0f) return outputs[0];
    combine<DType::f32>(terms, outputs, weights, padded, sum.v);
    return sum.v;
}

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
