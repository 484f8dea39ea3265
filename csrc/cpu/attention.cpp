// out = softmax(scale * q k^T + mask) v, online over blocks of keys (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// A task is kAttentionQueries queries of one head. Everything is transposed: a vector holds kWidth queries, so that
//     S^T[key][query] = sum_d K[key][d] Q^T[d][query]        O^T[d][query] += sum_key V^T[d][key] P^T[key][query]
// are one product, "broadcast an element of a, multiply a row of b", maxima and sums run down vectors without a
// horizontal step, and k and v are read where they lie, whatever their strides: only the queries are transposed, once.
//
// Elements are fp32, or where the processor has products of bf16, pairs of bf16 along the depth (two d, or two keys):
// then k is padded and v transposed once per call, for all queries. Other half-precision k and v are widened once.
// FLOPs: 2 L S (D + Dv) per head in the products, about 14 vector operations per kWidth scores in the softmax.
// Memory beside the tensors: k and v again (not for fp32), and kKeys + D + Dv rows of kQueries floats per thread.
#include "attention_memory.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

struct Place {
    int64_t b, h, rest;
    Place(const AttentionArgs& a, int64_t task, int64_t per_head)
        : b(task / per_head / a.h), h(task / per_head % a.h), rest(task % per_head) {}
};
template <DType D>
DIFUSORES_INLINE const char* head(const Heads& x, const Place& p) {
    return at<D>(x.ptr, p.b * x.stride[0] + p.h * x.stride[1]);
}

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

// Where the rows of scratch lie, each kQueries floats: transposed queries, scores, weights in pairs, out^T.
struct Scratch {
    int64_t scores, pairs, out, sums, rows;
    template <bool kPairs>
    static DIFUSORES_INLINE Scratch of(const AttentionArgs& a) {
        Scratch s{};
        s.scores = kPairs ? round_up(a.d, kChunk) / 2 : a.d;
        s.pairs = s.scores + kAttentionKeys;
        s.out = s.pairs + (kPairs ? kAttentionKeys / 2 : 0);
        s.sums = s.out + round_up(a.dv, kWidth);
        s.rows = s.sums + 2;
        return s;
    }
};

// V vectors of queries from query l on.
template <DType D, int V>
void attend(const AttentionArgs& a, const Place& place, int64_t l, int64_t queries, float* scratch) {
    constexpr bool kPairs = kInPairs<D>, kShort = D == DType::bf16;
    const Scratch rows = Scratch::of<kPairs>(a);
    float* const scores = scratch + rows.scores * kQueries;
    const float scale = a.scale == 0.0f ? 0.0f : __builtin_fabsf(a.scale);
    const bool scaled = a.mask.ptr && !a.mask_is_bool;  // together with the mask
    const float c = (scaled ? 1.0f : scale) * kLog2E, low = -125.0f / c;
    const State state{scratch + rows.sums * kQueries, scratch + (rows.sums + 1) * kQueries,
                      scratch + rows.out * kQueries, c, low < kLowest ? kLowest : low};
    for (int64_t i = rows.out * kQueries; i < rows.rows * kQueries; ++i) scratch[i] = 0.0f;
    for (int64_t i = a.d / (kPairs ? 2 : 1) * kQueries; i < rows.scores * kQueries; ++i) scratch[i] = 0.0f;
    for (int k = 0; k < kQueries; ++k) state.max[k] = kLowest;
    const void* q = at<D>(head<D>(a.q, place), l * a.q.stride[2]);
    take_queries<D, kPairs>(a.q, q, queries, a.d, a.scale < 0.0f, scratch);
    const int64_t mask = place.b * a.mask.stride[0] + place.h * a.mask.stride[1] + l * a.mask.stride[2];
    const Packed p = packed<kPairs>(a);
    const int64_t index = (place.b * a.h + place.h) * (p.k_size + p.v_size);
    const auto finish_scores = [&](int64_t first, int64_t keys) __attribute__((always_inline)) {
        if (a.mask.ptr) apply_mask(a, mask + first * a.mask.stride[3], queries, keys, scale, scores);
        move_maxima<V, kShort>(state, scores, keys, a.dv);
    };
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
        float* const pairs = scratch + rows.pairs * kQueries;
        const uint16_t* k = static_cast<const uint16_t*>(a.packed) + index;
        const uint16_t* v = k + p.k_size;
        for (int64_t first = 0; first < a.s; first += Pairs::kKeys) {
            const int64_t keys = least(Pairs::kKeys, a.s - first), chunks = round_up(keys, kChunk) / kChunk;
#if defined(__AMX_BF16__)
            constexpr int64_t kLine = kQueries * 4;
            const char* rows_of_k = reinterpret_cast<const char*>(k + first * p.d);
            const char* rows_of_v = reinterpret_cast<const char*>(v + first * p.dv);
            tiled_product<V>({rows_of_k, 2 * p.d, 32 * p.d, 64, reinterpret_cast<const char*>(scratch),
                              reinterpret_cast<char*>(scores), kLine, p.d / 32},
                             2 * chunks, false);
            finish_scores(first, keys);
            exponentials_in_pairs<V, kShort>(state, scores, pairs, keys);
            tiled_product<V>({rows_of_v, 64, 1024, p.dv * 64, reinterpret_cast<const char*>(pairs),
                              reinterpret_cast<char*>(state.out), kLine, chunks},
                             p.dv / 16, true);
#else
            const auto* rows_of_k = reinterpret_cast<const uint32_t*>(k + first * p.d);
            product<Pairs, V>({rows_of_k, p.d / 2, 1}, scratch, scores, keys, (a.d + 1) / 2, false);
            finish_scores(first, keys);
            exponentials_in_pairs<V, kShort>(state, scores, pairs, keys);
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const auto* rows_of_v = reinterpret_cast<const uint32_t*>(v + (first + chunk * kChunk) * p.dv);
                product<Pairs, V>({rows_of_v, kChunk / 2, 1}, pairs + chunk * kChunk / 2 * kQueries, state.out, a.dv,
                                  kChunk / 2, true);
            }
#endif
        }
    } else
