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
#include "simd.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int kVecs = kWidth == 16 ? 4 : 2;  // vectors of queries, and
constexpr int kRows = 6;                     // rows of a product that stay in registers together
constexpr int kQueries = kVecs * kWidth;     // queries that go through a task together
constexpr int64_t kDepth = 128;              // depth of a product whose part of b stays in L1
constexpr float kLowest = -3.402823466e38f;
constexpr float kLog2E = 1.44269504088896341f;

DIFUSORES_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
DIFUSORES_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// --- elements of a product ---

struct Floats {
    typedef float Element;
    static constexpr int64_t kKeys = 96;  // keys of a block: their scores stay in L1
    static constexpr int64_t kDeep = 1;   // elements of memory in one step of depth
    static DIFUSORES_INLINE void add(f32v& c, float a, f32v b) { c += splat(a) * b; }
};

#if defined(__AVX512BF16__)
struct Pairs {
    typedef uint32_t Element;  // two bf16
    static constexpr int64_t kKeys = 128;
    static constexpr int64_t kDeep = 2;
    static DIFUSORES_INLINE void add(f32v& c, uint32_t a, f32v b) {
        c = (f32v)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
    }
};
template <DType D>
constexpr bool kInPairs = D == DType::bf16;
#else
template <DType D>
constexpr bool kInPairs = false;
#endif

constexpr int64_t kChunk = 32;  // packed keys of v, and the unit to which packed k and v are padded

// --- c[row][query] (+)= sum_t a[row][t] b[t][query]; rows of b and c are kQueries long ---

template <class T>
struct Rows {
    const T* ptr;
    int64_t row, step;  // strides, in elements
};

// What is added to c is summed from zero: rounding errors grow with the depth of one block, not of all of them.
template <class Dot, int kCount, int V>
void product_tile(Rows<typename Dot::Element> a, const float* b, float* c, int64_t depth, bool accumulate) {
    f32v sum[kCount][V] = {};
    for (int64_t t = 0; t < depth; ++t, a.ptr += a.step, b += kQueries) {
        f32v across[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) across[v] = load<DType::f32>(b, v * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) Dot::add(sum[r][v], a.ptr[r * a.row], across[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const int64_t i = r * kQueries + v * kWidth;
            store<DType::f32>(c, i, accumulate ? load<DType::f32>(c, i) + sum[r][v] : sum[r][v]);
        }
}

// The last 0 < rows < kCount rows.
template <class Dot, int kCount, int V>
void product_tail(const Rows<typename Dot::Element>& a, const float* b, float* c, int64_t rows, int64_t depth,
                  bool accumulate) {
    if constexpr (kCount > 1) {
        if (rows == kCount - 1) product_tile<Dot, kCount - 1, V>(a, b, c, depth, accumulate);
        else product_tail<Dot, kCount - 1, V>(a, b, c, rows, depth, accumulate);
    }
}

template <class Dot, int V>
void product(const Rows<typename Dot::Element>& a, const float* b, float* c, int64_t rows, int64_t depth,
             bool accumulate) {
    for (int64_t t = 0; t < depth; t += kDepth, accumulate = true) {
        const int64_t deep = least(kDepth, depth - t);
        Rows<typename Dot::Element> part{a.ptr + t * a.step, a.row, a.step};
        int64_t r = 0;
        for (; r + kRows <= rows; r += kRows, part.ptr += kRows * a.row)
            product_tile<Dot, kRows, V>(part, b + t * kQueries, c + r * kQueries, deep, accumulate);
        if (r < rows) product_tail<Dot, kRows, V>(part, b + t * kQueries, c + r * kQueries, rows - r, deep, accumulate);
    }
}

// --- softmax ---

// d[k] = 2^(d[k] c), 0 where d[k] < low = -125 / c; NaN stays. The exponent is taken apart as in exp_f32; `short`:
// a polynomial of degree 3 (relative error 1.0e-4) for weights that are rounded to bf16, else 5 (1.1e-7). 2^0 is 1
// exactly: what a query has summed must not change when another query's maximum moves.
template <int kCount, bool kShort>
DIFUSORES_INLINE void exp2_of(f32v (&d)[kCount], float c, float low) {
    constexpr float kMagic = 12582912.0f;
    f32v t[kCount], r[kCount], p[kCount];
    for (int k = 0; k < kCount; ++k) t[k] = d[k] * c + kMagic;
    for (int k = 0; k < kCount; ++k) r[k] = d[k] * c - (t[k] - kMagic);
    if constexpr (kShort) {
        for (int k = 0; k < kCount; ++k) p[k] = r[k] * 0.0550089329f + 0.242210969f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.693282902f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 1.0f;
    } else {
        for (int k = 0; k < kCount; ++k) p[k] = r[k] * 0.00132647273f + 0.00967151299f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.0555073358f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.240222424f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 0.693147004f;
        for (int k = 0; k < kCount; ++k) p[k] = p[k] * r[k] + 1.0f;
    }
    for (int k = 0; k < kCount; ++k) {
        const i32v bits = (i32v)p[k] + ((i32v)t[k] << 23);
        d[k] = (f32v)((d[k] < low) ? i32v{} : bits);
    }
}

// What a task carries from block to block of keys.
struct State {
    float *max, *sum;  // [kQueries]
    float* out;        // [Dv rounded up to kWidth, kQueries]
    float c, low;      // exponents are c (score - max)
};

// The new maxima of the block's scores; where one moved, what was summed so far is brought to it.
template <int V, bool kShort>
void move_maxima(const State& state, const float* scores, int64_t keys, int64_t dv) {
    f32v max[V], old[V];
    for (int v = 0; v < V; ++v) max[v] = old[v] = load<DType::f32>(state.max, v * kWidth);
    for (int64_t n = 0; n < keys; ++n)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) max[v] = larger(max[v], load<DType::f32>(scores, n * kQueries + v * kWidth));
    bool moved = false;
    for (int v = 0; v < V; ++v) {
        store<DType::f32>(state.max, v * kWidth, max[v]);
        const i32v same = max[v] == old[v];
        for (int k = 0; k < kWidth; ++k) moved |= !same[k];
    }
    if (!moved) return;
    for (int v = 0; v < V; ++v) old[v] -= max[v];
    exp2_of<V, false>(old, state.c, state.low);
    for (int v = 0; v < V; ++v)
        store<DType::f32>(state.sum, v * kWidth, load<DType::f32>(state.sum, v * kWidth) * old[v]);
    for (int64_t d = 0; d < dv; ++d)
        for (int v = 0; v < V; ++v) {
            const int64_t i = d * kQueries + v * kWidth;
            store<DType::f32>(state.out, i, load<DType::f32>(state.out, i) * old[v]);
        }
}

// Scores to weights in place, and their sums.
template <int V, bool kShort>
void exponentials(const State& state, float* scores, int64_t keys) {
    f32v max[V], sum[V] = {};
    for (int v = 0; v < V; ++v) max[v] = load<DType::f32>(state.max, v * kWidth);
    for (int64_t n = 0; n < keys; ++n, scores += kQueries) {
        f32v p[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) p[v] = load<DType::f32>(scores, v * kWidth) - max[v];
        exp2_of<V, kShort>(p, state.c, state.low);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            sum[v] += p[v];
            store<DType::f32>(scores, v * kWidth, p[v]);
        }
    }
    for (int v = 0; v < V; ++v)
        store<DType::f32>(state.sum, v * kWidth, load<DType::f32>(state.sum, v * kWidth) + sum[v]);
}

