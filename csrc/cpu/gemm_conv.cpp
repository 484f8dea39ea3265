// y = conv(x, weight) + bias + residual as one matrix product: a row for each output pixel, a column for each output
// channel, summed over taps and input channels. A linear layer is a 1x1 convolution of rows. Or GEGLU of it:
// value * GELU(gate) + residual.
//
// x, y, residual are [N, H, W, C] in memory, fp32. Columns come in panels of kGemmColumns, packed [taps * C][columns];
// with GEGLU a vector of gates follows each vector of values. A task is a run of rows and a few panels. At most
// kGemmChunk of the depth at a time, its rows stay in L2, where those of a 1x1 convolution are read as they lie and
// others gathered, zeros outside the image. A tile of kRows rows is multiplied by a panel over a whole chunk in
// registers, while what comes next is asked for: the rows of the next tile, y's lines, and into L2 a share of the next
// panel. So a panel is read from memory once a run and sums wait in L2 only between chunks. A sum runs in order, each
// chunk from zero: an output's bits depend on its inputs alone, not on the batch or threads. Least bytes: x, y,
// residual and the weights once.
#include "gelu.h"
#include "product.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kStep = 8;  // channels between two times that memory is asked for

DIFUSORES_INLINE const float* floats(const void* p) { return static_cast<const float*>(p); }

// Of the row of output pixel p, which has taps * C floats, those from `begin` to `end`.
void gather(const GemmConvArgs& a, int64_t p, int64_t begin, int64_t end, float* row) {
    const int64_t ox = p % a.out_w, oy = p / a.out_w % a.out_h, n = p / (a.out_w * a.out_h);
    for (int64_t k = begin; k < end;) {
        const int64_t tap = k / a.c, c = k % a.c, count = at_most(a.c - c, end - k);
        const int64_t iy = oy * a.stride_h - a.pad_h + tap / a.kernel_w;
        const int64_t ix = ox * a.stride_w - a.pad_w + tap % a.kernel_w;
        if (iy < 0 || iy >= a.h || ix < 0 || ix >= a.w) __builtin_memset(row, 0, count * sizeof(float));
        else __builtin_memcpy(row, floats(a.x) + ((n * a.h + iy) * a.w + ix) * a.c + c, count * sizeof(float));
        k += count, row += count;
    }
}

// What the tiles of a panel have in common, over a chunk of the depth.
struct Tiles {
    const float *v, *u;  // of the run's first row; of the chunk's first channel
    int64_t width, wide, channels;
    float* m;  // sums of the chunks before, rows `wide` apart
    bool first, last, asks_rows;
    const float* next;      // panel
    int64_t lines;          // of it that a tile asks for in each step
    const float* bias;      // of the panel's columns
    const float* residual;  // of the run's first row, like y
    float* y;
    int64_t apart, columns;  // of y: from row to row, and how many are in this panel
};

// y of `count` rows from t on, from sums that lie together, `vectors` of a row from the panel's column o on.
template <bool kGeglu>
void finish(const Tiles& p, const float* sums, int64_t count, int64_t vectors, int64_t t, int64_t o) {
    const auto write = [&](int64_t row, int64_t column, f32v y) {
        const int64_t place = (t + row) * p.apart + column;
        const int left = static_cast<int>(at_most(p.columns - column, kWidth));
        if (left == kWidth) put(p.y + place, p.residual ? y + get(p.residual + place) : y);
        else if (left > 0)
            store_tail<DType::f32>(p.y, place, p.residual ? y + load_tail<DType::f32>(p.residual, place, left) : y,
                                   left);
    };
    const auto sum = [&](int64_t n) { return get(sums + n * kWidth) + get(p.bias + o + n % vectors * kWidth); };
    if constexpr (kGeglu) {
        constexpr int kEach = 4;  // pairs of vectors that are under way together
        const int64_t pairs = vectors / 2, all = count * pairs;
        for (int64_t n = 0; n < all; n += kEach) {
            f32v value[kEach], gates[kEach];
            for (int k = 0; k < kEach; ++k) {
                const int64_t pair = at_most(n + k, all - 1);
                value[k] = sum(2 * pair), gates[k] = sum(2 * pair + 1);
            }
            gate<false>(value, gates);
            for (int k = 0; k < kEach && n + k < all; ++k)
                write((n + k) / pairs, o / 2 + (n + k) % pairs * kWidth, value[k]);
        }
    } else {
        for (int64_t n = 0; n < count * vectors; ++n) write(n / vectors, o + n % vectors * kWidth, sum(n));
    }
}

