// gemm_conv: the packing of weights; checks, runs of rows, and the product of cpu/gemm_conv.cpp, in bf16 of
// cpu/gemm_conv_bf16.cpp, or of fp32 split in two of bf16 of cpu/gemm_conv_split.cpp, over torch's threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../pairs_layout.h"
#include "convolution.h"

namespace difusores {
namespace {

constexpr int64_t kRun = 384;              // rows of a task at most: a chunk of them takes 0.75 MB of L2
constexpr int64_t kSums = 96 << 10;        // floats of a task's sums at most
constexpr int64_t kFewRows = 16;           // below which reading the weights takes the time
constexpr int64_t kTasks = 4;              // that there should be, for threads
constexpr int64_t kRunBytes = 768 << 10;   // of x that a task in bf16 passes once a panel, at most if it can be
constexpr int64_t kSplitRows = 800 << 10;  // bytes of a task's split rows at most, beside a panel and sums in L2
constexpr int64_t kSplitShare = 10;        // panels of a task at least: each splits its rows anew
constexpr int64_t kBand = 1200 << 10;      // bytes of pixels that a task arranges: of L2's 2 MB
constexpr int64_t kArranged = 16 << 20;    // bytes of pixels that are arranged before they are multiplied

thread_local Scratch t_arranged;

// Cuts the tiles of what is laid out into runs of even lengths, and tells how many.
int64_t cut_into_runs(GemmPairsArgs& a) {
    const int64_t total = a.images * parts(a.down * a.out_w, kGemmTileRows);
    const int64_t taps = a.kernel_h * a.kernel_w, tile = 2 * kGemmTileRows * a.c;  // taps read a pixel close together
    const int64_t most = std::clamp<int64_t>(kRunBytes * taps / tile, 8, kGemmRunTiles);
    a.run = parts(parts(total, parts(total, most)), 2) * 2;
    return parts(total, a.run);
}

// Multiplications of pairs below which a second thread costs more than it brings: AMX has four times as many.
int64_t pairs_work() { return (std::strcmp(g_kernels->isa, "amx") == 0 ? 8 : 2) * kWork; }

void multiply_pairs(const GemmPairsArgs& a, int64_t begin, int64_t end) {
    g_kernels->gemm_conv_bf16(a, t_work.of(a.run * kGemmTileRows * kGemmPairColumns), begin, end);
}

// A large image in bands of `tall` rows of the output: a task arranges what a band reads in memory of its thread and
// multiplies it while it is in L2.
void convolve_bands(GemmPairsArgs a, int64_t n, int64_t tall, int64_t* place) {
    const int64_t bands = parts(a.out_h, tall);
    a.images = 1, a.down = tall, a.panels = parts(a.o, kGemmPairColumns);
    const int64_t floats = lay_out(a, place) / int64_t{sizeof(float)};
    torch::stable::parallel_for(0, n * bands, 1, [&](int64_t begin, int64_t end) {
        GemmPairsArgs band = a;
        band.arranged = reinterpret_cast<char*>(t_arranged.of(floats));
        for (int64_t task = begin; task < end; ++task) {
            band.first = task / bands, band.top = task % bands * tall, band.down = std::min(tall, a.out_h - band.top);
            g_kernels->gemm_conv_bf16_arrange(band, 0, (band.down - 1) * a.stride_h + a.kernel_h);
            const int64_t runs = cut_into_runs(band);
            multiply_pairs(band, 0, runs);
        }
    });
}

// bf16. Small images: some at a time, first their pixels arranged, then their tiles multiplied.
void convolve_pairs(GemmPairsArgs& a, int64_t n) {
    std::vector<int64_t> place(pair_steps(a));
    a.images = 1, a.top = 0, a.down = a.out_h;
    const int64_t of_image = lay_out(a, place.data()), reach_h = (a.out_h - 1) * a.stride_h + a.kernel_h;
    if (of_image > kBand) {
        const int64_t rows = kBand * reach_h / of_image, threads = torch::stable::get_num_threads();
        const int64_t tallest = std::max<int64_t>(1, (rows - a.kernel_h) / a.stride_h + 1);
        const int64_t bands = parts(parts(n * parts(a.out_h, tallest), threads) * threads, n);
        return convolve_bands(a, n, parts(a.out_h, bands), place.data());
    }
    const int64_t together = of_image ? std::clamp<int64_t>(kArranged / of_image, 1, n) : n;
    const int64_t panels = parts(a.o, kGemmPairColumns), depth = pair_steps(a) * kGemmPairStep;
    for (a.first = 0; a.first < n; a.first += together) {
        a.images = std::min(together, n - a.first);
        if (of_image) {
            a.arranged = reinterpret_cast<char*>(t_arranged.of(lay_out(a, place.data()) / int64_t{sizeof(float)}));
            torch::stable::parallel_for(
                0, a.images * reach_h, std::max<int64_t>(1, kGrain / (a.copies * a.pitch * a.c)),
                [&](int64_t begin, int64_t end) { g_kernels->gemm_conv_bf16_arrange(a, begin, end); });
        }
        const int64_t runs = cut_into_runs(a);
        a.panels = std::clamp<int64_t>(runs * panels / kTasks, 1, panels);  // so that there are tasks for threads
        torch::stable::parallel_for(
            0, runs * parts(panels, a.panels),
            std::max<int64_t>(1, pairs_work() / (a.run * kGemmTileRows * a.panels * kGemmPairColumns * depth)),
            [&](int64_t begin, int64_t end) { multiply_pairs(a, begin, end); });
    }
}

// Of y: [n, o, out_h, out_w]; or, of rows, x's sizes with o in place of the last.
struct Sizes {
    int64_t n, o, out_h, out_w;
    bool rows;
};

// x [..., C], contiguous, is rows where it has other than four dimensions or the weight has two.
bool is_rows(const Tensor& x, const Tensor& weight) { return x.dim() != 4 || weight.dim() == 2; }

// x as it lies in memory: [N, H, W, C], rows as an image of one column.
const void* pixels_of(const Tensor& x, const Tensor& weight, ScalarType type) {
    if (!is_rows(x, weight)) return image("gemm_conv", x, "x", type);
    STD_TORCH_CHECK(x.dim() > 0 && x.scalar_type() == type && x.is_contiguous(), "gemm_conv: rows must be contiguous");
    return x.data_ptr();
}

// Checks what both dtypes have in common and fills it in.
template <class Args>
Sizes set_geometry(Args& a, const Tensor& x, const Tensor& weight, const int64_t (&geometry)[4]) {
    const bool rows = is_rows(x, weight), flat = weight.dim() == 2;
    a.c = x.size(rows ? x.dim() - 1 : 1);
    STD_TORCH_CHECK((weight.dim() == 4 || (rows && flat)) && weight.size(1) == a.c,
                    "gemm_conv: weight must be [O, C, ...] of x's C");
    a.o = weight.size(0), a.kernel_h = flat ? 1 : weight.size(2), a.kernel_w = flat ? 1 : weight.size(3);
    a.stride_h = geometry[0], a.stride_w = geometry[1], a.pad_h = geometry[2], a.pad_w = geometry[3];
    STD_TORCH_CHECK(a.o > 0 && a.c > 0 && a.kernel_h > 0 && a.kernel_w > 0 && a.stride_h > 0 && a.stride_w > 0 &&
                        a.pad_h >= 0 && a.pad_w >= 0,
                    "gemm_conv: channels, kernel and stride must be positive and padding not negative");
    if (rows) {
        STD_TORCH_CHECK(a.kernel_h * a.kernel_w == 1 && a.stride_h * a.stride_w == 1 && !a.pad_h && !a.pad_w,
                        "gemm_conv: rows take a kernel of one element, without stride and padding");
        a.h = a.out_h = x.numel() / a.c, a.w = a.out_w = 1;
        return {1, a.o, a.out_h, 1, true};
    }
    a.h = x.size(2), a.w = x.size(3);
    a.out_h = (a.h + 2 * a.pad_h - a.kernel_h) / a.stride_h + 1;
    a.out_w = (a.w + 2 * a.pad_w - a.kernel_w) / a.stride_w + 1;
    STD_TORCH_CHECK(a.h + 2 * a.pad_h >= a.kernel_h && a.w + 2 * a.pad_w >= a.kernel_w,
                    "gemm_conv: the image is smaller than the kernel");
    return {x.size(0), a.o, a.out_h, a.out_w, false};
}

// Channels of GEGLU.
int64_t gated(int64_t o) {
    STD_TORCH_CHECK(o % (2 * kMaxWidth) == 0, "gemm_conv: with GEGLU the kernel takes a multiple of 32 channels");
    return o / 2;
}

// Of the weight [O, C, ...] as pairs of bf16; as two of them it has twice as many.
int64_t pair_numbers(const Tensor& weight) {
    const int64_t taps = weight.dim() == 4 ? weight.size(2) * weight.size(3) : 1;
    return taps * parts(weight.size(0), kGemmPairColumns) * kGemmPairColumns * parts(weight.size(1), kGemmPairStep) *
           kGemmPairStep;
}

const void* packed_of(const Tensor& packed, ScalarType type, int64_t numbers) {
    STD_TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == type && packed.numel() == numbers,
                    "gemm_conv: packed is not of a weight of this shape");
    return packed.data_ptr();
}

const void* residual_of(const OptionalTensor& residual, const Tensor& x, const Sizes& s, ScalarType type) {
    if (!residual) return nullptr;
    if (s.rows) {
        bool fits = residual->dim() == x.dim() && residual->size(x.dim() - 1) == s.o;
        for (int64_t d = 0; d + 1 < x.dim() && fits; ++d) fits = residual->size(d) == x.size(d);
        STD_TORCH_CHECK(fits && residual->is_contiguous() && residual->scalar_type() == type,
                        "gemm_conv: residual must have the shape of the output, be contiguous and of x's dtype");
        return residual->data_ptr();
    }
    STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == s.n && residual->size(1) == s.o &&
                        residual->size(2) == s.out_h && residual->size(3) == s.out_w,
                    "gemm_conv: residual must have the shape of the output");
    return image("gemm_conv", *residual, "residual", type);
}

