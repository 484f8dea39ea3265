// out = softmax(scale * q k^T + mask) v, online over blocks of keys (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// A task is kAttentionQueries queries of one head. Everything is transposed: a vector holds kWidth queries, so that
//     S^T[key][query] = sum_d K[key][d] Q^T[d][query]        O^T[d][query] += sum_key V^T[d][key] P^T[key][query]
// are one product, "broadcast an element of a, multiply a row of b", maxima and sums run down vectors without a
// horizontal step, and k and v are read where they lie, whatever their strides: only the queries are transposed, once.
//
// Elements are fp32, or where the processor has products of bf16, pairs of bf16 along the depth (two d, or two keys):
// then k is padded and v transposed once per call, for all queries. Other half-precision k and v are widened once.
// FLOPs: 2 L S (D + Dv) per head in the products, about 12 vector operations per kWidth scores in the softmax.
// Memory beside the tensors: k and v again (not for fp32), and per thread kQueries floats for each key of a block (half
// as many again for pairs), and for each of D + Dv in each block of queries of a group (D / 2 for pairs).
#include "attention_memory.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

template <DType D>
void pack(const AttentionArgs& a, int64_t task) {
    const Place place(a, task, (a.s + kAttentionKeys - 1) / kAttentionKeys);
    const Packed p = packed<kInPairs<D>>(a);
    const int64_t index = place.b * a.h + place.h;
    const int64_t first = place.rest * kAttentionKeys, last = least(p.keys, first + kAttentionKeys);
    const void *k = head<D>(a.k, place), *v = head<D>(a.v, place);
#if defined(__AVX512BF16__)
    if constexpr (kInPairs<D>) {
        uint16_t* to = static_cast<uint16_t*>(a.packed) + index * (p.k_size + p.v_size);
        pad_keys(a, k, p, first, last, to);
        return transpose_values(a, v, p, first, last, to + p.k_size);
    }
#endif
    float* to = static_cast<float*>(a.packed) + index * (p.k_size + p.v_size);
    widen<D>(a.k, k, first, last, a.d, to);
    widen<D>(a.v, v, first, last, a.dv, to + p.k_size);
}

constexpr int64_t kNear = 1 << 20;  // bytes of k and v of a head that stay in L2
constexpr int64_t kGroup = 4;       // tasks of a group at most

// A thread's scratch in rows of kQueries floats: for each block of queries of a group its queries, transposed, out^T,
// maxima and sums; then what the blocks use in turn, scores and weights in pairs.
struct Scratch {
    int64_t out, sums, rows;  // of a block of queries
    int64_t keys, shared;     // of a block of keys
    int64_t tasks;            // of a group: where k and v do not stay in L2, it reads a block of keys from there once
    template <bool kPairs>
    static DIFUSORES_INLINE Scratch of(const AttentionArgs& a) {
        Scratch s{};
        s.out = kPairs ? round_up(a.d, kChunk) / 2 : a.d;
        s.sums = s.out + round_up(a.dv, kWidth);
        s.rows = s.sums + 2;
        s.keys = kPairs ? keys_of_pairs(a.dv) : kKeysOfFloats;
        s.shared = s.keys + (kPairs ? s.keys / 2 : 0);
        s.tasks = (a.d + a.dv) * a.s * (kPairs ? 2 : 4) > kNear ? kGroup : 1;
        return s;
    }
    DIFUSORES_INLINE int64_t blocks() const { return tasks * (kAttentionQueries / kQueries); }
    DIFUSORES_INLINE int64_t bytes() const { return (blocks() * rows + shared) * kQueries * 4; }
};

// Queries [l, l + count) of a head, at most kQueries.
struct Block {
    int64_t l, count;
    float* queries;
    State state;
};

// Tasks of a head from `place` on. `next`: the task after them, or none: -1. `far`: k and v are not in L2.
struct Group {
    Place place;
    int64_t tasks, next;
    bool far;
};

