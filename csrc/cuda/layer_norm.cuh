// h = x + residual;  y = weight * (h - mean) * rstd + bias,  mean and rstd over each row of D elements;
// sum = h + sum_bias.
//
// Bytes: x and residual once in, y and sum once out, in accesses of 128 bits; weight and bias come from the caches. A
// row belongs to `lanes` threads, a power of two, each of which keeps kPer accesses of it in registers: few, so that
// small tensors fill the card, and all asked for at once. Parameters are asked for when they are used: registers that
// wait for them would leave a multiprocessor fewer rows. A block has several rows or, where a row takes more than a
// warp, one. Layout: contiguous rows.
//
// Statistics: two passes over registers, the mean, then the deviations from it, whose sum also corrects the mean.
// Nothing cancels when mean >> std. A row's bits depend on the row alone.
#pragma once
#include "cuda/common.cuh"

namespace difusores {
namespace cuda {

constexpr unsigned kLayerNormThreads = 128;
constexpr unsigned kFewLanes = 256;  // of a row, as long as these do
constexpr int kFewPer = 3;           // accesses of a thread then

// Threads of a row at most: what keeps 16384 elements, and leaves each thread registers enough.
constexpr __host__ __device__ unsigned most_lanes(int vec) { return vec == 1 ? 1024 : 512; }

constexpr __host__ __device__ unsigned most_threads(int vec, int per) {
    return per > kFewPer ? most_lanes(vec) : kFewLanes;
}
// Blocks of so many threads that share a multiprocessor at least: 64 registers a thread where it keeps little.
constexpr __host__ __device__ unsigned least_blocks(int per) { return per > kFewPer ? 1 : 4; }

// D: the dtype of x, which kVec 1 takes from the arguments.
template <DType D, int kVec, int kPer>
__global__ void __launch_bounds__(most_threads(kVec, kPer), least_blocks(kPer))
    layer_norm_kernel(const __grid_constant__ LayerNormArgs args, const __grid_constant__ LayerNormPlan plan) {
    DIFUSORES_SHARED(float2, parts, 2 * most_lanes(kVec) / kWarp);
    const DType dtype = kVec == 1 ? args.dtype : D;
    const unsigned lane = threadIdx.x % plan.lanes;  // a power of two
    const int64_t row = int64_t{blockIdx.x} * (plan.threads / plan.lanes) + threadIdx.x / plan.lanes;
    const int64_t begin = row * args.columns;
    const auto column = [&](int k) { return (static_cast<int64_t>(lane) + int64_t{k} * plan.lanes) * kVec; };
    const auto inside = [&](int k) { return row < args.rows && column(k) < args.columns; };
    // use(k) for the accesses that the row has
    const auto each = [&](const auto& use) {
#pragma unroll
        for (int k = 0; k < kPer; ++k)
            if (inside(k)) use(k);
    };
    Packed<kVec> from_x[kPer], from_r[kPer];
    each([&](int k) { from_x[k] = get<kVec>(args.x, begin + column(k), dtype); });
    if (args.residual) each([&](int k) { from_r[k] = get<kVec>(args.residual, begin + column(k), dtype); });
    const float share = 1.0f / static_cast<float>(args.columns);  // while the loads are under way
    float h[kPer][kVec], total = 0.0f;
    each([&](int k) { unpack<kVec>(from_x[k], dtype, h[k]); });
    if (args.residual)
        each([&](int k) {
            float r[kVec];
            unpack<kVec>(from_r[k], dtype, r);
#pragma unroll
            for (int j = 0; j < kVec; ++j) h[k][j] += r[j];
        });
    if (args.sum)
        each([&](int k) {
            float sum[kVec];
            params<kVec>(args.sum_bias, 0, column(k), 0.0f, sum);
#pragma unroll
            for (int j = 0; j < kVec; ++j) sum[j] += h[k][j];
            put<kVec>(args.sum, begin + column(k), dtype, pack<kVec>(dtype, sum));
        });
    each([&](int k) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) total += h[k][j];
    });
    const float mean = row_sum(total, 0.0f, plan.lanes, parts).x * share;
    float deviation = 0.0f, squares = 0.0f;
    each([&](int k) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            h[k][j] -= mean;
            deviation += h[k][j];
            squares = fmaf(h[k][j], h[k][j], squares);
        }
    });
    const float2 both = row_sum(deviation, squares, plan.lanes, parts + most_lanes(kVec) / kWarp);
    const float delta = both.x * share, m2 = fmaf(-both.x, delta, both.y);
    const float rstd = 1.0f / sqrtf((m2 < 0.0f ? 0.0f : m2) * share + static_cast<float>(args.eps));
    each([&](int k) {
        float w[kVec], b[kVec];
        params<kVec>(args.weight, 0, column(k), 1.0f, w);
        params<kVec>(args.bias, 0, column(k), 0.0f, b);
#pragma unroll
        for (int j = 0; j < kVec; ++j) h[k][j] = fmaf((h[k][j] - delta) * rstd, w[j], b[j]);
        put<kVec>(args.y, begin + column(k), dtype, pack<kVec>(dtype, h[k]));
    });
}

