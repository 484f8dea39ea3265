#include "cuda/geglu.cuh"

#include "launch.h"

extern "C" const char* geglu(const difusores::GegluArgs* args, int schedule) {
    const emulation::OnFibers fibers{static_cast<emulation::Schedule>(schedule)};
    return emulation::report(difusores::cuda::launch_geglu(*args, fibers));
}
