// What is used here of DLPack's C ABI, version 1 (https://dmlc.github.io/dlpack/latest/c_api.html): a tensor as it lies
// in memory, and the table of functions that a Python tensor type offers as the capsule `__dlpack_c_exchange_api__`.
#pragma once
#include <cstdint>

namespace difusores::dlpack {

constexpr uint32_t kMajorVersion = 1;
enum DeviceType : int32_t { kCPU = 1 };
enum TypeCode : uint8_t { kFloat = 2, kBfloat = 4 };

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

// A tensor with its owner, who is told by `deleter` when nobody holds it any more.
struct ManagedTensor {
    uint32_t major, minor;
    void* manager;
    void (*deleter)(ManagedTensor* self);
    uint64_t flags;
    Tensor tensor;
};

struct ExchangeAPI {
    uint32_t major, minor;
    void* prev_api;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object_no_sync;
    // Takes the tensor over and makes a Python object of it; 0, or -1 with a Python exception set.
    int (*managed_tensor_to_py_object_no_sync)(ManagedTensor* tensor, void** out);
    // Fills `out` with borrowed pointers; 0, or -1 with a Python exception set. May be absent.
    int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
    void* current_work_stream;
};

}  // namespace difusores::dlpack
