// How a .cu file starts a kernel on a stream; the emulation has its own.
#pragma once
#include "cuda/launch.h"

namespace difusores {
namespace cuda {

constexpr size_t kSharedWithoutAsking = 48 << 10;

struct OnStream {
    cudaStream_t stream;
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
        kernel<<<grid, threads, shared, stream>>>(arguments...);
        return cudaGetLastError();
    }
};

}  // namespace cuda
}  // namespace difusores
