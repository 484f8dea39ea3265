// From tensors of libtorch's stable ABI to the kernels' argument structs, with every check that a kernel relies on: the
// same for a CPU and for CUDA. One build serves every torch from 2.10 on.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>

#include "kernels.h"

namespace difusores {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t, const char* name) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return DType::f32;
        case ScalarType::BFloat16: return DType::bf16;
        case ScalarType::Half: return DType::f16;
        default: STD_TORCH_CHECK(false, name, ": the kernel takes float32, bfloat16 and float16");
    }
    return DType::f32;
}

// --- group_norm_silu ---

// [C] or [N, C] with unit stride along C.
inline Param param_of(const OptionalTensor& t, int64_t n, int64_t c, bool per_image, const char* name) {
    if (!t) return {};
    STD_TORCH_CHECK(per_image ? t->dim() == 2 && t->size(0) == n && t->size(1) == c : t->dim() == 1 && t->size(0) == c,
                    name, " has the wrong shape");
    STD_TORCH_CHECK(c == 1 || t->stride(per_image ? 1 : 0) == 1, name, " must be contiguous along the channels");
    return {t->data_ptr(), dtype_of(*t, name), per_image ? t->stride(0) : 0};
}

// Whether the elements of each image are laid out [S, C]; throws where they are neither [C, S] nor [S, C].
inline bool is_channels_last(const Tensor& x) {
    if (x.is_contiguous()) return false;
    int64_t expected = 1;
    const auto next = [&](int64_t d) {
        STD_TORCH_CHECK(x.size(d) == 1 || x.stride(d) == expected,
                        "the kernel takes contiguous and channels_last tensors");
        expected *= x.size(d);
    };
    next(1);
    for (int64_t d = x.dim() - 1; d >= 2; --d) next(d);
    next(0);
    return true;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim() || a.scalar_type() != b.scalar_type()) return false;
    for (int64_t d = 0; d < a.dim(); ++d)
        if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
    return true;
}

inline void check_group_norm_silu(const Tensor& x, int64_t num_groups, const OptionalTensor& residual) {
    STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 5, "group_norm_silu: x must have 3 to 5 dimensions");
    STD_TORCH_CHECK(num_groups >= 1 && x.size(1) % num_groups == 0, "group_norm_silu: num_groups must divide C");
    STD_TORCH_CHECK(!residual || same_layout(x, *residual), "group_norm_silu: residual must have x's dtype and layout");
}

// What every device needs; the tensors have been checked. y and sum are like x.
inline GroupNormSiluArgs group_norm_silu_args(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps, bool silu,
                                              const OptionalTensor& scale, const OptionalTensor& shift,
                                              const OptionalTensor& add, const OptionalTensor& residual,
                                              const Tensor& y, const Tensor& sum, bool return_sum) {
    const int64_t n = x.size(0), c = x.size(1);
    GroupNormSiluArgs args{};
    args.x = x.data_ptr();
    args.residual = residual ? residual->data_ptr() : nullptr;
    args.y = y.data_ptr();
    args.sum = return_sum ? sum.data_ptr() : nullptr;
    args.dtype = dtype_of(x, "x");
    args.weight = param_of(weight, n, c, false, "weight");
    args.bias = param_of(bias, n, c, false, "bias");
    args.scale = param_of(scale, n, c, true, "scale");
    args.shift = param_of(shift, n, c, true, "shift");
    args.add = param_of(add, n, c, true, "add");
    args.n = n, args.c = c, args.s = x.numel() / (n * c), args.groups = num_groups;
    args.eps = eps, args.silu = silu;
    return args;
}

// --- bias_residual ---

inline BiasResidualArgs bias_residual_args(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& add,
                                           const OptionalTensor& residual, double scale, const Tensor& y) {
    STD_TORCH_CHECK(x.dim() >= 2 && x.dim() <= 5, "bias_residual: x must have 2 to 5 dimensions");
    STD_TORCH_CHECK(!residual || same_layout(x, *residual), "bias_residual: residual must have x's dtype and layout");
    const int64_t n = x.size(0), c = x.size(1);
    BiasResidualArgs args{};
    args.x = x.data_ptr(), args.residual = residual ? residual->data_ptr() : nullptr, args.y = y.data_ptr();
    args.dtype = dtype_of(x, "x");
    args.bias = param_of(bias, n, c, false, "bias");
    args.add = param_of(add, n, c, true, "add");
    args.n = n, args.c = c, args.s = x.numel() / (n * c);
    args.scale = static_cast<float>(scale);
    return args;
}

