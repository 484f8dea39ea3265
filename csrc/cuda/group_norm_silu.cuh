// y = act((1 + scale) * (weight * (h - mean) * rstd + bias) + shift),  h = x + add + residual,  act = SiLU or identity,
// mean and rstd over each image's group of C / G channels and S positions.
//
// Bytes: where a tile in shared memory holds whole groups, x (and residual) once and y (and sum) once, by one kernel.
// Else two kernels: moments of tiles, which many blocks share, and the map; x is read twice (the sum in its place,
// where it is wanted, so that the residual is read once), with 16 bytes per group and tile between them. 128-bit
// accesses. Layouts: [N, C, S], a tile is a run of a group; [N, S, C], rows of as many groups as fill a few sectors:
// there a thread stays in its columns, whose coefficients it keeps in registers.
//
// Statistics: a thread takes the mean and the squared deviations of a few elements in registers, two passes, and joins
// them to its own by Chan's formula; threads and tiles are joined in a fixed order, first the mean, then the deviations
// of their means from it, whose sum also corrects the mean. Nothing cancels when mean >> std. Tiles depend on an image
// alone, so its bits do not depend on the batch.
//
// h is rounded to x's dtype once where there is a residual or the sum is wanted: what is normalised is what is
// returned.
#pragma once
#include "cuda/common.cuh"

