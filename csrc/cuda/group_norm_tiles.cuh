// Group norm's moments, tiles and plan, for the kernels forward and backward (group_norm_silu.cuh has the formula).
#pragma once
#include "cuda/common.cuh"

namespace difusores {
namespace cuda {

constexpr unsigned kNormThreads = 512;  // channels first
constexpr unsigned kRowThreads = 256;   // channels last: three blocks to a multiprocessor
constexpr int kAhead = 2;               // vectors that a thread asks for before it uses the first, channels last
constexpr int kAheadRun = 3;            // the same, channels first
constexpr int kNarrowVec = 4;           // 16-bit elements of an access of 64 bits

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

// Elements of a group's k-th tile.
template <bool kLast>
__device__ __forceinline__ float count_of(const GroupNormSiluArgs& args, const GroupNormPlan& plan, int k) {
    const int64_t per_group = args.c / args.groups, run = per_group * args.s;
    int64_t count;
    if constexpr (kLast) {
        const int parts = static_cast<int>(plan.parts), chunk = parts == 1 ? k : k / parts;
        const int64_t rows = args.s - chunk * plan.chunk, width = per_group - (k - chunk * parts) * plan.span;
        count = (rows < plan.chunk ? rows : plan.chunk) * (parts == 1          ? per_group
                                                           : width < plan.span ? width
                                                                               : plan.span);
    } else {
        count = run - k * plan.chunk < plan.chunk ? run - k * plan.chunk : plan.chunk;
    }
    return static_cast<float>(count);
}

// The tile as `join` takes it, from what the kernels of tiles wrote: its count, mean, delta and m2.
template <bool kLast>
__device__ __forceinline__ float4 part_of(const GroupNormSiluArgs& args, const GroupNormPlan& plan,
                                          const float4* of_group, int k) {
    return float4{count_of<kLast>(args, plan, k), of_group[k].x, of_group[k].y, of_group[k].z};
}

// Of a group whose tiles are those of a cluster's blocks: lane k of a warp reads block k's moments from its `own`. The
// same bits in every lane of every block. No block may leave, or write there again, before all have read.
template <bool kLast>
__device__ __forceinline__ Moments join_cluster(const GroupNormSiluArgs& args, const GroupNormPlan& plan,
                                                const Moments* own) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, blocks = static_cast<int>(plan.cluster);
    Moments there{};
    if (lane < blocks) there = *in_block(own, static_cast<unsigned>(lane));
    return join(
        static_cast<float>(args.c / args.groups * args.s), lane, kWarp, blocks,
        [&](int k) { return float4{count_of<kLast>(args, plan, k), there.mean, there.delta, there.m2}; },
        [](float a, float b, int) { return make_float2(warp_sum(a), warp_sum(b)); });
}

// y = act((h - center) * a + b) for one channel. What fp32 loses of mean + delta - add is `rest`, and goes into b:
// (h - mean) * rstd = (h - center - rest) * rstd.
struct Affine {
    float center, a, b, rest;
};

__device__ __forceinline__ Affine affine(const GroupNormSiluArgs& args, int64_t n, int64_t c, float add, float mean,
                                         float delta, float rstd) {
    const float scale = 1.0f + param(args.scale, n, c, 0.0f), a = rstd * param(args.weight, 0, c, 1.0f) * scale;
    const float center = mean - add, back = center - mean;
    const float lost = (mean - (center - back)) - (add + back);  // exactly mean - add - center
    const float offset = fmaf(param(args.bias, 0, c, 0.0f), scale, param(args.shift, n, c, 0.0f));
    const float rest = lost + delta;
    return {center, a, fmaf(-rest, a, offset), rest};
}

__device__ __forceinline__ float rstd_of(const Moments& moments, float count, double eps) {
    return 1.0f / sqrtf(moments.m2 / count + static_cast<float>(eps));
}

// Whether add is part of h before it is rounded, and not added as it is read.
__device__ __forceinline__ bool rounds(const GroupNormSiluArgs& args) { return args.residual || args.sum; }

// h of the elements at i, without add where that comes later.
template <int kVec, int kBytes>
__device__ __forceinline__ Packed<kVec, kBytes> whole_h(const GroupNormSiluArgs& args, const Packed<kVec, kBytes>& x,
                                                        const Packed<kVec, kBytes>& r, const float (&add)[kVec],
                                                        int64_t i) {
    if (!rounds(args)) return x;
    float h[kVec], other[kVec] = {};
    unpack<kVec>(x, args.dtype, h);
    if (args.residual) unpack<kVec>(r, args.dtype, other);
#pragma unroll
    for (int k = 0; k < kVec; ++k) h[k] = h[k] + add[k] + other[k];
    const Packed<kVec, kBytes> packed = pack<kVec, kBytes>(args.dtype, h);
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
        const auto u = [](int64_t v) { return static_cast<unsigned>(v); };  // the plan keeps all of them below 2^31
        const unsigned index = blockIdx.x / u(plan.chunks), of_group = u(args.c) / u(args.groups);
        t.chunk = blockIdx.x - index * u(plan.chunks);
        const unsigned n = index / u(plan.spans), span = index - n * u(plan.spans), parts = u(plan.parts);
        const unsigned first = parts > 1 ? span / parts : span * u(plan.groups_in_span);
        const unsigned part = parts > 1 ? span - first * parts : 0, left = of_group - part * u(plan.span);
        t.n = n, t.group = first, t.part = static_cast<int>(part);
        t.channel = int64_t{first} * of_group + part * plan.span;
        t.width = static_cast<int>(parts > 1 && left < plan.span ? left : plan.span);
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
template <int kVec, int kBytes, class Use>
__device__ __forceinline__ void each_rows(const GroupNormSiluArgs& args, const void* x, const void* residual,
                                          const RowTile& tile, const Use& use) {
    if (!tile.active) return;
    for (int row = tile.row; row < tile.rows; row += kAhead * tile.step) {
        Packed<kVec, kBytes> from_x[kAhead], from_r[kAhead];
        int count = 0;
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            if (row + k * tile.step >= tile.rows) continue;
            const int64_t i = tile.at + (row + int64_t{k} * tile.step) * args.c + tile.column;
            from_x[k] = get<kVec, kBytes>(x, i, args.dtype);
            if (residual) from_r[k] = get<kVec, kBytes>(residual, i, args.dtype);
            count = k + 1;
        }
        use(from_x, from_r, row, count);
    }
}

// --- the choice of tiles and instances ---

constexpr int64_t kTileBytes = 32 << 10;     // of a tile that is not a whole group, at least
constexpr int64_t kSpanBytes = 64;           // of a row of a tile, channels last, at least, if the channels allow it
constexpr int64_t kNarrowBytes = 32;         // the same in accesses of 64 bits, which take one group where 128 need two
constexpr int64_t kRowTileBytes = 16 << 10;  // the same, channels last
constexpr int64_t kWholeBytes = 48 << 10;    // of a whole group, channels last, at most: one block has all its work
constexpr int64_t kTableChannels = 1024;     // of a tile, channels first, about, where it is not a whole group
constexpr int64_t kMapThreads = 256;         // channels first, tiles that are not a whole group
constexpr unsigned kMostCluster = 8;         // blocks, which every device with clusters takes
constexpr unsigned kClusterThreads = 512;    // channels last, where one such block fills a multiprocessor
constexpr int64_t kClusterBytes = 96 << 10;  // that a block of a cluster keeps, channels first, at most if it can
// The same where one block could keep it all: the groups of an image or two are fewer than a card's multiprocessors.
constexpr int64_t kShareBytes = 32 << 10;
constexpr int64_t kStaticShared = 512;  // bytes that the kernels declare, rounded up

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

// Blocks of a cluster that divides n elements or rows, in units of `unit`: the fewest up to `most` whose shares are
// small, else the most whose shares fit; 1 if none do.
template <class Fits, class Small>
__host__ unsigned cluster_of(int64_t n, int64_t unit, unsigned most, const Fits& fits, const Small& small) {
    unsigned found = 1;
    for (unsigned blocks = 2; blocks <= most && blocks <= kMostCluster; blocks *= 2) {
        const int64_t chunk = up(up(n, blocks), unit) * unit;
        if (up(n, chunk) != blocks || !fits(chunk)) continue;
        found = blocks;
        if (small(chunk)) break;
    }
    return found;
}

inline __host__ void plan_run_cluster(const GroupNormSiluArgs& args, int64_t shared_limit, unsigned most,
                                      GroupNormPlan& plan) {
    const int64_t per_group = args.c / args.groups, run = per_group * args.s, size = bytes_of(args.dtype);
    const auto table_of = [&](int64_t chunk) { return up(at_most(per_group, (chunk - 1) / args.s + 2), 4) * 4; };
    const auto shared_of = [&](int64_t chunk) { return 16 * table_of(chunk) + chunk * size; };
    const auto fits = [&](int64_t chunk) {
        return table_of(chunk) <= 2 * kTableChannels && shared_of(chunk) + kStaticShared <= shared_limit;
    };
    const int64_t share = plan.whole ? kShareBytes : kClusterBytes;
    plan.cluster = cluster_of(run, plan.vec, most, fits, [&](int64_t chunk) { return chunk * size <= share; });
    if (plan.cluster == 1) return;
    plan.whole = true;
    plan.chunk = up(up(run, plan.cluster), plan.vec) * plan.vec;
    plan.table = table_of(plan.chunk), plan.shared_bytes = shared_of(plan.chunk);
    plan.threads = kNormThreads;
}

inline __host__ void plan_runs(const GroupNormSiluArgs& args, int64_t shared_limit, unsigned most_cluster,
                               GroupNormPlan& plan) {
    const int64_t per_group = args.c / args.groups, run = per_group * args.s, size = bytes_of(args.dtype);
    if (args.s % plan.vec) plan.vec = 1;
    plan.spans = args.groups, plan.groups_in_span = plan.parts = 1;
    plan.table = up(per_group, 4) * 4;
    plan.shared_bytes = 4 * plan.table * 4 + run * size;
    plan.whole = per_group <= 2 * kTableChannels && plan.shared_bytes + kStaticShared <= shared_limit;
    plan.chunk = run;
    plan.threads = static_cast<unsigned>(at_most(up(run / plan.vec, kWarp) * kWarp, kNormThreads));
    if (!plan.whole || run * size > kShareBytes) plan_run_cluster(args, shared_limit, most_cluster, plan);
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
    for (int64_t k = 1; k <= args.groups && k * per_group <= int64_t{kRowThreads} * vec; ++k) {
        if (args.groups % k || k * per_group % vec) continue;
        found = k;
        if (k * per_group * bytes_of(args.dtype) >= bytes) break;
    }
    return found;
}

// Channels last, the shared memory but for what is kept: a thread's columns or the table of all, sums and moments.
inline __host__ int64_t row_bytes(const GroupNormPlan& plan) {
    return plan.threads * plan.vec * 12 + up(plan.groups_in_span, 4) * (plan.cluster > 1 ? 128 : 80);
}

inline __host__ void plan_rows(const GroupNormSiluArgs& args, int64_t shared_limit, unsigned most_cluster,
                               GroupNormPlan& plan) {
    const int64_t per_group = args.c / args.groups, size = bytes_of(args.dtype);
    const auto set = [&](int64_t bytes, unsigned threads) {
        const int64_t k = groups_of_span(args, plan.vec, bytes);
        plan.parts = k ? 1 : up(per_group, int64_t{kRowThreads} * plan.vec);
        plan.groups_in_span = k ? k : 1;
        plan.span = k ? k * per_group : up(up(per_group, plan.parts), plan.vec) * plan.vec;
        plan.spans = k ? args.groups / k : args.groups * plan.parts;
        const int64_t vectors = plan.span / plan.vec, rows = at_most(at_least(threads / vectors, 1), args.s);
        plan.threads = static_cast<unsigned>(up(vectors * rows, kWarp) * kWarp);
        plan.shared_bytes = row_bytes(plan);
    };
    if (args.c % plan.vec || (!groups_of_span(args, plan.vec, kSpanBytes) && per_group % plan.vec)) plan.vec = 1;
    set(kSpanBytes, kRowThreads);
    const int64_t kept = args.s * plan.span * size;
    plan.whole = plan.parts == 1 && kept <= kWholeBytes && plan.shared_bytes + kept + kStaticShared <= shared_limit;
    plan.chunk = args.s;
    if (!plan.whole && plan.parts == 1) {
        const auto small = [&](int64_t chunk) { return chunk * plan.span * size <= kWholeBytes; };
        const auto threads = [&](int64_t chunk) { return small(chunk) ? kRowThreads : kClusterThreads; };
        const auto fits = [&](int64_t chunk) {
            const int64_t others = threads(chunk) * plan.vec * 12 + up(plan.groups_in_span, 4) * 128;
            return chunk * plan.span * size + others + kStaticShared <= shared_limit;
        };
        plan.cluster = cluster_of(args.s, 1, most_cluster, fits, small);
        plan.whole = plan.cluster > 1, plan.chunk = up(args.s, plan.cluster);
        if (plan.whole) set(kSpanBytes, threads(plan.chunk));
    }
    if (!plan.whole && plan.vec == 8) {
        const GroupNormPlan wide = plan;
        plan.vec = kNarrowVec;
        set(kNarrowBytes, kRowThreads);
        const int64_t narrow = args.s * plan.span * size;
        plan.whole =
            plan.parts == 1 && narrow <= kWholeBytes && plan.shared_bytes + narrow + kStaticShared <= shared_limit;
        if (!plan.whole) plan = wide;
    }
    if (plan.whole) {
        plan.shared_bytes += plan.chunk * plan.span * size;
    } else {
        set(2 * kSpanBytes, kRowThreads);
        plan.chunk = at_least(up(kRowTileBytes, plan.span * size), least_tile(args.s * per_group, size) / per_group);
        plan.chunk = at_most(plan.chunk, args.s);
    }
    plan.chunks = up(args.s, plan.chunk);
}

// shared_limit: bytes of shared memory that a block may have. most_cluster: blocks of a cluster; 1 on a device without.
// threads == 0: beyond what the kernels count.
inline __host__ GroupNormPlan plan_group_norm_silu(const GroupNormSiluArgs& args, bool channels_last,
                                                   int64_t shared_limit, unsigned most_cluster) {
    GroupNormPlan plan{};
    plan.cluster = 1;
    plan.channels_last = channels_last;
    plan.vec = 16 / bytes_of(args.dtype);
    for (const void* p : {args.x, args.residual, static_cast<const void*>(args.y), static_cast<const void*>(args.sum)})
        if (!aligned(p, 0, args.dtype, 16)) plan.vec = 1;
    if (channels_last) plan_rows(args, shared_limit, most_cluster, plan);
    else plan_runs(args, shared_limit, most_cluster, plan);
    plan.partials = plan.whole ? 0 : args.n * args.groups * plan.chunks * plan.parts;
    constexpr int64_t kLimit = int64_t{1} << 30;
    if (args.n * plan.spans * plan.chunks > kLimit || args.s > kLimit || args.c > kLimit) plan.threads = 0;
    return plan;
}

}  // namespace cuda
}  // namespace difusores