// --- geglu, layer_norm: contiguous rows ---

inline GegluArgs geglu_args(const Tensor& x, bool tanh, const Tensor& y) {
    GegluArgs args{};
    args.x = x.data_ptr(), args.y = y.data_ptr();
    args.dtype = dtype_of(x, "x");
    args.columns = x.size(x.dim() - 1) / 2, args.rows = y.numel() / args.columns;
    args.tanh = tanh;
    return args;
}

inline LayerNormArgs layer_norm_args(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                     double eps, const OptionalTensor& residual, const Tensor& y, const Tensor& sum,
                                     bool return_sum, const OptionalTensor& sum_bias) {
    const int64_t columns = x.size(x.dim() - 1);
    LayerNormArgs args{};
    args.x = x.data_ptr(), args.residual = residual ? residual->data_ptr() : nullptr;
    args.y = y.data_ptr(), args.sum = return_sum ? sum.data_ptr() : nullptr;
    args.dtype = dtype_of(x, "x");
    args.weight = param_of(weight, 1, columns, false, "weight");
    args.bias = param_of(bias, 1, columns, false, "bias");
    args.sum_bias = param_of(sum_bias, 1, columns, false, "sum_bias");
    args.rows = x.numel() / columns, args.columns = columns;
    args.eps = eps;
    return args;
}

// --- scheduler_step ---

// A tensor's shape, read once: every question to a tensor is a call into torch.
struct Shape {
    const int64_t* sizes;
    const int64_t* strides;
    int64_t dim;
    explicit Shape(const Tensor& t) : dim(t.dim()) {
        int64_t *first_size = nullptr, *first_stride = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &first_size));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &first_stride));
        sizes = first_size, strides = first_stride;
    }
    Shape(const int64_t* sizes, const int64_t* strides, int64_t dim) : sizes(sizes), strides(strides), dim(dim) {}
    // Whether an image of this is laid out as one of the other: every operand is one run of memory in the same order.
    bool same_image(const Shape& other) const {
        if (dim != other.dim) return false;
        for (int64_t d = 1; d < dim; ++d)
            if (sizes[d] != other.sizes[d] || (sizes[d] > 1 && strides[d] != other.strides[d])) return false;
        return true;
    }
    // Whether the elements of an image are one run of memory, in whatever order of dimensions.
    bool dense_image(int64_t inner) const {
        int64_t covered = 1;
        for (bool found = true; covered < inner && found;) {
            found = false;
            for (int64_t d = 1; d < dim && !found; ++d)
                if (sizes[d] > 1 && strides[d] == covered) {
                    covered *= sizes[d];
                    found = true;
                }
        }
        return covered == inner;
    }
};

inline Operand operand_of(const OptionalTensor& t, const Shape& sample, const char* name) {
    if (!t) return {};
    const Shape shape(*t);
    STD_TORCH_CHECK(shape.same_image(sample) && shape.sizes[0] == sample.sizes[0], "difusores: ", name,
                    " must have the first operand's shape and per-image strides");
    return {t->data_ptr(), dtype_of(*t, name), shape.strides[0]};
}

// An output holds whole batches one after another, each image dense.
inline Result result_of(const OptionalTensor& t, const Shape& sample, int64_t inner, const char* name, bool repeats) {
    if (!t) return {};
    const Shape shape(*t);
    STD_TORCH_CHECK(shape.same_image(sample), "scheduler_step: output ", name,
                    " must have the sample's per-image shape and strides");
    const int64_t count = shape.sizes[0], batch = sample.sizes[0];
    STD_TORCH_CHECK(repeats ? count % batch == 0 : count == batch, "scheduler_step: output ", name,
                    repeats ? " must hold whole batches" : " must hold the batch");
    STD_TORCH_CHECK(count <= 1 || shape.strides[0] == inner, "scheduler_step: output ", name, " must be dense");
    return {t->data_ptr(), dtype_of(*t, name), count / batch};
}

