// winograd_conv: checks, groups of tiles, scratch memory, and the steps of cpu/winograd_conv.cpp over torch's threads.
#include <algorithm>
#include <cstring>
#include <limits>

#include "convolution.h"
#include "group_norm.h"

namespace difusores {
namespace {

// Tiles of a group at most: their products for 64 channels take half a megabyte of L2.
constexpr int64_t kTiles = 64, kLargeTiles = 36;
constexpr int64_t kWorthLarge = 64;  // of them, 6x6, in an image, from which on they are used
constexpr int64_t kTogether =
    2 << 20;                    // bytes of transformed tiles, for each thread, that are made before they are multiplied
constexpr int64_t kShares = 8;  // groups for each thread, of which one more or less does not matter
constexpr int64_t kShared = 72 << 20;  // bytes of transformed weights that several groups of one call may share
constexpr int64_t kKept = 32 << 20;    // of them that a thread keeps for its next call: more are as large as an image
constexpr int64_t kBlock = kWinogradBlock;
constexpr const char* kNoInt16 = "winograd_conv: the product of int16 needs AVX-512 with VNNI and BF16";

thread_local Scratch t_tiles, t_weights, t_norm, t_sums;

// Groups as large as kTiles allows and of even sizes: whole images, or rectangles near a square, which share fewer
// pixels. Returns their number.
int64_t cut_into_groups(WinogradConvArgs& args) {
    const int64_t down = parts(args.h, args.tile), across = parts(args.w, args.tile);
    const int64_t most = args.tile == 4 ? kTiles : kLargeTiles;
    const auto even = [](int64_t total, int64_t most) { return parts(total, parts(total, most)); };
    args.group_n = 1;
    if (down * across <= most) {
        args.group_n = even(args.n, most / (down * across));
        args.group_h = down, args.group_w = across;
    } else {
        args.group_w = even(across, std::max<int64_t>(8, most / down));
        args.group_h = even(down, most / args.group_w);
    }
    return parts(args.n, args.group_n) * parts(down, args.group_h) * parts(across, args.group_w);
}

void set_weight(WinogradConvArgs& args, const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.size(1) >= 1 &&
                        weight.scalar_type() == ScalarType::Float,
                    "winograd_conv: weight must be float32 [O, C, 3, 3]");
    args.o = weight.size(0), args.c = weight.size(1);
    args.weight_last = !weight.is_contiguous();
    args.weight =
        args.weight_last ? image("winograd_conv", weight, "weight") : static_cast<const float*>(weight.data_ptr());
}

// 4, or 6 where larger tiles need a tenth fewer multiplications: what they save, in large images, but for what they
// compute beyond the edges, and the level has them.
int64_t tile_of(int64_t h, int64_t w) {
    const bool wide = std::strcmp(g_kernels->isa, "base") != 0 && std::strcmp(g_kernels->isa, "avx2") != 0;
    const int64_t small = parts(h, 4) * parts(w, 4), large = parts(h, 6) * parts(w, 6);
    return wide && large >= kWorthLarge && 64 * large * 10 <= 36 * small * 9 ? 6 : 4;
}

int64_t points_of(const WinogradConvArgs& args) { return (args.tile + 2) * (args.tile + 2); }

// Of weights of `points` points, or of the nine.
int64_t packed_floats(const WinogradConvArgs& args, int64_t points) {
    return parts(args.o, kBlock) * parts(args.c, kBlock) * points * kWinogradPoint;
}

template <class Kernel>
void run(int64_t tasks, int64_t work_per_task, int64_t scratch, const Kernel& kernel) {
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kWork / work_per_task),
                                [&](int64_t begin, int64_t end) { kernel(t_work.of(scratch), begin, end); });
}

void pack(const WinogradConvArgs& args, float* packed) {
    run(parts(args.o, kBlock) * parts(args.c, kBlock), 3 * points_of(args) * kBlock * kBlock, 9 * kWinogradPoint,
        [&](float* scratch, int64_t begin, int64_t end) {
            g_kernels->winograd_conv_pack(args, packed + begin * points_of(args) * kWinogradPoint, scratch, begin, end);
        });
}

int64_t packed_pairs(const WinogradConvArgs& args) {
    return parts(args.o, kBlock) * parts(args.c, kBlock) * 36 * kWinogradPairs;
}

