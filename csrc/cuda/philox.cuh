// Normal numbers that depend on (seed of the image, draw, element) alone; difusores/ops/scheduler_step.py has the
// reference.
#pragma once
#include "cuda/common.cuh"

namespace difusores {
namespace cuda {

// Philox4x32-10: counter (index, index >> 32, draw, 0), key: the image's seed.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t index, unsigned draw) {
    uint4 c = {static_cast<unsigned>(index), static_cast<unsigned>(index >> 32), draw, 0};
    unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned hi0 = __umulhi(c.x, 0xD2511F53u), lo0 = c.x * 0xD2511F53u;
        const unsigned hi1 = __umulhi(c.z, 0xCD9E8D57u), lo1 = c.z * 0xCD9E8D57u;
        c = {hi1 ^ c.y ^ k0, lo1, hi0 ^ c.w ^ k1, lo0};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// Box-Muller: sqrt(-2 ln u) (cos, sin)(2 pi t), u in (0, 1) from the upper 23 bits of a, t in [0, 1) from 24 of b.
__device__ __forceinline__ float2 box_muller(unsigned a, unsigned b) {
    const float u = (static_cast<float>(a >> 9) + 0.5f) * 0x1p-23f;
    const float radius = sqrtf(-2.0f * logf(u));
    float sine, cosine;
    sincospif(static_cast<float>(b >> 8) * 0x1p-23f, &sine, &cosine);
    return make_float2(radius * cosine, radius * sine);
}

// Those of kVec elements from `first` on, a multiple of kVec.
template <int kVec>
__device__ __forceinline__ void normals(uint64_t seed, int64_t first, unsigned draw, float (&z)[kVec]) {
    if constexpr (kVec == 1) {
        const uint4 bits = philox(seed, static_cast<uint64_t>(first) / 4, draw);
        const float2 pair = first & 2 ? box_muller(bits.z, bits.w) : box_muller(bits.x, bits.y);
        z[0] = first & 1 ? pair.y : pair.x;
    } else {
#pragma unroll
        for (int k = 0; k < kVec; k += 4) {
            const uint4 bits = philox(seed, static_cast<uint64_t>(first + k) / 4, draw);
            const float2 a = box_muller(bits.x, bits.y), b = box_muller(bits.z, bits.w);
            z[k] = a.x, z[k + 1] = a.y, z[k + 2] = b.x, z[k + 3] = b.y;
        }
    }
}

}  // namespace cuda
}  // namespace difusores
