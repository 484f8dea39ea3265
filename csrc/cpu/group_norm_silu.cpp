// y = act((1 + scale) * (weight * (h - mean) * rstd + bias) + shift),  h = x + add + residual,  act = SiLU or identity,
// mean and rstd over each image's group of C / G channels and S positions.
//
// Bytes: x (and residual) twice, y once (and sum once); the second read of x comes from cache where a group fits there.
// Statistics: blocks that fit L1 are summed, then their squared deviations from the block's own mean; blocks are joined
// by Chan's formula (Chan, Golub, LeVeque 1983), so nothing cancels when mean >> std. fp32 in a block, fp64 between.
// Layouts: [N, C, S], a task is one group; [N, S, C], a task is a chunk of rows, joined in a fixed order.
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kBlock = 1024;  // elements of a row whose second pass comes from L1
constexpr int64_t kRows = 32;     // channels last: rows whose second pass comes from L1

struct Moments {
    double count = 0, mean = 0, m2 = 0;
    void join(double n, double other_mean, double other_m2) {
        if (n == 0) return;
        const double total = count + n, delta = other_mean - mean;
        m2 += other_m2 + delta * delta * (count * n / total);
        mean += delta * (n / total);
        count = total;
    }
};

inline float rsqrt_exact(double v) { return static_cast<float>(1.0 / __builtin_sqrt(v)); }

// --- channels first ---

// h at [i, i + count) of one channel; lanes from `count` on are zero plus add.
template <DType D, bool kResidual>
inline f32v load_h(const char* x, const char* r, int64_t i, int count, float add) {
    f32v h = count == kWidth ? load<D>(x, i) : load_tail<D>(x, i, count);
    h += add;
    if constexpr (kResidual) h += count == kWidth ? load<D>(r, i) : load_tail<D>(r, i, count);
    return h;
}

template <DType D, bool kResidual>
void row_moments(const char* x, const char* r, char* sum, int64_t s, float add, Moments& moments) {
    for (int64_t begin = 0; begin < s; begin += kBlock) {
        const int64_t end = begin + kBlock < s ? begin + kBlock : s;
        const int64_t full = begin + (end - begin) / kWidth * kWidth;
        const int tail = static_cast<int>(end - full);
        const f32v mask = lane_mask(tail);
        f32v a0 = {}, a1 = {}, a2 = {}, a3 = {};
        int64_t i = begin;
        for (; i + 4 * kWidth <= full; i += 4 * kWidth) {
            const f32v h0 = load_h<D, kResidual>(x, r, i, kWidth, add);
            const f32v h1 = load_h<D, kResidual>(x, r, i + kWidth, kWidth, add);
            const f32v h2 = load_h<D, kResidual>(x, r, i + 2 * kWidth, kWidth, add);
            const f32v h3 = load_h<D, kResidual>(x, r, i + 3 * kWidth, kWidth, add);
            a0 += h0, a1 += h1, a2 += h2, a3 += h3;
            if (sum) {
                store<D>(sum, i, h0), store<D>(sum, i + kWidth, h1);
                store<D>(sum, i + 2 * kWidth, h2), store<D>(sum, i + 3 * kWidth, h3);
            }
        }
        for (; i < full; i += kWidth) {
            const f32v h = load_h<D, kResidual>(x, r, i, kWidth, add);
            a0 += h;
            if (sum) store<D>(sum, i, h);
        }
        if (tail) {
            const f32v h = load_h<D, kResidual>(x, r, full, tail, add);
            a1 += h * mask;
            if (sum) store_tail<D>(sum, full, h, tail);
        }
        const float mean = sum_lanes((a0 + a1) + (a2 + a3)) / static_cast<float>(end - begin);
        a0 = a1 = a2 = a3 = f32v{};
        for (i = begin; i + 4 * kWidth <= full; i += 4 * kWidth) {
            const f32v d0 = load_h<D, kResidual>(x, r, i, kWidth, add) - mean;
            const f32v d1 = load_h<D, kResidual>(x, r, i + kWidth, kWidth, add) - mean;
            const f32v d2 = load_h<D, kResidual>(x, r, i + 2 * kWidth, kWidth, add) - mean;
            const f32v d3 = load_h<D, kResidual>(x, r, i + 3 * kWidth, kWidth, add) - mean;
            a0 += d0 * d0, a1 += d1 * d1, a2 += d2 * d2, a3 += d3 * d3;
        }
        for (; i < full; i += kWidth) {
            const f32v d = load_h<D, kResidual>(x, r, i, kWidth, add) - mean;
            a0 += d * d;
        }
        if (tail) {
            const f32v d = (load_h<D, kResidual>(x, r, full, tail, add) - mean) * mask;
            a1 += d * d;
        }
        moments.join(static_cast<double>(end - begin), mean, sum_lanes((a0 + a1) + (a2 + a3)));
    }
}

