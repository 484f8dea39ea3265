// The Python module: chooses the kernels when it is loaded, and tells how it was built. The ops register themselves
// with torch's dispatcher in bindings/<op>.cpp; pybind11 carries what is not a tensor op.
#include "bindings.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace difusores {

const Kernels* g_kernels = nullptr;

namespace {

void load_kernels() {
    const char* forced = std::getenv("DIFUSORES_ISA");
    g_kernels = choose_kernels(forced);
    if (!g_kernels)
        throw std::runtime_error("DIFUSORES_ISA=" + std::string(forced ? forced : "") +
                                 ": this build or this processor has no such level");
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["compiler"] = DIFUSORES_COMPILER;
    info["build_type"] = DIFUSORES_BUILD_TYPE;
    info["torch"] = DIFUSORES_TORCH_VERSION;
    info["isa_levels"] = DIFUSORES_ISA_LIST;
    info["isa_found"] = choose_kernels(nullptr)->isa;
    info["isa_used"] = g_kernels->isa;
    info["avx512_bf16"] = cpu_has_avx512_bf16();
    return info;
}

}  // namespace
}  // namespace difusores

PYBIND11_MODULE(_C, m) {
    difusores::load_kernels();
    m.def("build_info", &difusores::build_info);
    difusores::define_group_norm_silu(m);
    difusores::define_scheduler_step(m);
}
