#include "cuda/layer_norm.cuh"

#include "launch.h"

// Returns the plan that was carried out.
extern "C" const char* layer_norm(const difusores::LayerNormArgs* args, int schedule, difusores::LayerNormPlan* plan) {
    const emulation::OnFibers fibers{static_cast<emulation::Schedule>(schedule)};
    *plan = difusores::cuda::plan_layer_norm(*args);
    if (plan->lanes == 0) return emulation::report("a row is longer than a block keeps");
    return emulation::report(difusores::cuda::launch_layer_norm(*args, *plan, fibers));
}
