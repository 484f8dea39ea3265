// attention.cuh's forward pass with the products of sm_90a (wgmma.cuh), for heads of 64, 80, 96, 128 and 160 elements
// in 16 bits without a mask. Compiled, not emulated, never run: attention_forward is its twin, with the same softmax
// (Running, weigh), the same layout of sums and the same way to write them.
//
// A block has 128 queries of a head, 64 for each of two groups of four warps, against 128 keys at a time; one warp of a
// third group does nothing but copy, and that group leaves its registers to the others: 168 a thread become 24 and 240.
// q, k and v come as boxes of tensor maps, k and v two tiles ahead; a group waits for a tile by its "full" barrier and
// says by the "empty" one that it has read it: 8 warps arrive at that, and the copying warp waits for it before it
// writes the tile's place again. While one group is at its softmax, the other's products run.
//
//     s = q k^T: both factors from shared memory, 64 x 128 over D in steps of 16
//     out += p v: p from registers, where s became it; 64 x D over 128 keys in steps of 16
//
// Chunks of a row in shared memory: 128 bytes where 64 divides D (64, 128), else 64 where 32 does (96, 160), else 32.
// Work for a score: 4 D operations at 4096 a cycle of a multiprocessor, D / 1024 cycles (0.0625 at 64), beside 0.0625
// for an exponential and about 0.05 for other instructions: at 64 they are equal, so the groups' alternation decides;
// at 128 products do. Reads of shared memory: 6 KB for 64 cycles of s, 2 D 16 bytes for D / 2 cycles of p v, below 128
// a cycle both. Registers: D / 2 sums, 64 scores. Bytes: k and v once per 128 queries, from L2: D / 32 a score.
#pragma once
#include "cuda/attention.cuh"
#include "cuda/wgmma.cuh"

