// y = x[:, :D] * GELU(x[:, D:]),  GELU(g) = g / 2 * (1 + erf(g / sqrt(2))), or its approximation by tanh.
//
// Bytes: 2 D elements of a row in, D out, once each: at the widths of a UNet that is the time. Arithmetic is fp32,
// about 30 operations a vector, kEach vectors step by step together, because each is one chain. Layout: contiguous
// rows.
#include "gelu.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int kEach = 4;  // vectors that are under way together

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
