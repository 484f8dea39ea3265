// Kernels with one fault each, which the emulation has to notice; and one without.
#include "cuda/common.cuh"
#include "launch.h"

namespace {

constexpr unsigned kThreads = 64;

// y[t] = x[0] + ... + x[63] for every t, through shared memory and a warp's exchange.
template <bool kBarrier>
__global__ void sum(const float* x, float* y) {
    DIFUSORES_SHARED(float, parts, 2);
    float total = x[threadIdx.x];
    for (int other = 16; other; other /= 2) total += __shfl_xor_sync(difusores::cuda::kAllLanes, total, other);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = total;
    if (kBarrier) __syncthreads();
    y[threadIdx.x] = parts[0] + parts[1];
}

__global__ void some_wait(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x < 32) return;
    __syncthreads();
}

__global__ void different_barriers(const float*, float*) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void half_a_warp(const float* x, float* y) {
    if (threadIdx.x % 32 >= 16) return;
    y[threadIdx.x] = __shfl_xor_sync(difusores::cuda::kAllLanes, x[threadIdx.x], 1);
}

__global__ void foreign_lane(const float* x, float* y) {
    if (threadIdx.x % 32 >= 16) return;
    y[threadIdx.x] = __shfl_xor_sync(0xFFFFu, x[threadIdx.x], 16);
}

__global__ void unwritten(const float*, float* y) {
    DIFUSORES_DYNAMIC_SHARED(dynamic);
    DIFUSORES_SHARED(float, fixed, 2);
    y[threadIdx.x] = threadIdx.x % 2 ? fixed[1] : reinterpret_cast<float*>(dynamic)[threadIdx.x];
}

}  // namespace

extern "C" const char* faults(const char* name, const float* x, float* y, int schedule) {
    const emulation::OnFibers fibers{static_cast<emulation::Schedule>(schedule)};
    const auto run = [&](auto kernel) {
        return emulation::report(fibers(kernel, dim3{1, 1, 1}, kThreads, kThreads * sizeof(float), x, y));
    };
    const std::string wanted = name;
    if (wanted == "sum") return run(sum<true>);
    if (wanted == "sum without a barrier") return run(sum<false>);
    if (wanted == "some wait") return run(some_wait);
    if (wanted == "different barriers") return run(different_barriers);
    if (wanted == "half a warp") return run(half_a_warp);
    if (wanted == "foreign lane") return run(foreign_lane);
    return run(unwritten);
}
