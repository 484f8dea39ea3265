// The kernels without torch: every ISA level that this processor has, against a float64 oracle, on memory whose bounds
// a sanitizer watches. Prints one line per failure; exits with their number.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

using namespace difusores;

namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
    if (ok) return;
    ++failures;
    std::printf("FAILED %s\n", what.c_str());
}

std::vector<float> normal(size_t n, unsigned seed, float mean = 0.0f) {
    std::mt19937 source(seed);
    std::normal_distribution<float> draw(mean, 1.0f);
    std::vector<float> v(n);
    for (float& a : v) a = draw(source);
    return v;
}

// Heap blocks of exactly the bytes needed, so that one element too far is seen.
std::vector<uint16_t> to_bf16(const std::vector<float>& v) {
    std::vector<uint16_t> out(v.size());
    for (size_t i = 0; i < v.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &v[i], 4);
        out[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    return out;
}
float from_bf16(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

void group_norm(const Kernels& k, int64_t n, int64_t c, int64_t s, int64_t g, bool last, bool bf16) {
    const size_t size = n * c * s;
    std::vector<float> x = normal(size, 1, 5.0f), r = normal(size, 2);
    const std::vector<float> w = normal(c, 3), b = normal(c, 4), add = normal(n * c, 5), scale = normal(n * c, 6);
    const auto xh = to_bf16(x), rh = to_bf16(r);
    if (bf16)
        for (size_t i = 0; i < size; ++i) x[i] = from_bf16(xh[i]), r[i] = from_bf16(rh[i]);
    std::vector<float> y(size), sum(size);
    std::vector<uint16_t> yh(size), sumh(size);
    GroupNormSiluArgs a{};
    a.x = bf16 ? static_cast<const void*>(xh.data()) : x.data();
    a.residual = bf16 ? static_cast<const void*>(rh.data()) : r.data();
    a.y = bf16 ? static_cast<void*>(yh.data()) : y.data();
    a.sum = bf16 ? static_cast<void*>(sumh.data()) : sum.data();
    a.dtype = bf16 ? DType::bf16 : DType::f32;
    a.weight = {w.data(), DType::f32, 0}, a.bias = {b.data(), DType::f32, 0};
    a.add = {add.data(), DType::f32, c}, a.scale = {scale.data(), DType::f32, c};
    a.n = n, a.c = c, a.s = s, a.groups = g, a.eps = 1e-5, a.silu = true;
    a.chunk_rows = 16, a.chunks = (s + 15) / 16, a.padded_c = (c + kMaxWidth - 1) / kMaxWidth * kMaxWidth;
    std::vector<float> scratch(n * a.chunks * 2 * a.padded_c), channels(n * 4 * c);
    std::vector<double> partial(n * a.chunks * g * 2);
    a.scratch = scratch.data(), a.channels = channels.data(), a.partial = partial.data();
    if (last) {
        k.group_norm_silu_prepare(a, 0, n);
        k.group_norm_silu_stats(a, 0, n * a.chunks);
        k.group_norm_silu_combine(a, 0, n);
        k.group_norm_silu_apply(a, 0, n * a.chunks);
    } else {
        k.group_norm_silu(a, 0, n * g);
    }
    const auto at = [&](int64_t i, int64_t ch, int64_t p) {
        return static_cast<size_t>(last ? (i * s + p) * c + ch : (i * c + ch) * s + p);
    };
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t group = 0; group < g; ++group) {
            const int64_t per = c / g;
            double mean = 0, var = 0;
            const auto h = [&](int64_t ch, int64_t p) {
                return static_cast<double>(x[at(i, ch, p)]) + r[at(i, ch, p)] + add[i * c + ch];
            };
            for (int64_t ch = group * per; ch < (group + 1) * per; ++ch)
                for (int64_t p = 0; p < s; ++p) mean += h(ch, p) / (per * s);
            for (int64_t ch = group * per; ch < (group + 1) * per; ++ch)
                for (int64_t p = 0; p < s; ++p) var += (h(ch, p) - mean) * (h(ch, p) - mean) / (per * s);
            for (int64_t ch = group * per; ch < (group + 1) * per; ++ch)
                for (int64_t p = 0; p < s; ++p) {
                    const double normed = (h(ch, p) - mean) / std::sqrt(var + 1e-5) * w[ch] + b[ch];
                    const double t = normed * (1.0 + scale[i * c + ch]);
                    const double want = t / (1 + std::exp(-t));
                    const size_t o = at(i, ch, p);
                    const double got = bf16 ? from_bf16(yh[o]) : y[o], total = bf16 ? from_bf16(sumh[o]) : sum[o];
                    const double unit = bf16 ? 1.0 / 128 : 1.0;
                    worst = std::fmax(worst, std::fabs(got - want));
                    largest = std::fmax(largest, std::fabs(want));
                    expect(std::fabs(total - h(ch, p)) <= std::fabs(h(ch, p)) * unit * (bf16 ? 1.0 : 3e-7) + 1e-6,
                           std::string(k.isa) + " sum");
                }
        }
    const double allowed = (bf16 ? 0x1p-8 : 2e-6) * largest + 1e-5;
    expect(worst <= allowed, std::string(k.isa) + (last ? " channels last " : " channels first ") +
                                 (bf16 ? "bf16 " : "f32 ") + std::to_string(c) + "x" + std::to_string(s) + ": " +
                                 std::to_string(worst));
}

void step(const Kernels& k, int64_t batch, int64_t inner) {
    const size_t size = batch * inner;
    const auto x = normal(size, 1), e = normal(size, 2), z = normal(size, 3), v = normal(size, 4), s = normal(size, 5);
    std::vector<float> y(size), m(2 * size), x0(size);
    double row[40] = {};
    row[0] = 1.0, row[3] = 0.2, row[4] = 1.1, row[5] = -0.7, row[6] = -1.0, row[7] = 1.0;
    row[8] = -1.0, row[9] = 0.3, row[10] = 1.0, row[11] = 0.5;
    const double w[9] = {0.9, 0.1, -0.2, 0.4, 0.3, 0, 0, 0, 0};
    for (int j = 0; j < 9; ++j) row[12 + j] = w[j];
    SchedulerStepArgs a{};
    a.row = row;
    a.sample = {x.data(), DType::f32, inner}, a.e[0] = {e.data(), DType::f32, inner};
    a.noise = {z.data(), DType::f32, inner}, a.variance = {v.data(), DType::f32, inner};
    a.slots[0] = {s.data(), DType::f32, inner};
    a.y = {y.data(), DType::f32, 1}, a.x0 = {x0.data(), DType::f32, 1}, a.m = {m.data(), DType::f32, 2};
    a.batch = batch, a.inner = inner;
    k.scheduler_step(a, 0, batch * ((inner + kStepBlock - 1) / kStepBlock));
    double worst = 0;
    for (size_t i = 0; i < size; ++i) {
        const double xh = x[i] + 0.2 * z[i], p = std::fmin(1.0, std::fmax(-1.0, 1.1 * xh - 0.7 * e[i]));
        const double want = 0.9 * p + 0.1 * xh - 0.2 * e[i] + 0.4 * z[i] * std::exp(-1.0 + 0.3 * v[i]) + 0.3 * s[i];
        for (const double got : {static_cast<double>(y[i]), 2.0 * m[i], 2.0 * m[size + i]})
            worst = std::fmax(worst, std::fabs(got - want));
        worst = std::fmax(worst, std::fabs(x0[i] - p));
    }
    expect(worst <= 3e-6,
           std::string(k.isa) + " scheduler_step " + std::to_string(inner) + ": " + std::to_string(worst));
}

}  // namespace

int main() {
    int levels = 0;
    for (const char* isa : {"base", "avx2", "avx512"}) {
        const Kernels* k = kernels_of(isa);
        if (!k) continue;
        ++levels;
        for (const bool last : {false, true})
            for (const bool bf16 : {false, true}) {
                for (const int64_t s : {1, 3, 16, 17, 33, 1025}) group_norm(*k, 2, 12, s, 3, last, bf16);
                group_norm(*k, 1, 70, 9, 35, last, bf16);
                group_norm(*k, 2, 5, 64, 1, last, bf16);
            }
        for (const int64_t inner : {1, 7, 1023, 1024, 1025, 5000}) step(*k, 2, inner);
    }
    std::printf("%d levels, %d failures\n", levels, failures);
    return levels ? failures : 1;
}