namespace difusores {
namespace cuda {

constexpr unsigned kNormThreads = 512;
constexpr int kAhead = 4;     // vectors that a thread asks for before it uses the first, channels last
constexpr int kAheadRun = 3;  // the same, channels first

// Of n elements: mean + delta, and the squared deviations from that.
struct Moments {
    float mean, delta, m2;
};

// The moments of all from a part per call of `part(k)`: count, mean, delta, m2. `sum` adds over those who take part.
template <class Part, class Sum>
__device__ __forceinline__ Moments join(float count, int first, int step, int parts, const Part& part, const Sum& sum) {
    float total = 0.0f;
    for (int k = first; k < parts; k += step) {
        const float4 p = part(k);
        total = fmaf(p.x, p.y, total);
    }
    const float mean = sum(total, 0.0f, 0).x / count;
    float deviation = 0.0f, squares = 0.0f;
    for (int k = first; k < parts; k += step) {
        const float4 p = part(k);
        const float d = p.y - mean + p.z;
        deviation = fmaf(p.x, d, deviation);
        squares += fmaf(p.x * d, d, p.w);
    }
    const float2 both = sum(deviation, squares, 1);
    const float delta = both.x / count, m2 = fmaf(-both.x, delta, both.y);
    return {mean, delta, m2 < 0.0f ? 0.0f : m2};
}

// y = act((h - center) * a + b) for one channel. What fp32 loses of mean + delta - add goes into b.
struct Affine {
    float center, a, b;
};

__device__ __forceinline__ Affine affine(const GroupNormSiluArgs& args, int64_t n, int64_t c, float add, float mean,
                                         float delta, float rstd) {
    const float scale = 1.0f + param(args.scale, n, c, 0.0f), a = rstd * param(args.weight, 0, c, 1.0f) * scale;
    const float center = mean - add, back = center - mean;
    const float lost = (mean - (center - back)) - (add + back);  // exactly mean - add - center
    const float offset = fmaf(param(args.bias, 0, c, 0.0f), scale, param(args.shift, n, c, 0.0f));
    return {center, a, fmaf(-(lost + delta), a, offset)};
}

__device__ __forceinline__ float rstd_of(const Moments& moments, float count, double eps) {
    return 1.0f / sqrtf(moments.m2 / count + static_cast<float>(eps));
}

__device__ __forceinline__ float act(float t, bool silu) { return silu ? __fdividef(t, 1.0f + __expf(-t)) : t; }

// Whether add is part of h before it is rounded, and not added as it is read.
__device__ __forceinline__ bool rounds(const GroupNormSiluArgs& args) { return args.residual || args.sum; }

// h of the elements at i, without add where that comes later.
template <int kVec>
__device__ __forceinline__ Packed<kVec> whole_h(const GroupNormSiluArgs& args, const Packed<kVec>& x,
                                                const Packed<kVec>& r, const float (&add)[kVec], int64_t i) {
    if (!rounds(args)) return x;
    float h[kVec], other[kVec] = {};
    unpack<kVec>(x, args.dtype, h);
    if (args.residual) unpack<kVec>(r, args.dtype, other);
#pragma unroll
    for (int k = 0; k < kVec; ++k) h[k] = h[k] + add[k] + other[k];
    const Packed<kVec> packed = pack<kVec>(args.dtype, h);
    if (args.sum) put<kVec>(args.sum, i, args.dtype, packed);
    return packed;
}

// --- channels first ---

// A tile of a group: elements [begin, begin + count) of its run, from the channel c0 of the group on.
struct RunTile {
    int64_t n, group, chunk, begin, at, channel;
    int vectors, channels;
    unsigned offset;  // of the tile in its first channel, in vectors
    float count;
    template <int kVec>
    static __device__ __forceinline__ RunTile of(const GroupNormSiluArgs& args, const GroupNormPlan& plan) {
        RunTile t;
        const int64_t per_group = args.c / args.groups, run = per_group * args.s;
        const int64_t index = blockIdx.x / plan.chunks;
        t.chunk = blockIdx.x - index * plan.chunks;
        t.n = index / args.groups, t.group = index - t.n * args.groups;
        t.begin = t.chunk * plan.chunk, t.at = index * run + t.begin;
        const int64_t count = run - t.begin < plan.chunk ? run - t.begin : plan.chunk;
        const int64_t c0 = t.begin / args.s;
        t.offset = static_cast<unsigned>((t.begin - c0 * args.s) / kVec);
        t.channel = t.group * per_group + c0;
        t.channels = static_cast<int>((t.begin + count - 1) / args.s - c0) + 1;
        t.vectors = static_cast<int>(count / kVec);
        t.count = static_cast<float>(count);
        return t;
    }
};

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

// use(v, packed x, packed residual) for each of the thread's vectors, kAheadRun of which are under way together.
template <int kVec, class Use>
__device__ __forceinline__ void each_vector(const GroupNormSiluArgs& args, const void* x, const void* residual,
                                            const RunTile& tile, const Use& use) {
    for (int first = threadIdx.x; first < tile.vectors; first += kAheadRun * blockDim.x) {
        Packed<kVec> from_x[kAheadRun], from_r[kAheadRun];
#pragma unroll
        for (int k = 0; k < kAheadRun; ++k) {
            const int v = first + k * static_cast<int>(blockDim.x);
            if (v >= tile.vectors) continue;
            from_x[k] = get<kVec>(x, tile.at + int64_t{v} * kVec, args.dtype);
            if (residual) from_r[k] = get<kVec>(residual, tile.at + int64_t{v} * kVec, args.dtype);
        }
#pragma unroll
        for (int k = 0; k < kAheadRun; ++k) {
            const int v = first + k * static_cast<int>(blockDim.x);
            if (v < tile.vectors) use(v, from_x[k], from_r[k]);
        }
    }
}

// The moments of a tile; of a whole group also y.
template <int kVec>
__global__ void __launch_bounds__(kNormThreads, 2)
    group_norm_first_tile(const __grid_constant__ GroupNormSiluArgs args, const __grid_constant__ GroupNormPlan plan,
                          const Divisor vectors_of_channel, float4* partial) {
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
    const Moments moments = join(
        tile.count, 0, 1, 1, [&](int) { return float4{count, mean, 0.0f, m2}; },
        [&](float a, float b, int k) { return block_sum(a, b, parts + k * kNormThreads / kWarp); });
    if (!plan.whole) {
        if (threadIdx.x == 0)
            partial[(tile.n * args.groups + tile.group) * plan.chunks + tile.chunk] = {moments.mean, moments.delta,
                                                                                       moments.m2, 0.0f};
        return;
    }
    table.fill(args, tile, moments, rstd_of(moments, tile.count, args.eps));
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
        [&](int k) {
            const int64_t left = run - k * plan.chunk;
            const float4 p = of_group[k];
            return float4{static_cast<float>(left < plan.chunk ? left : plan.chunk), p.x, p.y, p.z};
        },
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

// A tile: rows [begin, begin + rows) of `width` channels from `channel` on, and the thread's place in it.
struct RowTile {
    int64_t n, chunk, begin, at, channel, group;
    int rows, width, groups, per_group, part;
    int column, row, step;  // of the thread: its first channel and row; rows of the block at once
    bool active;
    template <int kVec>
    static __device__ __forceinline__ RowTile of(const GroupNormSiluArgs& args, const GroupNormPlan& plan) {
        RowTile t;
        const int64_t index = blockIdx.x / plan.chunks, of_group = args.c / args.groups;
        t.chunk = blockIdx.x - index * plan.chunks;
        t.n = index / plan.spans;
        const int64_t span = index - t.n * plan.spans, width_left = of_group - span % plan.parts * plan.span;
        t.part = static_cast<int>(span % plan.parts);
        t.group = plan.parts > 1 ? span / plan.parts : span * plan.groups_in_span;
        t.channel = t.group * of_group + t.part * plan.span;
        t.width = static_cast<int>(plan.parts > 1 && width_left < plan.span ? width_left : plan.span);
        t.groups = static_cast<int>(plan.groups_in_span);
        t.per_group = t.width / t.groups;
        t.begin = t.chunk * plan.chunk;
        t.rows = static_cast<int>(args.s - t.begin < plan.chunk ? args.s - t.begin : plan.chunk);
        t.at = (t.n * args.s + t.begin) * args.c + t.channel;
        const int vectors = t.width / kVec, thread = static_cast<int>(threadIdx.x);
        t.step = static_cast<int>(blockDim.x) / vectors;
        t.row = thread / vectors;
        t.column = (thread - t.row * vectors) * kVec;
        t.active = t.row < t.step;
        return t;
    }
    // Rows that a thread of row r has.
    __device__ __forceinline__ int rows_of(int r) const { return r < rows ? (rows - r + step - 1) / step : 0; }
};

// use(kCount rows as packed x and residual, the first row) for the rows of the thread.
template <int kVec, class Use>
__device__ __forceinline__ void each_rows(const GroupNormSiluArgs& args, const void* x, const void* residual,
                                          const RowTile& tile, const Use& use) {
    if (!tile.active) return;
    for (int row = tile.row; row < tile.rows; row += kAhead * tile.step) {
        Packed<kVec> from_x[kAhead], from_r[kAhead];
        int count = 0;
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            if (row + k * tile.step >= tile.rows) continue;
            const int64_t i = tile.at + (row + int64_t{k} * tile.step) * args.c + tile.column;
            from_x[k] = get<kVec>(x, i, args.dtype);
            if (residual) from_r[k] = get<kVec>(residual, i, args.dtype);
            count = k + 1;
        }
        use(from_x, from_r, row, count);
    }
}

template <int kVec>
struct Columns {
    float add[kVec], center[kVec], a[kVec], b[kVec];
    __device__ __forceinline__ void fill(const GroupNormSiluArgs& args, const RowTile& tile, const Moments* of_group,
                                         float count) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            const Moments m = of_group[(tile.column + k) / tile.per_group];
            const Affine v = affine(args, tile.n, tile.channel + tile.column + k, rounds(args) ? 0.0f : add[k], m.mean,
                                    m.delta, rstd_of(m, count, args.eps));
            center[k] = v.center, a[k] = v.a, b[k] = v.b;
        }
    }
    __device__ __forceinline__ void fill_add(const GroupNormSiluArgs& args, const RowTile& tile) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) add[k] = param(args.add, tile.n, tile.channel + tile.column + k, 0.0f);
    }
    __device__ __forceinline__ void map(const GroupNormSiluArgs& args, int64_t i, const Packed<kVec>& packed) const {
        float h[kVec];
        unpack<kVec>(packed, args.dtype, h);
#pragma unroll
        for (int k = 0; k < kVec; ++k) h[k] = act(fmaf(h[k] - center[k], a[k], b[k]), args.silu);
        put<kVec>(args.y, i, args.dtype, pack<kVec>(args.dtype, h));
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

// The moments of a tile's groups into `of_group`, from those of each thread's columns, a warp for each group.
template <int kVec>
__device__ __forceinline__ void join_columns(const RowTile& tile, const float (&mean)[kVec], const float (&m2)[kVec],
                                             float2* columns, Moments* of_group) {
    if (tile.active) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) columns[tile.row * tile.width + tile.column + k] = make_float2(mean[k], m2[k]);
    }
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto sum = [](float a, float b, int) { return make_float2(warp_sum(a), warp_sum(b)); };
    for (int g = static_cast<int>(threadIdx.x) / kWarp; g < tile.groups; g += static_cast<int>(blockDim.x) / kWarp) {
        const auto part = [&](int k) {
            const int row = k / tile.per_group;
            const float2 v = columns[row * tile.width + g * tile.per_group + k - row * tile.per_group];
            return float4{static_cast<float>(tile.rows_of(row)), v.x, 0.0f, v.y};
        };
        const float count = static_cast<float>(int64_t{tile.rows} * tile.per_group);
        const Moments moments = join(count, lane, kWarp, tile.step * tile.per_group, part, sum);
        if (lane == 0) of_group[g] = moments;
    }
    __syncthreads();
}

