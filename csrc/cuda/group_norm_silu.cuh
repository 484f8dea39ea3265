// y = act((1 + scale) * (weight * (h - mean) * rstd + bias) + shift),  h = x + add + residual,  act = SiLU or identity,
// mean and rstd over each image's group of C / G channels and S positions.
//
// Bytes: where a tile in shared memory holds whole groups, x (and residual) once and y (and sum) once, by one kernel.
// The same on sm_90 and later where the blocks of a cluster hold them together: each reads the others' moments from
// their shared memory, between two barriers of the cluster. Else two kernels: moments of tiles, which many blocks
// share, and the map; x is read twice (the sum in its place, where it is wanted, so that the residual is read once),
// with 16 bytes per group and tile between them. 128-bit accesses, or of 64 bits where those of 128 need several groups
// side by side that do not fit. Layouts: [N, C, S], a tile is a run of a group; [N, S, C], rows of as many groups as
// fill a few sectors: there a thread stays in its columns, whose coefficients it keeps in registers.
//
// Statistics: a thread takes the mean and the squared deviations of a few elements in registers, two passes, and joins
// them to its own by Chan's formula; threads and tiles are joined in a fixed order, first the mean, then the deviations
// of their means from it, whose sum also corrects the mean. Nothing cancels when mean >> std. Tiles depend on an image
// alone, so its bits do not depend on the batch.
//
// h is rounded to x's dtype once where there is a residual or the sum is wanted: what is normalised is what is
// returned.
#pragma once
#include "cuda/group_norm_tiles.cuh"

