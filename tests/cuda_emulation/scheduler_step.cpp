#include "cuda/scheduler_step.cuh"
#include "launch.h"

extern "C" const char* scheduler_step(const difusores::SchedulerStepArgs* args, const difusores::StepRow* row,
                                      int schedule) {
    const emulation::OnFibers fibers{static_cast<emulation::Schedule>(schedule)};
    return emulation::report(difusores::cuda::launch_scheduler_step(*args, *row, fibers));
}