void pack_int16(const WinogradInt16Args& args, int16_t* packed) {
    constexpr int64_t kPoints = 36 * kWinogradPoint;
    run(parts(args.o, kBlock) * parts(args.c, kBlock), 200 * kBlock * kBlock, kPoints + 9 * kWinogradPoint,
        [&](float* scratch, int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                g_kernels->winograd_conv_pack(args, scratch, scratch + kPoints, task, task + 1);
                g_kernels->winograd_int16_pack(args, scratch, packed, task);
            }
        });
}

// The tasks of the two kernels of a group: how many, their floats of scratch and their multiplications; and the floats
// of a group's transformed tiles between them.
struct Steps {
    int64_t in_tasks, in_scratch, in_work, out_tasks, out_scratch, out_work, tiles;
};

// Groups of an image, down and across.
int64_t parts_down(const WinogradConvArgs& args) { return parts(args.h, args.tile * args.group_h); }
int64_t parts_across(const WinogradConvArgs& args) { return parts(args.w, args.tile * args.group_w); }

// Mean and variance of the channels of y, [N, 2, O], from the sums of its parts in order: around the mean of all, so
// that nothing cancels (Chan, Golub, LeVeque 1983).
void join_sums(const WinogradConvArgs& args, double* moments) {
    const int64_t down = parts_down(args), across = parts_across(args);
    const int64_t high = args.tile * args.group_h, wide = args.tile * args.group_w;
    const double share = 1.0 / static_cast<double>(args.h * args.w);
    const auto each_part = [&](int64_t n, const auto& join) {
        const float* pivot = args.sums + n * down * across * 3 * args.o;
        for (int64_t y = 0; y < down; ++y)
            for (int64_t x = 0; x < across; ++x, pivot += 3 * args.o) {
                const int64_t rows = std::min(high, args.h - high * y), columns = std::min(wide, args.w - wide * x);
                const double count = static_cast<double>(rows * columns);
                for (int64_t o = 0; o < args.o; ++o)
                    join(o, count, pivot[o], static_cast<double>(pivot[args.o + o]), pivot[2 * args.o + o]);
            }
    };
    for (int64_t n = 0; n < args.n; ++n, moments += 2 * args.o) {
        double *const mean = moments, *const variance = mean + args.o;
        std::fill_n(moments, 2 * args.o, 0.0);
        each_part(n, [&](int64_t o, double count, double pivot, double sum, float) {
            mean[o] += (count * pivot + sum) * share;
        });
        each_part(n, [&](int64_t o, double count, double pivot, double sum, float squares) {
            const double away = pivot - mean[o];  // sum of (d + away)^2 over the deviations d from the pivot
            variance[o] += (squares + away * (2.0 * sum + away * count)) * share;
        });
    }
}

// Where it divides evenly, each thread multiplies the groups that it has transformed, out of its L2; else all threads
// transform some groups and then multiply them.
template <class Args, class Kernel, class Place>
void run_steps(Args& args, int64_t groups, const Steps& s, Kernel input, Kernel output, const Place& place) {
    const int64_t threads = torch::stable::get_num_threads();
    if (groups % threads == 0 || groups >= kShares * threads) {
        run(groups, s.in_tasks * s.in_work + s.out_tasks * s.out_work, s.tiles + std::max(s.in_scratch, s.out_scratch),
            [&](float* scratch, int64_t begin, int64_t end) {
                Args mine = args;
                place(mine, scratch);
                for (mine.first_group = begin; mine.first_group < end; ++mine.first_group) {
                    input(mine, scratch + s.tiles, 0, s.in_tasks);
                    output(mine, scratch + s.tiles, 0, s.out_tasks);
                }
            });
        return;
    }
    const int64_t together = std::clamp<int64_t>(threads * kTogether / (s.tiles * int64_t{sizeof(float)}), 1, groups);
    place(args, t_tiles.of(together * s.tiles));
    for (args.first_group = 0; args.first_group < groups; args.first_group += together) {
        const int64_t count = std::min(together, groups - args.first_group);
        run(count * s.in_tasks, s.in_work, s.in_scratch,
            [&](float* scratch, int64_t begin, int64_t end) { input(args, scratch, begin, end); });
        run(count * s.out_tasks, s.out_work, s.out_scratch,
            [&](float* scratch, int64_t begin, int64_t end) { output(args, scratch, begin, end); });
    }
}

template <class Args, class Kernel, class Place>
void run_groups(Args& args, double* moments, int64_t groups, const Steps& s, Kernel input, Kernel output,
                const Place& place) {
    if (moments) args.sums = t_sums.of(args.n * parts_down(args) * parts_across(args) * 3 * args.o);
    run_steps(args, groups, s, input, output, place);
    if (moments) join_sums(args, moments);
}

