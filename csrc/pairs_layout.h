// How gemm_conv in bf16 arranges pixels, so that a tile's lie at even distances; see cpu/gemm_conv_bf16.cpp.
#pragma once
#include "kernels.h"

namespace difusores {

inline int64_t pair_steps(const GemmPairsArgs& a) {
    return a.kernel_h * a.kernel_w * ((a.c + kGemmPairStep - 1) / kGemmPairStep);
}

// Fills what a says of the layout, and place[pair_steps(a)], from the sizes. Returns the bytes of a.arranged for
// a.down rows of the output of a.images images; 0, for any a.down: tiles are read in x.
inline int64_t lay_out(GemmPairsArgs& a, int64_t* place) {
    constexpr int64_t kPixel = 2 * kGemmPairStep;
    const int64_t taps = a.kernel_h * a.kernel_w, blocks = pair_steps(a) / taps, pixels = a.out_h * a.out_w;
    const bool as_it_is = taps == 1 && a.stride_h == 1 && a.stride_w == 1 && !a.pad_h && !a.pad_w;
    a.place = place;
    if (as_it_is && a.dtype == DType::bf16 && !a.multiplier.ptr && a.c % kGemmPairStep == 0 &&
        pixels >= kGemmTileRows) {
        for (int64_t block = 0; block < blocks; ++block) place[block] = block * kPixel;
        return 0;
    }
    const bool whole = a.out_w % kGemmTileRows == 0;  // tiles within rows of the output: one copy serves all taps
    a.split_w = !whole, a.split_h = !whole && a.stride_h > 1;
    a.copies = (a.split_w ? a.kernel_w : 1) * (a.split_h ? a.kernel_h : 1);
    a.rows = a.split_h ? a.down : (a.down - 1) * a.stride_h + a.kernel_h;
    a.pitch = a.split_w ? a.out_w : (a.out_w - 1) * a.stride_w + a.kernel_w;
    const int64_t copy = a.rows * a.pitch * kPixel;
    a.image_bytes = blocks * a.copies * copy;
    for (int64_t block = 0, step = 0; block < blocks; ++block)
        for (int64_t ky = 0; ky < a.kernel_h; ++ky)
            for (int64_t kx = 0; kx < a.kernel_w; ++kx, ++step) {
                const int64_t of_copy = (a.split_h ? ky * a.kernel_w : 0) + (a.split_w ? kx : 0);
                const int64_t pixel = (a.split_h ? 0 : ky * a.pitch) + (a.split_w ? 0 : kx);
                place[step] = (block * a.copies + of_copy) * copy + pixel * kPixel;
            }
    return a.images * a.image_bytes + kGemmTileRows * kPixel;
}

}  // namespace difusores