// The moments of a tile's groups, or of its part of one; of whole groups also y.
template <int kVec>
__global__ void __launch_bounds__(kNormThreads, 1)
    group_norm_last_tile(const __grid_constant__ GroupNormSiluArgs args, const __grid_constant__ GroupNormPlan plan,
                         float4* partial) {
    DIFUSORES_DYNAMIC_SHARED(dynamic);
    const RowTile tile = RowTile::of<kVec>(args, plan);
    float2* const columns = reinterpret_cast<float2*>(dynamic);
    Moments* const of_group = reinterpret_cast<Moments*>(columns + blockDim.x * kVec);
    unsigned char* const kept = reinterpret_cast<unsigned char*>(of_group + (plan.groups_in_span + 3) / 4 * 4);
    Columns<kVec> own;
    if (tile.active) own.fill_add(args, tile);
    float count = 0.0f, mean[kVec] = {}, m2[kVec] = {};
    each_rows<kVec>(args, args.x, args.residual, tile,
                    [&](const Packed<kVec>(&x)[kAhead], const Packed<kVec>(&r)[kAhead], int row, int rows) {
                        const auto widened = [&](int k, float (&h)[kVec]) {
                            const int64_t at = row + int64_t{k} * tile.step;
                            const Packed<kVec> packed =
                                whole_h<kVec>(args, x[k], r[k], own.add, tile.at + at * args.c + tile.column);
                            if (plan.whole) put<kVec>(kept, at * tile.width + tile.column, args.dtype, packed);
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
    join_columns<kVec>(tile, mean, m2, columns, of_group);
    if (!plan.whole) {
        for (int g = threadIdx.x; g < tile.groups; g += blockDim.x) {
            const int64_t at = (tile.n * args.groups + tile.group + g) * plan.chunks + tile.chunk;
            partial[at * plan.parts + tile.part] = {of_group[g].mean, of_group[g].delta, of_group[g].m2, 0.0f};
        }
        return;
    }
    if (!tile.active) return;
    own.fill(args, tile, of_group, static_cast<float>(int64_t{tile.rows} * tile.per_group));
    for (int row = tile.row; row < tile.rows; row += tile.step)
        own.map(args, tile.at + int64_t{row} * args.c + tile.column,
                get<kVec>(kept, int64_t{row} * tile.width + tile.column, args.dtype));
}

template <int kVec>
__global__ void __launch_bounds__(kNormThreads, 1)
    group_norm_last_map(const __grid_constant__ GroupNormSiluArgs args, const __grid_constant__ GroupNormPlan plan,
                        const float4* partial) {
    DIFUSORES_DYNAMIC_SHARED(dynamic);
    const RowTile tile = RowTile::of<kVec>(args, plan);
    Moments* const of_group = reinterpret_cast<Moments*>(dynamic);
    const int64_t per_group = args.c / args.groups;
    const int parts = static_cast<int>(plan.chunks * plan.parts), lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto sum = [](float a, float b, int) { return make_float2(warp_sum(a), warp_sum(b)); };
    for (int g = static_cast<int>(threadIdx.x) / kWarp; g < tile.groups; g += static_cast<int>(blockDim.x) / kWarp) {
        const float4* const own = partial + (tile.n * args.groups + tile.group + g) * parts;
        const auto part = [&](int k) {
            const int64_t chunk = k / plan.parts, rows = args.s - chunk * plan.chunk;
            const int64_t width = per_group - (k - chunk * plan.parts) * plan.span;
            const int64_t count = (rows < plan.chunk ? rows : plan.chunk) * (plan.parts == 1     ? per_group
                                                                             : width < plan.span ? width
                                                                                                 : plan.span);
            return float4{static_cast<float>(count), own[k].x, own[k].y, own[k].z};
        };
        const Moments moments = join(static_cast<float>(args.s * per_group), lane, kWarp, parts, part, sum);
        if (lane == 0) of_group[g] = moments;
    }
    __syncthreads();
    if (!tile.active) return;
    Columns<kVec> own;
    own.fill_add(args, tile);
    own.fill(args, tile, of_group, static_cast<float>(args.s * per_group));
    GroupNormSiluArgs again = args;  // h from the sum, if the first kernel wrote it
    if (args.sum) again.residual = nullptr;
    again.sum = nullptr;
    each_rows<kVec>(args, args.sum ? args.sum : args.x, again.residual, tile,
                    [&](const Packed<kVec>(&x)[kAhead], const Packed<kVec>(&r)[kAhead], int row, int rows) {
#pragma unroll
                        for (int k = 0; k < kAhead; ++k) {
                            if (k >= rows) continue;
                            const int64_t i = tile.at + (row + int64_t{k} * tile.step) * args.c + tile.column;
                            own.map(args, i, whole_h<kVec>(again, x[k], r[k], own.add, i));
                        }
                    });
}

// --- the choice of tiles and instances ---

constexpr int64_t kTileBytes = 32 << 10;  // of a tile that is not a whole group, at least
constexpr int64_t kSpanBytes = 64;        // of a row of a tile, channels last, at least, if the channels allow it
constexpr int64_t kTableChannels = 1024;  // of a tile, channels first, about, where it is not a whole group
constexpr int64_t kMapThreads = 256;      // channels first, tiles that are not a whole group
constexpr int64_t kStaticShared = 512;    // bytes that the kernels declare, rounded up

inline __host__ int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline __host__ int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline __host__ int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// The least tile, in elements of a run of `run`, whose share of the second kernel's reading of moments, 16 bytes for
// each tile of its group, is an eighth.
inline __host__ int64_t least_tile(int64_t run, int64_t size) {
    int64_t tile = 1;
    while (tile * tile * size < 128 * run) tile += tile / 16 + 1;
    return tile;
}

inline __host__ void plan_runs(const GroupNormSiluArgs& args, int64_t shared_limit, GroupNormPlan& plan) {
    const int64_t per_group = args.c / args.groups, run = per_group * args.s, size = bytes_of(args.dtype);
    if (args.s % plan.vec) plan.vec = 1;
    plan.spans = args.groups, plan.groups_in_span = plan.parts = 1;
    plan.table = up(per_group, 4) * 4;
    plan.shared_bytes = 4 * plan.table * 4 + run * size;
    plan.whole = per_group <= 2 * kTableChannels && plan.shared_bytes + kStaticShared <= shared_limit;
    plan.chunk = run;
    plan.threads = static_cast<unsigned>(at_most(up(run / plan.vec, kWarp) * kWarp, kNormThreads));
    if (!plan.whole) {
        plan.chunk = at_most(at_least(kTileBytes / size, least_tile(run, size)), kTableChannels * args.s);
        plan.chunk = at_most(plan.chunk / plan.vec * plan.vec, run);
        plan.table = up(at_most(per_group, (plan.chunk - 1) / args.s + 2), 4) * 4;
        plan.shared_bytes = 4 * plan.table * 4;
        plan.threads = kMapThreads;
    }
    plan.chunks = up(run, plan.chunk);
}

// How many whole groups make a row of a tile: the fewest that fill `bytes` and whole accesses; 0 if none do.
inline __host__ int64_t groups_of_span(const GroupNormSiluArgs& args, int64_t vec, int64_t bytes) {
    const int64_t per_group = args.c / args.groups;
    int64_t found = 0;
    for (int64_t k = 1; k <= args.groups && k * per_group <= int64_t{kNormThreads} * vec; ++k) {
        if (args.groups % k || k * per_group % vec) continue;
        found = k;
        if (k * per_group * bytes_of(args.dtype) >= bytes) break;
    }
    return found;
}

inline __host__ void plan_rows(const GroupNormSiluArgs& args, int64_t shared_limit, GroupNormPlan& plan) {
    const int64_t per_group = args.c / args.groups, size = bytes_of(args.dtype);
    const auto set = [&](int64_t bytes) {
        const int64_t k = groups_of_span(args, plan.vec, bytes);
        plan.parts = k ? 1 : up(per_group, int64_t{kNormThreads} * plan.vec);
        plan.groups_in_span = k ? k : 1;
        plan.span = k ? k * per_group : up(up(per_group, plan.parts), plan.vec) * plan.vec;
        plan.spans = k ? args.groups / k : args.groups * plan.parts;
        const int64_t vectors = plan.span / plan.vec, rows = at_most(at_least(kNormThreads / vectors, 1), args.s);
        plan.threads = static_cast<unsigned>(up(vectors * rows, kWarp) * kWarp);
        plan.shared_bytes = plan.threads * plan.vec * 8 + up(plan.groups_in_span, 4) * 48;
    };
    if (args.c % plan.vec || (!groups_of_span(args, plan.vec, kSpanBytes) && per_group % plan.vec)) plan.vec = 1;
    set(kSpanBytes);
    const int64_t kept = args.s * plan.span * size;
    plan.whole = plan.parts == 1 && plan.shared_bytes + kept + kStaticShared <= shared_limit;
    plan.chunk = args.s;
    if (plan.whole) {
        plan.shared_bytes += kept;
    } else {
        set(2 * kSpanBytes);
        plan.chunk = at_least(up(kTileBytes, plan.span * size), least_tile(args.s * per_group, size) / per_group);
        plan.chunk = at_most(plan.chunk, args.s);
    }
    plan.chunks = up(args.s, plan.chunk);
}

// shared_limit: bytes of shared memory that a block may have. threads == 0: beyond what the kernels count.
inline __host__ GroupNormPlan plan_group_norm_silu(const GroupNormSiluArgs& args, bool channels_last,
                                                   int64_t shared_limit) {
    GroupNormPlan plan{};
    plan.channels_last = channels_last;
    plan.vec = 16 / bytes_of(args.dtype);
    for (const void* p : {args.x, args.residual, static_cast<const void*>(args.y), static_cast<const void*>(args.sum)})
        if (!aligned(p, 0, args.dtype, 16)) plan.vec = 1;
    if (channels_last) plan_rows(args, shared_limit, plan);
    else plan_runs(args, shared_limit, plan);
    plan.partials = plan.whole ? 0 : args.n * args.groups * plan.chunks * plan.parts;
    constexpr int64_t kLimit = int64_t{1} << 30;
    if (args.n * plan.spans * plan.chunks > kLimit || args.s > kLimit) plan.threads = 0;
    return plan;
}

template <int kVec, class Launch>
__host__ auto launch_group_norm_silu_as(const GroupNormSiluArgs& args, const GroupNormPlan& plan, float4* partial,
                                        const Launch& launch) {
    const dim3 grid = {static_cast<unsigned>(args.n * plan.spans * plan.chunks), 1, 1};
    const size_t shared = static_cast<size_t>(plan.shared_bytes);
    if (plan.channels_last) {
        const auto first = launch(group_norm_last_tile<kVec>, grid, plan.threads, shared, args, plan, partial);
        if (plan.whole || !Launch::ok(first)) return first;
        const size_t moments = static_cast<size_t>(plan.groups_in_span) * sizeof(Moments);
        return launch(group_norm_last_map<kVec>, grid, plan.threads, moments, args, plan, partial);
    }
    const Divisor divisor(args.s / kVec);
    const auto first = launch(group_norm_first_tile<kVec>, grid, plan.threads, shared, args, plan, divisor, partial);
    if (plan.whole || !Launch::ok(first)) return first;
    return launch(group_norm_first_map<kVec>, grid, plan.threads, shared, args, plan, divisor, partial);
}

// partial: plan.partials of 16 bytes. launch(kernel, grid, threads, dynamic shared bytes, arguments of the kernel …)
template <class Launch>
__host__ auto launch_group_norm_silu(const GroupNormSiluArgs& args, const GroupNormPlan& plan, void* partial,
                                     const Launch& launch) {
    float4* const moments = static_cast<float4*>(partial);
    if (plan.vec == 8) return launch_group_norm_silu_as<8>(args, plan, moments, launch);
    if (plan.vec == 4) return launch_group_norm_silu_as<4>(args, plan, moments, launch);
    return launch_group_norm_silu_as<1>(args, plan, moments, launch);
}

}  // namespace cuda
}  // namespace difusores