template <DType D, bool kResidual, bool kSilu>
void row_apply(const char* x, const char* r, char* y, int64_t s, float add, float mean, float a, float b) {
    const int64_t full = s / kWidth * kWidth;
    const int tail = static_cast<int>(s - full);
    for (int64_t i = 0; i < full; i += kWidth) {
        const f32v t = (load_h<D, kResidual>(x, r, i, kWidth, add) - mean) * a + b;
        store<D>(y, i, kSilu ? silu(t) : t);
    }
    if (tail) {
        const f32v t = (load_h<D, kResidual>(x, r, full, tail, add) - mean) * a + b;
        store_tail<D>(y, full, kSilu ? silu(t) : t, tail);
    }
}

// a and b of y = act((h - mean) * a + b) for channel c of image n.
// What fp32 loses of the mean goes into b.
inline void channel_affine(const GroupNormSiluArgs& args, int64_t n, int64_t c, double mean, float rstd, float* a,
                           float* b) {
    const float scale = 1.0f + param(args.scale, n, c, 0.0f);
    *a = rstd * param(args.weight, 0, c, 1.0f) * scale;
    *b = param(args.bias, 0, c, 0.0f) * scale + param(args.shift, n, c, 0.0f) -
         static_cast<float>(mean - static_cast<float>(mean)) * *a;
}

template <DType D, bool kResidual>
void channels_first(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    const int64_t per_group = args.c / args.groups;
    const int64_t row_bytes = args.s * kBytes<D>;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / args.groups, first = task % args.groups * per_group;
        const int64_t offset = (n * args.c + first) * row_bytes;
        const char* x = static_cast<const char*>(args.x) + offset;
        const char* r = kResidual ? static_cast<const char*>(args.residual) + offset : nullptr;
        char* y = static_cast<char*>(args.y) + offset;
        char* sum = args.sum ? static_cast<char*>(args.sum) + offset : nullptr;
        Moments moments;
        if (!args.add.ptr) {  // the group's channels are one row
            row_moments<D, kResidual>(x, r, sum, per_group * args.s, 0.0f, moments);
        } else {
            for (int64_t k = 0; k < per_group; ++k) {
                const int64_t o = k * row_bytes;
                row_moments<D, kResidual>(x + o, kResidual ? r + o : nullptr, sum ? sum + o : nullptr, args.s,
                                          param(args.add, n, first + k, 0.0f), moments);
            }
        }
        const float mean = static_cast<float>(moments.mean);
        const float rstd = rsqrt_exact(moments.m2 / moments.count + args.eps);
        for (int64_t k = 0; k < per_group; ++k) {
            const int64_t o = k * row_bytes;
            float a, b;
            channel_affine(args, n, first + k, moments.mean, rstd, &a, &b);
            const float add = param(args.add, n, first + k, 0.0f);
            const char* rk = kResidual ? r + o : nullptr;
            if (args.silu) row_apply<D, kResidual, true>(x + o, rk, y + o, args.s, add, mean, a, b);
            else row_apply<D, kResidual, false>(x + o, rk, y + o, args.s, add, mean, a, b);
        }
    }
}

// --- channels last ---