Tensor new_output(const Tensor& x, const Sizes& s) {
    if (s.rows) {
        std::vector<int64_t> sizes(x.dim(), s.o), strides(x.dim(), 1);
        for (int64_t d = x.dim() - 2; d >= 0; --d) sizes[d] = x.size(d), strides[d] = strides[d + 1] * sizes[d + 1];
        return new_result(x, x.dim(), sizes.data(), strides.data());
    }
    const int64_t sizes[4] = {s.n, s.o, s.out_h, s.out_w};
    const int64_t strides[4] = {s.out_h * s.out_w * s.o, 1, s.out_w * s.o, s.o};
    return new_result(x, 4, sizes, strides);
}

Tensor gemm_conv_pairs(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& multiplier, const OptionalTensor& offset, bool silu,
                       const OptionalTensor& add, const OptionalTensor& residual, const int64_t (&geometry)[4],
                       const Tensor& packed, bool geglu) {
    STD_TORCH_CHECK(g_kernels->gemm_conv_bf16, "gemm_conv: ISA level ", g_kernels->isa, " has no bf16 kernel");
    const ScalarType type = x.scalar_type();
    GemmPairsArgs a{};
    a.dtype = type == ScalarType::Float ? DType::f32 : DType::bf16;
    a.x = pixels_of(x, weight, type);
    Sizes sizes = set_geometry(a, x, weight, geometry);
    a.packed = packed_of(packed, ScalarType::BFloat16, pair_numbers(weight));
    a.multiplier = floats("gemm_conv", multiplier, sizes.n, a.c, "multiplier");
    a.offset = floats("gemm_conv", offset, sizes.n, a.c, "offset");
    STD_TORCH_CHECK(!multiplier == !offset, "gemm_conv: multiplier and offset go together");
    STD_TORCH_CHECK(!sizes.rows || !(multiplier || add), "gemm_conv: multiplier, offset and add are of images");
    a.silu = silu;
    a.bias = param_of(bias, sizes.n, a.o, false, "gemm_conv: bias");
    a.add = param_of(add, sizes.n, a.o, true, "gemm_conv: add");
    a.geglu = geglu;
    STD_TORCH_CHECK(!geglu || !add, "gemm_conv: with GEGLU the kernel adds nothing but a bias and a residual");
    if (geglu) sizes.o = gated(a.o);
    a.residual = residual_of(residual, x, sizes, type);
    Tensor y = new_output(x, sizes);
    if (y.numel() == 0) return y;
    a.y = y.data_ptr();
    convolve_pairs(a, sizes.n);
    return y;
}