int64_t patch_of(const WinogradConvArgs& args) {
    return (args.tile * args.group_h + 2) * (args.tile * args.group_w + 2) * kBlock;
}

void convolve_int16(WinogradInt16Args& args, double* moments) {
    args.tile = 4;
    if (!args.packed16) {
        int16_t* const packed = reinterpret_cast<int16_t*>(t_weights.of(packed_pairs(args) / 2));
        pack_int16(args, packed);
        args.packed16 = packed;
    }
    const int64_t groups = cut_into_groups(args), tiles = args.group_n * args.group_h * args.group_w;
    const Steps steps{parts(args.c, kBlock),         36 * kBlock + patch_of(args),      300 * tiles * kBlock,
                      parts(args.o, kBlock),         36 * (kBlock * tiles + kMaxWidth), 18 * tiles * args.c * kBlock,
                      winograd_int16_group(args) / 2};
    run_groups(args, moments, groups, steps, g_kernels->winograd_int16_input, g_kernels->winograd_int16_output,
               [](WinogradInt16Args& a, float* v) { a.v16 = reinterpret_cast<int16_t*>(v); });
}

void convolve(WinogradConvArgs& args, double* moments) {
    const int64_t groups = cut_into_groups(args), tiles = args.group_n * args.group_h * args.group_w;
    const int64_t points = points_of(args) * (kBlock * tiles + kMaxWidth);  // of a group's block of channels
    const int64_t transformed = packed_floats(args, points_of(args));
    const int64_t bytes = transformed * int64_t{sizeof(float)};
    CallScratch of_this_call;
    if (!args.packed && groups >= 4 && bytes <= kShared) {
        float* const packed = bytes <= kKept ? t_weights.of(transformed) : of_this_call.of(transformed);
        pack(args, packed);
        args.packed = packed;
    }
    const int64_t weights = (9 + 2 * (args.tile + 2)) * kWinogradPoint;  // gathered, and two rows of points
    const Steps steps{parts(args.c, kBlock),         patch_of(args),   8 * points_of(args) * tiles * kBlock,
                      parts(args.o, kBlock),         weights + points, points_of(args) * tiles * args.c * kBlock,
                      parts(args.c, kBlock) * points};
    run_groups(args, moments, groups, steps, g_kernels->winograd_conv_input, g_kernels->winograd_conv_output,
               [](WinogradConvArgs& a, float* v) { a.v = v; });
}

// multiplier and offset of a group norm of x, in memory that the thread keeps.
void set_norm(WinogradConvArgs& args, int64_t pixels, int64_t groups, const OptionalTensor& weight,
              const OptionalTensor& bias, double eps, const OptionalTensor& moments) {
    STD_TORCH_CHECK(!args.multiplier.ptr && !args.offset.ptr,
                    "winograd_conv: a norm is given, and multiplier or offset beside it");
    STD_TORCH_CHECK(groups >= 1 && args.c % groups == 0, "winograd_conv: norm_groups must divide C");
    GroupNormSiluArgs norm{};
    norm.x = args.x, norm.dtype = DType::f32;
    norm.weight = param_of(weight, args.n, args.c, false, "winograd_conv: norm_weight");
    norm.bias = param_of(bias, args.n, args.c, false, "winograd_conv: norm_bias");
    norm.n = args.n, norm.c = args.c, norm.s = pixels, norm.groups = groups, norm.eps = eps;
    float* const multiplier = t_norm.of(2 * args.n * args.c);
    float* const offset = multiplier + args.n * args.c;
    norm_affine(norm, moments_of(moments, args.n, args.c, "winograd_conv: norm_moments"), multiplier, offset);
    args.multiplier = {multiplier, DType::f32, args.c}, args.offset = {offset, DType::f32, args.c};
}

