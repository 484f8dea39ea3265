#include "cuda/geglu.cuh"
#include "cuda/launch.cuh"

namespace difusores {
namespace cuda {

cudaError_t geglu(const GegluArgs& args, cudaStream_t stream) { return launch_geglu(args, OnStream{stream}); }

}  // namespace cuda
}  // namespace difusores
