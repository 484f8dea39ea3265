// y = conv(x, weight) + bias + residual as one matrix product: a row for each output pixel, a column for each output
// channel, summed over taps and input channels. A linear layer is a 1x1 convolution of rows.
//
// x, y, residual are [N, H, W, C] in memory, fp32. Columns come in panels of kGemmColumns, packed [taps * C][columns].
// A task is a run of rows and a panel: rows of a 1x1 convolution are read where they lie, others are gathered once per
// run, zeros outside the image. Rows and panel pass in blocks of kDepth through the micro-kernel, whose sums wait in
// L2. The sum runs in order, each block from zero: an output's bits depend on its inputs alone, not on the batch or
// threads. Least bytes: x, y, residual and the weights once.
#include "product.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kDepth = 128;  // 32 KB of a panel

// The row of output pixel p, taps * C floats.
void gather(const GemmConvArgs& a, int64_t p, float* row) {
    const int64_t ox = p % a.out_w, oy = p / a.out_w % a.out_h, n = p / (a.out_w * a.out_h);
    for (int64_t ky = 0; ky < a.kernel_h; ++ky)
        for (int64_t kx = 0; kx < a.kernel_w; ++kx, row += a.c) {
            const int64_t iy = oy * a.stride_h - a.pad_h + ky, ix = ox * a.stride_w - a.pad_w + kx;
            if (iy < 0 || iy >= a.h || ix < 0 || ix >= a.w) __builtin_memset(row, 0, a.c * sizeof(float));
            else __builtin_memcpy(row, a.x + ((n * a.h + iy) * a.w + ix) * a.c, a.c * sizeof(float));
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
                if (a.residual) y += get(a.residual + place);
                put(a.y + place, y);
            } else {
                if (a.residual) y += load_tail<DType::f32>(a.residual, place, left);
                store_tail<DType::f32>(a.y, place, y, left);
            }
        }
}

}  // namespace

void gemm_conv(const GemmConvArgs& a, float* scratch, int64_t begin, int64_t end) {
    const int64_t depth = a.kernel_h * a.kernel_w * a.c, rows = a.n * a.out_h * a.out_w;
    const int64_t panels = (a.o + kGemmColumns - 1) / kGemmColumns, padded = rounded(a.o, kMaxWidth);
    float *const m = scratch, *const gathered = scratch + a.run * kGemmColumns;
    for (int64_t task = begin, last_run = -1; task < end; ++task) {
        const int64_t first = task / panels * a.run, count = at_most(a.run, rows - first);
        const int64_t o0 = task % panels * kGemmColumns, wide = at_most(padded - o0, kGemmColumns);
        if (a.gathers && task / panels != last_run)
            for (int64_t r = 0; r < count; ++r) gather(a, first + r, gathered + r * depth);
        last_run = task / panels;
        const float* const v = a.gathers ? gathered : a.x + first * depth;
        const float* const u = a.packed + o0 * depth;
        for (int64_t k = 0; k < depth; k += kDepth) {
            const Panel p{v + k, u + k * wide, m, depth, wide, at_most(depth - k, kDepth), u + (k + kDepth) * wide};
            if (k) multiply_columns<false>(p, count);
            else multiply_columns<true>(p, count);
        }
        finish(a, m, first, count, o0, wide);
    }
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
