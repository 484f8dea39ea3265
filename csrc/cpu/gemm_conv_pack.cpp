// The weight of gemm_conv as its kernels read it: an output channel becomes a column of a panel, of words of 32 bits.
//
// fp32: a word is an input channel, [O / 64][taps * C][64], the last panel as wide as O, rounded up to kMaxWidth.
// bf16: a pair of them, [O / 32][C / 32][taps][16][32], or split in two, [O / 32][C / 32][high, low][16][32]; zeros
// beyond O and C. With GEGLU a vector of values (in bf16: 16) and one of their gates in turn.
// A task is a panel and 32 input channels, which lie in L2 for all taps. Bytes: the weight and what is packed, once.
#include "simd.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

constexpr int64_t kChannels = kGemmPairStep, kPairs = kChannels / 2;

DIFUSORES_INLINE float number(float v) { return v; }
DIFUSORES_INLINE float number(uint16_t v) { return __builtin_bit_cast(float, uint32_t{v} << 16); }

// bf16 in the high half, to nearest even; any NaN a quiet one.
DIFUSORES_INLINE uint32_t rounded(float v) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, v);
    return v == v ? (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u : 0x7fc00000u;
}

// Channels of an output channel and a tap; zeros from `count` on.
template <class T>
DIFUSORES_INLINE void read(const T* from, int64_t stride, int64_t count, float (&row)[kChannels]) {
    if (count == kChannels && stride == 1)
        for (int64_t i = 0; i < kChannels; ++i) row[i] = number(from[i]);
    else
        for (int64_t i = 0; i < kChannels; ++i) row[i] = i < count ? number(from[i * stride]) : 0.0f;
}

// Pairs of their high or low parts.
DIFUSORES_INLINE void pair_up(const float (&row)[kChannels], bool low, uint32_t (&words)[kChannels]) {
    uint32_t bits[kChannels];
    for (int64_t i = 0; i < kChannels; ++i) {
        bits[i] = rounded(row[i]);
        if (low) bits[i] = rounded(row[i] - __builtin_bit_cast(float, bits[i]));
    }
    for (int64_t i = 0; i < kPairs; ++i) words[i] = bits[2 * i] >> 16 | bits[2 * i + 1];
}

// The output channel of a column.
int64_t channel_of(const GemmPackArgs& a, int64_t column) {
    if (!a.geglu) return column;
    const int64_t lanes = a.pairs ? kMaxWidth : kWidth, vector = column / lanes;
    return vector % 2 * (a.o / 2) + vector / 2 * lanes + column % lanes;
}

template <class T>
void pack(const GemmPackArgs& a, int64_t task) {
    const int64_t blocks = (a.c + kChannels - 1) / kChannels, panel = task / blocks, c0 = task % blocks * kChannels;
    const int64_t wide = a.pairs ? kGemmPairColumns : kGemmColumns, first = panel * wide, left = a.o - first;
    const int64_t padded = (left + kMaxWidth - 1) / kMaxWidth * kMaxWidth;
    const int64_t columns = a.pairs || padded > wide ? wide : padded;
    const int64_t channels = a.c - c0 < kChannels ? a.c - c0 : kChannels, count = a.pairs ? kPairs : channels;
    const int64_t taps = a.kernel_h * a.kernel_w, halves = a.split ? 2 : 1;
    for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t at = c0 * a.stride_c + tap / a.kernel_w * a.stride_h + tap % a.kernel_w * a.stride_w;
        uint32_t* const to = a.packed + (a.pairs ? (task * taps + tap) * halves * kPairs * columns
                                                 : first * taps * a.c + (tap * a.c + c0) * columns);
        for (int64_t column = 0; column < columns; ++column) {
            float row[kChannels] = {};
            if (column < left)
                read(static_cast<const T*>(a.rows[channel_of(a, first + column)]) + at, a.stride_c, channels, row);
            for (int64_t half = 0; half < halves; ++half) {
                uint32_t words[kChannels];
                if (a.pairs) pair_up(row, half == 1, words);
                else __builtin_memcpy(words, row, sizeof(words));
                uint32_t* const here = to + half * kPairs * columns + column;
                for (int64_t i = 0; i < count; ++i) here[i * columns] = words[i];
            }
        }
    }
}

}  // namespace

void gemm_conv_pack(const GemmPackArgs& a, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
        a.dtype == DType::f32 ? pack<float>(a, task) : pack<uint16_t>(a, task);
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