// Rows of pixels, each fp32 as two of bf16; what is given was checked but for the product's kind.
void multiply_split(const GemmConvArgs& given) {
    STD_TORCH_CHECK(g_kernels->gemm_conv_split, "gemm_conv: ISA level ", g_kernels->isa, " does not split float32");
    STD_TORCH_CHECK(!given.gathers, "gemm_conv: a weight that is split is of a 1x1 convolution, stride 1");
    GemmSplitArgs a{};
    a.x = static_cast<const float*>(given.x), a.packed = given.packed, a.bias = given.bias;
    a.residual = static_cast<const float*>(given.residual), a.y = static_cast<float*>(given.y);
    a.rows = given.n * given.out_h * given.out_w, a.c = given.c, a.o = given.o, a.geglu = given.geglu;
    const int64_t steps = std::min(parts(a.c, kGemmPairStep), kGemmSplitDepth);
    const int64_t tiles = parts(a.rows, kGemmTileRows), panels = parts(a.o, kGemmPairColumns);
    const int64_t most = std::max<int64_t>(2, kSplitRows / (steps * 4 * kGemmPairStep * kGemmTileRows));
    a.run = parts(parts(tiles, parts(tiles, most)), 2) * 2;  // of even lengths, of pairs of tiles
    const int64_t runs = parts(tiles, a.run);
    a.panels = std::clamp<int64_t>(runs * panels / kTasks, std::min(kSplitShare, panels), panels);
    torch::stable::parallel_for(
        0, runs * parts(panels, a.panels),
        std::max<int64_t>(1, 2 * kWork / (a.run * kGemmTileRows * a.panels * kGemmPairColumns * a.c)),
        [&](int64_t begin, int64_t end) {
            g_kernels->gemm_conv_split(a, t_work.of(gemm_split_scratch(a)), begin, end);
        });
}