// The row names operands by non-zero coefficients; the kernel must not meet one that was not given.
inline void check_row(const SchedulerStepArgs& a) {
    const double* w = a.row + 12;
    const bool outputs[3] = {a.y.ptr || a.m.ptr, a.d.ptr != nullptr, a.u.ptr != nullptr};
    bool column[9] = {};
    for (int k = 0; k < 3; ++k)
        for (int j = 0; j < 9; ++j) column[j] |= outputs[k] && w[9 * k + j] != 0.0;
    const bool x0 = column[0] || a.x0.ptr;
    const bool xh = column[1] || (x0 && a.row[4] != 0.0);
    const bool z = column[3] || (xh && a.row[3] != 0.0);
    STD_TORCH_CHECK(!z || a.noise.ptr || a.seeds, "scheduler_step: this row reads noise, which was not given");
    STD_TORCH_CHECK(!column[3] || a.row[10] == 0.0 || a.variance.ptr,
                    "scheduler_step: this row's mode reads variance, which was not given");
    for (int k = 0; k < 5; ++k)
        STD_TORCH_CHECK(!column[4 + k] || a.slots[k].ptr, "scheduler_step: this row's W reads s", k,
                        ", which was not given");
}

inline void check_table(const Tensor& row, const OptionalTensor& step, const char* op) {
    STD_TORCH_CHECK(row.scalar_type() == ScalarType::Double && row.is_contiguous() && row.dim() == (step ? 2 : 1) &&
                        row.size(row.dim() - 1) == 40,
                    op, ": row must be contiguous float64 [40], or [rows, 40] with step");
    STD_TORCH_CHECK(!step || (step->scalar_type() == ScalarType::Long && step->numel() == 1), op,
                    ": step must be one int64");
}

// The row, where it and step are on the host.
inline const double* row_on_host(const Tensor& row, const OptionalTensor& step, const char* op) {
    const int64_t index = step ? *static_cast<const int64_t*>(step->data_ptr()) : 0;
    STD_TORCH_CHECK(index >= 0 && index < (step ? row.size(0) : 1), op, ": step ", index,
                    " is outside the table of rows");
    return static_cast<const double*>(row.data_ptr()) + index * 40;
}

// [B] float32, or nullptr.
inline float* of_images(const OptionalTensor& t, int64_t batch, const char* name) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == batch,
                    "difusores: ", name, " must be contiguous float32 [B]");
    return static_cast<float*>(t->data_ptr());
}

// All but the row, which each device reads in its own way.
inline SchedulerStepArgs scheduler_step_args(const Tensor& row, const OptionalTensor& step, const Tensor& sample,
                                             const std::array<const OptionalTensor*, 3>& e, const OptionalTensor& noise,
                                             const OptionalTensor& variance, const OptionalTensor& threshold,
                                             const OptionalTensor& factor,
                                             const std::array<const OptionalTensor*, 5>& slots,
                                             const OptionalTensor& seeds,
                                             const std::array<const OptionalTensor*, 5>& outputs) {
    STD_TORCH_CHECK(sample.dim() >= 1, "scheduler_step: sample must have a batch dimension");
    check_table(row, step, "scheduler_step");
    const Shape shape(sample);
    const int64_t batch = shape.sizes[0], inner = sample.numel() / batch;
    STD_TORCH_CHECK(shape.dense_image(inner), "scheduler_step: the images of sample must be dense");
    SchedulerStepArgs a{};
    a.sample = {sample.data_ptr(), dtype_of(sample, "sample"), shape.strides[0]};
    const char* const names[3] = {"e1", "e2", "e3"};
    for (int k = 0; k < 3; ++k) a.e[k] = operand_of(*e[k], shape, names[k]);
    a.noise = operand_of(noise, shape, "noise");
    a.variance = operand_of(variance, shape, "variance");
    for (int k = 0; k < 5; ++k) a.slots[k] = operand_of(*slots[k], shape, "slot");
    a.threshold = of_images(threshold, batch, "threshold");
    a.factor = of_images(factor, batch, "factor");
    if (seeds) {
        STD_TORCH_CHECK(seeds->scalar_type() == ScalarType::Long && seeds->is_contiguous() && seeds->numel() == batch &&
                            sample.is_contiguous(),
                        "scheduler_step: seeds must be contiguous int64 [B] and the sample contiguous");
        a.seeds = static_cast<const int64_t*>(seeds->data_ptr());
    }
    a.y = result_of(*outputs[0], shape, inner, "y", false);
    a.d = result_of(*outputs[1], shape, inner, "d", false);
    a.u = result_of(*outputs[2], shape, inner, "u", false);
    a.x0 = result_of(*outputs[3], shape, inner, "x0", false);
    a.m = result_of(*outputs[4], shape, inner, "m", true);
    a.batch = batch, a.inner = inner;
    return a;
}