DIFUSORES_INLINE int64_t tasks_of_head(const AttentionArgs& a) {
    return (a.l + kAttentionQueries - 1) / kAttentionQueries;
}
DIFUSORES_INLINE float factor_of_scores(const AttentionArgs& a) {
    return a.scale == 0.0f ? 0.0f : __builtin_fabsf(a.scale);
}
template <DType D>
DIFUSORES_INLINE char* out_of(const AttentionArgs& a, const Place& p, const Block& block) {
    return static_cast<char*>(a.out) +
           kBytes<D> * (p.b * a.out_stride[0] + p.h * a.out_stride[1] + block.l * a.out_stride[2]);
}

template <DType D>
Block begin_block(const AttentionArgs& a, const Place& place, const Scratch& rows, int64_t l, int64_t count,
                  float* to) {
    const bool scaled = a.mask.ptr && !a.mask_is_bool;  // together with the mask
    const float c = (scaled ? 1.0f : factor_of_scores(a)) * kLog2E, low = -125.0f / c, reach = kReach / c;
    float *const max = to + rows.sums * kQueries, *const out = to + rows.out * kQueries;
    const State state{max, max + kQueries, out, c, low < kLowest ? kLowest : low, reach > kFar ? kFar : reach};
    for (int k = 0; k < kQueries; ++k) state.max[k] = kLowest, state.sum[k] = 0.0f;
    for (float* f = out; a.s == 0 && f < max; ++f) *f = 0.0f;
    const void* q = at<D>(head<D>(a.q, place), l * a.q.stride[2]);
    take_queries<D, kInPairs<D>>(a.q, q, count, a.d, a.scale < 0.0f, to);
    return {l, count, to, state};
}

template <int V>
DIFUSORES_INLINE void finish_scores(const AttentionArgs& a, const Place& place, const Block& block, int64_t first,
                                    int64_t keys, float* scores) {
    const int64_t* const stride = a.mask.stride;
    const int64_t mask = place.b * stride[0] + place.h * stride[1] + block.l * stride[2] + first * stride[3];
    if (a.mask.ptr) apply_mask(a, mask, block.count, keys, factor_of_scores(a), scores);
    move_maxima<V>(block.state, scores, keys, a.dv, first == 0);
}

// V vectors of queries meet keys [first, first + keys).
template <DType D, int V>
void attend_floats(const AttentionArgs& a, const Place& place, const Block& block, int64_t first, int64_t keys,
                   float* scores, Ahead& ahead) {
    Rows<float> k, v;
    if constexpr (D == DType::f32) {
        k = {reinterpret_cast<const float*>(head<D>(a.k, place)), a.k.stride[2], a.k.stride[3]};
        v = {reinterpret_cast<const float*>(head<D>(a.v, place)), a.v.stride[3], a.v.stride[2]};
    } else {
        const Packed p = packed<false>(a);
        const float* all = static_cast<const float*>(a.packed) + (place.b * a.h + place.h) * (p.k_size + p.v_size);
        k = {all, a.d, 1}, v = {all + p.k_size, 1, a.dv};
    }
    ahead.spread(parts_of(a.d) * (keys / kRows) + a.dv / kRows + 1);
    product<Floats, V>({k.ptr + first * k.row, k.row, k.step}, block.queries, scores, keys, a.d, false, ahead);
    finish_scores<V>(a, place, block, first, keys, scores);
    exponentials<V, D == DType::bf16>(block.state, scores, keys);
    const float* const values = v.ptr + first * v.step;
    float* const out = block.state.out;
    constexpr int64_t kLine = 16;
    if (v.row != 1 || v.step % (32 * kLine) != 0)
        return product<Floats, V>({values, v.row, v.step}, scores, out, a.dv, keys, first > 0, ahead);
    // Rows a multiple of 2 KB apart have only two sets of L1 for a column: it is copied.
    alignas(64) float columns[kKeysOfFloats * kLine];
    for (int64_t d = 0; d < a.dv; d += kLine) {
        const int64_t count = least(kLine, a.dv - d);
        for (int64_t n = 0; n < keys; ++n) {
            const float* const row = values + n * v.step + d;
            if (count == kLine) __builtin_memcpy(columns + n * kLine, row, 4 * kLine);
            else __builtin_memcpy(columns + n * kLine, row, 4 * count);
        }
        product<Floats, V>({columns, 1, kLine}, scores, out + d * kQueries, count, keys, first > 0, ahead);
    }
}

