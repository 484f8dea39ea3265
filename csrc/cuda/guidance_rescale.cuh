// factor = 1 + share (std(e_c) / std(sum g_k e_k) - 1) of each image, c the conditional output; the row, of which g_k
// are the first numbers: difusores/ops/scheduler_step.py.
//
// Bytes: every model output once in, in accesses of 128 bits where all have one dtype and their addresses allow it; 16
// of each tile out and in again. Layout: [B, inner], any step between images. An image of up to kRescaleWhole elements
// is one block's, which writes its factor: all of it is one multiprocessor's share of bandwidth then, and takes a few
// microseconds, which is what a second launch takes. A larger one is cut into tiles, which a second kernel joins.
// Tiles depend on an image's size alone, so its bits do not depend on the batch.
//
// Statistics: of what is left of each output without its first element, so that a mean far above the deviation costs
// no digits, and what is the same everywhere has no deviation at all. A thread takes the mean and the squared
// deviations of an access in registers, two passes, and joins them to its own by Chan's formula; threads and tiles are
// joined in a fixed order, first the mean, then the deviations of their means from it.
//
// The row comes with the launch or is read from device memory, by a counter that is there too: nothing waits for the
// host. A counter outside the table gives NaN. An output whose weight is 0 and which is not the conditional one is
// read, since the host may not know its weight, and does not count.
#pragma once
#include "cuda/common.cuh"

namespace difusores {
namespace cuda {

constexpr int64_t kRescaleWhole = 65536, kRescaleTile = 8192;
constexpr unsigned kRescaleThreads = 1024, kRescaleTileThreads = 256, kRescaleJoinThreads = 128;
constexpr int kRescaleParts = 6 * kWarp;  // floats of shared memory to join with

// Of the conditional output and of the mixture: means, squared deviations from them.
struct TwoMoments {
    float mean[2] = {}, m2[2] = {};
};

// The moments of `count` elements. each(use) calls use(n, moments of n elements) for every part that this thread has.
template <class Each>
__device__ __forceinline__ TwoMoments join_two(float count, const Each& each, float* parts) {
    float means[2] = {}, sums[4] = {};
    each([&](float n, const TwoMoments& of) {
        for (int k = 0; k < 2; ++k) means[k] = fmaf(n, of.mean[k], means[k]);
    });
    block_sums(means, parts);
    for (int k = 0; k < 2; ++k) means[k] /= count;
    each([&](float n, const TwoMoments& of) {
        for (int k = 0; k < 2; ++k) {
            const float d = of.mean[k] - means[k];
            sums[k] = fmaf(n, d, sums[k]);
            sums[2 + k] += fmaf(n * d, d, of.m2[k]);
        }
    });
    block_sums(sums, parts + 2 * kWarp);
    TwoMoments all;
    for (int k = 0; k < 2; ++k) {
        const float delta = sums[k] / count, m2 = fmaf(-sums[k], delta, sums[2 + k]);
        all.mean[k] = means[k] + delta, all.m2[k] = m2 < 0.0f ? 0.0f : m2;
    }
    return all;
}

__device__ __forceinline__ float factor_of(const GuidanceRescaleArgs& args, const TwoMoments& image) {
    return fmaf(static_cast<float>(args.share), sqrtf(image.m2[0]) / sqrtf(image.m2[1]) - 1.0f, 1.0f);
}

// D: the dtype of all outputs, which kVec 1 takes from the arguments. A block has a tile of an image, of which there
// are `tiles`; of a whole image it writes the factor, else the moments.
template <DType D, int kVec>
__global__ void __launch_bounds__(kRescaleThreads)
    guidance_rescale_tile(const __grid_constant__ GuidanceRescaleArgs args, const __grid_constant__ StepRow source,
                          unsigned tiles, float4* partial) {
    DIFUSORES_SHARED(float, parts, kRescaleParts);
    const int64_t b = blockIdx.x / tiles, begin = blockIdx.x % tiles * kRescaleTile, left = args.inner - begin;
    const int elements = static_cast<int>(tiles > 1 && left > kRescaleTile ? kRescaleTile : left);
    const auto dtype_of = [&](int k) { return kVec == 1 ? args.e[k].dtype : D; };
    Packed<kVec> raw[3];
    const auto ask = [&](int i) {
#pragma unroll
        for (int k = 0; k < 3; ++k)
            if (args.e[k].ptr) raw[k] = get<kVec>(args.e[k].ptr, b * args.e[k].batch_stride + begin + i, dtype_of(k));
    };
    const int64_t index = index_of(source);  // asked for before all else: the row waits for it
    int i = static_cast<int>(threadIdx.x) * kVec;
    if (i < elements) ask(i);
    float first[3] = {}, g[3];
#pragma unroll
    for (int k = 0; k < 3; ++k)
        if (args.e[k].ptr) first[k] = load_one(args.e[k].ptr, dtype_of(k), b * args.e[k].batch_stride);
#pragma unroll
    for (int k = 0; k < 3; ++k) g[k] = static_cast<float>(number_of(source, index, k));
    float count = 0.0f;
    TwoMoments own;
    while (i < elements) {
        float told[kVec] = {}, mixed[kVec] = {};
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            if (!args.e[k].ptr) continue;
            float v[kVec];
            unpack(raw[k], dtype_of(k), v);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                v[j] -= first[k];
                if (k == args.conditional) told[j] = v[j];
                if (g[k] != 0.0f) mixed[j] = fmaf(g[k], v[j], mixed[j]);
            }
        }
        i += static_cast<int>(blockDim.x) * kVec;
        if (i < elements) ask(i);
        const float weight = kVec / (count + kVec);
        const auto add = [&](const float (&h)[kVec], float& mean, float& m2) {
            float total = 0.0f, squares = 0.0f;
#pragma unroll
            for (int j = 0; j < kVec; ++j) total += h[j];
            const float center = total / kVec, d = center - mean;
#pragma unroll
            for (int j = 0; j < kVec; ++j) squares = fmaf(h[j] - center, h[j] - center, squares);
            m2 += fmaf(d * d, count * weight, squares);
            mean = fmaf(d, weight, mean);
        };
        add(told, own.mean[0], own.m2[0]);
        add(mixed, own.mean[1], own.m2[1]);
        count += kVec;
    }
    const TwoMoments all = join_two(static_cast<float>(elements), [&](const auto& use) { use(count, own); }, parts);
    if (threadIdx.x > 0) return;
    if (tiles == 1) args.factor[b] = factor_of(args, all);
    else partial[blockIdx.x] = {all.mean[0], all.m2[0], all.mean[1], all.m2[1]};
}

