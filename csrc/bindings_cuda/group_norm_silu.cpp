// group_norm_silu on CUDA: check the tensors, fill the struct, launch.
#include <array>
#include <atomic>
#include <tuple>

#include "bindings_cuda.h"

namespace difusores {
namespace {

// Asked of each device once; a second thread that asks meanwhile is told the same.
unsigned most_cluster(const OnDevice& device) {
    static std::array<std::atomic<unsigned>, 64> known{};
    const auto index = static_cast<size_t>(device.index());
    if (index >= known.size()) return 1;
    unsigned blocks = known[index].load(std::memory_order_relaxed);
    if (blocks == 0) {
        blocks = cuda::group_norm_silu_cluster(device.capability(), device.shared_limit());
        known[index].store(blocks, std::memory_order_relaxed);
    }
    return blocks;
}

std::tuple<Tensor, Tensor> group_norm_silu(Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias,
                                           double eps, bool silu, OptionalTensor scale, OptionalTensor shift,
                                           OptionalTensor add, OptionalTensor residual, bool return_sum) {
    check_group_norm_silu(x, num_groups, residual);
    const bool channels_last = is_channels_last(x);
    const OnDevice device(x);
    const int64_t none = 0, one = 1;
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    Tensor y = device.like(x);
    Tensor sum = return_sum ? device.like(x) : device.empty(dtype, 1, &none, &one);
    if (x.numel() == 0) return {y, sum};
    const GroupNormSiluArgs args =
        group_norm_silu_args(x, num_groups, weight, bias, eps, silu, scale, shift, add, residual, y, sum, return_sum);
    const GroupNormPlan plan =
        cuda::group_norm_silu_plan(args, channels_last, device.shared_limit(), most_cluster(device));
    STD_TORCH_CHECK(plan.threads > 0, "group_norm_silu: the CUDA kernel takes at most 2^30 positions and tiles");
    // Returned to torch's allocator at the end of this call, which gives it away again in the order of the stream.
    OptionalTensor partial;
    const int64_t floats = 4 * plan.partials;
    if (floats > 0) partial = device.empty(aoti_torch_dtype_float32(), 1, &floats, &one);
    OnDevice::check(cuda::group_norm_silu(args, plan, partial ? partial->data_ptr() : nullptr, device.stream()),
                    "group_norm_silu");
    return {y, sum};
}

// Of x and the residual, of weight, bias, scale, shift and add; empty where those are not given.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    Tensor grad_y, OptionalTensor grad_sum, Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias,
    double eps, bool silu, OptionalTensor scale, OptionalTensor shift, OptionalTensor add, OptionalTensor residual) {
    check_group_norm_silu(x, num_groups, residual);
    STD_TORCH_CHECK(same_layout(x, grad_y) && (!grad_sum || same_layout(x, *grad_sum)),
                    "group_norm_silu_backward: the gradients must have x's dtype and layout");
    const bool channels_last = is_channels_last(x);
    const OnDevice device(x);
    const Tensor grad_x = device.like(x);
    const auto of = [&](const OptionalTensor& p) {
        return p ? device.contiguous(*p, {p->sizes().begin(), p->sizes().end()}) : device.contiguous(x, {0});
    };
    const Tensor of_weight = of(weight), of_bias = of(bias), of_scale = of(scale), of_shift = of(shift),
                 of_add = of(add);
    const auto all = [&] { return std::make_tuple(grad_x, of_weight, of_bias, of_scale, of_shift, of_add); };
    if (x.numel() == 0) {
        for (const Tensor& t : {of_weight, of_bias, of_scale, of_shift, of_add})
            OnDevice::check(cudaMemsetAsync(t.data_ptr(), 0, t.numel() * t.element_size(), device.stream()), "memset");
        return all();
    }
    GroupNormSiluArgs args =
        group_norm_silu_args(x, num_groups, weight, bias, eps, silu, scale, shift, add, residual, x, x, false);
    args.y = nullptr;
    const auto param = [&](const OptionalTensor& given, const Tensor& t, bool per_image) {
        return given ? param_of(t, args.n, args.c, per_image, "gradient") : Param{};
    };
    GroupNormSiluGrads grads{};
    grads.y = grad_y.data_ptr(), grads.sum = grad_sum ? grad_sum->data_ptr() : nullptr, grads.x = grad_x.data_ptr();
    grads.weight = param(weight, of_weight, false), grads.bias = param(bias, of_bias, false);
    grads.scale = param(scale, of_scale, true), grads.shift = param(shift, of_shift, true);
    grads.add = param(add, of_add, true);
    const GroupNormBackwardPlan plan = cuda::group_norm_silu_backward_plan(args, grads, channels_last);
    STD_TORCH_CHECK(plan.tiles.threads > 0,
                    "group_norm_silu_backward: the CUDA kernel takes at most 2^30 positions and tiles");
    const int64_t one = 1;
    const Tensor scratch = device.empty(aoti_torch_dtype_float32(), 1, &plan.floats, &one);
    OnDevice::check(cuda::group_norm_silu_backward(args, grads, plan, scratch.data_ptr(), device.stream()),
                    "group_norm_silu_backward");
    return all();
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) {
    m.impl("group_norm_silu", TORCH_BOX(&difusores::group_norm_silu));
    m.impl("group_norm_silu_backward", TORCH_BOX(&difusores::group_norm_silu_backward));
}
