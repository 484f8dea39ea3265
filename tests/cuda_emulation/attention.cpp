#include "mma.h"
#include "cuda/attention.cuh"
#include "cuda/attention_backward.cuh"
#include "launch.h"

extern "C" void attention_plan(const difusores::AttentionArgs* args, int64_t shared_limit, int multiprocessors,
                               difusores::cuda::AttentionPlan* plan) {
    *plan = difusores::cuda::plan_attention(*args, shared_limit, multiprocessors);
}

// Of shared memory for a block of the gradients in 16 bits.
extern "C" int attention_gradient_bytes(int width) {
    return difusores::cuda::kGradStages * difusores::cuda::grad_stage_bytes(width);
}

// shared_limit, multiprocessors: as of a device. Returns the plan that was carried out.
extern "C" const char* attention(const difusores::AttentionArgs* args, int64_t shared_limit, int multiprocessors,
                                 int schedule, difusores::cuda::AttentionPlan* plan) {
    const emulation::OnFibers fibers{static_cast<emulation::Schedule>(schedule)};
    attention_plan(args, shared_limit, multiprocessors, plan);
#ifdef DIFUSORES_FAULTY  // three instances, which compile at once
    const dim3 grid = {static_cast<unsigned>(plan->blocks * args->b * args->h), 1, 1};
    const auto run = [&](auto kernel) {
        return emulation::report(
            fibers(kernel, grid, plan->threads, static_cast<size_t>(plan->shared_bytes), *args, *plan));
    };
    if (args->dtype == difusores::DType::f32) return run(difusores::cuda::attention_fp32<40>);
    if (plan->width == 256) return run(difusores::cuda::attention_wide<difusores::DType::f16, 256, false>);
    return run(difusores::cuda::attention_forward<difusores::DType::f16, 40, false>);
#else
    return emulation::report(difusores::cuda::launch_attention(*args, *plan, fibers));
#endif
}

extern "C" const char* attention_gradients(const difusores::AttentionGradArgs* args, int64_t shared_limit,
                                           int schedule) {
    const emulation::OnFibers fibers{static_cast<emulation::Schedule>(schedule)};
#ifdef DIFUSORES_FAULTY
    using difusores::DType;
    if (args->dtype == DType::f32)
        return emulation::report(difusores::cuda::launch_gradients<DType::f32, 40>(*args, shared_limit, fibers));
    return emulation::report(difusores::cuda::launch_gradients<DType::f16, 40>(*args, shared_limit, fibers));
#else
    return emulation::report(difusores::cuda::launch_attention_gradients(*args, shared_limit, fibers));
#endif
}
