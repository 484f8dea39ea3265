#include "cuda/attention_backward.cuh"
#include "cuda/launch.cuh"

namespace difusores {
namespace cuda {

const char* attention_gradients_refuses(const AttentionGradArgs& args, int64_t shared_limit) {
    return refuses_attention_gradients(args, shared_limit);
}

cudaError_t attention_gradients(const AttentionGradArgs& args, int64_t shared_limit, cudaStream_t stream) {
    return launch_attention_gradients(args, shared_limit, OnStream{stream});
}

}  // namespace cuda
}  // namespace difusores
