#include "cuda/launch.cuh"
#include "cuda/layer_norm.cuh"

namespace difusores {
namespace cuda {

LayerNormPlan layer_norm_plan(const LayerNormArgs& args) { return plan_layer_norm(args); }

cudaError_t layer_norm(const LayerNormArgs& args, const LayerNormPlan& plan, cudaStream_t stream) {
    return launch_layer_norm(args, plan, OnStream{stream});
}

}  // namespace cuda
}  // namespace difusores
