// scheduler_step on CUDA: check the tensors, fill the struct, launch.
#include "bindings_cuda.h"

namespace difusores {
namespace {

void scheduler_step(Tensor row, OptionalTensor step, Tensor sample, Tensor e1, OptionalTensor e2, OptionalTensor e3,
                    OptionalTensor noise, OptionalTensor variance, OptionalTensor threshold, OptionalTensor factor,
                    OptionalTensor s0, OptionalTensor s1, OptionalTensor s2, OptionalTensor s3, OptionalTensor s4,
                    OptionalTensor seeds, OptionalTensor y, OptionalTensor d, OptionalTensor u, OptionalTensor x0,
                    OptionalTensor m) {
    if (sample.numel() == 0) return;
    const OptionalTensor first = e1;
    SchedulerStepArgs a = scheduler_step_args(row, step, sample, {&first, &e2, &e3}, noise, variance, threshold, factor,
                                              {&s0, &s1, &s2, &s3, &s4}, seeds, {&y, &d, &u, &x0, &m});
    const StepRow source = step_row(row, step, "scheduler_step");
    a.row = source.table ? nullptr : source.row;
    if (a.row) check_row(a);
    const OnDevice device(sample);
    OnDevice::check(cuda::scheduler_step(a, source, device.stream()), "scheduler_step");
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) { m.impl("scheduler_step", TORCH_BOX(&difusores::scheduler_step)); }
