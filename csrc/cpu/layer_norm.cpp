// h = x + residual;  y = weight * (h - mean) * rstd + bias,  mean and rstd over each row of D elements;
// sum = h + sum_bias.
//
// Bytes: x and residual once in, y and sum once out; the next row is fetched ahead. A row of h waits in L1 as fp32
// (where that is x, in x), beside the parameters, which are widened once a range of rows. Layout: contiguous rows.
//
// Statistics: two passes over that row, the mean, then the deviations from it, whose sum also corrects the mean.
// Nothing cancels when mean >> std. A row's bits depend on the row alone.
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int kSums = 4;  // of one pass: chains of additions beside each other

DIFUSORES_INLINE int64_t padded(int64_t columns) { return (columns + kMaxWidth - 1) / kMaxWidth * kMaxWidth; }
DIFUSORES_INLINE int lanes(int64_t columns, int64_t i) {
    return static_cast<int>(columns - i < kWidth ? columns - i : kWidth);
}

DIFUSORES_INLINE float total(f32v (&sums)[kSums]) { return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// h into `row`, if any, padded with zeros, and with sum_bias into a.sum; returns h's mean.
template <DType D>
float take(const LayerNormArgs& a, int64_t first, const float* sum_bias, float* row) {
    f32v sums[kSums] = {};
    const auto one = [&](int64_t i, f32v h, f32v& sum) __attribute__((always_inline)) {
        if (row) store<DType::f32>(row, i, h);
        sum += h;
    };
    int64_t i = 0;
    for (; i + kSums * kWidth <= a.columns; i += kSums * kWidth) {
        f32v h[kSums];
        for (int k = 0; k < kSums; ++k) h[k] = load<D>(a.x, first + i + k * kWidth);
        if (a.residual)
            for (int k = 0; k < kSums; ++k) h[k] += load<D>(a.residual, first + i + k * kWidth);
        if (a.sum) {
            f32v sum[kSums];
            for (int k = 0; k < kSums; ++k) sum[k] = h[k] + load<DType::f32>(sum_bias, i + k * kWidth);
            store_all<D>(a.sum, first + i, sum);
        }
        for (int k = 0; k < kSums; ++k) one(i + k * kWidth, h[k], sums[k]);
    }
    for (; i < a.columns; i += kWidth) {
        const int count = lanes(a.columns, i);
        f32v h = load_tail<D>(a.x, first + i, count);
        if (a.residual) h += load_tail<D>(a.residual, first + i, count);
        if (a.sum) store_tail<D>(a.sum, first + i, h + load<DType::f32>(sum_bias, i), count);
        one(i, h, sums[0]);
    }
    return total(sums) / static_cast<float>(a.columns);
}

template <DType D>
void widen(const void* from, int64_t columns, float* to) {
    int64_t i = 0;
    for (; i + kWidth <= columns; i += kWidth) store<DType::f32>(to, i, load<D>(from, i));
    if (i < columns) store<DType::f32>(to, i, load_tail<D>(from, i, lanes(columns, i)));
}

// A parameter, or `absent`, as whole vectors of fp32.
void widen(const Param& from, int64_t columns, float absent, float* to) {
    if (!from.ptr)
        for (int64_t i = 0; i < columns; i += kWidth) store<DType::f32>(to, i, splat(absent));
    else if (from.dtype == DType::f32) widen<DType::f32>(from.ptr, columns, to);
    else if (from.dtype == DType::bf16) widen<DType::bf16>(from.ptr, columns, to);
    else widen<DType::f16>(from.ptr, columns, to);
}

struct Moments {
    float mean, delta, rstd;  // the mean is mean + delta, which fp32 cannot hold where it is large
};

// Of a row whose mean is about `mean`. The next row, at `next`, comes from memory meanwhile, and this one of y.
template <DType D>
Moments moments(const LayerNormArgs& a, const float* row, float mean, int64_t next) {
    const int64_t whole = a.columns / (kSums * kWidth) * (kSums * kWidth);
    f32v sums[kSums] = {}, squares[kSums] = {};
    for (int64_t i = 0; i < whole; i += kSums * kWidth) {
        prefetch<kSums * kWidth * kBytes<D>, true>(static_cast<const char*>(a.y) + (next - a.columns + i) * kBytes<D>);
        prefetch<kSums * kWidth * kBytes<D>>(static_cast<const char*>(a.x) + (next + i) * kBytes<D>);
        if (a.residual)
            prefetch<kSums * kWidth * kBytes<D>>(static_cast<const char*>(a.residual) + (next + i) * kBytes<D>);
        for (int k = 0; k < kSums; ++k) {
            const f32v t = load<DType::f32>(row, i + k * kWidth) - mean;
            sums[k] += t, squares[k] += t * t;
        }
    }
    for (int64_t i = whole; i < a.columns; i += kWidth) {
        const f32v t = (load_tail<DType::f32>(row, i, lanes(a.columns, i)) - mean) * lane_mask(lanes(a.columns, i));
        sums[0] += t, squares[0] += t * t;
    }
    const float count = static_cast<float>(a.columns), sum = total(sums), delta = sum / count;
    const float m2 = total(squares) - sum * delta;
    return {mean, delta, 1.0f / __builtin_sqrtf((m2 < 0.0f ? 0.0f : m2) / count + static_cast<float>(a.eps))};
}

template <DType D>
void rows(const LayerNormArgs& a, float* scratch, int64_t begin, int64_t end) {
    const int64_t width = padded(a.columns);
    float *const weight = scratch, *const bias = scratch + width, *const sum_bias = scratch + 2 * width;
    float* const kept = D == DType::f32 && !a.residual ? nullptr : scratch + 3 * width;
    widen(a.weight, a.columns, 1.0f, weight);
    widen(a.bias, a.columns, 0.0f, bias);
    widen(a.sum_bias, a.columns, 0.0f, sum_bias);
    for (int64_t r = begin; r < end; ++r) {
        const int64_t first = r * a.columns;
        const float mean = take<D>(a, first, sum_bias, kept);
        const float* const row = kept ? kept : static_cast<const float*>(a.x) + first;
        const Moments m = moments<D>(a, row, mean, first + a.columns);
        const float shift = -m.delta * m.rstd;
        const auto normed = [&](int64_t i, f32v h) __attribute__((always_inline)) {
            return ((h - m.mean) * m.rstd + shift) * load<DType::f32>(weight, i) + load<DType::f32>(bias, i);
        };
        int64_t i = 0;
        for (; i + kSums * kWidth <= a.columns; i += kSums * kWidth) {
            f32v y[kSums];
            for (int k = 0; k < kSums; ++k) y[k] = normed(i + k * kWidth, load<DType::f32>(row, i + k * kWidth));
            store_all<D>(a.y, first + i, y);
        }
        for (; i < a.columns; i += kWidth) {
            const int count = lanes(a.columns, i);
            store_tail<D>(a.y, first + i, normed(i, load_tail<DType::f32>(row, i, count)), count);
        }
    }
}

}  // namespace

int64_t layer_norm_scratch(const LayerNormArgs& a) { return 4 * padded(a.columns); }

void layer_norm(const LayerNormArgs& a, float* scratch, int64_t begin, int64_t end) {
    if (a.dtype == DType::f32) rows<DType::f32>(a, scratch, begin, end);
    else if (a.dtype == DType::bf16) rows<DType::bf16>(a, scratch, begin, end);
    else rows<DType::f16>(a, scratch, begin, end);
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
