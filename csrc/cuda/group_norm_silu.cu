#include "cuda/group_norm_silu_backward.cuh"
#include "cuda/launch.cuh"

namespace difusores {
namespace cuda {

namespace {

// Part of a card may have fewer multiprocessors side by side than a cluster has blocks. Code for earlier cards, which a
// driver has compiled anew for this one, has no clusters.
unsigned most_cluster(int64_t shared_limit) {
    const auto kernel = group_norm_last_tile<8, true>;
    cudaFuncAttributes compiled{};
    if (cudaFuncGetAttributes(&compiled, kernel) != cudaSuccess || compiled.ptxVersion < 90) return 1;
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
    return 1;
}

}  // namespace

unsigned group_norm_silu_cluster(int capability, int64_t shared_limit) {
    const unsigned blocks = capability < 90 ? 1 : most_cluster(shared_limit);
    cudaGetLastError();  // of the questions: the next launch is not to report it
    return blocks;
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
