// The gradients of y = act((h - center) * a + b), h = x + add + residual, as group_norm_silu.cuh has it. With
// hat = (h - mean) * rstd, A = weight * (1 + scale), g = grad_y * act'((h - center) * a + b) and M elements of a group:
//
//   grad_h     = rstd * (A g - sum_group(A g) / M - hat * sum_group(A g hat) / M) + grad_sum
//              = a g + p (h - center) + q + grad_sum, p and q of a channel
//   grad_shift = sum(g)                           grad_scale = weight * sum(g hat) + bias * sum(g)
//   grad_bias  = sum over n of (1 + scale) sum(g)      grad_weight = sum over n of (1 + scale) sum(g hat)
//   grad_add   = sum(grad_h)
//
// Bytes: x (and the residual) three times, grad_y and grad_sum twice, grad_x once; 128-bit accesses. Five kernels:
// moments of tiles (the forward pass's), coefficients of channels, sums of tiles, p and q of channels, the map; one
// more for weight and bias. Every sum has a fixed order, and of an image the order depends on the image alone.
#pragma once
#include <type_traits>

#include "cuda/group_norm_silu.cuh"

namespace difusores {
namespace cuda {

constexpr unsigned kGradThreads = 128;
constexpr unsigned kMostGradLanes = 256;
constexpr int64_t kGradChunk = 2048;  // accesses of a tile at most, channels first
constexpr int kGradAhead = 2;         // accesses of each operand that are under way together

// What the kernels leave for each other, of channel c of image n at n * C + c.
struct GradScratch {
    float4* partial;       // moments of tiles
    float4* coefficients;  // center, a, b, rest
    float4* sums;          // of each tile, [N * C, chunks]: of g, g (h - center), h - center, grad_sum
    float4* grads;         // p, q, (1 + scale) sum(g), (1 + scale) sum(g hat)
    float* rstd;           // of group g of image n at n * G + g
    __host__ GradScratch(const GroupNormSiluArgs& args, const GroupNormBackwardPlan& plan, void* scratch) {
        const int64_t channels = args.n * args.c;
        partial = static_cast<float4*>(scratch);
        coefficients = partial + plan.tiles.partials;
        sums = coefficients + channels, grads = sums + channels * plan.chunks;
        rstd = reinterpret_cast<float*>(grads + channels);
    }
};

inline __host__ int64_t floats_of_backward(const GroupNormSiluArgs& args, const GroupNormBackwardPlan& plan) {
    return 4 * (plan.tiles.partials + args.n * args.c * (2 + plan.chunks)) + args.n * args.groups;
}

// g of one element, t = (h - center) * a + b. kExact: of fp32, whose sums show what a fast exponential loses.
template <bool kExact>
__device__ __forceinline__ float before_act(float grad, float t, bool silu) {
    if (!silu) return grad;
    const float s = kExact ? 1.0f / (1.0f + expf(-t)) : __fdividef(1.0f, 1.0f + __expf(-t));
    return grad * (s * fmaf(t, 1.0f - s, 1.0f));
}

// Group blockIdx.x, in order of images: its moments, and the coefficients of its channels.
template <bool kLast>
__global__ void __launch_bounds__(kGradThreads)
    group_norm_coefficients(const __grid_constant__ GroupNormSiluArgs args, const __grid_constant__ GroupNormPlan plan,
                            const __grid_constant__ GradScratch scratch) {
    DIFUSORES_SHARED(float2, parts, 2 * kGradThreads / kWarp);
    const int64_t n = blockIdx.x / args.groups, group = blockIdx.x - n * args.groups, per_group = args.c / args.groups;
    const int tiles = static_cast<int>(plan.chunks * plan.parts);
    const float4* const of_group = scratch.partial + int64_t{blockIdx.x} * tiles;
    const float count = static_cast<float>(per_group * args.s);
    const Moments m = join(
        count, threadIdx.x, blockDim.x, tiles, [&](int k) { return part_of<kLast>(args, plan, of_group, k); },
        [&](float a, float b, int k) { return block_sum(a, b, parts + k * kGradThreads / kWarp); });
    const float rstd = rstd_of(m, count, args.eps);
    if (threadIdx.x == 0) scratch.rstd[blockIdx.x] = rstd;
    for (int64_t c = group * per_group + threadIdx.x; c < (group + 1) * per_group; c += blockDim.x) {
        const float later = rounds(args) ? 0.0f : param(args.add, n, c, 0.0f);
        const Affine v = affine(args, n, c, later, m.mean, m.delta, rstd);
        scratch.coefficients[n * args.c + c] = {v.center, v.a, v.b, v.rest};
    }
}

// The accesses of an element's operands.
template <int kVec>
struct Operands {
    Packed<kVec> x, residual, y, sum;
    __device__ __forceinline__ void read(const GroupNormSiluArgs& args, const GroupNormSiluGrads& grads, int64_t i) {
        x = get<kVec>(args.x, i, args.dtype), y = get<kVec>(grads.y, i, args.dtype);
        if (args.residual) residual = get<kVec>(args.residual, i, args.dtype);
        if (grads.sum) sum = get<kVec>(grads.sum, i, args.dtype);
    }
    // h without add where that comes later, grad_y, grad_sum.
    __device__ __forceinline__ void widen(const GroupNormSiluArgs& args, const GroupNormSiluGrads& grads,
                                          const float (&add)[kVec], float (&h)[kVec], float (&of_y)[kVec],
                                          float (&of_sum)[kVec]) const {
        unpack<kVec>(whole_h<kVec>(args, x, residual, add, 0), args.dtype, h);
        unpack<kVec>(y, args.dtype, of_y);
        if (grads.sum) unpack<kVec>(sum, args.dtype, of_sum);
        else {
#pragma unroll
            for (int k = 0; k < kVec; ++k) of_sum[k] = 0.0f;
        }
    }
};

template <int kVec>
__device__ __forceinline__ void put_grad(const GroupNormSiluArgs& args, const GroupNormSiluGrads& grads, int64_t i,
                                         const float (&grad)[kVec]) {
    put<kVec>(grads.x, i, args.dtype, pack<kVec>(args.dtype, grad));
}

// --- channels first: a row is a piece of one channel ---

struct GradRow {
    int64_t channel, at;  // n * C + c; the row's first element
    int vectors;          // 0: there is no such row
    float add;
    template <int kVec>
    static __device__ __forceinline__ GradRow of(const GroupNormSiluArgs& args, const GroupNormBackwardPlan& plan,
                                                 int64_t row) {
        GradRow r{};
        r.channel = row / plan.chunks;
        if (r.channel >= args.n * args.c) return r;
        const int64_t begin = (row - r.channel * plan.chunks) * plan.chunk, left = args.s / kVec - begin;
        r.at = r.channel * args.s + begin * kVec;
        r.vectors = static_cast<int>(left < plan.chunk ? left : plan.chunk);
        if (rounds(args)) r.add = param(args.add, r.channel / args.c, r.channel % args.c, 0.0f);
        return r;
    }
    // use(kGradAhead operands, the first access, how many) over the accesses of lane `lane`.
    template <int kVec, class Use>
    __device__ __forceinline__ void each(const GroupNormSiluArgs& args, const GroupNormSiluGrads& grads, int lane,
                                         int lanes, const Use& use) const {
        for (int first = lane; first < vectors; first += kGradAhead * lanes) {
            Operands<kVec> operands[kGradAhead];
#pragma unroll
            for (int k = 0; k < kGradAhead; ++k)
                if (first + k * lanes < vectors) operands[k].read(args, grads, at + int64_t{first + k * lanes} * kVec);
#pragma unroll
            for (int k = 0; k < kGradAhead; ++k)
                if (first + k * lanes < vectors) use(operands[k], at + int64_t{first + k * lanes} * kVec);
        }
    }
};

// kMap: grad_x; else the sums of the rows.
template <int kVec, bool kMap>
__global__ void __launch_bounds__(kMostGradLanes, 2)
    group_norm_grads_first(const __grid_constant__ GroupNormSiluArgs args,
                           const __grid_constant__ GroupNormSiluGrads grads,
                           const __grid_constant__ GroupNormBackwardPlan plan,
                           const __grid_constant__ GradScratch scratch) {
    DIFUSORES_SHARED(float2, parts, 2 * kMostGradLanes / kWarp);
    const int lanes = static_cast<int>(plan.lanes), lane = static_cast<int>(threadIdx.x) % lanes;
    const int64_t index = int64_t{blockIdx.x} * (blockDim.x / plan.lanes) + threadIdx.x / plan.lanes;
    const GradRow row = GradRow::of<kVec>(args, plan, index);
    float4 own{}, slopes{}, sums{};
    if (row.vectors) own = scratch.coefficients[row.channel];
    if (kMap && row.vectors) slopes = scratch.grads[row.channel];
    float add[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) add[k] = row.add;
    row.each<kVec>(args, grads, lane, lanes, [&](const Operands<kVec>& operands, int64_t i) {
        float h[kVec], of_y[kVec], of_sum[kVec];
        operands.widen(args, grads, add, h, of_y, of_sum);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            const float away = h[k] - own.x, g = before_act<kVec != 8>(of_y[k], fmaf(away, own.y, own.z), args.silu);
            if constexpr (kMap) {
                of_y[k] = fmaf(own.y, g, fmaf(slopes.x, away, slopes.y)) + of_sum[k];
            } else {
                sums.x += g, sums.y = fmaf(g, away, sums.y), sums.z += away, sums.w += of_sum[k];
            }
        }
        if constexpr (kMap) put_grad<kVec>(args, grads, i, of_y);
    });
    if constexpr (!kMap) {
        const float2 of_g = row_sum(sums.x, sums.y, plan.lanes, parts);
        const float2 others = row_sum(sums.z, sums.w, plan.lanes, parts + kMostGradLanes / kWarp);
        if (row.vectors && lane == 0) scratch.sums[index] = {of_g.x, of_g.y, others.x, others.y};
    }
}

// --- channels last: the forward pass's tiles of rows ---

// kMap: grad_x; else the sums of the tile's columns, of kAdd also those which only grad_add needs.
template <int kVec, bool kMap, bool kAdd>
__global__ void __launch_bounds__(kRowThreads, 2)
    group_norm_grads_last(const __grid_constant__ GroupNormSiluArgs args,
                          const __grid_constant__ GroupNormSiluGrads grads,
                          const __grid_constant__ GroupNormBackwardPlan plan,
                          const __grid_constant__ GradScratch scratch) {
    DIFUSORES_DYNAMIC_SHARED(dynamic);
    const RowTile tile = RowTile::of<kVec>(args, plan.tiles);
    const int64_t channel = tile.n * args.c + tile.channel;
    constexpr int kAheadHere = kAdd ? 1 : kGradAhead;  // the sums of kAdd take the registers
    float center[kVec], a[kVec], b[kVec], add[kVec] = {};
    float first[kVec] = {}, second[kVec] = {}, third[kVec] = {}, fourth[kVec] = {};  // p and q of kMap, else the sums
    if (tile.active) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            const float4 own = scratch.coefficients[channel + tile.column + k];
            center[k] = own.x, a[k] = own.y, b[k] = own.z;
            if (rounds(args)) add[k] = param(args.add, tile.n, tile.channel + tile.column + k, 0.0f);
            if constexpr (kMap) {
                const float4 slopes = scratch.grads[channel + tile.column + k];
                first[k] = slopes.x, second[k] = slopes.y;
            }
        }
        for (int row = tile.row; row < tile.rows; row += kAheadHere * tile.step) {
            Operands<kVec> operands[kAheadHere];
            const auto at = [&](int k) { return tile.at + (row + int64_t{k} * tile.step) * args.c + tile.column; };
#pragma unroll
            for (int k = 0; k < kAheadHere; ++k)
                if (row + k * tile.step < tile.rows) operands[k].read(args, grads, at(k));
#pragma unroll
            for (int j = 0; j < kAheadHere; ++j) {
                if (row + j * tile.step >= tile.rows) continue;
                float h[kVec], of_y[kVec], of_sum[kVec];
                operands[j].widen(args, grads, add, h, of_y, of_sum);
#pragma unroll
                for (int k = 0; k < kVec; ++k) {
                    const float away = h[k] - center[k],
                                g = before_act<kVec != 8>(of_y[k], fmaf(away, a[k], b[k]), args.silu);
                    if constexpr (kMap) {
                        of_y[k] = fmaf(a[k], g, fmaf(first[k], away, second[k])) + of_sum[k];
                    } else {
                        first[k] += g, second[k] = fmaf(g, away, second[k]);
                        if constexpr (kAdd) third[k] += away, fourth[k] += of_sum[k];
                    }
                }
                if constexpr (kMap) put_grad<kVec>(args, grads, at(j), of_y);
            }
        }
    }
    if constexpr (kMap) return;
    float2* const columns = reinterpret_cast<float2*>(dynamic);  // one for every thread and column of it
    float2* const sums = reinterpret_cast<float2*>(scratch.sums);
    const auto join = [&](const float (&one)[kVec], const float (&two)[kVec], int half) {
        if (tile.active) {
#pragma unroll
            for (int k = 0; k < kVec; ++k)
                columns[tile.row * tile.width + tile.column + k] = make_float2(one[k], two[k]);
        }
        __syncthreads();
        for (int c = threadIdx.x; c < tile.width; c += blockDim.x) {
            float2 total = columns[c];
            for (int row = 1; row < tile.step; ++row) {
                total.x += columns[row * tile.width + c].x, total.y += columns[row * tile.width + c].y;
            }
            sums[((channel + c) * plan.chunks + tile.chunk) * 2 + half] = total;
        }
        __syncthreads();
    };
    join(first, second, 0);
    join(third, fourth, 1);
}