// Rows [t, t + kCount) and kVectorCount vectors of the panel's columns, from o on. Asks for weights from `next` on;
// returns how far that went.
template <int kCount, int kVectorCount, bool kGeglu>
const float* multiply_tile(const Tiles& p, int64_t t, int64_t o, const float* next, const float* end) {
    constexpr int64_t kTogether = kVectorCount * kWidth, kOut = kGeglu ? kTogether / 2 : kTogether;
    const float* const v = p.v + t * p.width;
    const float* u = p.u + o;
    const int64_t place = t * p.apart + (kGeglu ? o / 2 : o);
    int64_t unasked = p.last ? kCount : 0, asked = place;  // rows of y; the place of the next of them
    Rows<kCount> rows(v, p.width);
    Accumulators<kCount, kVectorCount> sum;
    clear<kCount, kVectorCount>(sum);
    int64_t c = 0;
    for (; c + kStep <= p.channels; c += kStep) {
        if (p.asks_rows && c % kLine == 0) {
            DIFUSORES_UNROLL
            for (int i = 0; i < kCount; ++i) __builtin_prefetch(v + (kCount + i) * p.width + c);
        }
        if (unasked) {
            for (int64_t k = 0; k < kOut; k += kLine) __builtin_prefetch(p.y + asked + k, 1);
            if (p.residual) ask(p.residual + asked, kOut);
            asked += p.apart, --unasked;
        }
        for (int64_t k = p.lines; k && next < end; --k, next += kLine) __builtin_prefetch(next, 0, 2);
        for (int k = 0; k < kStep; k += kChannelsAtOnce, u += kChannelsAtOnce * p.wide)
            multiply_add<kChannelsAtOnce, kCount, kVectorCount>(sum, rows, u, p.wide);
    }
    for (; c < p.channels; ++c, u += p.wide) multiply_add<1, kCount, kVectorCount>(sum, rows, u, p.wide);
    if (!p.first) add<kCount, kVectorCount>(sum, p.m + t * p.wide + o, p.wide);
    if (!p.last) {
        store<kCount, kVectorCount>(sum, p.m + t * p.wide + o, p.wide);
    } else if (kGeglu || o + kTogether > p.columns) {
        alignas(64) float sums[kCount * kTogether];
        store<kCount, kVectorCount>(sum, sums, kTogether);
        finish<kGeglu>(p, sums, kCount, kVectorCount, t, o);
    } else {
        add_row<kCount, kVectorCount>(sum, p.bias + o);
        if (p.residual) add<kCount, kVectorCount>(sum, p.residual + place, p.apart);
        store<kCount, kVectorCount>(sum, p.y + place, p.apart);
    }
    return next;
}

template <int kVectorCount, bool kGeglu>
void multiply_tiles(const Tiles& p, int64_t rows, int64_t o) {
    constexpr decltype(&multiply_tile<1, kVectorCount, kGeglu>) kTiles[kRows] = {
        multiply_tile<1, kVectorCount, kGeglu>, multiply_tile<2, kVectorCount, kGeglu>,
        multiply_tile<3, kVectorCount, kGeglu>, multiply_tile<4, kVectorCount, kGeglu>,
        multiply_tile<5, kVectorCount, kGeglu>, multiply_tile<6, kVectorCount, kGeglu>};
    const float *next = p.next + o * p.channels, *const end = next + kVectorCount * kWidth * p.channels;
    for (int64_t t = 0, left = (rows + kRows - 1) / kRows; left; --left) {
        const int64_t count = (rows - t + left - 1) / left;  // of even lengths: a short tile waits for its own sums
        next = kTiles[count - 1](p, t, o, next, end);
        t += count;
    }
}

