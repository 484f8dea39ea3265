#include "cuda/bias_residual.cuh"
#include "cuda/launch.cuh"

namespace difusores {
namespace cuda {

bool bias_residual_takes(const BiasResidualArgs& args) { return takes_bias_residual(args); }

cudaError_t bias_residual(const BiasResidualArgs& args, bool channels_last, cudaStream_t stream) {
    return launch_bias_residual(args, channels_last, OnStream{stream});
}

}  // namespace cuda
}  // namespace difusores