// --- between them ---

__device__ __forceinline__ void put_param(const Param& p, int64_t i, float v) {
    if (!p.ptr) return;
    void* const to = const_cast<void*>(p.ptr);
    if (p.dtype == DType::f32) store_one<DType::f32>(to, i, v);
    else if (p.dtype == DType::bf16) store_one<DType::bf16>(to, i, v);
    else store_one<DType::f16>(to, i, v);
}

// Group blockIdx.x, in order of images, a warp for each channel: the sums of its tiles, p and q, what [N, C] has.
__global__ void __launch_bounds__(kGradThreads)
    group_norm_channel_grads(const __grid_constant__ GroupNormSiluArgs args,
                             const __grid_constant__ GroupNormSiluGrads grads, int chunks,
                             const __grid_constant__ GradScratch scratch) {
    DIFUSORES_SHARED(float2, parts, kGradThreads / kWarp);
    const int64_t n = blockIdx.x / args.groups, group = blockIdx.x - n * args.groups, per_group = args.c / args.groups;
    const float rstd = scratch.rstd[blockIdx.x], size = static_cast<float>(args.s);
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
    float of_g = 0.0f, of_hat = 0.0f;  // over the channels of the warp, of A g and A g hat
    for (int64_t c = group * per_group + threadIdx.x / kWarp; c < (group + 1) * per_group; c += warps) {
        const float4* const tiles = scratch.sums + (n * args.c + c) * chunks;
        float4 total{};
        for (int k = lane; k < chunks; k += kWarp) {
            const float4 v = tiles[k];
            total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
        }
        total.x = warp_sum(total.x), total.y = warp_sum(total.y);
        total.z = warp_sum(total.z), total.w = warp_sum(total.w);
        if (lane) continue;
        const float rest = scratch.coefficients[n * args.c + c].w;
        const float weight = param(args.weight, 0, c, 1.0f), factor = 1.0f + param(args.scale, n, c, 0.0f);
        const float g_hat = rstd * fmaf(-rest, total.x, total.y);
        scratch.grads[n * args.c + c] = {total.x, g_hat, total.z, total.w};
        of_g = fmaf(weight * factor, total.x, of_g), of_hat = fmaf(weight * factor, g_hat, of_hat);
    }
    const float2 both = block_sum(of_g, of_hat, parts);  // its barrier: all channels have been written
    const float mean_g = both.x / (size * per_group), mean_hat = both.y / (size * per_group);
    for (int64_t c = group * per_group + threadIdx.x; c < (group + 1) * per_group; c += blockDim.x) {
        const int64_t i = n * args.c + c;
        const float4 own = scratch.coefficients[i], sums = scratch.grads[i];
        const float factor = 1.0f + param(args.scale, n, c, 0.0f);
        const float p = -rstd * rstd * mean_hat, q = -rstd * fmaf(-rstd * own.w, mean_hat, mean_g);
        put_param(grads.shift, i, sums.x);
        put_param(grads.scale, i, fmaf(param(args.weight, 0, c, 1.0f), sums.y, param(args.bias, 0, c, 0.0f) * sums.x));
        put_param(grads.add, i, fmaf(own.y, sums.x, fmaf(p, sums.z, q * size)) + sums.w);
        scratch.grads[i] = {p, q, factor * sums.x, factor * sums.y};
    }
}

