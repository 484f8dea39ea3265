// group_norm_silu on CUDA: check the tensors, fill the struct, launch.
#include <algorithm>
#include <tuple>

#include "bindings_cuda.h"

namespace difusores {
namespace {

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
    const GroupNormPlan plan = cuda::group_norm_silu_plan(args, channels_last, device.shared_limit());
    STD_TORCH_CHECK(plan.threads > 0, "group_norm_silu: the CUDA kernel takes at most 2^30 positions and tiles");
    // Returned to torch's allocator at the end of this call, which gives it away again in the order of the stream.
    const int64_t floats = std::max<int64_t>(4 * plan.partials, 4);
    const Tensor partial = device.empty(aoti_torch_dtype_float32(), 1, &floats, &one);
    OnDevice::check(cuda::group_norm_silu(args, plan, partial.data_ptr(), device.stream()), "group_norm_silu");
    return {y, sum};
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) { m.impl("group_norm_silu", TORCH_BOX(&difusores::group_norm_silu)); }
