#include "cuda/guidance_rescale.cuh"
#include "launch.h"

extern "C" const char* guidance_rescale(const difusores::GuidanceRescaleArgs* args, const difusores::StepRow* row,
                                        int schedule) {
    const emulation::OnFibers fibers{static_cast<emulation::Schedule>(schedule)};
    std::vector<float4> partial(args->batch * difusores::cuda::rescale_tiles(*args), float4{NAN, NAN, NAN, NAN});
    return emulation::report(difusores::cuda::launch_guidance_rescale(*args, *row, partial.data(), fibers));
}
