// layer_norm on CUDA: check the tensors, fill the struct, launch.
#include <tuple>
#include <vector>

#include "bindings_cuda.h"

namespace difusores {
namespace {

std::tuple<Tensor, Tensor> layer_norm(Tensor x, OptionalTensor weight, OptionalTensor bias, double eps,
                                      OptionalTensor residual, bool return_sum, OptionalTensor sum_bias) {
    STD_TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), "layer_norm: the kernel takes contiguous tensors");
    STD_TORCH_CHECK(!residual || (residual->is_contiguous() && same_layout(x, *residual)),
                    "layer_norm: residual must be contiguous and have x's shape and dtype");
    const OnDevice device(x);
    Tensor y = device.like(x);
    Tensor sum = return_sum ? device.like(x) : device.contiguous(x, {0});
    if (x.numel() == 0) return {y, sum};
    const LayerNormArgs args = layer_norm_args(x, weight, bias, eps, residual, y, sum, return_sum, sum_bias);
    const LayerNormPlan plan = cuda::layer_norm_plan(args);
    STD_TORCH_CHECK(plan.lanes > 0, "layer_norm: the CUDA kernel takes rows of at most 16384 elements");
    OnDevice::check(cuda::layer_norm(args, plan, device.stream()), "layer_norm");
    return {y, sum};
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) { m.impl("layer_norm", TORCH_BOX(&difusores::layer_norm)); }
