// y = act((1 + scale) * (weight * (h - mean) * rstd + bias) + shift),  h = x + add + residual,  act = SiLU or identity,
// mean and rstd over each image's group of C / G channels and S positions.
//
// Bytes: x (and residual) twice, y once (and sum once); the second read of x comes from cache where a group fits there.
// Statistics: kDeep vectors in registers give each lane a mean and the squared deviations from it (two passes without a
// second load); lanes, blocks and rows are joined by Chan's formula (Chan, Golub, LeVeque 1983), so nothing cancels
// when mean >> std. fp32 for at most kFlush blocks, fp64 beyond. Layouts: [N, C, S], a task is one group; [N, S, C], a
// task is a chunk of rows, joined in a fixed order.
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int kDeep = kWidth == 16 ? 16 : 8;  // vectors of a block of the statistics: half of the registers
constexpr int kRows = 8;                      // rows that go into the statistics together, channels last
constexpr int kFlush = 32;                    // blocks after which the lanes are joined in fp64
// Vectors that go through act together: as many as the registers hold beside its constants.
constexpr int kUnroll = kWidth == 16 ? 4 : 2;
constexpr int64_t kAheadY = 4096;  // bytes by which the lines of y are asked for before they are written
constexpr int64_t kAheadX = 8192;  // the same of x where rows follow each other, channels last

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

// h at [i, i + count) of one channel; lanes from `count` on are add.
template <DType D, bool kResidual>
DIFUSORES_INLINE f32v load_h(const void* x, const void* r, int64_t i, int count) {
    f32v h = count == kWidth ? load<D>(x, i) : load_tail<D>(x, i, count);
    if constexpr (kResidual) h += count == kWidth ? load<D>(r, i) : load_tail<D>(r, i, count);
    return h;
}

struct Block {
    f32v mean, m2;
};

// Of each lane of kCount vectors. Sums as trees: short chains of dependent operations.
template <int kCount>
DIFUSORES_INLINE Block mean_and_deviations(const f32v (&h)[kCount]) {
    f32v sum[kCount], dev[2] = {};
    for (int k = 0; k < kCount; ++k) sum[k] = h[k];
    for (int half = kCount / 2; half; half /= 2)
        for (int k = 0; k < half; ++k) sum[k] += sum[k + half];
    const f32v mean = sum[0] * (1.0f / kCount);
    for (int k = 0; k < kCount; ++k) dev[k % 2] += (h[k] - mean) * (h[k] - mean);
    return {mean, dev[0] + dev[1]};
}

// Mean and squared deviations of each lane.
struct Lanes {
    f32v mean = {}, m2 = {};
    float count = 0;  // elements of a lane
    int blocks = 0;

    template <int kCount>
    DIFUSORES_INLINE void join(const f32v (&h)[kCount]) {
        const auto [block, dev] = mean_and_deviations(h);
        const float weight = kCount / (count + kCount);
        const f32v delta = block - mean;
        m2 += dev + delta * delta * (count * weight);
        mean += delta * weight;
        count += kCount;
        ++blocks;
    }

    DIFUSORES_INLINE void flush(Moments& moments) {
        const float center = sum_lanes(mean) / kWidth;
        const f32v delta = mean - center;
        moments.join(static_cast<double>(count) * kWidth, center, sum_lanes(m2 + delta * delta * count));
        *this = Lanes();
    }
};

// --- channels first ---

