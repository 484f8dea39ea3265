// The statistics of group norms of channels_last images, for the ops that end in one or begin with one.
#pragma once
#include <algorithm>
#include <memory>

#include "../bindings.h"

namespace difusores {

constexpr int64_t kTaskCost = 256;  // elements that take as long as what a task does once

inline void run_norm(int64_t tasks, int64_t elements_per_task, decltype(Kernels::group_norm_silu) kernel,
                     const GroupNormSiluArgs& args) {
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / (elements_per_task + kTaskCost)),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Channels last: what normalises every channel of every image, into args.channels. of_channels: the mean and variance
// of each channel, [N, 2, C], where they are known.
struct ChannelMoments {
    std::unique_ptr<float[]> scratch;
    std::unique_ptr<double[]> partial;

    explicit ChannelMoments(GroupNormSiluArgs& args, const double* of_channels = nullptr) {
        if (of_channels) {
            join(args, of_channels);
            return;
        }
        // A chunk of rows is about 256 KB of fp32: it is read twice, the second time from L2 or L3.
        args.chunk_rows = std::clamp<int64_t>(2 * kGrain / args.c / 8 * 8, 8, 1024);
        args.chunks = (args.s + args.chunk_rows - 1) / args.chunk_rows;
        args.padded_c = (args.c + kMaxWidth - 1) / kMaxWidth * kMaxWidth;
        const int64_t tasks = args.n * args.chunks;
        scratch.reset(new float[tasks * 2 * args.padded_c + args.n * 4 * args.c]);
        partial.reset(new double[tasks * args.groups * 2]);
        args.scratch = scratch.get(), args.channels = scratch.get() + tasks * 2 * args.padded_c;
        args.partial = partial.get();
        g_kernels->group_norm_silu_prepare(args, 0, args.n);
        run_norm(tasks, args.chunk_rows * args.c, g_kernels->group_norm_silu_stats, args);
        run_norm(args.n, 16 * args.c, g_kernels->group_norm_silu_combine,
                 args);  // a channel costs as much as 16 elements
    }

  private:
    // An image is one chunk, whose groups are joined from their channels.
    void join(GroupNormSiluArgs& args, const double* of_channels) {
        args.chunks = 1, args.chunk_rows = args.s;
        scratch.reset(new float[args.n * 4 * args.c]);
        partial.reset(new double[args.n * args.groups * 2]);
        args.channels = scratch.get(), args.partial = partial.get();
        const int64_t per_group = args.c / args.groups;
        for (int64_t n = 0; n < args.n; ++n)
            for (int64_t g = 0; g < args.groups; ++g) {
                const double* const mean = of_channels + n * 2 * args.c + g * per_group;
                const double* const variance = mean + args.c;
                double total = 0.0, variances = 0.0;
                for (int64_t c = 0; c < per_group; ++c) total += mean[c];
                const double center = total / static_cast<double>(per_group);
                for (int64_t c = 0; c < per_group; ++c)
                    variances += variance[c] + (mean[c] - center) * (mean[c] - center);
                double* const of_group = partial.get() + (n * args.groups + g) * 2;
                of_group[0] = center, of_group[1] = variances * static_cast<double>(args.s);
            }
        g_kernels->group_norm_silu_prepare(args, 0, args.n);
        g_kernels->group_norm_silu_combine(args, 0, args.n);
    }
};

// multiplier and offset, [N, C] each, such that multiplier * x + offset is the norm of x.
inline void norm_affine(GroupNormSiluArgs& args, const double* of_channels, float* multiplier, float* offset) {
    const ChannelMoments moments(args, of_channels);
    for (int64_t n = 0; n < args.n; ++n) {
        const float* const center = args.channels + (n * 4 + 1) * args.c;
        const float *const a = center + args.c, *const b = a + args.c;
        for (int64_t c = 0; c < args.c; ++c) {
            *multiplier++ = a[c];
            *offset++ = static_cast<float>(b[c] - static_cast<double>(center[c]) * a[c]);
        }
    }
}

// [N, 2, C] contiguous fp64, mean and variance of each channel of an image, or nullptr.
inline double* moments_of(const OptionalTensor& t, int64_t n, int64_t c, const char* name) {
    if (!t) return nullptr;
    const bool fits = t->dim() == 3 && t->size(0) == n && t->size(1) == 2 && t->size(2) == c;
    STD_TORCH_CHECK(fits && t->is_contiguous() && t->scalar_type() == ScalarType::Double, name,
                    " must be contiguous float64 [N, 2, C]");
    return static_cast<double*>(t->data_ptr());
}

}  // namespace difusores
