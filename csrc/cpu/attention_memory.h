// Between tensors of any strides and what attention computes on: transposed queries, packed k and v, masks, results.
#pragma once
#include "attention_softmax.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

template <DType D>
DIFUSORES_INLINE const char* at(const void* p, int64_t i) {
    return static_cast<const char*>(p) + i * kBytes<D>;
}

// Of a task: image, head, and which of the head's `per_head` tasks it is.
struct Place {
    int64_t b, h, rest;
    Place(const AttentionArgs& a, int64_t task, int64_t per_head)
        : b(task / per_head / a.h), h(task / per_head % a.h), rest(task % per_head) {}
};
template <DType D>
DIFUSORES_INLINE const char* head(const Heads& x, const Place& p) {
    return at<D>(x.ptr, p.b * x.stride[0] + p.h * x.stride[1]);
}

// --- [row][query], a row of scratch for each column of memory ---

// v[i][j] becomes v[j][i]: pairs of vectors kHalf apart exchange their lanes kHalf apart, for 1, 2, 4 …
template <int kHalf = 1>
DIFUSORES_INLINE void transpose(f32v (&v)[kWidth]) {
    i32v low, high;
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; ++j) {
        low[j] = j & kHalf ? j - kHalf + kWidth : j;
        high[j] = j & kHalf ? j + kWidth : j + kHalf;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
        if (i & kHalf) continue;
        const f32v a = v[i], b = v[i + kHalf];
        v[i] = __builtin_shuffle(a, b, low);
        v[i + kHalf] = __builtin_shuffle(a, b, high);
    }
    if constexpr (2 * kHalf < kWidth) transpose<2 * kHalf>(v);
}

// `count` <= kWidth elements, `stride` apart; the other lanes are zero.
template <DType D>
DIFUSORES_INLINE f32v load_apart(const void* p, int64_t stride, int count) {
    if (stride == 1) return count == kWidth ? load<D>(p, 0) : load_tail<D>(p, 0, count);
    f32v v = {};
    for (int k = 0; k < count; ++k) v[k] = load_scalar(p, D, k * stride);
    return v;
}

#if defined(__AVX512BF16__)
// `count` <= 2 kWidth bf16 as pairs.
DIFUSORES_INLINE f32v load_pairs(const void* p, int64_t stride, int count) {
    alignas(64) uint16_t buffer[2 * kWidth] = {};
    const uint16_t* q = static_cast<const uint16_t*>(p);
    if (stride == 1 && count == 2 * kWidth) return *reinterpret_cast<const f32v_mem*>(q);
    if (stride == 1) __builtin_memcpy(buffer, q, 2 * count);
    else
        for (int k = 0; k < count; ++k) buffer[k] = q[k * stride];
    return *reinterpret_cast<const f32v_mem*>(buffer);
}
#endif

// to[t][query] from rows of memory: `queries` rows of `columns` elements; the queries that are missing are zero.
// In pairs, t counts two columns, padded with zeros to kChunk; for tiles the vectors of queries follow each other,
// each with all t. The sign of the scale goes in here, so that the largest score is the largest weight.
template <DType D, bool kPairs>
void take_queries(const Heads& x, const void* from, int64_t queries, int64_t columns, bool negate, float* to) {
    constexpr int kTake = kPairs ? 2 * kWidth : kWidth;
    const bool apart = kPairs && kTiles;
    const int64_t line = apart ? kWidth : kQueries, vector = apart ? round_up(columns, kChunk) / 2 * kWidth : kWidth;
    const uint32_t sign = negate ? kPairs ? 0x80008000u : 0x80000000u : 0;
    for (int v = 0; v * kWidth < queries; ++v)
        for (int64_t d = 0; d < columns; d += kTake) {
            const int count = static_cast<int>(least(kTake, columns - d));
            f32v block[kWidth] = {};
            for (int k = 0; k < kWidth && v * kWidth + k < queries; ++k) {
                const void* row = at<D>(from, (v * kWidth + k) * x.stride[2] + d * x.stride[3]);
#if defined(__AVX512BF16__)
                if constexpr (kPairs) block[k] = load_pairs(row, x.stride[3], count);
                else
#endif
                    block[k] = load_apart<D>(row, x.stride[3], count);
            }
            transpose(block);
            for (int t = 0; t < (kPairs ? kWidth : count); ++t)
                store<DType::f32>(to, (d / (kPairs ? 2 : 1) + t) * line + v * vector, (f32v)((u32v)block[t] ^ sign));
        }
}

