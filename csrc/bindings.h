// What the bindings of all ops share: tensors of libtorch's stable ABI as the kernels want them. One build serves every
// torch from 2.10 on. Each op's own checks and its call stand in bindings/<op>.cpp, the Python module in bindings.cpp.
#pragma once
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "arena.h"
#include "arguments.h"
#include "recycler.h"

// Of torch 2.11 and newer; nullptr with 2.10. A tensor of memory that is ours, given back by `deleter`.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace difusores {

extern const Kernels* g_kernels;  // set once, when the module is loaded

constexpr int64_t kGrain = 32768;  // elements below which a second thread costs more than it brings

inline void want_huge_pages(const Tensor& t) { want_huge_pages(t.data_ptr(), t.numel() * t.element_size()); }

// A new tensor of x's dtype on the CPU. torch::stable::empty_like looks its op up by name at every call, which takes
// longer than a small norm.
inline Tensor new_empty(const Tensor& x, int64_t dims, const int64_t* sizes, const int64_t* strides) {
    int32_t dtype = 0;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

// The same for what an op returns: large ones in the arena, where that is in use.
inline Tensor new_result(const Tensor& x, int64_t dims, const int64_t* sizes, const int64_t* strides) {
    int64_t bytes = x.element_size();
    for (int64_t d = 0; d < dims; ++d) bytes *= sizes[d];
    void* const memory = torch_from_blob && bytes >= Arena::kLeast ? arena().take(bytes) : nullptr;
    if (!memory) {
        Tensor y = new_empty(x, dims, sizes, strides);
        want_huge_pages(y);
        return y;
    }
    const auto give = [](void* data, void* size) { arena().give(data, reinterpret_cast<intptr_t>(size)); };
    int32_t dtype = 0;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    // Where this fails torch may have given the block back or not, so it is not given here: twice would be worse.
    TORCH_ERROR_CODE_CHECK(torch_from_blob(memory, dims, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1,
                                           &handle, aoti_torch_layout_strided(), nullptr, 0, give,
                                           reinterpret_cast<void*>(static_cast<intptr_t>(bytes))));
    return Tensor(handle);
}

// A new contiguous fp32 tensor [rows, columns] on the CPU.
inline Tensor new_float(int64_t rows, int64_t columns) {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(),
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

// A new contiguous tensor of x's dtype on the CPU.
inline Tensor new_contiguous(const Tensor& x, const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
    return new_result(x, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data());
}

inline Tensor new_like(const Tensor& x) { return new_result(x, x.dim(), x.sizes().data(), x.strides().data()); }

// Every op file adds what Python calls past the dispatcher, if it has any.
void define_group_norm_silu(pybind11::module_& m);
void define_scheduler_step(pybind11::module_& m);

}  // namespace difusores
