// guidance_rescale on a CPU: check the tensors, fill the struct, run the kernel over torch's threads, combine its
// blocks.
#include <cmath>
#include <vector>

#include "bindings.h"

namespace difusores {
namespace {

// Of an image from its blocks' moments, one after the other: the sum of squared deviations (Chan et al. 1979).
double squares_of_image(const RescaleMoments* blocks, int64_t inner) {
    double count = 0, mean = 0, squares = 0;
    for (; count < static_cast<double>(inner); blocks += 2) {
        const double more = std::min<double>(kStepBlock, static_cast<double>(inner) - count), whole = count + more;
        const double apart = blocks->mean - mean;
        mean += apart * (more / whole);
        squares += blocks->squares + apart * apart * (count * (more / whole));
        count = whole;
    }
    return squares;
}

void guidance_rescale(Tensor row, OptionalTensor step, Tensor e1, OptionalTensor e2, OptionalTensor e3,
                      int64_t conditional, double share, Tensor factor) {
    const OptionalTensor first = e1;
    GuidanceRescaleArgs a = guidance_rescale_args(row, step, {&first, &e2, &e3}, conditional, share, factor);
    a.row = row_on_host(row, step, "guidance_rescale");
    const int64_t blocks = (a.inner + kStepBlock - 1) / kStepBlock;
    std::vector<RescaleMoments> moments(2 * a.batch * blocks);
    torch::stable::parallel_for(0, a.batch * blocks, kGrain / kStepBlock, [&](int64_t begin, int64_t end) {
        g_kernels->guidance_rescale(a, moments.data(), begin, end);
    });
    for (int64_t b = 0; b < a.batch; ++b) {
        const RescaleMoments* const of_image = &moments[2 * b * blocks];
        const double ratio =
            std::sqrt(squares_of_image(of_image, a.inner)) / std::sqrt(squares_of_image(of_image + 1, a.inner));
        a.factor[b] = static_cast<float>(a.share * ratio + (1.0 - a.share));
    }
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) { m.impl("guidance_rescale", TORCH_BOX(&difusores::guidance_rescale)); }
