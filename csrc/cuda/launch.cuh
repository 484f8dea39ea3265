// How a .cu file starts a kernel on a stream; the emulation has its own.
#pragma once
#include "cuda/launch.h"

namespace difusores {
namespace cuda {

constexpr size_t kSharedWithoutAsking = 48 << 10;

struct OnStream {
    cudaStream_t stream;
    unsigned cluster = 1;  // blocks of it
    OnStream in_clusters(unsigned blocks) const { return {stream, blocks}; }
    static bool ok(cudaError_t error) { return error == cudaSuccess; }
    template <class... Parameters, class... Arguments>
    cudaError_t operator()(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared,
                           const Arguments&... arguments) const {
        if (shared > kSharedWithoutAsking) {
            const cudaError_t error =
                cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared));
            if (error != cudaSuccess) return error;
        }
        if (cluster > 1) {
            cudaLaunchAttribute attribute{};
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
            cudaLaunchConfig_t config{};
            config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
            config.stream = stream, config.attrs = &attribute, config.numAttrs = 1;
            return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
        }
        kernel<<<grid, threads, shared, stream>>>(arguments...);
        return cudaGetLastError();
    }
};

}  // namespace cuda
}  // namespace difusores
