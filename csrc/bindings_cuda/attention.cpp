// attention on CUDA: check the tensors, fill the structs, launch; with what its gradients need, and these.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "bindings_cuda.h"

namespace difusores {
namespace {

// A new [B, H, rows, width] like t, in memory [B, rows, H, width], so that joining the heads copies nothing.
Tensor heads_inside(const OnDevice& device, const Tensor& t, int64_t rows, int64_t width) {
    const int64_t b = t.size(0), h = t.size(1);
    const int64_t sizes[4] = {b, h, rows, width}, strides[4] = {rows * h * width, width, h * width, 1};
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
    return device.empty(dtype, 4, sizes, strides);
}

void set_zero(const OnDevice& device, const Tensor& t) {
    const int64_t bytes = t.numel() * (dtype_of(t, "result") == DType::f32 ? 4 : 2);
    OnDevice::check(cudaMemsetAsync(t.data_ptr(), 0, bytes, device.stream()), "attention");
}

// sums: what the gradients need, or nullptr.
Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale,
               const Tensor* sums) {
    AttentionArgs a = attention_args(q, k, v, scale);
    const OnDevice device(q);
    Tensor out = heads_inside(device, q, a.l, a.dv);
    if (out.numel() == 0) return out;
    if (a.s == 0) {
        set_zero(device, out);
        return out;
    }
    a.out = out.data_ptr();
    for (int dim = 0; dim < 3; ++dim) a.out_stride[dim] = out.stride(dim);
    if (mask) set_mask(*mask, a);
    if (sums) a.log2_sums = static_cast<float*>(sums->data_ptr()), a.padded_l = sums->size(2);
    const char* const reason = cuda::attention_refuses(a, device.shared_limit());
    STD_TORCH_CHECK(reason == nullptr, "attention: the CUDA kernel takes ", reason);
    OnDevice::check(cuda::attention(a, device.shared_limit(), device.multiprocessors(), device.stream()), "attention");
    return out;
}

Tensor attention(Tensor q, Tensor k, Tensor v, OptionalTensor mask, double scale) {
    return forward(q, k, v, mask, scale, nullptr);
}

Tensor attention_wgmma(Tensor q, Tensor k, Tensor v, double scale) {
    STD_TORCH_CHECK(
        std::strstr(DIFUSORES_CUDA_ARCHITECTURES, "90a") != nullptr,
        "attention: the wgmma kernel needs a build for sm_90a, and this one is for " DIFUSORES_CUDA_ARCHITECTURES);
    AttentionArgs a = attention_args(q, k, v, scale);
    const OnDevice device(q);
    Tensor out = heads_inside(device, q, a.l, a.dv);
    if (out.numel() == 0) return out;
    if (a.s == 0) {
        set_zero(device, out);
        return out;
    }
    a.out = out.data_ptr();
    for (int dim = 0; dim < 3; ++dim) a.out_stride[dim] = out.stride(dim);
    const char* const reason = cuda::attention_wgmma_refuses(a, device.shared_limit(), device.capability());
    STD_TORCH_CHECK(reason == nullptr, "attention: the wgmma kernel takes ", reason);
    OnDevice::check(cuda::attention_wgmma(a, device.stream()), "attention_wgmma");
    return out;
}

std::tuple<Tensor, Tensor> attention_with_sums(Tensor q, Tensor k, Tensor v, OptionalTensor mask, double scale) {
    STD_TORCH_CHECK(q.dim() == 4, "attention: q, k, v must have 4 dimensions");
    const OnDevice device(q);
    const int64_t padded = (q.size(2) + 63) / 64 * 64;
    const int64_t sizes[3] = {q.size(0), q.size(1), padded}, strides[3] = {q.size(1) * padded, padded, 1};
    Tensor sums = device.empty(aoti_torch_dtype_float32(), 3, sizes, strides);
    Tensor out = forward(q, k, v, mask, scale, &sums);
    return {out, sums};
}

Gradient gradient_of(const Tensor& t) { return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2)}}; }

std::tuple<Tensor, Tensor, Tensor> attention_gradients(Tensor grad, Tensor q, Tensor k, Tensor v, OptionalTensor mask,
                                                       Tensor out, Tensor sums, double scale) {
    AttentionArgs forward = attention_args(q, k, v, scale);
    if (mask) set_mask(*mask, forward);
    const OnDevice device(q);
    Tensor grad_q = heads_inside(device, q, forward.l, forward.d);
    Tensor grad_k = heads_inside(device, k, forward.s, forward.d);
    Tensor grad_v = heads_inside(device, v, forward.s, forward.dv);
    if (forward.b * forward.h * forward.l * forward.s * forward.dv == 0) {
        for (const Tensor* t : {&grad_q, &grad_k, &grad_v})
            if (t->numel()) set_zero(device, *t);
        return {grad_q, grad_k, grad_v};
    }
    AttentionGradArgs a{};
    a.q = forward.q, a.k = forward.k, a.v = forward.v;
    a.mask = forward.mask, a.mask_dtype = forward.mask_dtype, a.mask_is_bool = forward.mask_is_bool;
    a.b = forward.b, a.h = forward.h, a.l = forward.l, a.s = forward.s, a.d = forward.d, a.dv = forward.dv;
    a.dtype = forward.dtype, a.scale = forward.scale;
    a.grad = heads_of(grad, a.b, a.h, a.l, a.dv, "grad");
    a.out = heads_of(out, a.b, a.h, a.l, a.dv, "out");
    a.padded_l = (a.l + 63) / 64 * 64;
    STD_TORCH_CHECK(dtype_of(grad, "grad") == a.dtype && dtype_of(out, "out") == a.dtype &&
                        dtype_of(sums, "sums") == DType::f32 && sums.is_contiguous() &&
                        sums.numel() == a.b * a.h * a.padded_l,
                    "attention: grad and out must have q's dtype, and sums be what attention_with_sums gave");
    const int64_t sizes[1] = {sums.numel()}, strides[1] = {1};
    const Tensor delta = device.empty(aoti_torch_dtype_float32(), 1, sizes, strides);
    a.log2_sums = static_cast<float*>(sums.data_ptr()), a.delta = static_cast<float*>(delta.data_ptr());
    a.grad_q = gradient_of(grad_q), a.grad_k = gradient_of(grad_k), a.grad_v = gradient_of(grad_v);
    for (const char* const reason : {cuda::attention_refuses(forward, device.shared_limit()),
                                     cuda::attention_gradients_refuses(a, device.shared_limit())})
        STD_TORCH_CHECK(reason == nullptr, "attention: the CUDA kernels of the gradients take ", reason);
    OnDevice::check(cuda::attention_gradients(a, device.shared_limit(), device.stream()), "attention_gradients");
    return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) {
    m.impl("attention", TORCH_BOX(&difusores::attention));
    m.impl("attention_wgmma", TORCH_BOX(&difusores::attention_wgmma));
    m.impl("attention_with_sums", TORCH_BOX(&difusores::attention_with_sums));
    m.impl("attention_gradients", TORCH_BOX(&difusores::attention_gradients));
}
