// How the CUDA kernels cut a call, from its sizes alone: for a model of costs, which needs no kernels.
#include "cuda/group_norm_tiles.cuh"
#include "launch.h"

extern "C" void group_norm_silu_plan(const difusores::GroupNormSiluArgs* args, bool channels_last, int64_t shared_limit,
                                     unsigned most_cluster, difusores::GroupNormPlan* plan) {
    *plan = difusores::cuda::plan_group_norm_silu(*args, channels_last, shared_limit, most_cluster);
}
