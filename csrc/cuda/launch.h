// The launchers of the CUDA kernels, for the bindings: host code without torch. Every pointer in the arguments is to
// device memory. They return the launch's error and read nothing back.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels.h"

namespace difusores {
namespace cuda {

cudaError_t scheduler_step(const SchedulerStepArgs& args, const StepRow& row, cudaStream_t stream);

}  // namespace cuda
}  // namespace difusores
