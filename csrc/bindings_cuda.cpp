// The Python module _cuda: tells how it was built. The ops register themselves with torch's dispatcher in
// bindings_cuda/<op>.cpp.
#include <pybind11/pybind11.h>

namespace difusores {
namespace {

pybind11::dict build_info() {
    pybind11::dict info;
    info["compiler"] = DIFUSORES_CUDA_COMPILER;
    info["architectures"] = DIFUSORES_CUDA_ARCHITECTURES;
    info["torch"] = DIFUSORES_TORCH_VERSION;
    return info;
}

}  // namespace
}  // namespace difusores

PYBIND11_MODULE(_cuda, m) { m.def("build_info", &difusores::build_info); }