// lanes == 0: a row is longer than a block keeps.
inline __host__ LayerNormPlan plan_layer_norm(const LayerNormArgs& args) {
    LayerNormPlan plan{};
    plan.vec = 16 / bytes_of(args.dtype);
    bool wide = args.columns % plan.vec == 0 && aligned_params(args.weight) && aligned_params(args.bias) &&
                aligned_params(args.sum_bias);
    for (const void* p : {args.x, args.residual, static_cast<const void*>(args.y), static_cast<const void*>(args.sum)})
        wide = wide && aligned(p, 0, args.dtype, 16);
    if (!wide) plan.vec = 1;
    const int64_t vectors = args.columns / plan.vec;
    for (const int per : {2, 3, 8, 16}) {  // the fewest idle lanes; 3: five in six at 320, 640, 1280, all at 768
        if ((plan.vec == 1) != (per == 16) || (per == 8 && plan.lanes)) continue;
        const unsigned most = per > kFewPer ? most_lanes(plan.vec) : kFewLanes;
        unsigned lanes = 1;
        while (int64_t{lanes} * per < vectors && lanes <= most) lanes *= 2;
        if (lanes > most || (plan.lanes && plan.lanes * plan.per_lane <= lanes * static_cast<unsigned>(per))) continue;
        plan.lanes = lanes, plan.per_lane = per;
    }
    plan.threads = plan.lanes > kWarp ? plan.lanes : kLayerNormThreads;
    return plan;
}

// launch(kernel, grid, threads, dynamic shared bytes, arguments of the kernel …)
template <class Launch>
__host__ auto launch_layer_norm(const LayerNormArgs& args, const LayerNormPlan& plan, const Launch& launch) {
    const int64_t rows = plan.threads / plan.lanes;
    const dim3 grid = {static_cast<unsigned>((args.rows + rows - 1) / rows), 1, 1};
    const auto of_per = [&](auto two, auto three, auto eight) {
        return plan.per_lane == 2 ? two : plan.per_lane == 3 ? three : eight;
    };
    constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
    const auto kernel =
        plan.vec == 1 ? layer_norm_kernel<f32, 1, 16>
        : args.dtype == f32
            ? of_per(layer_norm_kernel<f32, 4, 2>, layer_norm_kernel<f32, 4, 3>, layer_norm_kernel<f32, 4, 8>)
        : args.dtype == f16
            ? of_per(layer_norm_kernel<f16, 8, 2>, layer_norm_kernel<f16, 8, 3>, layer_norm_kernel<f16, 8, 8>)
            : of_per(layer_norm_kernel<bf16, 8, 2>, layer_norm_kernel<bf16, 8, 3>, layer_norm_kernel<bf16, 8, 8>);
    return launch(kernel, grid, plan.threads, 0, args, plan);
}

}  // namespace cuda
}  // namespace difusores
