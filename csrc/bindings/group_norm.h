// The statistics of a group norm of channels_last images, for the ops that end in one or begin with one.
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

// Channels last: the moments of every channel of every image, into args.channels.
struct ChannelMoments {
    std::unique_ptr<float[]> scratch;
    std::unique_ptr<double[]> partial;

    explicit ChannelMoments(GroupNormSiluArgs& args) {
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
};

// multiplier and offset, [N, C] each, such that multiplier * x + offset is the norm of x.
inline void norm_affine(GroupNormSiluArgs& args, float* multiplier, float* offset) {
    const ChannelMoments moments(args);
    for (int64_t n = 0; n < args.n; ++n) {
        const float* const center = args.channels + (n * 4 + 1) * args.c;
        const float *const a = center + args.c, *const b = a + args.c;
        for (int64_t c = 0; c < args.c; ++c) {
            *multiplier++ = a[c];
            *offset++ = static_cast<float>(b[c] - static_cast<double>(center[c]) * a[c]);
        }
    }
}

}  // namespace difusores