Tensor gemm_conv(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor multiplier, OptionalTensor offset,
                 bool silu, OptionalTensor add, OptionalTensor residual, int64_t stride_h, int64_t stride_w,
                 int64_t padding_h, int64_t padding_w, Tensor packed, bool geglu) {
    const int64_t geometry[4] = {stride_h, stride_w, padding_h, padding_w};
    const bool pairs = packed.scalar_type() == ScalarType::BFloat16;
    if (x.scalar_type() == ScalarType::BFloat16 || (pairs && packed.numel() == pair_numbers(weight)))
        return gemm_conv_pairs(x, weight, bias, multiplier, offset, silu, add, residual, geometry, packed, geglu);
    STD_TORCH_CHECK(!multiplier && !offset && !silu && !add,
                    "gemm_conv: the kernel takes multiplier, offset, silu and add with weights in bfloat16 alone");
    GemmConvArgs a{};
    a.x = pixels_of(x, weight, ScalarType::Float);
    Sizes sizes = set_geometry(a, x, weight, geometry);
    a.n = sizes.n, a.geglu = geglu;
    if (geglu) sizes.o = gated(a.o);
    const int64_t rows = a.n * a.out_h * a.out_w, depth = a.kernel_h * a.kernel_w * a.c;
    if (pairs)
        a.packed = packed_of(
            packed, ScalarType::BFloat16,
            2 * parts(depth, kGemmPairStep) * kGemmPairStep * parts(a.o, kGemmPairColumns) * kGemmPairColumns);
    else a.packed = packed_of(packed, ScalarType::Float, depth * parts(a.o, kMaxWidth) * kMaxWidth);
    a.bias = param_of(bias, a.n, a.o, false, "gemm_conv: bias");
    a.residual = residual_of(residual, x, sizes, ScalarType::Float);
    Tensor y = new_output(x, sizes);
    if (rows == 0) return y;
    a.y = y.data_ptr();
    a.gathers = a.kernel_h * a.kernel_w != 1 || a.stride_h != 1 || a.stride_w != 1 || a.pad_h || a.pad_w;
    if (pairs) {
        multiply_split(a);
        return y;
    }
    a.run = parts(rows, parts(rows, kRun));  // of even lengths
    const int64_t runs = parts(rows, a.run), panels = parts(a.o, kGemmColumns);
    a.panels = 1;
    if (depth > kGemmChunk)
        a.panels = std::clamp<int64_t>(std::min(kSums / (a.run * kGemmColumns), runs * panels / kTasks), 1, panels);
    const int64_t scratch = a.run * (a.panels * kGemmColumns + kGemmChunk + kMaxWidth);
    torch::stable::parallel_for(
        0, runs * parts(panels, a.panels),
        std::max<int64_t>(1, kWork / (std::max(a.run, kFewRows) * a.panels * kGemmColumns * depth)),
        [&](int64_t begin, int64_t end) { g_kernels->gemm_conv(a, t_work.of(scratch), begin, end); });
    return y;
}

