#include "cuda/bias_residual.cuh"

#include "launch.h"

extern "C" const char* bias_residual(const difusores::BiasResidualArgs* args, bool channels_last, int schedule) {
    const emulation::OnFibers fibers{static_cast<emulation::Schedule>(schedule)};
    return emulation::report(difusores::cuda::launch_bias_residual(*args, channels_last, fibers));
}