#if defined(__AVX512BF16__)
template <DType D, int V>
void attend_pairs(const AttentionArgs& a, const Place& place, const Block& block, int64_t first, int64_t keys,
                  float* scores, Ahead& ahead) {
    const Packed p = packed<true>(a);
    const auto* k = static_cast<const uint16_t*>(a.packed) + (place.b * a.h + place.h) * (p.k_size + p.v_size);
    const uint16_t* v = k + p.k_size;
    float *const pairs = scores + keys_of_pairs(a.dv) * kQueries, *const out = block.state.out;
    const int64_t chunks = round_up(keys, kChunk) / kChunk;
#if defined(__AMX_BF16__)
    constexpr int64_t kLine = kQueries * 4, kTile = 1024, kSteps = 8;
    const int64_t steps = p.d / kChunk;
    ahead.spread(chunks * ((steps + kSteps - 1) / kSteps) + (p.dv / 16 + 1) / 2);
    const auto ask = [&]() __attribute__((always_inline)) { ahead.ask(); };
    const char *const tiles_of_k = reinterpret_cast<const char*>(k + first * p.d),
                      *const tiles_of_v = reinterpret_cast<const char*>(v + first * p.dv),
                      *const queries = reinterpret_cast<const char*>(block.queries);
    for (int64_t step = 0; step < steps; step += kSteps)
        tiled_product<V>({tiles_of_k + step * kTile, 64, steps * kTile, kTile, queries + step * kTile, 64,
                          steps * kTile, reinterpret_cast<char*>(scores), kLine, least(kSteps, steps - step)},
                         2 * chunks, step > 0, ask);
    finish_scores<V>(a, place, block, first, keys, scores);
    exponentials_in_pairs<V, true>(block.state, scores, pairs, keys);
    tiled_product<V>({tiles_of_v, 64, chunks * kTile, kTile, reinterpret_cast<const char*>(pairs), kLine, 64,
                      reinterpret_cast<char*>(out), kLine, chunks},
                     p.dv / 16, first > 0, ask);
#else
    ahead.spread(parts_of((a.d + 1) / 2) * (keys / kRows) + chunks * (a.dv / kRows) + 1);
    const auto* rows_of_k = reinterpret_cast<const uint32_t*>(k + first * p.d);
    product<Pairs, V>({rows_of_k, p.d / 2, 1}, block.queries, scores, keys, (a.d + 1) / 2, false, ahead);
    finish_scores<V>(a, place, block, first, keys, scores);
    exponentials_in_pairs<V, true>(block.state, scores, pairs, keys);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const auto* rows_of_v = reinterpret_cast<const uint32_t*>(v + (first + chunk * kChunk) * p.dv);
        product<Pairs, V>({rows_of_v, kChunk / 2, 1}, pairs + chunk * kChunk / 2 * kQueries, out, a.dv, kChunk / 2,
                          first + chunk > 0, ahead);
    }
#endif
}
#endif

template <DType D, int V>
void attend(const AttentionArgs& a, const Place& place, const Block& block, int64_t first, int64_t keys, float* scores,
            Ahead& ahead) {
#if defined(__AVX512BF16__)
    if constexpr (kInPairs<D>) return attend_pairs<D, V>(a, place, block, first, keys, scores, ahead);
    else
#endif
        attend_floats<D, V>(a, place, block, first, keys, scores, ahead);
}

// What is wanted soon after `block`, the i-th of `count`, has met keys [first, first + keys).
template <DType D>
Ahead look_ahead(const AttentionArgs& a, const Group& group, const Block& block, int64_t i, int64_t count,
                 int64_t first, int64_t keys) {
    Ahead ahead;
    if (const int64_t left = a.s - first - keys; left > 0) {
        const int64_t next = least(keys, left), from = next * i / count;
        if (group.far) ask_for_keys<D>(a, group.place, first + keys + from, next * (i + 1) / count - from, ahead);
        return ahead;
    }
    ahead.add(out_of<D>(a, group.place, block), kBytes<D> * a.out_stride[2], kBytes<D> * a.dv, block.count);
    if (group.next < 0) return ahead;
    const Place then(a, group.next, tasks_of_head(a));
    if (then.rest == 0 && i + 1 == count) ask_for_keys<D>(a, then, 0, least(kKeysOfFloats, a.s), ahead);
    const int64_t l = then.rest * kAttentionQueries + i * kQueries;
    ask_for_rows<D>(a.q, then, l, least(kQueries, a.l - l), a.d, ahead);
    return ahead;
}

