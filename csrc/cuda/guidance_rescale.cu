#include "cuda/guidance_rescale.cuh"
#include "cuda/launch.cuh"

namespace difusores {
namespace cuda {

int64_t guidance_rescale_bytes(const GuidanceRescaleArgs& args) {
    const int64_t tiles = rescale_tiles(args);
    return tiles > 1 ? args.batch * tiles * static_cast<int64_t>(sizeof(float4)) : 0;
}

cudaError_t guidance_rescale(const GuidanceRescaleArgs& args, const StepRow& row, void* partial, cudaStream_t stream) {
    return launch_guidance_rescale(args, row, partial, OnStream{stream});
}

}  // namespace cuda
}  // namespace difusores
