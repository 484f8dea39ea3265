// guidance_rescale on CUDA: check the tensors, fill the struct, launch.
#include "bindings_cuda.h"

namespace difusores {
namespace {

void guidance_rescale(Tensor row, OptionalTensor step, Tensor e1, OptionalTensor e2, OptionalTensor e3,
                      int64_t conditional, double share, Tensor factor) {
    const OptionalTensor first = e1;
    const GuidanceRescaleArgs a = guidance_rescale_args(row, step, {&first, &e2, &e3}, conditional, share, factor);
    const StepRow source = step_row(row, step, "guidance_rescale");
    const OnDevice device(e1);
    const int64_t bytes = cuda::guidance_rescale_bytes(a);
    std::optional<Tensor> partial;
    if (bytes > 0) partial = device.contiguous(factor, {bytes / 4});
    OnDevice::check(cuda::guidance_rescale(a, source, partial ? partial->data_ptr() : nullptr, device.stream()),
                    "guidance_rescale");
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) { m.impl("guidance_rescale", TORCH_BOX(&difusores::guidance_rescale)); }