// --- guidance_rescale ---

// All but the row, which each device reads in its own way.
inline GuidanceRescaleArgs guidance_rescale_args(const Tensor& row, const OptionalTensor& step,
                                                 const std::array<const OptionalTensor*, 3>& e, int64_t conditional,
                                                 double share, const Tensor& factor) {
    check_table(row, step, "guidance_rescale");
    const Tensor& first = **e[0];
    STD_TORCH_CHECK(first.dim() >= 1 && first.numel() > 0,
                    "guidance_rescale: e1 must be a batch of images with elements");
    const Shape shape(first);
    GuidanceRescaleArgs a{};
    a.batch = shape.sizes[0], a.inner = first.numel() / a.batch;
    STD_TORCH_CHECK(shape.dense_image(a.inner), "guidance_rescale: the images of e1 must be dense");
    const char* const names[3] = {"e1", "e2", "e3"};
    for (int k = 0; k < 3; ++k) a.e[k] = operand_of(*e[k], shape, names[k]);
    STD_TORCH_CHECK(conditional >= 0 && conditional < 3 && a.e[conditional].ptr,
                    "guidance_rescale: conditional must be the number of an output that is given, got ", conditional);
    a.conditional = conditional, a.share = share;
    a.factor = of_images(factor, a.batch, "factor");
    return a;
}

// --- attention ---

inline Heads heads_of(const Tensor& t, int64_t b, int64_t h, int64_t rows, int64_t columns, const char* name) {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == b && t.size(1) == h && t.size(2) == rows && t.size(3) == columns,
                    "attention: ", name, " has the wrong shape");
    return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

// Any shape that broadcasts to [B, H, L, S]; a repeated dimension has stride 0.
inline void set_mask(const Tensor& t, AttentionArgs& a) {
    if (a.s == 0) return;
    const int64_t sizes[4] = {a.b, a.h, a.l, a.s}, missing = 4 - t.dim();
    STD_TORCH_CHECK(missing >= 0, "attention: mask must have at most 4 dimensions");
    a.mask.ptr = t.data_ptr();
    for (int64_t d = 0; d < t.dim(); ++d) {
        const int64_t size = t.size(d);
        STD_TORCH_CHECK(size == 1 || size == sizes[missing + d], "attention: mask does not broadcast to [B, H, L, S]");
        a.mask.stride[missing + d] = size == 1 ? 0 : t.stride(d);
    }
    a.mask_is_bool = t.scalar_type() == ScalarType::Bool;
    if (!a.mask_is_bool) a.mask_dtype = dtype_of(t, "mask");
}

// All but mask and out.
inline AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
    STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "attention: q, k, v must have 4 dimensions");
    AttentionArgs a{};
    a.b = q.size(0), a.h = q.size(1), a.l = q.size(2), a.d = q.size(3), a.s = v.size(2), a.dv = v.size(3);
    a.q = heads_of(q, a.b, a.h, a.l, a.d, "q");
    a.k = heads_of(k, a.b, a.h, a.s, a.d, "k");
    a.v = heads_of(v, a.b, a.h, a.s, a.dv, "v");
    a.dtype = dtype_of(q, "q");
    STD_TORCH_CHECK(dtype_of(k, "k") == a.dtype && dtype_of(v, "v") == a.dtype,
                    "attention: q, k, v must have one dtype");
    STD_TORCH_CHECK(a.d > 0, "attention: D must be at least 1");
    a.scale = static_cast<float>(scale);
    return a;
}

}  // namespace difusores
