#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace difusores {
namespace cuda {

const char* attention_refuses(const AttentionArgs& args, int64_t shared_limit) {
    return refuses_attention(args, shared_limit);
}

cudaError_t attention(const AttentionArgs& args, int64_t shared_limit, int multiprocessors, cudaStream_t stream) {
    return launch_attention(args, plan_attention(args, shared_limit, multiprocessors), OnStream{stream});
}

}  // namespace cuda
}  // namespace difusores