namespace difusores {
namespace cuda {

__device__ __forceinline__ float act(float t, bool silu) { return silu ? __fdividef(t, 1.0f + __expf(-t)) : t; }

// --- channels first ---

// The tile's channels in shared memory: add, center, a, b.
struct Table {
    float *add, *center, *a, *b;
    __device__ __forceinline__ Table(float* at, int64_t size)
        : add(at), center(at + size), a(at + 2 * size), b(at + 3 * size) {}
    __device__ __forceinline__ void fill(const GroupNormSiluArgs& args, const RunTile& tile, const Moments& m,
                                         float rstd) const {
        for (int c = threadIdx.x; c < tile.channels; c += blockDim.x) {
            const float later = rounds(args) ? 0.0f : param(args.add, tile.n, tile.channel + c, 0.0f);
            const Affine v = affine(args, tile.n, tile.channel + c, later, m.mean, m.delta, rstd);
            center[c] = v.center, a[c] = v.a, b[c] = v.b;
        }
    }
};

template <int kVec>
__device__ __forceinline__ void map_run(const GroupNormSiluArgs& args, const Table& table, int c, int64_t i,
                                        const Packed<kVec>& packed) {
    float h[kVec];
    unpack<kVec>(packed, args.dtype, h);
    const float center = table.center[c], a = table.a[c], b = table.b[c];
#pragma unroll
    for (int k = 0; k < kVec; ++k) h[k] = act(fmaf(h[k] - center, a, b), args.silu);
    put<kVec>(args.y, i, args.dtype, pack<kVec>(args.dtype, h));
}

// The moments of a tile; of a whole group, or of all of it together as a cluster, also y.
template <int kVec, bool kCluster>
__global__ void __launch_bounds__(kNormThreads, 2)
    group_norm_first_tile(const __grid_constant__ GroupNormSiluArgs args, const __grid_constant__ GroupNormPlan plan,
                          const Divisor vectors_of_channel, float4* partial) {
    if (kCluster && !kClusters) return;  // nothing to compile: the plan has no clusters there
    DIFUSORES_DYNAMIC_SHARED(dynamic);
    DIFUSORES_SHARED(float2, parts, 2 * kNormThreads / kWarp);
    const RunTile tile = RunTile::of<kVec>(args, plan);
    const Table table(reinterpret_cast<float*>(dynamic), plan.table);
    unsigned char* const kept = dynamic + 4 * plan.table * sizeof(float);
    for (int c = threadIdx.x; c < tile.channels; c += blockDim.x)
        table.add[c] = param(args.add, tile.n, tile.channel + c, 0.0f);
    __syncthreads();

    float count = 0.0f, mean = 0.0f, m2 = 0.0f;
    each_vector<kVec>(args, args.x, args.residual, tile, [&](int v, const Packed<kVec>& x, const Packed<kVec>& r) {
        const float channel_add = table.add[vectors_of_channel.quotient(tile.offset + v)];
        float add[kVec], h[kVec];
#pragma unroll
        for (int k = 0; k < kVec; ++k) add[k] = channel_add;
        const Packed<kVec> packed = whole_h<kVec>(args, x, r, add, tile.at + int64_t{v} * kVec);
        if (plan.whole) put<kVec>(kept, int64_t{v} * kVec, args.dtype, packed);
        unpack<kVec>(packed, args.dtype, h);
        float total = 0.0f, squares = 0.0f;
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            if (!rounds(args)) h[k] += channel_add;
            total += h[k];
        }
        const float center = total / kVec;
#pragma unroll
        for (int k = 0; k < kVec; ++k) squares = fmaf(h[k] - center, h[k] - center, squares);
        const float d = center - mean, weight = kVec / (count + kVec);
        m2 += fmaf(d * d, count * weight, squares);
        mean = fmaf(d, weight, mean);
        count += kVec;
    });
    Moments moments = join(
        tile.count, 0, 1, 1, [&](int) { return float4{count, mean, 0.0f, m2}; },
        [&](float a, float b, int k) { return block_sum(a, b, parts + k * kNormThreads / kWarp); });
    float group_count = tile.count;
    if constexpr (kCluster) {
        DIFUSORES_SHARED(Moments, own, 1);
        if (threadIdx.x == 0) *own = moments;
        cluster_barrier();  // every block's moments are there
        moments = join_cluster<false>(args, plan, own);
        cluster_barrier();  // nobody reads them any more
        group_count = static_cast<float>(args.c / args.groups * args.s);
    }
    if (!plan.whole) {
        if (threadIdx.x == 0)
            partial[(tile.n * args.groups + tile.group) * plan.chunks + tile.chunk] = {moments.mean, moments.delta,
                                                                                       moments.m2, 0.0f};
        return;
    }
    table.fill(args, tile, moments, rstd_of(moments, group_count, args.eps));
    __syncthreads();
    for (int v = threadIdx.x; v < tile.vectors; v += blockDim.x)
        map_run<kVec>(args, table, vectors_of_channel.quotient(tile.offset + v), tile.at + int64_t{v} * kVec,
                      get<kVec>(kept, int64_t{v} * kVec, args.dtype));
}

template <int kVec>
__global__ void __launch_bounds__(kNormThreads, 2)
    group_norm_first_map(const __grid_constant__ GroupNormSiluArgs args, const __grid_constant__ GroupNormPlan plan,
                         const Divisor vectors_of_channel, const float4* partial) {
    DIFUSORES_DYNAMIC_SHARED(dynamic);
    DIFUSORES_SHARED(float2, parts, 2 * kNormThreads / kWarp);
    const RunTile tile = RunTile::of<kVec>(args, plan);
    const Table table(reinterpret_cast<float*>(dynamic), plan.table);
    const int64_t run = args.c / args.groups * args.s;
    const float4* const of_group = partial + (tile.n * args.groups + tile.group) * plan.chunks;
    const Moments moments = join(
        static_cast<float>(run), threadIdx.x, blockDim.x, static_cast<int>(plan.chunks),
        [&](int k) { return part_of<false>(args, plan, of_group, k); },
        [&](float a, float b, int k) { return block_sum(a, b, parts + k * kNormThreads / kWarp); });
    table.fill(args, tile, moments, rstd_of(moments, static_cast<float>(run), args.eps));
    for (int c = threadIdx.x; c < tile.channels; c += blockDim.x)
        table.add[c] = param(args.add, tile.n, tile.channel + c, 0.0f);
    __syncthreads();
    GroupNormSiluArgs again = args;  // h from the sum, if the first kernel wrote it
    if (args.sum) again.residual = nullptr;
    again.sum = nullptr;
    each_vector<kVec>(args, args.sum ? args.sum : args.x, again.residual, tile,
                      [&](int v, const Packed<kVec>& x, const Packed<kVec>& r) {
                          const int c = vectors_of_channel.quotient(tile.offset + v);
                          float add[kVec];
#pragma unroll
                          for (int k = 0; k < kVec; ++k) add[k] = table.add[c];
                          const int64_t i = tile.at + int64_t{v} * kVec;
                          map_run<kVec>(args, table, c, i, whole_h<kVec>(again, x, r, add, i));
                      });
}

// --- channels last ---

// Shared memory of a block, channels last.
struct RowShared {
    float2* columns;    // two numbers of each thread's columns
    float* table;       // center, a, b of each column, in the place of `columns` when those are done with
    float2* sums;       // of each group
    Moments* of_group;  // the same
    Moments* of_tile;   // the same of this block's tile, which other blocks of a cluster read
    unsigned char* kept;
    template <int kVec>
    static __device__ __forceinline__ RowShared of(unsigned char* dynamic, const GroupNormPlan& plan) {
        RowShared s;
        const int64_t groups = (plan.groups_in_span + 3) / 4 * 4;
        s.columns = reinterpret_cast<float2*>(dynamic), s.table = reinterpret_cast<float*>(dynamic);
        s.sums = reinterpret_cast<float2*>(s.table + blockDim.x * kVec * 3);
        s.of_group = reinterpret_cast<Moments*>(s.sums + groups);
        s.of_tile = plan.cluster > 1 ? s.of_group + groups : s.of_group;
        s.kept = reinterpret_cast<unsigned char*>(s.of_tile + groups);
        return s;
    }
};

template <int kVec>
struct Columns {
    float add[kVec], center[kVec], a[kVec], b[kVec];
    // Of all threads together: each column's coefficients once, from its group's moments.
    __device__ __forceinline__ void fill(const GroupNormSiluArgs& args, const RowTile& tile, const RowShared& shared,
                                         float count) {
        float* const of_a = shared.table + tile.width;
        float* const of_b = of_a + tile.width;
        for (int c = static_cast<int>(threadIdx.x); c < tile.width; c += static_cast<int>(blockDim.x)) {
            const Moments m = shared.of_group[c / tile.per_group];
            const float later = rounds(args) ? 0.0f : param(args.add, tile.n, tile.channel + c, 0.0f);
            const Affine v =
                affine(args, tile.n, tile.channel + c, later, m.mean, m.delta, rstd_of(m, count, args.eps));
            shared.table[c] = v.center, of_a[c] = v.a, of_b[c] = v.b;
        }
        __syncthreads();
        if (!tile.active) return;
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            center[k] = shared.table[tile.column + k], a[k] = of_a[tile.column + k], b[k] = of_b[tile.column + k];
        }
    }
    __device__ __forceinline__ void fill_add(const GroupNormSiluArgs& args, const RowTile& tile) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) add[k] = param(args.add, tile.n, tile.channel + tile.column + k, 0.0f);
    }
    template <int kBytes>
    __device__ __forceinline__ void map(const GroupNormSiluArgs& args, int64_t i,
                                        const Packed<kVec, kBytes>& packed) const {
        float h[kVec];
        unpack<kVec>(packed, args.dtype, h);
#pragma unroll
        for (int k = 0; k < kVec; ++k) h[k] = act(fmaf(h[k] - center[k], a[k], b[k]), args.silu);
        put<kVec>(args.y, i, args.dtype, pack<kVec, kBytes>(args.dtype, h));
    }
};

