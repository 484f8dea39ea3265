// The fused multiply-adds that a processor can do: chains in registers, no memory.
//     peak fp32|bf16 THREADS  prints GFLOP/s (2 per multiply-add), or 0 where there is no such instruction.
// Compiled for the machine at hand (-march=native) by peak.py.

#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kChains = 12;  // more than latency (4) times units (2), and they fit into the registers
constexpr long kRounds = 1 << 22;
volatile float sink;  // takes the sums, or the compiler computes none

#if defined(__AVX512F__)
double fp32() {
    __m512 a = _mm512_set1_ps(0.5f), sum[kChains];
    for (auto& s : sum) s = _mm512_set1_ps(1.0f);
    for (long i = 0; i < kRounds; ++i) {
        for (int k = 0; k < kChains; ++k) sum[k] = _mm512_fmadd_ps(sum[k], a, a);
    }
    for (auto& s : sum) sink = _mm512_reduce_add_ps(s);
    return 2.0 * 16 * kChains * kRounds;
}
#elif defined(__FMA__)
double fp32() {
    __m256 a = _mm256_set1_ps(0.5f), sum[kChains];
    for (auto& s : sum) s = _mm256_set1_ps(1.0f);
    for (long i = 0; i < kRounds; ++i) {
        for (int k = 0; k < kChains; ++k) sum[k] = _mm256_fmadd_ps(sum[k], a, a);
    }
    for (auto& s : sum) sink = _mm256_cvtss_f32(s);
    return 2.0 * 8 * kChains * kRounds;
}
#else
double fp32() { return 0; }
#endif

#if defined(__AMX_BF16__)
double bf16() {
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) != 0) return 0;
    struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = 16;
    asm volatile("" : : "r"(&config) : "memory");  // gcc does not see that the next line reads it
    _tile_loadconfig(&config);
    alignas(64) static const char zeros[1024] = {};
    _tile_loadd(4, zeros, 64);
    _tile_loadd(5, zeros, 64);
    _tile_loadd(6, zeros, 64);
    _tile_loadd(7, zeros, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long i = 0; i < kRounds / 8; ++i) {  // four sums of 16 x 16, products of depth 32
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 2.0 * 4 * 16 * 16 * 32 * (kRounds / 8);
}
#elif defined(__AVX512BF16__)
double bf16() {
    __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00);
    __m512 sum[kChains];
    for (auto& s : sum) s = _mm512_set1_ps(1.0f);
    for (long i = 0; i < kRounds; ++i) {
        for (int k = 0; k < kChains; ++k) sum[k] = _mm512_dpbf16_ps(sum[k], a, a);
    }
    for (auto& s : sum) sink = _mm512_reduce_add_ps(s);
    return 2.0 * 32 * kChains * kRounds;
}
#else
double bf16() { return 0; }
#endif

// Operations that so many threads do, each its chains once.
double together(double (*run)(), int threads) {
    std::vector<double> done(threads);
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t) team.emplace_back([&, t] { done[t] = run(); });
    for (auto& thread : team) thread.join();
    double sum = 0;
    for (double d : done) sum += d;
    return sum;
}

}  // namespace

// The same for who loads this file as a library.
extern "C" double fp32_together(int threads) { return together(fp32, threads); }
extern "C" double bf16_together(int threads) { return together(bf16, threads); }

int main(int count, char** words) {
    if (count != 3) return 1;
    auto* run = std::strcmp(words[1], "bf16") == 0 ? bf16 : fp32;
    double best = 0;
    for (int round = 0; round < 5; ++round) {
        const auto start = std::chrono::steady_clock::now();
        const double sum = together(run, std::atoi(words[2]));
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        if (sum / taken.count() > best) best = sum / taken.count();
    }
    std::printf("%.0f\n", best / 1e9);
}