// Joins one row of S elements; `sum` (or nullptr) receives h. kAdd: add is not zero.
template <DType D, bool kResidual, bool kAdd>
void row_moments(const char* x, const char* r, char* sum, int64_t s, float add, Lanes& running, Moments& moments) {
    Lanes lanes = running;  // in registers: through memory every block would wait for the one before
    const int64_t full = s / kWidth * kWidth;
    const int tail = static_cast<int>(s - full);
    int64_t i = 0;
    const auto step = [&](auto& h) __attribute__((always_inline)) {
        constexpr int kCount = sizeof(h) / sizeof(f32v);
        for (int k = 0; k < kCount; ++k) {
            h[k] = load_h<D, kResidual>(x, r, i + k * kWidth, kWidth);
            if constexpr (kAdd) h[k] += add;
        }
        if (sum) store_all<D>(sum, i, h);
        lanes.join(h);
        if (lanes.blocks == kFlush) lanes.flush(moments);
        i += kCount * kWidth;
    };
    while (i + kDeep * kWidth <= full) {
        f32v h[kDeep];
        step(h);
    }
    while (i + 2 * kWidth <= full) {
        f32v h[2];
        step(h);
    }
    while (i < full) {
        f32v h[1];
        step(h);
    }
    if (tail) {
        const f32v mask = lane_mask(tail);
        const f32v h = load_h<D, kResidual>(x, r, full, tail) + add;
        if (sum) store_tail<D>(sum, full, h, tail);
        const float mean = sum_lanes(h * mask) / static_cast<float>(tail);
        const f32v d = (h - mean) * mask;
        moments.join(tail, mean, sum_lanes(d * d));
    }
    running = lanes;
}

// One row through act. While a group is in act the next one, `ahead` bytes on, is fetched (0: not).
template <DType D, bool kResidual, bool kSilu>
void row_apply(const char* x, const char* r, char* y, int64_t s, int64_t ahead, float center, float a, float b) {
    const int64_t full = s / kWidth * kWidth;
    const int tail = static_cast<int>(s - full);
    int64_t i = 0;
    for (; i + kUnroll * kWidth <= full; i += kUnroll * kWidth) {
        if (ahead) {
            prefetch<kUnroll * kWidth * kBytes<D>>(x + ahead + i * kBytes<D>);
            if constexpr (kResidual) prefetch<kUnroll * kWidth * kBytes<D>>(r + ahead + i * kBytes<D>);
        }
        prefetch<kUnroll * kWidth * kBytes<D>, true>(y + kAheadY + i * kBytes<D>);
        f32v t[kUnroll];
        for (int k = 0; k < kUnroll; ++k) t[k] = (load_h<D, kResidual>(x, r, i + k * kWidth, kWidth) - center) * a + b;
        if constexpr (kSilu) silu(t);
        store_all<D>(y, i, t);
    }
    for (; i < s; i += kWidth) {
        const int count = i < full ? kWidth : tail;
        f32v t[1] = {(load_h<D, kResidual>(x, r, i, count) - center) * a + b};
        if constexpr (kSilu) silu(t);
        if (count == kWidth) store<D>(y, i, t[0]);
        else store_tail<D>(y, i, t[0], count);
    }
}

DIFUSORES_INLINE double rstd_of(const Moments& moments, double eps) {
    return 1.0 / __builtin_sqrt(moments.m2 / moments.count + eps);
}

// y = act((x + residual - center) * a + b) for one channel. What fp32 loses of mean - add goes into b.
struct Affine {
    float center, a, b;
    DIFUSORES_INLINE void set(const GroupNormSiluArgs& args, int64_t n, int64_t c, double mean, double rstd) {
        const float scale = 1.0f + param(args.scale, n, c, 0.0f);
        const double exact = mean - param(args.add, n, c, 0.0f);
        center = static_cast<float>(exact);
        a = static_cast<float>(rstd) * param(args.weight, 0, c, 1.0f) * scale;
        b = param(args.bias, 0, c, 0.0f) * scale + param(args.shift, n, c, 0.0f) -
            static_cast<float>(exact - center) * a;
    }
};