// Joins kCount rows into the moments of a thread's columns, each of which has `count` elements so far.
template <int kVec, int kCount>
__device__ __forceinline__ void join_rows(const float (*h)[kVec], float count, float (&mean)[kVec], float (&m2)[kVec]) {
    const float weight = kCount / (count + kCount);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        float total = 0.0f, squares = 0.0f;
#pragma unroll
        for (int r = 0; r < kCount; ++r) total += h[r][k];
        const float center = total / kCount;
#pragma unroll
        for (int r = 0; r < kCount; ++r) squares = fmaf(h[r][k] - center, h[r][k] - center, squares);
        const float d = center - mean[k];
        m2[k] += fmaf(d * d, count * weight, squares);
        mean[k] = fmaf(d, weight, mean[k]);
    }
}

// Sums of `own` of each thread's columns over a tile's groups, into shared.sums: first rows of a column that are
// `segments` apart, by all threads, then a group's columns and segments by a warp.
template <int kVec>
__device__ __forceinline__ void group_sums(const RowTile& tile, const float2 (&own)[kVec], const RowShared& shared) {
    float2* const columns = shared.columns;
    if (tile.active) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) columns[tile.row * tile.width + tile.column + k] = own[k];
    }
    __syncthreads();
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int fit = threads / tile.width, segments = fit < 1 ? 1 : fit < tile.step ? fit : tile.step;
    const int segment = fit < 1 ? 0 : thread / tile.width;
    for (int c = thread - segment * tile.width; c < tile.width && segment < segments;
         c += fit < 1 ? threads : tile.width) {
        float2 total = columns[segment * tile.width + c];
        for (int row = segment + segments; row < tile.step; row += segments) {
            const float2 v = columns[row * tile.width + c];
            total.x += v.x, total.y += v.y;
        }
        columns[segment * tile.width + c] = total;
    }
    __syncthreads();
    for (int g = thread / kWarp; g < tile.groups; g += threads / kWarp) {
        float2 total = make_float2(0.0f, 0.0f);
        for (int c = thread % kWarp; c < tile.per_group; c += kWarp) {
            for (int row = 0; row < segments; ++row) {
                const float2 v = columns[row * tile.width + g * tile.per_group + c];
                total.x += v.x, total.y += v.y;
            }
        }
        total = make_float2(warp_sum(total.x), warp_sum(total.y));
        if (thread % kWarp == 0) shared.sums[g] = total;
    }
    __syncthreads();
}