// grad_weight and grad_bias: over the images, in their order.
__global__ void __launch_bounds__(kGradThreads)
    group_norm_weight_grads(const __grid_constant__ GroupNormSiluArgs args,
                            const __grid_constant__ GroupNormSiluGrads grads,
                            const __grid_constant__ GradScratch scratch) {
    const int64_t c = int64_t{blockIdx.x} * kGradThreads + threadIdx.x;
    if (c >= args.c) return;
    float of_bias = 0.0f, of_weight = 0.0f;
    for (int64_t n = 0; n < args.n; ++n) {
        const float4 v = scratch.grads[n * args.c + c];
        of_bias += v.z, of_weight += v.w;
    }
    put_param(grads.bias, c, of_bias);
    put_param(grads.weight, c, of_weight);
}

// --- the choice of instances ---

// tiles.threads == 0: beyond what the kernels count.
inline __host__ GroupNormBackwardPlan plan_group_norm_silu_backward(const GroupNormSiluArgs& args,
                                                                    const GroupNormSiluGrads& grads,
                                                                    bool channels_last) {
    GroupNormBackwardPlan plan{};
    GroupNormSiluArgs as_forward = args;
    for (const void* p : {grads.y, grads.sum, static_cast<const void*>(grads.x)})
        if (!aligned(p, 0, args.dtype, 16)) as_forward.x = p;
    plan.tiles = plan_group_norm_silu(as_forward, channels_last, 0, 1);
    if (plan.tiles.threads == 0) return plan;
    plan.chunks = plan.tiles.chunks;
    if (!channels_last) {
        const int64_t vectors = args.s / plan.tiles.vec;
        plan.chunk = at_most(vectors, kGradChunk), plan.chunks = up(vectors, plan.chunk);
        plan.lanes = 1;
        while (plan.lanes * 4 < plan.chunk && plan.lanes < kMostGradLanes) plan.lanes *= 2;
        plan.threads = plan.lanes > kWarp ? plan.lanes : kGradThreads;
    }
    plan.floats = floats_of_backward(args, plan);
    if (args.n * args.c * plan.chunks > int64_t{1} << 30) plan.tiles.threads = 0;
    return plan;
}

