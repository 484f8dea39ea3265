// attention on CUDA: check the tensors, fill the struct, launch.
#include <algorithm>

#include "bindings_cuda.h"

namespace difusores {
namespace {

Tensor attention(Tensor q, Tensor k, Tensor v, OptionalTensor mask, double scale) {
    AttentionArgs a = attention_args(q, k, v, scale);
    const OnDevice device(q);
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
    // In memory [B, L, H, Dv], so that joining the heads copies nothing.
    const int64_t sizes[4] = {a.b, a.h, a.l, a.dv}, strides[4] = {a.l * a.h * a.dv, a.dv, a.h * a.dv, 1};
    Tensor out = device.empty(dtype, 4, sizes, strides);
    if (out.numel() == 0) return out;
    a.out = out.data_ptr();
    std::copy(strides, strides + 3, a.out_stride);
    if (a.s == 0) {
        OnDevice::check(cudaMemsetAsync(a.out, 0, out.numel() * 2, device.stream()), "attention");
        return out;
    }
    if (mask) set_mask(*mask, a);
    const char* const reason = cuda::attention_refuses(a, device.shared_limit());
    STD_TORCH_CHECK(reason == nullptr, "attention: the CUDA kernel takes ", reason);
    OnDevice::check(cuda::attention(a, device.shared_limit(), device.multiprocessors(), device.stream()), "attention");
    return out;
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) { m.impl("attention", TORCH_BOX(&difusores::attention)); }