// The moments of a tile's groups into shared.of_tile, from those of each thread's columns of `count` elements: the
// mean, then the deviations from it.
template <int kVec>
__device__ __forceinline__ void join_columns(const RowTile& tile, float count, const float (&mean)[kVec],
                                             const float (&m2)[kVec], const RowShared& shared) {
    const float total = static_cast<float>(int64_t{tile.rows} * tile.per_group);
    float2 own[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) own[k] = make_float2(count * mean[k], 0.0f);
    group_sums<kVec>(tile, own, shared);
    int group = tile.column / tile.per_group, within = tile.column - group * tile.per_group;
#pragma unroll
    for (int k = 0; k < kVec && tile.active; ++k) {
        const float d = mean[k] - shared.sums[group].x / total;
        own[k] = make_float2(count * d, fmaf(count * d, d, m2[k]));
        if (++within == tile.per_group) within = 0, ++group;
    }
    for (int g = static_cast<int>(threadIdx.x); g < tile.groups; g += static_cast<int>(blockDim.x))
        shared.of_tile[g].mean = shared.sums[g].x / total;
    group_sums<kVec>(tile, own, shared);
    for (int g = static_cast<int>(threadIdx.x); g < tile.groups; g += static_cast<int>(blockDim.x)) {
        const float2 both = shared.sums[g];
        const float delta = both.x / total, squares = fmaf(-both.x, delta, both.y);
        shared.of_tile[g].delta = delta, shared.of_tile[g].m2 = squares < 0.0f ? 0.0f : squares;
    }
    __syncthreads();
}

