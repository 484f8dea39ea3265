// group_norm_silu on a CPU: check the tensors, fill the struct, run the kernel over torch's threads.
#include <unistd.h>

#include <string>
#include <tuple>
#include <vector>

#include "group_norm.h"

namespace difusores {
namespace {

// The bytes of which L2 holds three: a group that is fetched ahead, beside the x and y of the one in work.
int64_t third_of_l2() {
    int64_t bytes = 512 << 10;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) bytes = found;
#endif
    return bytes / 3;
}

std::tuple<Tensor, Tensor> group_norm_silu(Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias,
                                           double eps, bool silu, OptionalTensor scale, OptionalTensor shift,
                                           OptionalTensor add, OptionalTensor residual, bool return_sum) {
    check_group_norm_silu(x, num_groups, residual);
    const bool channels_last = is_channels_last(x);
    const int64_t none = 0, one = 1;
    Tensor y = new_like(x);
    Tensor sum = return_sum ? new_like(x) : new_empty(x, 1, &none, &one);
    if (x.numel() == 0) return {y, sum};
    GroupNormSiluArgs args =
        group_norm_silu_args(x, num_groups, weight, bias, eps, silu, scale, shift, add, residual, y, sum, return_sum);
    if (!channels_last) {
        args.fetch = third_of_l2();
        run_norm(args.n * num_groups, args.c / num_groups * args.s, g_kernels->group_norm_silu, args);
        return {y, sum};
    }
    const ChannelMoments moments(args);
    run_norm(args.n * args.chunks, args.chunk_rows * args.c, g_kernels->group_norm_silu_apply, args);
    return {y, sum};
}

// multiplier and offset of the norm, for an op that applies them as it reads x.
std::tuple<Tensor, Tensor> group_norm_affine(Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias,
                                             double eps, OptionalTensor scale, OptionalTensor shift,
                                             OptionalTensor moments) {
    STD_TORCH_CHECK(x.dim() == 4, "group_norm_affine: the CPU kernel takes x with 4 dimensions");
    const int64_t n = x.size(0), c = x.size(1), s = x.size(2) * x.size(3);
    STD_TORCH_CHECK(num_groups >= 1 && c % num_groups == 0, "group_norm_affine: num_groups must divide C");
    STD_TORCH_CHECK(is_channels_last(x) || c == 1 || s == 1,
                    "group_norm_affine: the CPU kernel takes channels_last tensors");
    Tensor multiplier = new_float(n, c), offset = new_float(n, c);
    if (x.numel() == 0) return {multiplier, offset};
    GroupNormSiluArgs args{};
    args.x = x.data_ptr();
    args.dtype = dtype_of(x, "x");
    args.weight = param_of(weight, n, c, false, "weight");
    args.bias = param_of(bias, n, c, false, "bias");
    args.scale = param_of(scale, n, c, true, "scale");
    args.shift = param_of(shift, n, c, true, "shift");
    args.n = n, args.c = c, args.s = s, args.groups = num_groups;
    args.eps = eps;
    norm_affine(args, moments_of(moments, n, c, "group_norm_affine: moments"),
                static_cast<float*>(multiplier.data_ptr()), static_cast<float*>(offset.data_ptr()));
    return {multiplier, offset};
}

// The arithmetic alone of group_norm_silu over `elements` elements and torch's threads: its act and, if asked, its
// statistics, each from L1 to L1 in the dtype's own loads and stores.
void group_norm_silu_floor(const std::string& dtype, int64_t elements, bool statistics) {
    constexpr int64_t n = 4096;
    const DType type = dtype == "float32" ? DType::f32 : dtype == "bfloat16" ? DType::bf16 : DType::f16;
    if (type == DType::f16 && dtype != "float16")
        throw pybind11::value_error("group_norm_silu_floor: dtype is float32, bfloat16 or float16, got " + dtype);
    torch::stable::parallel_for(0, (elements + n - 1) / n, kGrain / n, [type, statistics](int64_t begin, int64_t end) {
        std::vector<float> x(n), y(n);  // zeros, whichever the dtype
        g_kernels->group_norm_silu_floor(type, x.data(), y.data(), n, end - begin, statistics);
    });
}

}  // namespace

void define_group_norm_silu(pybind11::module_& m) { m.def("group_norm_silu_floor", &group_norm_silu_floor); }

}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) {
    m.impl("group_norm_silu", TORCH_BOX(&difusores::group_norm_silu));
    m.impl("group_norm_affine", TORCH_BOX(&difusores::group_norm_affine));
}