// Mean and squared deviations of each channel over rows [begin, end) for the channels [c, c + kLanes vectors).
template <DType D, bool kResidual, int kVectors>
inline void strip_moments(const GroupNormSiluArgs& args, int64_t n, int64_t begin, int64_t end, int64_t c, int count,
                          float* mean_out, float* m2_out) {
    const float* add = args.affine + n * 4 * args.c;
    f32v add_v[kVectors], mean[kVectors], m2[kVectors];
    const auto at = [&](const void* p, int64_t row, int v) {
        const int64_t i = (n * args.s + row) * args.c + c + v * kWidth;
        return count == kWidth ? load<D>(p, i) : load_tail<D>(p, i, count);
    };
    const auto h_at = [&](int64_t row, int v) {
        f32v h = at(args.x, row, v) + add_v[v];
        if constexpr (kResidual) h += at(args.residual, row, v);
        return h;
    };
    for (int v = 0; v < kVectors; ++v) {
        add_v[v] = count == kWidth ? load<DType::f32>(add, c + v * kWidth) : load_tail<DType::f32>(add, c, count);
        mean[v] = m2[v] = f32v{};
    }
    for (int64_t first = begin; first < end; first += kRows) {
        const int64_t last = first + kRows < end ? first + kRows : end;
        const float rows = static_cast<float>(last - first), before = static_cast<float>(first - begin);
        f32v acc[kVectors] = {};
        for (int64_t row = first; row < last; ++row)
            for (int v = 0; v < kVectors; ++v) {
                const f32v h = h_at(row, v);
                acc[v] += h;
                if (args.sum) {
                    const int64_t i = (n * args.s + row) * args.c + c + v * kWidth;
                    if (count == kWidth) store<D>(args.sum, i, h);
                    else store_tail<D>(args.sum, i, h, count);
                }
            }
        f32v block[kVectors], dev[kVectors] = {};
        for (int v = 0; v < kVectors; ++v) block[v] = acc[v] / rows;
        for (int64_t row = first; row < last; ++row)
            for (int v = 0; v < kVectors; ++v) {
                const f32v d = h_at(row, v) - block[v];
                dev[v] += d * d;
            }
        for (int v = 0; v < kVectors; ++v) {
            const f32v delta = block[v] - mean[v];
            m2[v] += dev[v] + delta * delta * (before * rows / (before + rows));
            mean[v] += delta * (rows / (before + rows));
        }
    }
    for (int v = 0; v < kVectors; ++v) {
        if (count == kWidth) {
            store<DType::f32>(mean_out, v * kWidth, mean[v]);
            store<DType::f32>(m2_out, v * kWidth, m2[v]);
        } else {
            store_tail<DType::f32>(mean_out, 0, mean[v], count);
            store_tail<DType::f32>(m2_out, 0, m2[v], count);
        }
    }
}

template <DType D, bool kResidual>
void channels_last_stats(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    constexpr int kVectors = 4;
    constexpr int64_t kStrip = kVectors * kWidth;
    const int64_t per_group = args.c / args.groups;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / args.chunks, first = task % args.chunks * args.chunk_rows;
        const int64_t last = first + args.chunk_rows < args.s ? first + args.chunk_rows : args.s;
        const double rows = static_cast<double>(last - first);
        double* partial = args.partial + task * args.groups * 2;
        float mean[kStrip], m2[kStrip];
        Moments moments;
        for (int64_t c = 0; c < args.c;) {
            int64_t width = kStrip;
            if (c + kStrip <= args.c) {
                strip_moments<D, kResidual, kVectors>(args, n, first, last, c, kWidth, mean, m2);
            } else {
                width = args.c - c < kWidth ? args.c - c : kWidth;
                strip_moments<D, kResidual, 1>(args, n, first, last, c, static_cast<int>(width), mean, m2);
            }
            for (int64_t k = 0; k < width; ++k) {
                moments.join(rows, mean[k], m2[k]);
                if ((c + k + 1) % per_group == 0) {
                    const int64_t g = (c + k) / per_group;
                    partial[2 * g] = moments.mean;
                    partial[2 * g + 1] = moments.m2;
                    moments = Moments();
                }
            }
            c += width;
        }
    }
}

