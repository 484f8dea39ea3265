// layer_norm on a CPU: check the tensors, fill the struct, run the kernel over torch's threads.
#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace difusores {
namespace {

std::tuple<Tensor, Tensor> layer_norm(Tensor x, OptionalTensor weight, OptionalTensor bias, double eps,
                                      OptionalTensor residual, bool return_sum, OptionalTensor sum_bias) {
    STD_TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), "layer_norm: the kernel takes contiguous tensors");
    STD_TORCH_CHECK(!residual || (residual->is_contiguous() && same_layout(x, *residual)),
                    "layer_norm: residual must be contiguous and have x's shape and dtype");
    Tensor y = new_like(x);
    Tensor sum = return_sum ? new_like(x) : new_contiguous(x, {0});
    if (x.numel() == 0) return {y, sum};
    const LayerNormArgs args = layer_norm_args(x, weight, bias, eps, residual, y, sum, return_sum, sum_bias);
    torch::stable::parallel_for(
        0, args.rows, std::max<int64_t>(1, kGrain / args.columns), [&](int64_t begin, int64_t end) {
            const std::unique_ptr<float[]> scratch(new float[g_kernels->layer_norm_scratch(args)]);
            g_kernels->layer_norm(args, scratch.get(), begin, end);
        });
    return {y, sum};
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) { m.impl("layer_norm", TORCH_BOX(&difusores::layer_norm)); }
