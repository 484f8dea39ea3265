#include "cuda/launch.cuh"
#include "cuda/scheduler_step.cuh"

namespace difusores {
namespace cuda {

cudaError_t scheduler_step(const SchedulerStepArgs& args, const StepRow& row, cudaStream_t stream) {
    return launch_scheduler_step(args, row, OnStream{stream});
}

}  // namespace cuda
}  // namespace difusores