// The moments of a tile's groups, or of its part of one; of whole groups, or of all of them as a cluster, also y.
template <int kVec, bool kCluster, int kBytes = 16>
__global__ void __launch_bounds__(kCluster ? kClusterThreads : kRowThreads, kCluster ? 1 : 3)
    group_norm_last_tile(const __grid_constant__ GroupNormSiluArgs args, const __grid_constant__ GroupNormPlan plan,
                         float4* partial) {
    if (kCluster && !kClusters) return;  // nothing to compile: the plan has no clusters there
    DIFUSORES_DYNAMIC_SHARED(dynamic);
    const RowTile tile = RowTile::of<kVec>(args, plan);
    const RowShared shared = RowShared::of<kVec>(dynamic, plan);
    Columns<kVec> own;
    if (tile.active) own.fill_add(args, tile);
    float count = 0.0f, mean[kVec] = {}, m2[kVec] = {};
    each_rows<kVec, kBytes>(
        args, args.x, args.residual, tile,
        [&](const Packed<kVec, kBytes>(&x)[kAhead], const Packed<kVec, kBytes>(&r)[kAhead], int row, int rows) {
            const auto widened = [&](int k, float (&h)[kVec]) {
                const int64_t at = row + int64_t{k} * tile.step;
                const Packed<kVec, kBytes> packed =
                    whole_h<kVec>(args, x[k], r[k], own.add, tile.at + at * args.c + tile.column);
                if (plan.whole) put<kVec>(shared.kept, at * tile.width + tile.column, args.dtype, packed);
                unpack<kVec>(packed, args.dtype, h);
                if (!rounds(args)) {
#pragma unroll
                    for (int j = 0; j < kVec; ++j) h[j] += own.add[j];
                }
            };
#pragma unroll
            for (int k = 0; k < kAhead; k += 2) {
                float h[2][kVec];
                if (k < rows) widened(k, h[0]);
                if (k + 1 < rows) {
                    widened(k + 1, h[1]);
                    join_rows<kVec, 2>(h, count + k, mean, m2);
                } else if (k < rows) {
                    join_rows<kVec, 1>(h, count + k, mean, m2);
                }
            }
            count += rows;
        });
    join_columns<kVec>(tile, count, mean, m2, shared);
    float group_count = static_cast<float>(int64_t{tile.rows} * tile.per_group);
    if constexpr (kCluster) {
        cluster_barrier();  // every block's moments are there
        for (int g = threadIdx.x / kWarp; g < tile.groups; g += blockDim.x / kWarp) {
            const Moments moments = join_cluster<true>(args, plan, shared.of_tile + g);
            if (threadIdx.x % kWarp == 0) shared.of_group[g] = moments;
        }
        cluster_barrier();  // nobody reads them any more, and of_group is there
        group_count = static_cast<float>(args.s * tile.per_group);
    }
    if (!plan.whole) {
        for (int g = threadIdx.x; g < tile.groups; g += blockDim.x) {
            const int64_t at = (tile.n * args.groups + tile.group + g) * plan.chunks + tile.chunk;
            const Moments m = shared.of_tile[g];
            partial[at * plan.parts + tile.part] = {m.mean, m.delta, m.m2, 0.0f};
        }
        return;
    }
    own.fill(args, tile, shared, group_count);
    if (!tile.active) return;
    for (int row = tile.row; row < tile.rows; row += tile.step)
        own.map(args, tile.at + int64_t{row} * args.c + tile.column,
                get<kVec, kBytes>(shared.kept, int64_t{row} * tile.width + tile.column, args.dtype));
}

template <int kVec>
__global__ void __launch_bounds__(kRowThreads, 3)
    group_norm_last_map(const __grid_constant__ GroupNormSiluArgs args, const __grid_constant__ GroupNormPlan plan,
                        const float4* partial) {
    DIFUSORES_DYNAMIC_SHARED(dynamic);
    const RowTile tile = RowTile::of<kVec>(args, plan);
    const RowShared shared = RowShared::of<kVec>(dynamic, plan);
    const int64_t per_group = args.c / args.groups;
    const int parts = static_cast<int>(plan.chunks * plan.parts), lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto sum = [](float a, float b, int) { return make_float2(warp_sum(a), warp_sum(b)); };
    for (int g = static_cast<int>(threadIdx.x) / kWarp; g < tile.groups; g += static_cast<int>(blockDim.x) / kWarp) {
        const float4* const own = partial + (tile.n * args.groups + tile.group + g) * parts;
        const auto part = [&](int k) { return part_of<true>(args, plan, own, k); };
        const Moments moments = join(static_cast<float>(args.s * per_group), lane, kWarp, parts, part, sum);
        if (lane == 0) shared.of_group[g] = moments;
    }
    __syncthreads();
    Columns<kVec> own;
    own.fill(args, tile, shared, static_cast<float>(args.s * per_group));
    if (!tile.active) return;
    own.fill_add(args, tile);
    GroupNormSiluArgs again = args;  // h from the sum, if the first kernel wrote it
    if (args.sum) again.residual = nullptr;
    again.sum = nullptr;
    each_rows<kVec, 16>(args, args.sum ? args.sum : args.x, again.residual, tile,
                        [&](const Packed<kVec>(&x)[kAhead], const Packed<kVec>(&r)[kAhead], int row, int rows) {
#pragma unroll
                            for (int k = 0; k < kAhead; ++k) {
                                if (k >= rows) continue;
                                const int64_t i = tile.at + (row + int64_t{k} * tile.step) * args.c + tile.column;
                                own.map(args, i, whole_h<kVec>(again, x[k], r[k], own.add, i));
                            }
                        });
}