template <int kVec, bool kLast, class Launch>
__host__ auto launch_group_norm_silu_backward_as(const GroupNormSiluArgs& args, const GroupNormSiluGrads& grads,
                                                 const GroupNormBackwardPlan& plan, void* memory,
                                                 const Launch& launch) {
    const GradScratch scratch(args, plan, memory);
    const dim3 groups = {static_cast<unsigned>(args.n * args.groups), 1, 1};
    auto result = launch_group_norm_tiles<kVec>(args, plan.tiles, scratch.partial, launch);
    const auto next = [&](auto kernel, dim3 grid, unsigned threads, size_t shared, const auto&... arguments) {
        if (Launch::ok(result)) result = launch(kernel, grid, threads, shared, arguments...);
    };
    next(group_norm_coefficients<kLast>, groups, kGradThreads, 0, args, plan.tiles, scratch);
    const auto tiles = [&](auto kernel, size_t shared) {
        const int64_t rows = kLast ? 1 : plan.threads / plan.lanes;
        const int64_t count = kLast ? args.n * plan.tiles.spans * plan.chunks : args.n * args.c * plan.chunks;
        next(kernel, {static_cast<unsigned>(up(count, rows)), 1, 1}, kLast ? plan.tiles.threads : plan.threads, shared,
             args, grads, plan, scratch);
    };
    if constexpr (kLast) {
        const size_t columns = plan.tiles.threads * kVec * sizeof(float2);
        if (grads.add.ptr) tiles(group_norm_grads_last<kVec, false, true>, columns);
        else tiles(group_norm_grads_last<kVec, false, false>, columns);
    } else {
        tiles(group_norm_grads_first<kVec, false>, 0);
    }
    next(group_norm_channel_grads, groups, kGradThreads, 0, args, grads, static_cast<int>(plan.chunks), scratch);
    if constexpr (kLast) tiles(group_norm_grads_last<kVec, true, false>, 0);
    else tiles(group_norm_grads_first<kVec, true>, 0);
    if (grads.weight.ptr || grads.bias.ptr) {
        const dim3 channels = {static_cast<unsigned>(up(args.c, kGradThreads)), 1, 1};
        next(group_norm_weight_grads, channels, kGradThreads, 0, args, grads, scratch);
    }
    return result;
}

// scratch: plan.floats floats. launch(kernel, grid, threads, dynamic shared bytes, arguments of the kernel …)
template <class Launch>
__host__ auto launch_group_norm_silu_backward(const GroupNormSiluArgs& args, const GroupNormSiluGrads& grads,
                                              const GroupNormBackwardPlan& plan, void* scratch, const Launch& launch) {
    const auto as = [&](auto vec, auto last) {
        return launch_group_norm_silu_backward_as<vec.value, last.value>(args, grads, plan, scratch, launch);
    };
    const auto of_vec = [&](auto vec) {
        return plan.tiles.channels_last ? as(vec, std::true_type{}) : as(vec, std::false_type{});
    };
    if (plan.tiles.vec == 8) return of_vec(std::integral_constant<int, 8>{});
    if (plan.tiles.vec == 4) return of_vec(std::integral_constant<int, 4>{});
    return of_vec(std::integral_constant<int, 1>{});
}

}  // namespace cuda
}  // namespace difusores
