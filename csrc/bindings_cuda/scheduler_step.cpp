// scheduler_step on CUDA: check the tensors, fill the struct, launch.
#include <algorithm>

#include "bindings_cuda.h"

namespace difusores {
namespace {

// Where the row is: on the host it goes with the launch, on the device the kernel reads it there.
StepRow source_of(const Tensor& row, const OptionalTensor& step, SchedulerStepArgs& a) {
    StepRow source{};
    source.count = row.dim() == 2 ? row.size(0) : 1;
    if (row.is_cuda()) {
        STD_TORCH_CHECK(!step || step->is_cuda(), "scheduler_step: step must be with row, on the device");
        source.table = static_cast<const double*>(row.data_ptr());
        source.step = step ? static_cast<const int64_t*>(step->data_ptr()) : nullptr;
        return source;
    }
    STD_TORCH_CHECK(!step || step->is_cpu(), "scheduler_step: step must be with row, on the CPU");
    a.row = row_on_host(row, step, "scheduler_step");
    check_row(a);
    std::copy(a.row, a.row + 40, source.row);
    return source;
}

void scheduler_step(Tensor row, OptionalTensor step, Tensor sample, Tensor e1, OptionalTensor e2, OptionalTensor e3,
                    OptionalTensor noise, OptionalTensor variance, OptionalTensor threshold, OptionalTensor factor,
                    OptionalTensor s0, OptionalTensor s1, OptionalTensor s2, OptionalTensor s3, OptionalTensor s4,
                    OptionalTensor seeds, OptionalTensor y, OptionalTensor d, OptionalTensor u, OptionalTensor x0,
                    OptionalTensor m) {
    STD_TORCH_CHECK(!factor, "scheduler_step: the kernel takes no factor in this version");
    if (sample.numel() == 0) return;
    const OptionalTensor first = e1;
    SchedulerStepArgs a = scheduler_step_args(row, step, sample, {&first, &e2, &e3}, noise, variance, threshold, factor,
                                              {&s0, &s1, &s2, &s3, &s4}, seeds, {&y, &d, &u, &x0, &m});
    const StepRow source = source_of(row, step, a);
    const OnDevice device(sample);
    OnDevice::check(cuda::scheduler_step(a, source, device.stream()), "scheduler_step");
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) { m.impl("scheduler_step", TORCH_BOX(&difusores::scheduler_step)); }
