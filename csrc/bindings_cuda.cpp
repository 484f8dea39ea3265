// CUDA: checks the tensors, fills the structs, launches on the current stream; registers the CUDA implementations. The
// module _cuda, against libtorch's stable ABI. No call waits for the device.
#define USE_CUDA  // the stable ABI declares its CUDA functions only then

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "arguments.h"
#include "cuda/launch.h"

namespace difusores {
namespace {

// Makes a tensor's device the current one, and finds the stream that torch works on there.
class OnDevice {
  public:
    explicit OnDevice(const Tensor& t) : device_(t.get_device_index()) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device_, &guard_));
        void* stream = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
        stream_ = static_cast<cudaStream_t>(stream);
    }
    ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    cudaStream_t stream() const { return stream_; }

    // A new tensor on the device.
    Tensor empty(int32_t dtype, int64_t dims, const int64_t* sizes, const int64_t* strides) const {
        AtenTensorHandle handle = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cuda(), device_, &handle));
        return Tensor(handle);
    }
    Tensor like(const Tensor& x) const {
        int32_t dtype = 0;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
        return empty(dtype, x.dim(), x.sizes().data(), x.strides().data());
    }
    int64_t shared_limit() const {
        int bytes = 0;
        check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_), "shared memory");
        return bytes;
    }
    static void check(cudaError_t error, const char* what) {
        STD_TORCH_CHECK(error == cudaSuccess, "difusores: ", what, ": ", cudaGetErrorString(error));
    }

  private:
    int32_t device_;
    CUDAGuardHandle guard_ = nullptr;
    cudaStream_t stream_ = nullptr;
};

std::tuple<Tensor, Tensor> group_norm_silu(Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias,
                                           double eps, bool silu, OptionalTensor scale, OptionalTensor shift,
                                           OptionalTensor add, OptionalTensor residual, bool return_sum) {
    check_group_norm_silu(x, num_groups, residual);
    const bool channels_last = is_channels_last(x);
    const OnDevice device(x);
    const int64_t none = 0, one = 1;
    int32_t dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    Tensor y = device.like(x);
    Tensor sum = return_sum ? device.like(x) : device.empty(dtype, 1, &none, &one);
    if (x.numel() == 0) return {y, sum};
    const GroupNormSiluArgs args =
        group_norm_silu_args(x, num_groups, weight, bias, eps, silu, scale, shift, add, residual, y, sum, return_sum);
    const GroupNormPlan plan = cuda::group_norm_silu_plan(args, channels_last, device.shared_limit());
    STD_TORCH_CHECK(plan.threads > 0, "group_norm_silu: the CUDA kernel takes at most 2^30 positions and tiles");
    // Returned to torch's allocator at the end of this call, which gives it away again in the order of the stream.
    const int64_t floats = std::max<int64_t>(4 * plan.partials, 4);
    const Tensor partial = device.empty(aoti_torch_dtype_float32(), 1, &floats, &one);
    OnDevice::check(cuda::group_norm_silu(args, plan, partial.data_ptr(), device.stream()), "group_norm_silu");
    return {y, sum};
}

// Where the row is: on the host it goes with the launch, on the device the kernel reads it there.
StepRow source_of(const Tensor& row, const OptionalTensor& step, SchedulerStepArgs& a) {
    StepRow source{};
    source.count = row.dim() == 2 ? row.size(0) : 1;
    if (row.is_cuda()) {
        STD_TORCH_CHECK(!step || step->is_cuda(), "scheduler_step: step must be with row, on the device");
        source.table = static_cast<const double*>(row.data_ptr());
        source.step = step ? static_cast<const int64_t*>(step->data_ptr()) : nullptr;
        return source;
    }
    STD_TORCH_CHECK(!step || step->is_cpu(), "scheduler_step: step must be with row, on the CPU");
    const int64_t index = step ? *static_cast<const int64_t*>(step->data_ptr()) : 0;
    STD_TORCH_CHECK(index >= 0 && index < source.count, "scheduler_step: step ", index,
                    " is outside the table of rows");
    a.row = static_cast<const double*>(row.data_ptr()) + index * 40;
    check_row(a);
    std::copy(a.row, a.row + 40, source.row);
    return source;
}

void scheduler_step(Tensor row, OptionalTensor step, Tensor sample, Tensor e1, OptionalTensor e2, OptionalTensor e3,
                    OptionalTensor noise, OptionalTensor variance, OptionalTensor threshold, OptionalTensor s0,
                    OptionalTensor s1, OptionalTensor s2, OptionalTensor s3, OptionalTensor s4, OptionalTensor seeds,
                    OptionalTensor y, OptionalTensor d, OptionalTensor u, OptionalTensor x0, OptionalTensor m) {
    if (sample.numel() == 0) return;
    const OptionalTensor first = e1;
    SchedulerStepArgs a = scheduler_step_args(row, step, sample, {&first, &e2, &e3}, noise, variance, threshold,
                                              {&s0, &s1, &s2, &s3, &s4}, seeds, {&y, &d, &u, &x0, &m});
    const StepRow source = source_of(row, step, a);
    const OnDevice device(sample);
    OnDevice::check(cuda::scheduler_step(a, source, device.stream()), "scheduler_step");
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["compiler"] = DIFUSORES_CUDA_COMPILER;
    info["architectures"] = DIFUSORES_CUDA_ARCHITECTURES;
    info["torch"] = DIFUSORES_TORCH_VERSION;
    return info;
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) {
    m.impl("group_norm_silu", TORCH_BOX(&difusores::group_norm_silu));
    m.impl("scheduler_step", TORCH_BOX(&difusores::scheduler_step));
}

PYBIND11_MODULE(_cuda, m) { m.def("build_info", &difusores::build_info); }
