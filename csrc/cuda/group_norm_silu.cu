#include "cuda/group_norm_silu_backward.cuh"
#include "cuda/launch.cuh"

namespace difusores {
namespace cuda {

// Part of a card may have fewer multiprocessors side by side than a cluster has blocks.
unsigned group_norm_silu_cluster(int capability, int64_t shared_limit) {
    if (capability < 90) return 1;
    const auto kernel = group_norm_last_tile<8, true>;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(kClusterThreads),
    config.dynamicSmemBytes = static_cast<size_t>(shared_limit) - kStaticShared;
    config.attrs = &attribute, config.numAttrs = 1;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(config.dynamicSmemBytes)) != cudaSuccess)
        return 1;
    for (unsigned blocks = kMostCluster; blocks > 1; blocks /= 2) {
        attribute.val.clusterDim.x = blocks, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.gridDim = dim3(blocks);
        int clusters = 0;
        if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) return blocks;
    }
    cudaGetLastError();  // of the questions
    return 1;
}

GroupNormPlan group_norm_silu_plan(const GroupNormSiluArgs& args, bool channels_last, int64_t shared_limit,
                                   unsigned most_cluster) {
    return plan_group_norm_silu(args, channels_last, shared_limit, most_cluster);
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