// Rows too short for kUnroll vectors: as many rows go through act together.
template <DType D, bool kResidual, bool kSilu>
void short_rows_apply(const char* x, const char* r, char* y, int64_t s, const Affine (&affine)[kUnroll]) {
    for (int64_t i = 0; i < s; i += kWidth) {
        const int count = s - i < kWidth ? static_cast<int>(s - i) : kWidth;
        f32v t[kUnroll];
        for (int k = 0; k < kUnroll; ++k)
            t[k] = (load_h<D, kResidual>(x, r, k * s + i, count) - affine[k].center) * affine[k].a + affine[k].b;
        if constexpr (kSilu) silu(t);
        for (int k = 0; k < kUnroll; ++k) {
            if (count == kWidth) store<D>(y, k * s + i, t[k]);
            else store_tail<D>(y, k * s + i, t[k], count);
        }
    }
}

template <DType D, bool kResidual>
void channels_first(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    const int64_t per_group = args.c / args.groups;
    const int64_t row_bytes = args.s * kBytes<D>;
    const int64_t group_bytes = per_group * row_bytes;
    const bool fits = group_bytes <= args.fetch;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / args.groups, first = task % args.groups * per_group;
        const int64_t offset = task * group_bytes;
        const char* x = static_cast<const char*>(args.x) + offset;
        const char* r = kResidual ? static_cast<const char*>(args.residual) + offset : nullptr;
        char* y = static_cast<char*>(args.y) + offset;
        char* sum = args.sum ? static_cast<char*>(args.sum) + offset : nullptr;
        Moments moments;
        Lanes lanes;
        if (!args.add.ptr) {  // the group's channels are one row
            row_moments<D, kResidual, false>(x, r, sum, per_group * args.s, 0.0f, lanes, moments);
        } else {
            for (int64_t k = 0; k < per_group; ++k) {
                const int64_t o = k * row_bytes;
                row_moments<D, kResidual, true>(x + o, kResidual ? r + o : nullptr, sum ? sum + o : nullptr, args.s,
                                                param(args.add, n, first + k, 0.0f), lanes, moments);
            }
        }
        lanes.flush(moments);
        const int64_t ahead = task + 1 < end && fits ? group_bytes : 0;
        const double rstd = rstd_of(moments, args.eps);
        const auto apply = args.silu ? row_apply<D, kResidual, true> : row_apply<D, kResidual, false>;
        const auto short_apply =
            args.silu ? short_rows_apply<D, kResidual, true> : short_rows_apply<D, kResidual, false>;
        Affine affine[kUnroll];
        for (int64_t k = 0; k < per_group;) {
            const int64_t o = k * row_bytes;
            const bool together = args.s < kUnroll * kWidth && k + kUnroll <= per_group;
            const int rows = together ? kUnroll : 1;
            for (int j = 0; j < rows; ++j) affine[j].set(args, n, first + k + j, moments.mean, rstd);
            const auto [center, a, b] = affine[0];
            const char* residual = kResidual ? r + o : nullptr;
            if (together) short_apply(x + o, residual, y + o, args.s, affine);
            else apply(x + o, residual, y + o, args.s, ahead, center, a, b);
            k += rows;
        }
    }
}

// --- channels last ---