__global__ void __launch_bounds__(kRescaleJoinThreads)
    guidance_rescale_join(const __grid_constant__ GuidanceRescaleArgs args, unsigned tiles, const float4* partial) {
    DIFUSORES_SHARED(float, parts, kRescaleParts);
    const float4* const of_image = partial + int64_t{blockIdx.x} * tiles;
    const auto each = [&](const auto& use) {
        for (unsigned t = threadIdx.x; t < tiles; t += blockDim.x) {
            const float4 p = of_image[t];
            const int64_t left = args.inner - t * kRescaleTile;
            use(static_cast<float>(left < kRescaleTile ? left : kRescaleTile), TwoMoments{{p.x, p.z}, {p.y, p.w}});
        }
    };
    const TwoMoments all = join_two(static_cast<float>(args.inner), each, parts);
    if (threadIdx.x == 0) args.factor[blockIdx.x] = factor_of(args, all);
}

inline __host__ int64_t rescale_tiles(const GuidanceRescaleArgs& args) {
    return args.inner <= kRescaleWhole ? 1 : (args.inner + kRescaleTile - 1) / kRescaleTile;
}

// partial: a float4 for each tile of each image, where an image has several. launch(kernel, grid, threads, dynamic
// shared bytes, arguments of the kernel …)
template <class Launch>
__host__ auto launch_guidance_rescale(const GuidanceRescaleArgs& args, const StepRow& row, void* partial,
                                      const Launch& launch) {
    const DType dtype = args.e[0].dtype;
    const int64_t vec = 16 / bytes_of(dtype);
    bool wide = args.inner % vec == 0;
    for (const Operand& o : args.e)
        wide = wide && (!o.ptr || (o.dtype == dtype && aligned(o.ptr, args.batch > 1 ? o.batch_stride : 0, dtype, 16)));
    constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
    const auto kernel = !wide           ? guidance_rescale_tile<f32, 1>
                        : dtype == f32  ? guidance_rescale_tile<f32, 4>
                        : dtype == bf16 ? guidance_rescale_tile<bf16, 8>
                                        : guidance_rescale_tile<f16, 8>;
    const int64_t accesses = wide ? args.inner / vec : args.inner;
    const unsigned tiles = static_cast<unsigned>(rescale_tiles(args));
    const unsigned threads = tiles > 1                     ? kRescaleTileThreads
                             : accesses >= kRescaleThreads ? kRescaleThreads
                                                           : static_cast<unsigned>((accesses + 31) / 32 * 32);
    float4* const of_tiles = static_cast<float4*>(partial);
    const dim3 grid = {static_cast<unsigned>(args.batch * tiles), 1, 1},
               images = {static_cast<unsigned>(args.batch), 1, 1};
    auto result = launch(kernel, grid, threads, size_t{0}, args, row, tiles, of_tiles);
    if (tiles == 1 || !Launch::ok(result)) return result;
    return launch(guidance_rescale_join, images, kRescaleJoinThreads, size_t{0}, args, tiles,
                  static_cast<const float4*>(of_tiles));
}

}  // namespace cuda
}  // namespace difusores