// --- the choice of instances ---

inline __host__ dim3 grid_of_tiles(const GroupNormSiluArgs& args, const GroupNormPlan& plan) {
    return {static_cast<unsigned>(args.n * plan.spans * plan.chunks), 1, 1};
}

// The first kernel: the moments of tiles or, of whole groups, all.
template <int kVec, class Launch>
__host__ auto launch_group_norm_tiles(const GroupNormSiluArgs& args, const GroupNormPlan& plan, float4* partial,
                                      const Launch& launch) {
    const dim3 grid = grid_of_tiles(args, plan);
    const size_t shared = static_cast<size_t>(plan.shared_bytes);
    const auto go = [&](auto last, auto first, const Launch& as) {
        if (plan.channels_last) return as(last, grid, plan.threads, shared, args, plan, partial);
        return as(first, grid, plan.threads, shared, args, plan, Divisor(args.s / kVec), partial);
    };
    if (plan.cluster > 1)
        return go(group_norm_last_tile<kVec, true>, group_norm_first_tile<kVec, true>,
                  launch.in_clusters(plan.cluster));
    return go(group_norm_last_tile<kVec, false>, group_norm_first_tile<kVec, false>, launch);
}

template <int kVec, class Launch>
__host__ auto launch_group_norm_silu_as(const GroupNormSiluArgs& args, const GroupNormPlan& plan, float4* partial,
                                        const Launch& launch) {
    const auto first = launch_group_norm_tiles<kVec>(args, plan, partial, launch);
    if (plan.whole || !Launch::ok(first)) return first;
    const dim3 grid = grid_of_tiles(args, plan);
    if (plan.channels_last) {
        const size_t table = static_cast<size_t>(row_bytes(plan));
        return launch(group_norm_last_map<kVec>, grid, plan.threads, table, args, plan, partial);
    }
    const size_t shared = static_cast<size_t>(plan.shared_bytes);
    const Divisor divisor(args.s / kVec);
    return launch(group_norm_first_map<kVec>, grid, plan.threads, shared, args, plan, divisor, partial);
}

// partial: plan.partials of 16 bytes. launch(kernel, grid, threads, dynamic shared bytes, arguments of the kernel …)
template <class Launch>
__host__ auto launch_group_norm_silu(const GroupNormSiluArgs& args, const GroupNormPlan& plan, void* partial,
                                     const Launch& launch) {
    float4* const moments = static_cast<float4*>(partial);
    if (plan.vec == 8) return launch_group_norm_silu_as<8>(args, plan, moments, launch);
    if (plan.vec == kNarrowVec && args.dtype != DType::f32)  // whole groups alone
        return launch(group_norm_last_tile<kNarrowVec, false, 2 * kNarrowVec>, grid_of_tiles(args, plan), plan.threads,
                      static_cast<size_t>(plan.shared_bytes), args, plan, moments);
    if (plan.vec == 4) return launch_group_norm_silu_as<4>(args, plan, moments, launch);
    return launch_group_norm_silu_as<1>(args, plan, moments, launch);
}

}  // namespace cuda
}  // namespace difusores