// The mask's value at `count` keys of one query: for a bool, 0 or -inf.
f32v load_mask(const AttentionArgs& a, int64_t offset, int count) {
    const int64_t stride = a.mask.stride[3];
    if (!a.mask_is_bool) {
        switch (a.mask_dtype) {
            case DType::f32: return load_apart<DType::f32>(at<DType::f32>(a.mask.ptr, offset), stride, count);
            case DType::bf16: return load_apart<DType::bf16>(at<DType::bf16>(a.mask.ptr, offset), stride, count);
            default: return load_apart<DType::f16>(at<DType::f16>(a.mask.ptr, offset), stride, count);
        }
    }
    const uint8_t* p = static_cast<const uint8_t*>(a.mask.ptr) + offset;
    f32v v = {};
    for (int k = 0; k < count; ++k) v[k] = p[k * stride] ? 0.0f : -__builtin_inff();
    return v;
}

// scores = mask ? scores : -inf, or scale * scores + mask. `first`: offset of the mask at the block's first query, key.
void apply_mask(const AttentionArgs& a, int64_t first, int64_t queries, int64_t keys, float scale, float* scores) {
    const bool same = a.mask.stride[2] == 0;  // for every query
    for (int64_t n = 0; n < keys; n += kWidth) {
        const int count = static_cast<int>(least(kWidth, keys - n));
        for (int v = 0; v * kWidth < queries; ++v) {
            f32v block[kWidth] = {};
            if (same) block[0] = load_mask(a, first + n * a.mask.stride[3], count);
            for (int k = 0; !same && k < kWidth && v * kWidth + k < queries; ++k)
                block[k] = load_mask(a, first + (v * kWidth + k) * a.mask.stride[2] + n * a.mask.stride[3], count);
            if (!same) transpose(block);
            for (int k = 0; k < count; ++k) {
                const int64_t i = (n + k) * kQueries + v * kWidth;
                const f32v mask = same ? splat(block[0][k]) : block[k], s = load<DType::f32>(scores, i);
                store<DType::f32>(scores, i, a.mask_is_bool ? (mask < 0.0f ? mask : s) : s * scale + mask);
            }
        }
    }
}

// out[query][d] = out^T[d][query] / sum; zero where no key took part.
template <DType D>
void write(const State& state, void* to, int64_t row, int64_t queries, int64_t dv) {
    for (int v = 0; v * kWidth < queries; ++v) {
        const f32v sum = load<DType::f32>(state.sum, v * kWidth);
        const f32v factor = sum == 0.0f ? f32v{} : 1.0f / sum;
        for (int64_t d = 0; d < dv; d += kWidth) {
            f32v block[kWidth];
#pragma GCC unroll 16
            for (int k = 0; k < kWidth; ++k)
                block[k] = load<DType::f32>(state.out, (d + k) * kQueries + v * kWidth) * factor;
            transpose(block);
            const int count = static_cast<int>(least(kWidth, dv - d));
            for (int k = 0; k < kWidth && v * kWidth + k < queries; ++k) {
                const int64_t i = (v * kWidth + k) * row + d;
                if (count == kWidth) store<D>(to, i, block[k]);
                else store_tail<D>(to, i, block[k], count);
            }
        }
    }
}

// --- packed k and v ---

// Of one head: where packed k and v begin and how large they are, in elements of memory.
struct Packed {
    int64_t keys, d, dv;  // padded
    int64_t k_size, v_size;
};
template <bool kPairs>
DIFUSORES_INLINE Packed packed(const AttentionArgs& a) {
    Packed p{};
    p.keys = kPairs ? round_up(a.s, kChunk) : a.s;
    p.d = kPairs ? round_up(a.d, kChunk) : a.d;
    p.dv = kPairs ? round_up(a.dv, kWidth) : a.dv;
    p.k_size = p.keys * p.d, p.v_size = p.keys * p.dv;
    return p;
}

