#include "cuda/group_norm_silu_backward.cuh"
#include "launch.h"

// shared_limit: bytes of shared memory that a block may have, most_cluster: blocks of a cluster, as of a device.
// Returns the plan that was carried out.
extern "C" const char* group_norm_silu(const difusores::GroupNormSiluArgs* args, bool channels_last,
                                       int64_t shared_limit, unsigned most_cluster, int schedule,
                                       difusores::GroupNormPlan* plan) {
    const emulation::OnFibers fibers{static_cast<emulation::Schedule>(schedule)};
    *plan = difusores::cuda::plan_group_norm_silu(*args, channels_last, shared_limit, most_cluster);
    std::vector<float4> partial(plan->partials, float4{NAN, NAN, NAN, NAN});
    return emulation::report(difusores::cuda::launch_group_norm_silu(*args, *plan, partial.data(), fibers));
}

extern "C" const char* group_norm_silu_backward(const difusores::GroupNormSiluArgs* args,
                                                const difusores::GroupNormSiluGrads* grads, bool channels_last,
                                                int schedule, difusores::GroupNormBackwardPlan* plan) {
    const emulation::OnFibers fibers{static_cast<emulation::Schedule>(schedule)};
    *plan = difusores::cuda::plan_group_norm_silu_backward(*args, *grads, channels_last);
    std::vector<float4> scratch((plan->floats + 3) / 4, float4{NAN, NAN, NAN, NAN});
    return emulation::report(
        difusores::cuda::launch_group_norm_silu_backward(*args, *grads, *plan, scratch.data(), fibers));
}