namespace difusores {
namespace cuda {

constexpr int kGroupQueries = 64, kGroups = 2, kMapRows = 128, kMapStages = 2;
constexpr int kConsumers = kGroups * 128, kMapThreads = kConsumers + 128;
constexpr int kCopyRegisters = 24, kConsumerRegisters = 240;
static_assert(128 * kCopyRegisters + kConsumers * kConsumerRegisters <= 65536);
static_assert(kGroups * kGroupQueries == kMapRows, "one box for queries, keys and values");

constexpr __host__ __device__ int chunk_bytes(int width) { return width % 64 == 0 ? 128 : width % 32 == 0 ? 64 : 32; }
constexpr __host__ __device__ int map_tile_bytes(int width) { return kMapRows * width * 2; }

struct MapBarriers {
    uint64_t q, full_k[kMapStages], full_v[kMapStages], empty_k[kMapStages], empty_v[kMapStages];
};

// 1024 bytes for the alignment of the first tile.
constexpr __host__ __device__ int map_shared_bytes(int width) {
    return 1024 + (1 + 2 * kMapStages) * map_tile_bytes(width) + static_cast<int>(sizeof(MapBarriers));
}

// A tile of kMapRows rows, in chunks.
template <int kWidth>
__device__ __forceinline__ void copy_map_tile(unsigned char* to, const CUtensorMap* map, uint64_t* full, int row,
                                              const BlockOf& block) {
    constexpr int kSpan = chunk_bytes(kWidth);
    arrive_and_expect(full, map_tile_bytes(kWidth));  // what lies beyond the tensor counts too
#pragma unroll
    for (int chunk = 0; chunk < kWidth * 2 / kSpan; ++chunk)
        copy_box(to + chunk * kMapRows * kSpan, map, full, chunk * kSpan / 2, row, static_cast<int>(block.head),
                 static_cast<int>(block.batch));
}

template <DType T, int kWidth>
__global__ void __launch_bounds__(kMapThreads, 1)
    attention_wgmma(const __grid_constant__ AttentionArgs args, const __grid_constant__ AttentionPlan plan,
                    const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int kSpan = chunk_bytes(kWidth), kTile = map_tile_bytes(kWidth), kChunk = kMapRows * kSpan;
    DIFUSORES_DYNAMIC_SHARED(shared);
    unsigned char *const q_tile = shared + (-shared_address(shared) & 1023u), *const k_tiles = q_tile + kTile,
                         *const v_tiles = k_tiles + kMapStages * kTile;
    MapBarriers& barriers = *reinterpret_cast<MapBarriers*>(v_tiles + kMapStages * kTile);
    if (threadIdx.x == 0) {
        barrier_init(&barriers.q, 1);
        for (int stage = 0; stage < kMapStages; ++stage) {
            barrier_init(&barriers.full_k[stage], 1), barrier_init(&barriers.full_v[stage], 1);
            barrier_init(&barriers.empty_k[stage], kConsumers / kWarp);
            barrier_init(&barriers.empty_v[stage], kConsumers / kWarp);
        }
        barriers_made();
    }
    __syncthreads();

    const BlockOf block(args, plan);
    const int keys = static_cast<int>(args.s), tiles = (keys + kMapRows - 1) / kMapRows;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
    if (warp >= kConsumers / kWarp) {
        fewer_registers<kCopyRegisters>();
        if (threadIdx.x != kConsumers) return;
        copy_map_tile<kWidth>(q_tile, &q_map, &barriers.q, block.first, block);
        for (int tile = 0; tile < tiles; ++tile) {
            const int stage = tile % kMapStages, before = tile / kMapStages - 1;
            if (before >= 0) wait_for(&barriers.empty_k[stage], before & 1);
            copy_map_tile<kWidth>(k_tiles + stage * kTile, &k_map, &barriers.full_k[stage], tile * kMapRows, block);
            if (before >= 0) wait_for(&barriers.empty_v[stage], before & 1);
            copy_map_tile<kWidth>(v_tiles + stage * kTile, &v_map, &barriers.full_v[stage], tile * kMapRows, block);
        }
        return;
    }

    more_registers<kConsumerRegisters>();
    const int first = block.first + warp * 16;  // of the warp's queries
    const unsigned char* const q = q_tile + warp / 4 * kGroupQueries * kSpan;
    const float c = fmaxf(fabsf(args.scale) * kLog2E, kSmallest);
    Running<T, kWidth, 1> running;
    wait_for(&barriers.q, 0);
    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % kMapStages, parity = tile / kMapStages & 1, key0 = tile * kMapRows;
        const unsigned char *const k = k_tiles + stage * kTile, *const v = v_tiles + stage * kTile;
        float s[1][kMapRows / 8][4];
        wait_for(&barriers.full_k[stage], parity);
        products_begin();
#pragma unroll
        for (int x = 0; x < kWidth * 2; x += 32) {
            const int at = x / kSpan * kChunk + x % kSpan;
            product_along_k<T>(s[0], descriptor_of<kSpan>(q + at, 16), descriptor_of<kSpan>(k + at, 16), x > 0);
        }
        products_end();
        products_done();
        hold(s[0]);
        if (lane == 0) arrive(&barriers.empty_k[stage]);

        if (args.scale < 0.0f) {
#pragma unroll
            for (int n = 0; n < kMapRows / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) s[0][n][e] = -s[0][n][e];
        }
        if (key0 + kMapRows > keys) hide_keys<false>(s, MaskView{}, 1.0f, first, static_cast<int>(args.l), key0, keys);
        running.raise_tops(s, c);
        weigh(s, running.top, running.total, c);
        unsigned words[kMapRows / 8][2];
#pragma unroll
        for (int n = 0; n < kMapRows / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) words[n][half] = pack_2<T>(s[0][n][2 * half], s[0][n][2 * half + 1]);

        wait_for(&barriers.full_v[stage], parity);
        hold(words), hold(running.out[0]);
        products_begin();
#pragma unroll
        for (int n = 0; n < kMapRows / 8; n += 2)
            add_product_along_n<T, kWidth>(running.out[0], words[n][0], words[n][1], words[n + 1][0], words[n + 1][1],
                                           descriptor_of<kSpan>(v + n * 8 * kSpan, kChunk));
        products_end();
        products_done();
        hold(running.out[0]);
        if (lane == 0) arrive(&barriers.empty_v[stage]);
    }
    running.store(args, block, first);
#else
    __trap();  // the host refuses other GPUs
#endif
}

// nullptr, or what the kernel takes and this is not. capability: 90 for sm_90.
inline __host__ const char* refuses_attention_wgmma(const AttentionArgs& args, int64_t shared_limit, int capability) {
    if (capability != 90) return "a GPU of sm_90, which alone has its instructions";
    if (args.dtype == DType::f32) return "float16 and bfloat16";
    if (args.mask.ptr) return "no mask";
    const int64_t d = args.d;
    if (d != args.dv || (d != 64 && d != 80 && d != 96 && d != 128 && d != 160))
        return "heads of 64, 80, 96, 128 and 160 elements, of q, k and v alike";
    for (const Heads* t : {&args.q, &args.k, &args.v}) {
        const int64_t sizes[] = {args.b, args.h, t == &args.q ? args.l : args.s};
        for (int dim = 0; dim < 3; ++dim)
            if (sizes[dim] > 1 && (t->stride[dim] < 1 || t->stride[dim] >= int64_t{1} << 39))
                return "tensors that are expanded in no dimension, with strides below 2^40 bytes";
    }
    return refuses_attention(args, shared_limit);
}

}  // namespace cuda
}  // namespace difusores