// Joins kCount rows, from `row` on, into the channels' running mean and m2 (kCount elements each, `before` so far).
template <DType D, bool kResidual, int kCount>
void rows_moments(const GroupNormSiluArgs& args, int64_t n, int64_t row, float before, float* mean, float* m2) {
    const float* add = args.channels + n * 4 * args.c;
    const int64_t first = (n * args.s + row) * args.c;
    const float weight = kCount / (before + kCount);
    for (int64_t c = 0; c < args.c; c += kWidth) {
        const int count = args.c - c < kWidth ? static_cast<int>(args.c - c) : kWidth;
        // Eight rows are eight streams to the hardware's prefetcher, but the next rows are one.
        const int64_t next = (first + kCount * args.c + c * kCount) * kBytes<D>;
        prefetch<kCount * kWidth * kBytes<D>>(static_cast<const char*>(args.x) + next);
        if constexpr (kResidual) prefetch<kCount * kWidth * kBytes<D>>(static_cast<const char*>(args.residual) + next);
        f32v h[kCount];
        for (int k = 0; k < kCount; ++k)
            h[k] = load_h<D, kResidual>(args.x, args.residual, first + k * args.c + c, count);
        if (args.sum) {
            const f32v a = count == kWidth ? load<DType::f32>(add, c) : load_tail<DType::f32>(add, c, count);
            for (int k = 0; k < kCount; ++k) {
                if (count == kWidth) store<D>(args.sum, first + k * args.c + c, h[k] + a);
                else store_tail<D>(args.sum, first + k * args.c + c, h[k] + a, count);
            }
        }
        const auto [block, dev] = mean_and_deviations(h);
        // mean and m2 have room for whole vectors
        const f32v delta = block - load<DType::f32>(mean, c);
        store<DType::f32>(m2, c, load<DType::f32>(m2, c) + (dev + delta * delta * (before * weight)));
        store<DType::f32>(mean, c, load<DType::f32>(mean, c) + delta * weight);
    }
}

template <DType D, bool kResidual>
void channels_last_stats(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    const int64_t per_group = args.c / args.groups;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / args.chunks, first = task % args.chunks * args.chunk_rows;
        const int64_t last = first + args.chunk_rows < args.s ? first + args.chunk_rows : args.s;
        float* mean = args.scratch + task * 2 * args.padded_c;
        float* m2 = mean + args.padded_c;
        for (int64_t c = 0; c < 2 * args.padded_c; ++c) mean[c] = 0.0f;
        int64_t row = first;
        for (; row + kRows <= last; row += kRows)
            rows_moments<D, kResidual, kRows>(args, n, row, static_cast<float>(row - first), mean, m2);
        for (; row < last; ++row)
            rows_moments<D, kResidual, 1>(args, n, row, static_cast<float>(row - first), mean, m2);
        // Channels into groups: equal counts, so the group's mean is the mean of means.
        const float* add = args.channels + n * 4 * args.c;
        double* partial = args.partial + task * args.groups * 2;
        for (int64_t g = 0; g < args.groups; ++g) {
            double total = 0.0, squares = 0.0;
            for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) total += mean[c] + add[c];
            const double center = total / static_cast<double>(per_group);
            for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
                const double delta = mean[c] + add[c] - center;
                squares += m2[c] + delta * delta * static_cast<double>(last - first);
            }
            partial[2 * g] = center;
            partial[2 * g + 1] = squares;
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
        const float* center = args.channels + (n * 4 + 1) * args.c;
        const float *a = center + args.c, *b = a + args.c;
        const auto affine = [&](int64_t o, int64_t c, int count) __attribute__((always_inline)) {
            const auto at = [&](const float* p) __attribute__((always_inline)) {
                return count == kWidth ? load<DType::f32>(p, c) : load_tail<DType::f32>(p, c, count);
            };
            return (load_h<D, kResidual>(args.x, args.residual, o + c, count) - at(center)) * at(a) + at(b);
        };
        for (int64_t row = first; row < last; ++row) {
            const int64_t o = (n * args.s + row) * args.c;
            int64_t c = 0;
            for (; c + kUnroll * kWidth <= full; c += kUnroll * kWidth) {
                f32v t[kUnroll];
                const int64_t bytes = (o + c) * kBytes<D>;
                prefetch<kUnroll * kWidth * kBytes<D>>(static_cast<const char*>(args.x) + bytes + kAheadX);
                prefetch<kUnroll * kWidth * kBytes<D>, true>(static_cast<char*>(args.y) + bytes + kAheadY);
                for (int k = 0; k < kUnroll; ++k) t[k] = affine(o, c + k * kWidth, kWidth);
                if constexpr (kSilu) silu(t);
                store_all<D>(args.y, o + c, t);
            }
            for (; c < args.c; c += kWidth) {
                const int count = c < full ? kWidth : tail;
                f32v t[1] = {affine(o, c, count)};
                if constexpr (kSilu) silu(t);
                if (count == kWidth) store<D>(args.y, o + c, t[0]);
                else store_tail<D>(args.y, o + c, t[0], count);
            }
        }
    }
}

