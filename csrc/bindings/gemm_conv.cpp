// gemm_conv: checks, runs of rows, and the product of cpu/gemm_conv.cpp or, in bf16, of cpu/gemm_conv_bf16.cpp over
// torch's threads.
#include <algorithm>

#include "convolution.h"

namespace difusores {
namespace {

constexpr int64_t kRun = 384;         // rows of a task at most: a chunk of them takes 0.75 MB of L2
constexpr int64_t kSums = 96 << 10;   // floats of a task's sums at most
constexpr int64_t kTasks = 4;         // that there should be, for threads
constexpr int64_t kRunOfPairs = 512;  // rows of a task in bf16 at most

// Runs of even lengths in whole tiles of 16 rows: rather more runs than shares of a run, each of which gathers anew.
void run_pairs(GemmConvArgs& a, int64_t rows, int64_t depth) {
    const int64_t groups = parts(rows, 16), panels = parts(a.o, kGemmPairColumns);
    a.run = 16 * parts(groups, parts(groups, std::clamp<int64_t>(groups / kTasks, 4, kRunOfPairs / 16)));
    const int64_t runs = parts(rows, a.run);
    a.panels = std::clamp<int64_t>(std::min(kSums / (a.run * kGemmPairColumns), runs * panels / kTasks), 1, panels);
    const int64_t scratch = a.run * (a.panels * kGemmPairColumns + kGemmChunk / 2);
    torch::stable::parallel_for(
        0, runs * parts(panels, a.panels),
        std::max<int64_t>(1, 8 * kWork / (a.run * a.panels * kGemmPairColumns * depth)),
        [&](int64_t begin, int64_t end) { g_kernels->gemm_conv_bf16(a, t_work.of(scratch), begin, end); });
}

Tensor gemm_conv(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, int64_t stride_h,
                 int64_t stride_w, int64_t padding_h, int64_t padding_w, Tensor packed, bool geglu) {
    GemmConvArgs a{};
    const bool pairs = x.scalar_type() == ScalarType::BFloat16;
    const ScalarType type = pairs ? ScalarType::BFloat16 : ScalarType::Float;
    STD_TORCH_CHECK(!pairs || g_kernels->gemm_conv_bf16, "gemm_conv: ISA level ", g_kernels->isa,
                    " has no bf16 kernel");
    a.x = image("gemm_conv", x, "x", type);
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
    const int64_t step = pairs ? kGemmPairStep : 1, columns = pairs ? kGemmPairColumns : kMaxWidth;
    const int64_t depth = a.kernel_h * a.kernel_w * parts(a.c, step) * step;
    STD_TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == type &&
                        packed.numel() == depth * parts(a.o, columns) * columns,
                    "gemm_conv: packed is not of a weight of this shape");
    a.packed = packed.data_ptr();
    STD_TORCH_CHECK(!geglu || (!pairs && a.o % (2 * kMaxWidth) == 0),
                    "gemm_conv: with GEGLU the kernel takes float32 and a multiple of 32 channels");
    a.geglu = geglu;
    const int64_t channels = geglu ? a.o / 2 : a.o;
    const int64_t sizes[4] = {a.n, channels, a.out_h, a.out_w};
    const int64_t strides[4] = {a.out_h * a.out_w * channels, 1, a.out_w * channels, channels};
    Tensor y = new_empty(x, 4, sizes, strides);
    const int64_t rows = a.n * a.out_h * a.out_w;
    if (rows == 0) return y;
    want_huge_pages(y);
    a.y = y.data_ptr();
    a.bias = param_of(bias, a.n, a.o, false, "gemm_conv: bias");
    if (residual) {
        for (int64_t d = 0; d < 4; ++d)
            STD_TORCH_CHECK(residual->dim() == 4 && residual->size(d) == sizes[d],
                            "gemm_conv: residual must have the shape of the output");
        a.residual = image("gemm_conv", *residual, "residual", type);
    }
    a.gathers = a.kernel_h * a.kernel_w != 1 || a.stride_h != 1 || a.stride_w != 1 || a.pad_h || a.pad_w;
    if (pairs) {
        run_pairs(a, rows, depth);
        return y;
    }
    a.run = parts(rows, parts(rows, kRun));  // of even lengths
    const int64_t runs = parts(rows, a.run), panels = parts(a.o, kGemmColumns);
    a.panels = 1;
    if (depth > kGemmChunk)
        a.panels = std::clamp<int64_t>(std::min(kSums / (a.run * kGemmColumns), runs * panels / kTasks), 1, panels);
    const int64_t scratch = a.run * (a.panels * kGemmColumns + kGemmChunk + kMaxWidth);
    torch::stable::parallel_for(
        0, runs * parts(panels, a.panels), std::max<int64_t>(1, kWork / (a.run * a.panels * kGemmColumns * depth)),
        [&](int64_t begin, int64_t end) { g_kernels->gemm_conv(a, t_work.of(scratch), begin, end); });
    return y;
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) { m.impl("gemm_conv", TORCH_BOX(&difusores::gemm_conv)); }
