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

// Whether elements in memory, of 2 or 4 bytes, are what they were. table: int64 [n, 4], of each tensor the address of
// an element, bytes from it to the next, how many and of how many bytes; before: int32, all of them one after the
// other.
bool same_elements(uintptr_t table, int64_t n, uintptr_t before) {
    const int64_t* row = reinterpret_cast<const int64_t*>(table);
    const int32_t* was = reinterpret_cast<const int32_t*>(before);
    for (; n; --n, row += 4) {
        const char* at = reinterpret_cast<const char*>(row[0]);
        int32_t different = 0;  // without a branch for each element: each comes from another page
        for (int64_t k = 0; k < row[2]; ++k, at += row[1], ++was)
            different |=
                *was ^ (row[3] == 2 ? *reinterpret_cast<const int16_t*>(at) : *reinterpret_cast<const int32_t*>(at));
        if (different) return false;
    }
    return true;
}

// Whether each of these dictionaries has under its name what it had, None where that was nothing.
bool same_objects(const pybind11::list& dictionaries, const pybind11::list& names, const pybind11::list& values) {
    const Py_ssize_t n = PyList_GET_SIZE(dictionaries.ptr());
    if (PyList_GET_SIZE(names.ptr()) != n || PyList_GET_SIZE(values.ptr()) != n)
        throw pybind11::value_error("same_objects: the lists must be equally long");
    for (Py_ssize_t k = 0; k < n; ++k) {
        PyObject* found =
            PyDict_GetItemWithError(PyList_GET_ITEM(dictionaries.ptr(), k), PyList_GET_ITEM(names.ptr(), k));
        if (!found && PyErr_Occurred()) throw pybind11::error_already_set();
        if ((found ? found : Py_None) != PyList_GET_ITEM(values.ptr(), k)) return false;
    }
    return true;
}

}  // namespace
}  // namespace difusores

PYBIND11_MODULE(_C, m) {
    difusores::load_kernels();
    m.def("build_info", &difusores::build_info);
    m.def("keep_images", [](bool on) { difusores::arena().use(on); });
    m.def("poison_outputs", [](bool on) { difusores::arena().poison(on), difusores::recycler().poison(on); });
    m.def("same_elements", &difusores::same_elements);
    m.def("same_objects", &difusores::same_objects);
    difusores::define_group_norm_silu(m);
    difusores::define_scheduler_step(m);
}