#endif
    {
        Rows<float> k, v;
        if constexpr (D == DType::f32) {
            k = {reinterpret_cast<const float*>(head<D>(a.k, place)), a.k.stride[2], a.k.stride[3]};
            v = {reinterpret_cast<const float*>(head<D>(a.v, place)), a.v.stride[3], a.v.stride[2]};
        } else {
            const float* all = static_cast<const float*>(a.packed) + index;
            k = {all, a.d, 1}, v = {all + p.k_size, 1, a.dv};
        }
        for (int64_t first = 0; first < a.s; first += Floats::kKeys) {
            const int64_t keys = least(Floats::kKeys, a.s - first);
            product<Floats, V>({k.ptr + first * k.row, k.row, k.step}, scratch, scores, keys, a.d, false);
            finish_scores(first, keys);
            exponentials<V, kShort>(state, scores, keys);
            product<Floats, V>({v.ptr + first * v.step, v.row, v.step}, scores, state.out, a.dv, keys, true);
        }
    }
    void* out = static_cast<char*>(a.out) +
                kBytes<D> * (place.b * a.out_stride[0] + place.h * a.out_stride[1] + l * a.out_stride[2]);
    write<D>(state, out, a.out_stride[2], queries, a.dv);
}

template <DType D>
void attend_task(const AttentionArgs& a, int64_t task, float* scratch) {
    const Place place(a, task, (a.l + kAttentionQueries - 1) / kAttentionQueries);
    const int64_t end = least(a.l, (place.rest + 1) * kAttentionQueries);
    for (int64_t l = place.rest * kAttentionQueries; l < end; l += kQueries) {
        const int64_t queries = least(kQueries, end - l);
        const int64_t vectors = (queries + kWidth - 1) / kWidth;
        if (vectors == 1) attend<D, 1>(a, place, l, queries, scratch);
        else if (vectors == 2) attend<D, 2>(a, place, l, queries, scratch);
        else if (kVecs == 4 && vectors == 3) attend<D, kVecs == 4 ? 3 : 1>(a, place, l, queries, scratch);
        else attend<D, kVecs>(a, place, l, queries, scratch);
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
    return (pairs ? Scratch::of<true>(a) : Scratch::of<false>(a)).rows * kQueries * 4;
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
    for (int64_t task = begin; task < end; ++task)
        if (a.dtype == DType::f32) attend_task<DType::f32>(a, task, floats);
        else if (a.dtype == DType::bf16) attend_task<DType::bf16>(a, task, floats);
        else attend_task<DType::f16>(a, task, floats);
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
