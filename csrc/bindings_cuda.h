// What the CUDA bindings of all ops share: the device, its stream, new tensors. Against libtorch's stable ABI. Each
// op's checks and its launch stand in bindings_cuda/<op>.cpp, the Python module in bindings_cuda.cpp. No call waits for
// the device.
#pragma once
#define USE_CUDA  // the stable ABI declares its CUDA functions only then

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "cuda/launch.h"

namespace difusores {

// Makes a tensor's device the current one, and finds the stream that torch works on there.
class OnDevice {
  public:
    explicit OnDevice(const Tensor& t) : device_(t.get_device_index()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device_, &guard_));
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }
    ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    cudaStream_t stream() const { return stream_; }

    // A new tensor on the device.
    Tensor empty(int32_t dtype, int64_t dims, const int64_t* sizes, const int64_t* strides) const {
        AtenTensorHandle handle = nullptr;
        TORCH_ERROR_CODE_CHECK(
            aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cuda(), device_, &handle));
        return Tensor(handle);
    }
    Tensor like(const Tensor& x) const {
        int32_t dtype = 0;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
        return empty(dtype, x.dim(), x.sizes().data(), x.strides().data());
    }
    // A new contiguous tensor of x's dtype.
    Tensor contiguous(const Tensor& x, const std::vector<int64_t>& sizes) const {
        int32_t dtype = 0;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
        std::vector<int64_t> strides(sizes.size(), 1);
        for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
        return empty(dtype, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data());
    }
    int64_t shared_limit() const {
        int bytes = 0;
        check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_), "shared memory");
        return bytes;
    }
    int multiprocessors() const {
        int count = 0;
        check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_), "multiprocessors");
        return count;
    }
    // 90 for sm_90.
    int capability() const {
        int major = 0, minor = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_), "compute capability");
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_), "compute capability");
        return 10 * major + minor;
    }
    int32_t index() const { return device_; }
    static void check(cudaError_t error, const char* what) {
        STD_TORCH_CHECK(error == cudaSuccess, "difusores: ", what, ": ", cudaGetErrorString(error));
    }

  private:
    int32_t device_;
    CUDAGuardHandle guard_ = nullptr;
    cudaStream_t stream_ = nullptr;
};

// Where a step's row is: on the host it goes with the launch, on the device the kernel reads it there.
inline StepRow step_row(const Tensor& row, const OptionalTensor& step, const char* op) {
    StepRow source{};
    source.count = row.dim() == 2 ? row.size(0) : 1;
    if (row.is_cuda()) {
        STD_TORCH_CHECK(!step || step->is_cuda(), op, ": step must be with row, on the device");
        source.table = static_cast<const double*>(row.data_ptr());
        source.step = step ? static_cast<const int64_t*>(step->data_ptr()) : nullptr;
        return source;
    }
    STD_TORCH_CHECK(!step || step->is_cpu(), op, ": step must be with row, on the CPU");
    const double* const found = row_on_host(row, step, op);
    std::copy(found, found + 40, source.row);
    return source;
}

}  // namespace difusores