// Weights [O, C, kh, kw] that lie alike, one below the other.
Tensor gemm_conv_pack(std::vector<Tensor> weights, bool pairs, bool geglu, bool split) {
    STD_TORCH_CHECK(!weights.empty() && weights[0].dim() == 4, "gemm_conv_pack: weights must be [O, C, kh, kw]");
    const Tensor& one = weights[0];
    const ScalarType type = one.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                    "gemm_conv_pack: weights must be float32 or bfloat16");
    GemmPackArgs a{};
    a.dtype = type == ScalarType::Float ? DType::f32 : DType::bf16;
    a.c = one.size(1), a.kernel_h = one.size(2), a.kernel_w = one.size(3);
    a.stride_c = one.stride(1), a.stride_h = one.stride(2), a.stride_w = one.stride(3);
    a.pairs = pairs, a.split = split, a.geglu = geglu;
    std::vector<const void*> rows;
    for (const Tensor& weight : weights) {
        bool alike = weight.dim() == 4 && weight.scalar_type() == type;
        for (int64_t d = 1; d < 4 && alike; ++d)
            alike = weight.size(d) == one.size(d) && (weight.size(d) == 1 || weight.stride(d) == one.stride(d));
        STD_TORCH_CHECK(alike, "gemm_conv_pack: weights must be of one dtype and lie alike but for O");
        const char* const data = static_cast<const char*>(weight.data_ptr());
        for (int64_t o = 0; o < weight.size(0); ++o)
            rows.push_back(data + o * weight.stride(0) * weight.element_size());
    }
    a.o = static_cast<int64_t>(rows.size()), a.rows = rows.data();
    STD_TORCH_CHECK(a.o > 0 && a.c > 0 && a.kernel_h > 0 && a.kernel_w > 0, "gemm_conv_pack: a weight is empty");
    STD_TORCH_CHECK(!split || (pairs && a.kernel_h * a.kernel_w == 1), "gemm_conv_pack: pairs of one tap are split");
    if (geglu) gated(a.o);
    const int64_t columns = pairs ? kGemmPairColumns : kMaxWidth, channels = pairs ? kGemmPairStep : 1;
    const int64_t numbers =
        (split ? 2 : 1) * a.kernel_h * a.kernel_w * parts(a.o, columns) * columns * parts(a.c, channels) * channels;
    const int64_t stride = 1;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &numbers, &stride,
                                                    pairs ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32(),
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    Tensor packed(handle);
    a.packed = static_cast<uint32_t*>(packed.data_ptr());
    const int64_t panels = parts(a.o, pairs ? kGemmPairColumns : kGemmColumns), blocks = parts(a.c, kGemmPairStep);
    torch::stable::parallel_for(0, panels * blocks, std::max<int64_t>(1, kGrain * panels * blocks / numbers),
                                [&](int64_t begin, int64_t end) { g_kernels->gemm_conv_pack(a, begin, end); });
    return packed;
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) {
    m.impl("gemm_conv", TORCH_BOX(&difusores::gemm_conv));
    m.impl("gemm_conv_pack", TORCH_BOX(&difusores::gemm_conv_pack));
}