template <DType D, bool kResidual>
void apply_by_act(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    if (args.silu) channels_last_apply<D, kResidual, true>(args, begin, end);
    else channels_last_apply<D, kResidual, false>(args, begin, end);
}

// Calls f<dtype, has residual>.
#define DIFUSORES_BY_TYPE(f)                                                                                         \
    switch (args.dtype) {                                                                                            \
        case DType::f32:                                                                                             \
            return args.residual ? f<DType::f32, true>(args, begin, end) : f<DType::f32, false>(args, begin, end);   \
        case DType::bf16:                                                                                            \
            return args.residual ? f<DType::bf16, true>(args, begin, end) : f<DType::bf16, false>(args, begin, end); \
        case DType::f16:                                                                                             \
            return args.residual ? f<DType::f16, true>(args, begin, end) : f<DType::f16, false>(args, begin, end);   \
    }

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args, int64_t begin, int64_t end) { DIFUSORES_BY_TYPE(channels_first) }

void group_norm_silu_prepare(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        float* add = args.channels + n * 4 * args.c;
        if (!args.add.ptr) __builtin_memset(add, 0, args.c * sizeof(float));
        else
            for (int64_t c = 0; c < args.c; ++c) add[c] = param(args.add, n, c, 0.0f);
    }
}

void group_norm_silu_stats(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    DIFUSORES_BY_TYPE(channels_last_stats)
}

void group_norm_silu_combine(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    const int64_t per_group = args.c / args.groups;
    for (int64_t n = begin; n < end; ++n) {
        float* center = args.channels + (n * 4 + 1) * args.c;
        for (int64_t g = 0; g < args.groups; ++g) {
            Moments moments;
            for (int64_t k = 0; k < args.chunks; ++k) {
                const int64_t first = k * args.chunk_rows;
                const int64_t last = first + args.chunk_rows < args.s ? first + args.chunk_rows : args.s;
                const double* partial = args.partial + ((n * args.chunks + k) * args.groups + g) * 2;
                moments.join(static_cast<double>((last - first) * per_group), partial[0], partial[1]);
            }
            const double rstd = rstd_of(moments, args.eps);
            for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
                Affine affine;
                affine.set(args, n, c, moments.mean, rstd);
                center[c] = affine.center;
                center[args.c + c] = affine.a;
                center[2 * args.c + c] = affine.b;
            }
        }
    }
}

void group_norm_silu_apply(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
    DIFUSORES_BY_TYPE(apply_by_act)
}

namespace {
template <DType D>
void floor_of(const void* x, void* y, int64_t n, int64_t repeats, bool statistics) {
    const char* from = static_cast<const char*>(x);
    Moments moments;
    Lanes lanes;
    for (int64_t k = 0; k < repeats; ++k) {
        if (statistics) row_moments<D, false, false>(from, nullptr, nullptr, n, 0.0f, lanes, moments);
        row_apply<D, false, true>(from, nullptr, static_cast<char*>(y), n, 0, 0.5f, 1.5f, 0.25f);
    }
    lanes.flush(moments);
    *static_cast<float*>(y) = static_cast<float>(moments.m2);  // so that the compiler keeps them
}
}  // namespace

void group_norm_silu_floor(DType dtype, const void* x, void* y, int64_t n, int64_t repeats, bool statistics) {
    switch (dtype) {
        case DType::f32: return floor_of<DType::f32>(x, y, n, repeats, statistics);
        case DType::bf16: return floor_of<DType::bf16>(x, y, n, repeats, statistics);
        case DType::f16: return floor_of<DType::f16>(x, y, n, repeats, statistics);
    }
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