// The rows of a run times all columns of a panel.
template <bool kGeglu>
void multiply_run(const Tiles& p, int64_t rows) {
    int64_t o = 0;
    for (; o + kVectors * kWidth <= p.wide; o += kVectors * kWidth) multiply_tiles<kVectors, kGeglu>(p, rows, o);
    if constexpr (kVectors == 4) {
        const int64_t left = (p.wide - o) / kWidth;
        if (left == 2) multiply_tiles<2, kGeglu>(p, rows, o);
        if constexpr (!kGeglu) {  // whose vectors come in pairs
            if (left == 3) multiply_tiles<3, kGeglu>(p, rows, o);
            if (left == 1) multiply_tiles<1, kGeglu>(p, rows, o);
        }
    }
}

// Of the columns [o0, o0 + wide) in the order in which they are packed.
void gather_bias(const GemmConvArgs& a, int64_t o0, int64_t wide, float* bias) {
    for (int64_t o = 0; o < wide; ++o) {
        const int64_t packed = o0 + o, half = packed / kWidth % 2 * (a.o / 2);
        const int64_t column = a.geglu ? half + packed / (2 * kWidth) * kWidth + packed % kWidth : packed;
        bias[o] = column < a.o ? param(a.bias, 0, column, 0.0f) : 0.0f;
    }
}

}  // namespace

void gemm_conv(const GemmConvArgs& a, float* scratch, int64_t begin, int64_t end) {
    const int64_t depth = a.kernel_h * a.kernel_w * a.c, rows = a.n * a.out_h * a.out_w;
    const int64_t padded = rounded(a.o, kMaxWidth), columns = a.panels * kGemmColumns;
    const int64_t shares = (a.o + columns - 1) / columns;  // tasks of a run
    const int64_t chunks = (depth + kGemmChunk - 1) / kGemmChunk;
    const int64_t chunk = rounded((depth + chunks - 1) / chunks, kLine);
    const int64_t width = a.gathers ? kGemmChunk + kMaxWidth : depth, apart = a.geglu ? a.o / 2 : a.o;
    const float *const packed = floats(a.packed), *const residual = floats(a.residual);
    float *const m = scratch, *const gathered = scratch + a.run * columns;
    alignas(64) float bias[kGemmColumns];
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / shares * a.run, count = at_most(a.run, rows - first);
        const int64_t o0 = task % shares * columns, o1 = at_most(o0 + columns, padded);
        for (int64_t k0 = 0; k0 < depth; k0 += chunk) {
            const int64_t k1 = at_most(k0 + chunk, depth);
            if (a.gathers)
                for (int64_t r = 0; r < count; ++r) gather(a, first + r, k0, k1, gathered + r * width);
            for (int64_t o = o0; o < o1; o += kGemmColumns) {
                const int64_t wide = at_most(padded - o, kGemmColumns), place = first * apart + (a.geglu ? o / 2 : o);
                Tiles p{};
                p.v = a.gathers ? gathered : floats(a.x) + first * depth + k0;
                p.u = packed + o * depth + k0 * wide;
                p.width = width, p.wide = wide, p.channels = k1 - k0;
                p.m = m + (o - o0) * a.run;
                p.first = k0 == 0, p.last = k1 == depth, p.asks_rows = o == o0 && !a.gathers;
                if (o + kGemmColumns < o1) p.next = p.u + depth * wide;
                else if (!p.last) p.next = packed + o0 * depth + k1 * at_most(padded - o0, kGemmColumns);
                else p.next = packed + (o1 < padded ? o1 * depth : 0);
                const int64_t tiles = (count + kRows - 1) / kRows;
                p.lines = (kStep * kVectors * kWidth / kLine + tiles - 1) / tiles;
                p.bias = bias, p.residual = residual ? residual + place : nullptr;
                p.y = static_cast<float*>(a.y) + place, p.apart = apart;
                p.columns = a.geglu ? wide / 2 : at_most(a.o - o, wide);
                if (p.last) gather_bias(a, o, wide, bias);
                if (a.geglu) multiply_run<true>(p, count);
                else multiply_run<false>(p, count);
            }
        }
    }
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