template <DType D, bool kResidual, bool kSilu>
void channels_last_apply(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    const int64_t full = args.c / kWidth * kWidth;
    const int tail = static_cast<int>(args.c - full);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / args.chunks, first = task % args.chunks * args.chunk_rows;
        const int64_t last = first + args.chunk_rows < args.s ? first + args.chunk_rows : args.s;
        const float* add = args.affine + n * 4 * args.c;
        const float *mean = add + args.c, *a = mean + args.c, *b = a + args.c;
        for (int64_t row = first; row < last; ++row) {
            const int64_t o = (n * args.s + row) * args.c;
            for (int64_t c = 0; c < full; c += kWidth) {
                f32v h = load<D>(args.x, o + c) + load<DType::f32>(add, c);
                if constexpr (kResidual) h += load<D>(args.residual, o + c);
                const f32v t = (h - load<DType::f32>(mean, c)) * load<DType::f32>(a, c) + load<DType::f32>(b, c);
                store<D>(args.y, o + c, kSilu ? silu(t) : t);
            }
            if (tail) {
                f32v h = load_tail<D>(args.x, o + full, tail) + load_tail<DType::f32>(add, full, tail);
                if constexpr (kResidual) h += load_tail<D>(args.residual, o + full, tail);
                const f32v t = (h - load_tail<DType::f32>(mean, full, tail)) * load_tail<DType::f32>(a, full, tail) +
                               load_tail<DType::f32>(b, full, tail);
                store_tail<D>(args.y, o + full, kSilu ? silu(t) : t, tail);
            }
        }
    }
}

// Calls f<dtype, has residual>.
#define DIFUSORES_BY_TYPE(f)                                                          \
    switch (args.dtype) {                                                             \
        case DType::f32:                                                              \
            return args.residual ? f<DType::f32, true>(args, begin, end)              \
                                 : f<DType::f32, false>(args, begin, end);            \
        case DType::bf16:                                                             \
            return args.residual ? f<DType::bf16, true>(args, begin, end)             \
                                 : f<DType::bf16, false>(args, begin, end);           \
        case DType::f16:                                                              \
            return args.residual ? f<DType::f16, true>(args, begin, end)              \
                                 : f<DType::f16, false>(args, begin, end);            \
    }

template <DType D, bool kResidual>
void apply_by_act(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    if (args.silu) channels_last_apply<D, kResidual, true>(args, begin, end);
    else channels_last_apply<D, kResidual, false>(args, begin, end);
}

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    DIFUSORES_BY_TYPE(channels_first)
}

void group_norm_silu_stats(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    DIFUSORES_BY_TYPE(channels_last_stats)
}

void group_norm_silu_apply(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    DIFUSORES_BY_TYPE(apply_by_act)
}

void group_norm_silu_prepare(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
        for (int64_t c = 0; c < args.c; ++c) args.affine[n * 4 * args.c + c] = param(args.add, n, c, 0.0f);
}

void group_norm_silu_combine(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    const int64_t per_group = args.c / args.groups;
    for (int64_t n = begin; n < end; ++n) {
        float* mean = args.affine + n * 4 * args.c + args.c;
        for (int64_t g = 0; g < args.groups; ++g) {
            Moments moments;
            for (int64_t k = 0; k < args.chunks; ++k) {
                const int64_t first = k * args.chunk_rows;
                const int64_t last = first + args.chunk_rows < args.s ? first + args.chunk_rows : args.s;
                const double* partial = args.partial + ((n * args.chunks + k) * args.groups + g) * 2;
                moments.join(static_cast<double>((last - first) * per_group), partial[0], partial[1]);
            }
            const float rstd = rsqrt_exact(moments.m2 / moments.count + args.eps);
            for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
                mean[c] = static_cast<float>(moments.mean);
                channel_affine(args, n, c, moments.mean, rstd, mean + args.c + c, mean + 2 * args.c + c);
            }
        }
    }
}

void silu_floor(const float* x, float* y, int64_t n, int64_t repeats) {
    for (int64_t k = 0; k < repeats; ++k)
        row_apply<DType::f32, false, true>(reinterpret_cast<const char*>(x), nullptr, reinterpret_cast<char*>(y), n,
                                           0.0f, 0.5f, 1.5f, 0.25f);
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
