// y = conv(x, weight) + bias + residual as one matrix product: a row for each output pixel, a column for each output
// channel, summed over taps and input channels. A linear layer is a 1x1 convolution of rows.
//
// x, y, residual are [N, H, W, C] in memory, fp32. Columns come in panels of kGemmColumns, packed [taps * C][columns].
// A task is a run of rows and a few panels. kGemmChunk of the depth at a time, rows stay in L2, where those of a 1x1
// convolution are read as they lie and others gathered, zeros outside the image; so the weights are read once a run.
// Rows and panels pass in blocks of kDepth through the micro-kernel, whose sums wait in L2. The sum runs in order, each
// block from zero: an output's bits depend on its inputs alone, not on the batch or threads. Least bytes: x, y,
// residual and the weights once.
#include "product.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kDepth = 128;  // 32 KB of a panel

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

// Adds to the sums m of `count` rows and of columns [o, o + wide) what depth [k0, k1) brings; v begins at k0.
void multiply_chunk(const GemmConvArgs& a, const float* v, int64_t width, float* m, int64_t count, int64_t o,
                    int64_t wide, int64_t k0, int64_t k1, int64_t depth) {
    const float* const u = floats(a.packed) + o * depth;
    const int64_t step = count < kGemmColumns ? (kGemmColumns + count - 1) / count : 1;
    for (int64_t k = k0; k < k1; k += kDepth) {
        const float* const ahead = k + kDepth < k1 ? u + (k + kDepth) * wide : u + depth * wide + k0 * wide;
        const Panel p{v + k - k0, u + k * wide, m, width, wide, at_most(k1 - k, kDepth), ahead, step};
        if (k) multiply_columns<false>(p, count);
        else multiply_columns<true>(p, count);
    }
}

// y of rows [first, first + count) and columns [o0, o0 + wide) from their sums m.
void finish(const GemmConvArgs& a, const float* m, int64_t first, int64_t count, int64_t o0, int64_t wide) {
    alignas(64) float bias[kGemmColumns];
    for (int64_t o = 0; o < wide; ++o) bias[o] = o0 + o < a.o ? param(a.bias, 0, o0 + o, 0.0f) : 0.0f;
    for (int64_t r = 0; r < count; ++r)
        for (int64_t o = 0; o < wide && o0 + o < a.o; o += kWidth) {
            const int64_t place = (first + r) * a.o + o0 + o;
            const int left = static_cast<int>(at_most(a.o - o0 - o, kWidth));
            f32v y = get(m + r * wide + o) + get(bias + o);
            if (left == kWidth) {
                if (a.residual) y += get(floats(a.residual) + place);
                put(static_cast<float*>(a.y) + place, y);
            } else {
                if (a.residual) y += load_tail<DType::f32>(a.residual, place, left);
                store_tail<DType::f32>(a.y, place, y, left);
            }
        }
}

}  // namespace

void gemm_conv(const GemmConvArgs& a, float* scratch, int64_t begin, int64_t end) {
    const int64_t depth = a.kernel_h * a.kernel_w * a.c, rows = a.n * a.out_h * a.out_w;
    const int64_t padded = rounded(a.o, kMaxWidth), columns = a.panels * kGemmColumns;
    const int64_t shares = (a.o + columns - 1) / columns;  // tasks of a run
    const int64_t width = a.gathers ? kGemmChunk + kMaxWidth : depth;
    float *const m = scratch, *const gathered = scratch + a.run * columns;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / shares * a.run, count = at_most(a.run, rows - first);
        const int64_t o0 = task % shares * columns, o1 = at_most(o0 + columns, padded);
        for (int64_t k0 = 0; k0 < depth; k0 += kGemmChunk) {
            const int64_t k1 = at_most(k0 + kGemmChunk, depth);
            if (a.gathers)
                for (int64_t r = 0; r < count; ++r) gather(a, first + r, k0, k1, gathered + r * width);
            const float* const v = a.gathers ? gathered : floats(a.x) + first * depth + k0;
            for (int64_t o = o0; o < o1; o += kGemmColumns)
                multiply_chunk(a, v, width, m + (o - o0) * a.run, count, o, at_most(o1 - o, kGemmColumns), k0, k1,
                               depth);
        }
        for (int64_t o = o0; o < o1; o += kGemmColumns)
            finish(a, m + (o - o0) * a.run, first, count, o, at_most(o1 - o, kGemmColumns));
    }
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
