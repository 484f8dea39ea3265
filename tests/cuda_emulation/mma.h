// What csrc/cuda/mma.cuh is on the device, behind the emulation: products of tiles and ldmatrix by PTX's layouts of
// fragments over the 32 lanes, asynchronous copies that happen as late as they may: when their thread waits for them.
// Sums of a product are rounded to fp32 once; in which order and how hardware rounds them, it does not say.
#pragma once
#include <array>

#include "cuda/common.cuh"

namespace difusores {
namespace cuda {

namespace emulated {

// What a lane brings to a product. Two sets, used by turns: a lane that is one exchange ahead leaves the last one
// whole.
struct Fragments {
    float a[8], b[4];
};
inline Fragments fragments[emulation::kMaxThreads][2];
inline unsigned char turn[emulation::kMaxThreads];

template <DType T>
void unpack_word(unsigned word, float* to) {
    to[0] = widen<T>(word & 0xFFFFu), to[1] = widen<T>(word >> 16);
}

// c[16][8] += a[16][8 kHalves] b[8 kHalves][8]; words of a and b as mma.cuh describes them.
template <DType T, int kHalves>
void product(float (&c)[4], const unsigned* a, const unsigned* b, std::source_location where) {
    const unsigned self = emulation::running, lane = self % 32, first = self - lane, set = turn[self] ^= 1;
    Fragments& mine = fragments[self][set];
    for (int k = 0; k < 2 * kHalves; ++k) unpack_word<T>(a[k], mine.a + 2 * k);
    for (int k = 0; k < kHalves; ++k) unpack_word<T>(b[k], mine.b + 2 * k);
    emulation::exchange(kAllLanes, set, where);
    for (int e = 0; e < 4; ++e) {
        const unsigned row = lane / 4, column = lane % 4 * 2 + e % 2;
        double sum = c[e];
        for (unsigned k = 0; k < 8 * kHalves; ++k) {
            const unsigned half = k / 8, t = k % 8 / 2;
            const Fragments& left = fragments[first + row * 4 + t][set];
            const Fragments& right = fragments[first + column * 4 + t][set];
            sum += static_cast<double>(left.a[4 * half + e / 2 * 2 + k % 2]) * right.b[2 * half + k % 2];
        }
        c[e] = static_cast<float>(sum);
    }
}

template <bool kTransposed>
void load_tiles(unsigned (&tiles)[4], const void* row, std::source_location where) {
    const unsigned lane = emulation::running % 32, first = emulation::running - lane;
    if (reinterpret_cast<uintptr_t>(row) % 16) emulation::failure = "ldmatrix: a row does not begin at 16 bytes";
    emulation::exchange(kAllLanes, reinterpret_cast<uintptr_t>(row), where);
    for (unsigned tile = 0; tile < 4; ++tile) {
        const auto element = [&](unsigned r, unsigned column) {
            const uint64_t at = emulation::fibers[first + 8 * tile + r].collected;
            return static_cast<unsigned>(reinterpret_cast<const unsigned short*>(at)[column]);
        };
        const unsigned g = lane / 4, t = 2 * (lane % 4);
        tiles[tile] = kTransposed ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
    }
}

}  // namespace emulated

template <DType T>
void mma_k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b0,
            std::source_location where = std::source_location::current()) {
    const unsigned a[] = {a0, a1};
    emulated::product<T, 1>(c, a, &b0, where);
}

template <DType T>
void mma_k16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1,
             std::source_location where = std::source_location::current()) {
    const unsigned a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
    emulated::product<T, 2>(c, a, b, where);
}

inline void ldmatrix(unsigned (&tiles)[4], const void* row,
                     std::source_location where = std::source_location::current()) {
    emulated::load_tiles<false>(tiles, row, where);
}

inline void ldmatrix_transposed(unsigned (&tiles)[4], const void* row,
                                std::source_location where = std::source_location::current()) {
    emulated::load_tiles<true>(tiles, row, where);
}

inline int anew(int value) { return value; }
inline unsigned thread_anew() { return threadIdx.x; }
inline unsigned threads_anew() { return blockDim.x; }

inline void copy_16(void* to, const void* from, bool real) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        emulation::failure = "cp.async: an address is not a multiple of 16 bytes";
    emulation::fibers[emulation::running].open.push_back({to, real ? from : nullptr});
}

inline void close_copies() {
    emulation::Fiber& self = emulation::fibers[emulation::running];
    self.closed.push_back(std::move(self.open));
    self.open.clear();
}

template <int kLeft>
void copies_done() {
    auto& closed = emulation::fibers[emulation::running].closed;
    for (; closed.size() > kLeft; closed.pop_front())
        for (const emulation::Copy& copy : closed.front())
            copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

inline float exp2_fast(float v) { return std::exp2(v); }

template <DType T>
unsigned pack_2(float low, float high) {
    return narrow<T>(low) | narrow<T>(high) << 16;
}

}  // namespace cuda
}  // namespace difusores
