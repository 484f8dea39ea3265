// bias_residual on CUDA: check the tensors, fill the struct, launch.
#include "bindings_cuda.h"

namespace difusores {
namespace {

void launch(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& add, const OptionalTensor& residual,
            double scale, const Tensor& y, const OnDevice& device) {
    const bool channels_last = is_channels_last(x);
    if (x.numel() == 0) return;
    const BiasResidualArgs args = bias_residual_args(x, bias, add, residual, scale, y);
    STD_TORCH_CHECK(cuda::bias_residual_takes(args), "bias_residual: the CUDA kernel takes images below 2^30 elements");
    OnDevice::check(cuda::bias_residual(args, channels_last, device.stream()), "bias_residual");
}

Tensor bias_residual(Tensor x, OptionalTensor bias, OptionalTensor add, OptionalTensor residual, double scale) {
    const OnDevice device(x);
    Tensor y = device.like(x);
    launch(x, bias, add, residual, scale, y, device);
    return y;
}

void bias_residual_(Tensor x, OptionalTensor bias, OptionalTensor add, OptionalTensor residual, double scale) {
    launch(x, bias, add, residual, scale, x, OnDevice(x));
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) {
    m.impl("bias_residual", TORCH_BOX(&difusores::bias_residual));
    m.impl("bias_residual_", TORCH_BOX(&difusores::bias_residual_));
}
