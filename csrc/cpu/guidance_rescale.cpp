// factor = share * std(e_c) / std(sum_k g_k e_k) + 1 - share, deviations over an image; c: the conditional output.
//
// Bytes: every model output once in; 32 bytes out for each block of kStepBlock elements, of which the binding combines
// the moments (Chan et al. 1979). Layout: [B, inner] with any batch stride; a block is of one image and depends on its
// place there alone. Statistics: two passes over a block in L1, the mean, then the deviations from it, whose sum also
// corrects the mean. Nothing cancels when mean >> std.
#include "step_block.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int kSums = 4;  // chains of additions beside each other

DIFUSORES_INLINE float total(f32v (&sums)[kSums]) { return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// Of `count` numbers, zero-padded to whole vectors.
RescaleMoments moments(const float* x, int64_t count) {
    const auto each = [&](const auto& add) __attribute__((always_inline)) {
        int64_t k = 0;
        for (; k + kSums * kWidth <= count; k += kSums * kWidth)
            for (int j = 0; j < kSums; ++j) add(j, load<DType::f32>(x, k + j * kWidth), splat(1.0f));
        for (; k < count; k += kWidth)
            add(0, load<DType::f32>(x, k), lane_mask(count - k < kWidth ? static_cast<int>(count - k) : kWidth));
    };
    f32v sums[kSums] = {}, rests[kSums] = {}, squares[kSums] = {};
    each([&](int j, f32v v, f32v) __attribute__((always_inline)) { sums[j] += v; });
    const float mean = total(sums) / static_cast<float>(count);
    each([&](int j, f32v v, f32v inside) __attribute__((always_inline)) {
        const f32v t = (v - mean) * inside;
        rests[j] += t, squares[j] += t * t;
    });
    const double rest = static_cast<double>(total(rests)), delta = rest / static_cast<double>(count);
    const double about = static_cast<double>(total(squares)) - rest * delta;
    return {static_cast<double>(mean) + delta, about < 0.0 ? 0.0 : about};
}

}  // namespace

void guidance_rescale(const GuidanceRescaleArgs& args, RescaleMoments* found, int64_t begin, int64_t end) {
    float g[3];
    for (int k = 0; k < 3; ++k) g[k] = static_cast<float>(args.row[k]);
    const int64_t blocks = (args.inner + kStepBlock - 1) / kStepBlock;
    Block sum, others[2], conditional;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks, i = task % blocks * kStepBlock;
        const int64_t count = args.inner - i < kStepBlock ? args.inner - i : kStepBlock;
        const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;
        found[2 * task] = moments(read(args.e[args.conditional], b, i, count, conditional), count);
        found[2 * task + 1] = moments(mix(args.e, g, b, i, count, padded, sum, others), count);
    }
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
