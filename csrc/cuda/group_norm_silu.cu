#include "cuda/group_norm_silu_backward.cuh"
#include "cuda/launch.cuh"

namespace difusores {
namespace cuda {

GroupNormPlan group_norm_silu_plan(const GroupNormSiluArgs& args, bool channels_last, int64_t shared_limit) {
    return plan_group_norm_silu(args, channels_last, shared_limit);
}

cudaError_t group_norm_silu(const GroupNormSiluArgs& args, const GroupNormPlan& plan, void* partial,
                            cudaStream_t stream) {
    return launch_group_norm_silu(args, plan, partial, OnStream{stream});
}

GroupNormBackwardPlan group_norm_silu_backward_plan(const GroupNormSiluArgs& args, const GroupNormSiluGrads& grads,
                                                    bool channels_last) {
    return plan_group_norm_silu_backward(args, grads, channels_last);
}

cudaError_t group_norm_silu_backward(const GroupNormSiluArgs& args, const GroupNormSiluGrads& grads,
                                     const GroupNormBackwardPlan& plan, void* scratch, cudaStream_t stream) {
    return launch_group_norm_silu_backward(args, grads, plan, scratch, OnStream{stream});
}

}  // namespace cuda
}  // namespace difusores