Tensor winograd_conv(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor multiplier, OptionalTensor offset,
                     bool silu, OptionalTensor add, OptionalTensor residual, double output_scale, OptionalTensor packed,
                     int64_t norm_groups, OptionalTensor norm_weight, OptionalTensor norm_bias, double norm_eps,
                     bool doubled, OptionalTensor moments, OptionalTensor norm_moments) {
    WinogradInt16Args args{};
    args.x = image("winograd_conv", x, "x");
    set_weight(args, weight);
    const int64_t factor = doubled ? 2 : 1;
    args.doubled = doubled;
    args.n = x.size(0), args.h = factor * x.size(2), args.w = factor * x.size(3);
    args.tile = tile_of(args.h, args.w);
    STD_TORCH_CHECK(x.size(1) == args.c, "winograd_conv: weight must be [O, C, 3, 3] with the C of x");
    const int64_t sizes[4] = {args.n, args.o, args.h, args.w};
    const int64_t strides[4] = {args.h * args.w * args.o, 1, args.w * args.o, args.o};
    Tensor y = new_result(x, 4, sizes, strides);
    double* const to_moments = moments_of(moments, args.n, args.o, "winograd_conv: moments");
    if (y.numel() == 0) {
        std::fill_n(to_moments, moments ? moments->numel() : 0, std::numeric_limits<double>::quiet_NaN());
        return y;
    }
    args.y = static_cast<float*>(y.data_ptr());
    args.bias = floats("winograd_conv", bias, 0, args.o, "bias");
    args.multiplier = floats("winograd_conv", multiplier, args.n, args.c, "multiplier");
    args.offset = floats("winograd_conv", offset, args.n, args.c, "offset");
    if (norm_groups) set_norm(args, x.size(2) * x.size(3), norm_groups, norm_weight, norm_bias, norm_eps, norm_moments);
    args.add = floats("winograd_conv", add, args.n, args.o, "add");
    if (residual) {
        for (int64_t d = 0; d < 4; ++d)
            STD_TORCH_CHECK(residual->dim() == 4 && residual->size(d) == sizes[d],
                            "winograd_conv: residual must have the shape of the output");
        args.residual = image("winograd_conv", *residual, "residual");
    }
    args.silu = silu, args.output_scale = static_cast<float>(output_scale);
    if (packed && packed->scalar_type() == ScalarType::Short) {
        STD_TORCH_CHECK(g_kernels->winograd_int16_output, kNoInt16);
        STD_TORCH_CHECK(packed->is_contiguous() && (packed->numel() == packed_pairs(args) || packed->numel() == 0),
                        "winograd_conv: packed is not of this weight");
        if (packed->numel()) args.packed16 = static_cast<const int16_t*>(packed->data_ptr());
        convolve_int16(args, to_moments);
        return y;
    }
    if (packed) {
        const bool transformed = packed->numel() == packed_floats(args, 36);
        STD_TORCH_CHECK(packed->is_contiguous() && packed->scalar_type() == ScalarType::Float &&
                            (transformed || packed->numel() == packed_floats(args, 9)),
                        "winograd_conv: packed is not of this weight");
        if (!transformed) args.gathered = static_cast<const float*>(packed->data_ptr());
        else if (args.tile == 4) args.packed = static_cast<const float*>(packed->data_ptr());
    }
    convolve(args, to_moments);
    return y;
}

Tensor winograd_conv_pack(Tensor weight, bool transformed) {
    WinogradConvArgs args{};
    set_weight(args, weight);
    args.tile = 4;
    const int64_t size = packed_floats(args, transformed ? 36 : 9), stride = 1;
    Tensor packed = new_empty(weight, 1, &size, &stride);
    want_huge_pages(packed);
    float* const to = static_cast<float*>(packed.data_ptr());
    const int64_t blocks = parts(args.o, kBlock) * parts(args.c, kBlock), block = size / blocks;
    run(blocks, kWork, 9 * kWinogradPoint, [&](float* scratch, int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            std::memset(to + task * block, 0, block * sizeof(float));  // the kernels leave what is padding
            if (transformed) g_kernels->winograd_conv_pack(args, to + task * block, scratch, task, task + 1);
            else g_kernels->winograd_conv_gather(args, to, task, task + 1);
        }
    });
    return packed;
}

Tensor winograd_conv_pack_int16(Tensor weight) {
    WinogradInt16Args args{};
    set_weight(args, weight);
    args.tile = 4;
    STD_TORCH_CHECK(g_kernels->winograd_int16_pack, kNoInt16);
    const int64_t size = packed_pairs(args), stride = 1;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_int16(),
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    Tensor packed(handle);
    want_huge_pages(packed);
    pack_int16(args, static_cast<int16_t*>(packed.data_ptr()));
    return packed;
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) {
    m.impl("winograd_conv", TORCH_BOX(&difusores::winograd_conv));
    m.impl("winograd_conv_pack", TORCH_BOX(&difusores::winograd_conv_pack));
    m.impl("winograd_conv_pack_int16", TORCH_BOX(&difusores::winograd_conv_pack_int16));
}