// [keys][d] in fp32
template <DType D>
void widen(const Heads& x, const void* from, int64_t first, int64_t last, int64_t columns, float* to) {
    for (int64_t n = first; n < last; ++n)
        for (int64_t d = 0; d < columns; d += kWidth) {
            const int count = static_cast<int>(least(kWidth, columns - d));
            const f32v v = load_apart<D>(at<D>(from, n * x.stride[2] + d * x.stride[3]), x.stride[3], count);
            if (count == kWidth) store<DType::f32>(to, n * columns + d, v);
            else store_tail<DType::f32>(to, n * columns + d, v, count);
        }
}

#if defined(__AVX512BF16__)
// [keys][d], both padded with zeros; for tiles [keys / 16][d / kChunk][16][kChunk]
void pad_keys(const AttentionArgs& a, const void* from, const Packed& p, int64_t first, int64_t last, uint16_t* to) {
    for (int64_t n = first; n < last; ++n)
        for (int64_t d = 0; d < p.d; d += kChunk) {
            const int count = static_cast<int>(least(kChunk, a.d - d));
            const void* row = at<DType::bf16>(from, n * a.k.stride[2] + d * a.k.stride[3]);
            const f32v v = n < a.s && count > 0 ? load_pairs(row, a.k.stride[3], count) : f32v{};
            const int64_t i = kTiles ? n / 16 * 16 * p.d + d * 16 + n % 16 * kChunk : n * p.d + d;
            *reinterpret_cast<f32v_mem*>(to + i) = v;
        }
}

// [keys / kChunk][dv][kChunk], both padded with zeros; for tiles, of each block of keys, [dv / 16][keys /
// kChunk][16][kChunk]
void transpose_values(const AttentionArgs& a, const void* from, const Packed& p, int64_t first, int64_t last,
                      uint16_t* to) {
    const int64_t keys = keys_of_pairs(a.dv);
    for (int64_t n = first; n < last; n += kChunk) {
        const int64_t block_begin = n / keys * keys, block_keys = least(keys, p.keys - block_begin);
        for (int64_t d = 0; d < p.dv; d += kWidth) {
            const int count = static_cast<int>(least(kWidth, a.dv - d));
            f32v block[kWidth];
            for (int k = 0; k < kWidth; ++k) {
                u32v bits[2] = {};
                for (int side = 0; side < 2; ++side) {
                    const int64_t key = n + 2 * k + side;
                    if (key >= a.s) continue;
                    const void* row = at<DType::bf16>(from, key * a.v.stride[2] + d * a.v.stride[3]);
                    bits[side] = (u32v)load_apart<DType::bf16>(row, a.v.stride[3], count);
                }
                block[k] = (f32v)(bits[0] >> 16 | bits[1]);
            }
            transpose(block);
            const int64_t i =
                kTiles ? block_begin * p.dv + d * block_keys + (n - block_begin) * kWidth : n * p.dv + d * kChunk;
            for (int k = 0; k < kWidth; ++k) *reinterpret_cast<f32v_mem*>(to + i + k * kChunk) = block[k];
        }
    }
}
#endif

// --- what comes next, brought nearer ---

template <DType D>
void ask_for_rows(const Heads& x, const Place& place, int64_t first, int64_t count, int64_t columns, Ahead& ahead) {
    if (x.stride[3] == 1)
        ahead.add(at<D>(head<D>(x, place), first * x.stride[2]), kBytes<D> * x.stride[2], kBytes<D> * columns, count);
}

// Keys [first, first + count). Packed pairs need no asking: the processor sees itself what comes next.
template <DType D>
void ask_for_keys(const AttentionArgs& a, const Place& place, int64_t first, int64_t count, Ahead& ahead) {
    if constexpr (D == DType::f32) {
        ask_for_rows<D>(a.v, place, first, count, a.dv, ahead);
        ask_for_rows<D>(a.k, place, first, count, a.d, ahead);
    } else if constexpr (!kInPairs<D>) {
        const Packed p = packed<false>(a);
        const float* k = static_cast<const float*>(a.packed) + (place.b * a.h + place.h) * (p.k_size + p.v_size);
        ahead.add(k + p.k_size + first * a.dv, 4 * a.dv, 4 * a.dv, count);
        ahead.add(k + first * a.d, 4 * a.d, 4 * a.d, count);
    }
}

}  // namespace
}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