template <DType D>
void attend_group(const AttentionArgs& a, const Group& group, const Scratch& rows, float* scratch) {
    const int64_t begin = group.place.rest * kAttentionQueries;
    const int64_t end = least(a.l, begin + group.tasks * kAttentionQueries);
    Block blocks[kGroup * (kAttentionQueries / kQueries)];
    int64_t count = 0;
    for (int64_t l = begin; l < end; l += kQueries, ++count)
        blocks[count] =
            begin_block<D>(a, group.place, rows, l, least(kQueries, end - l), scratch + count * rows.rows * kQueries);
    float* const scores = scratch + rows.blocks() * rows.rows * kQueries;
    for (int64_t first = 0; first < a.s; first += rows.keys) {
        const int64_t keys = least(rows.keys, a.s - first);
        for (int64_t i = 0; i < count; ++i) {
            const Block& block = blocks[i];
            Ahead ahead = look_ahead<D>(a, group, block, i, count, first, keys);
            const int64_t vectors = (block.count + kWidth - 1) / kWidth;
            if (vectors == 1) attend<D, 1>(a, group.place, block, first, keys, scores, ahead);
            else if (vectors == 2) attend<D, 2>(a, group.place, block, first, keys, scores, ahead);
            else if (kVecs == 4 && vectors == 3)
                attend<D, kVecs == 4 ? 3 : 1>(a, group.place, block, first, keys, scores, ahead);
            else attend<D, kVecs>(a, group.place, block, first, keys, scores, ahead);
        }
    }
    for (int64_t i = 0; i < count; ++i)
        write<D>(blocks[i].state, out_of<D>(a, group.place, blocks[i]), a.out_stride[2], blocks[i].count, a.dv);
}

template <DType D>
void attend_tasks(const AttentionArgs& a, int64_t begin, int64_t end, float* scratch) {
    const Scratch rows = Scratch::of<kInPairs<D>>(a);
    const int64_t of_head = tasks_of_head(a);
    for (int64_t task = begin; task < end;) {
        const int64_t tasks = least(least(rows.tasks, of_head - task % of_head), end - task), next = task + tasks;
        const bool far = rows.tasks > 1 || task == begin || task % of_head == 0;
        attend_group<D>(a, {Place(a, task, of_head), tasks, next < end ? next : -1, far}, rows, scratch);
        task = next;
    }
}

}  // namespace

int64_t attention_packed_bytes(const AttentionArgs& a) {
    if (a.dtype == DType::f32) return 0;
    const bool pairs = kInPairs<DType::bf16> && a.dtype == DType::bf16;
    const Packed p = pairs ? packed<true>(a) : packed<false>(a);
    return a.b * a.h * (p.k_size + p.v_size) * (pairs ? 2 : 4);
}

int64_t attention_scratch_bytes(const AttentionArgs& a) {
    const bool pairs = kInPairs<DType::bf16> && a.dtype == DType::bf16;
    return (pairs ? Scratch::of<true>(a) : Scratch::of<false>(a)).bytes();
}

void attention_pack(const AttentionArgs& a, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
        if (a.dtype == DType::bf16) pack<DType::bf16>(a, task);
        else if (a.dtype == DType::f16) pack<DType::f16>(a, task);
}

void attention(const AttentionArgs& a, void* scratch, int64_t begin, int64_t end) {
    float* const floats = static_cast<float*>(scratch);
#if defined(__AMX_BF16__)
    const Tiles tiles;
#endif
    if (a.dtype == DType::f32) attend_tasks<DType::f32>(a, begin, end, floats);
    else if (a.dtype == DType::bf16) attend_tasks<DType::bf16>(a, begin, end, floats);
    else attend_tasks<DType::f16>(a, begin, end, floats);
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
