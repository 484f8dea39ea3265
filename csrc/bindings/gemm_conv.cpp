// gemm_conv: checks, runs of rows, and the product of cpu/gemm_conv.cpp over torch's threads.
#include <algorithm>

#include "convolution.h"

namespace difusores {
namespace {

constexpr int64_t kRun = 384;             // rows of a task at most: their sums take 96 KB
constexpr int64_t kGathered = 128 << 10;  // floats of gathered rows of a task: half a MB of L2
constexpr int64_t kRead = 256 << 10;      // floats of rows of a task that are read where they lie, once a panel

Tensor gemm_conv(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, int64_t stride_h,
                 int64_t stride_w, int64_t padding_h, int64_t padding_w, Tensor packed) {
    GemmConvArgs a{};
    a.x = image("gemm_conv", x, "x");
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1), "gemm_conv: weight must be [O, C, ...] of x's C");
    a.n = x.size(0), a.c = x.size(1), a.h = x.size(2), a.w = x.size(3), a.o = weight.size(0);
    a.kernel_h = weight.size(2), a.kernel_w = weight.size(3), a.stride_h = stride_h, a.stride_w = stride_w;
    a.pad_h = padding_h, a.pad_w = padding_w;
    STD_TORCH_CHECK(a.o > 0 && a.c > 0 && a.kernel_h > 0 && a.kernel_w > 0 && a.stride_h > 0 && a.stride_w > 0 &&
                        a.pad_h >= 0 && a.pad_w >= 0,
                    "gemm_conv: channels, kernel and stride must be positive and padding not negative");
    a.out_h = (a.h + 2 * a.pad_h - a.kernel_h) / a.stride_h + 1;
    a.out_w = (a.w + 2 * a.pad_w - a.kernel_w) / a.stride_w + 1;
    STD_TORCH_CHECK(a.h + 2 * a.pad_h >= a.kernel_h && a.w + 2 * a.pad_w >= a.kernel_w,
                    "gemm_conv: the image is smaller than the kernel");
    const int64_t depth = a.kernel_h * a.kernel_w * a.c;
    STD_TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == ScalarType::Float &&
                        packed.numel() == depth * parts(a.o, kMaxWidth) * kMaxWidth,
                    "gemm_conv: packed is not of a weight of this shape");
    a.packed = static_cast<const float*>(packed.data_ptr());
    const int64_t sizes[4] = {a.n, a.o, a.out_h, a.out_w};
    const int64_t strides[4] = {a.out_h * a.out_w * a.o, 1, a.out_w * a.o, a.o};
    Tensor y = new_empty(x, 4, sizes, strides);
    const int64_t rows = a.n * a.out_h * a.out_w;
    if (rows == 0) return y;
    want_huge_pages(y);
    a.y = static_cast<float*>(y.data_ptr());
    a.bias = floats("gemm_conv", bias, 0, a.o, "bias");
    if (residual) {
        for (int64_t d = 0; d < 4; ++d)
            STD_TORCH_CHECK(residual->dim() == 4 && residual->size(d) == sizes[d],
                            "gemm_conv: residual must have the shape of the output");
        a.residual = image("gemm_conv", *residual, "residual");
    }
    a.gathers = depth != a.c || a.stride_h != 1 || a.stride_w != 1 || a.pad_h || a.pad_w;
    const int64_t most =
        a.gathers ? std::clamp<int64_t>(kGathered / depth, 6, kRun) : std::clamp<int64_t>(kRead / depth, 48, kRun);
    a.run = parts(rows, parts(rows, most));  // of even lengths
    const int64_t scratch = a.run * (kGemmColumns + (a.gathers ? depth : 0));
    torch::stable::parallel_for(
        0, parts(rows, a.run) * parts(a.o, kGemmColumns), std::max<int64_t>(1, kWork / (a.run * kGemmColumns * depth)),
        [&](int64_t begin, int64_t end) { g_kernels->gemm_conv(a, t_work.of(scratch), begin, end); });
    return y;
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) { m.impl("gemm_conv", TORCH_BOX(&difusores::gemm_conv)); }