#if defined(__AVX512BF16__)
// The same, weights to pairs of bf16 of two keys; from `keys` on to a whole chunk they are zero.
template <int V, bool kShort>
void exponentials_in_pairs(const State& state, const float* scores, float* pairs, int64_t keys) {
    u32v order{};  // bf16 of both keys in turn
    for (int k = 0; k < kWidth; ++k) order[k] = static_cast<uint32_t>(k | (k + 16) << 16);
    f32v max[V], sum[V] = {};
    for (int v = 0; v < V; ++v) max[v] = load<DType::f32>(state.max, v * kWidth);
    for (int64_t n = 0; n < round_up(keys, kChunk); n += 2, scores += 2 * kQueries, pairs += kQueries) {
        f32v p[2][V] = {};
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            if (n + k >= keys) break;
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) p[k][v] = load<DType::f32>(scores, k * kQueries + v * kWidth) - max[v];
            exp2_of<V, kShort>(p[k], state.c, state.low);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[v] += p[k][v];
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1][v], (__m512)p[0][v]);
            store<DType::f32>(pairs, v * kWidth, (f32v)_mm512_permutexvar_epi16((__m512i)order, both));
        }
    }
    for (int v = 0; v < V; ++v)
        store<DType::f32>(state.sum, v * kWidth, load<DType::f32>(state.sum, v * kWidth) + sum[v]);
}
#endif

// --- between memory and [row][query] ---

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

template <DType D>
DIFUSORES_INLINE const char* at(const void* p, int64_t i) {
    return static_cast<const char*>(p) + i * kBytes<D>;
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
// In pairs, t counts two columns. The sign of the scale goes in here, so that the largest score is the largest weight.
template <DType D, bool kPairs>
void take_queries(const Heads& x, const void* from, int64_t queries, int64_t columns, bool negate, float* to) {
    constexpr int kTake = kPairs ? 2 * kWidth : kWidth;
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
            const int steps = kPairs ? (count + 1) / 2 : count;
            for (int t = 0; t < steps; ++t)
                store<DType::f32>(to, (d / (kPairs ? 2 : 1) + t) * kQueries + v * kWidth,
                                  (f32v)((u32v)block[t] ^ sign));
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
// [keys][d], both padded with zeros
void pad_keys(const AttentionArgs& a, const void* from, const Packed& p, int64_t first, int64_t last, uint16_t* to) {
    for (int64_t n = first; n < last; ++n)
        for (int64_t d = 0; d < p.d; d += kChunk) {
            const int count = static_cast<int>(least(kChunk, a.d - d));
            const void* row = at<DType::bf16>(from, n * a.k.stride[2] + d * a.k.stride[3]);
            const f32v v = n < a.s && count > 0 ? load_pairs(row, a.k.stride[3], count) : f32v{};
            *reinterpret_cast<f32v_mem*>(to + n * p.d + d) = v;
        }
}

// [keys / kChunk][dv][kChunk], both padded with zeros
void transpose_values(const AttentionArgs& a, const void* from, const Packed& p, int64_t first, int64_t last,
                      uint16_t* to) {
    for (int64_t n = first; n < last; n += kChunk)
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
            for (int k = 0; k < kWidth; ++k)
                *reinterpret_cast<f32v_mem*>(to + (n / kChunk * p.dv + d + k) * kChunk) = block[k];
        }
}
#endif

// --- tasks ---

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
