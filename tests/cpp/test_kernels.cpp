// The kernels without torch: every ISA level that this processor has, against a float64 oracle, on memory whose bounds
// a sanitizer watches. Prints one line per failure; exits with their number.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pairs_layout.h"

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

// Half-precision bits. Heap blocks of exactly the bytes needed, so that one element too far is seen.
float from_half(uint16_t h, DType dtype) {
    if (dtype == DType::f16) {
        _Float16 f;
        std::memcpy(&f, &h, 2);
        return static_cast<float>(f);
    }
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
std::vector<uint16_t> to_half(const std::vector<float>& v, DType dtype) {
    std::vector<uint16_t> out(v.size());
    for (size_t i = 0; i < v.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &v[i], 4);
        out[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        const _Float16 f = static_cast<_Float16>(v[i]);
        if (dtype == DType::f16) std::memcpy(&out[i], &f, 2);
    }
    return out;
}

// plain: neither add nor sum, and groups may be fetched ahead.
void group_norm(const Kernels& k, int64_t n, int64_t c, int64_t s, int64_t g, bool last, DType dtype, bool plain) {
    const bool half = dtype != DType::f32;
    const size_t size = n * c * s;
    std::vector<float> x = normal(size, 1, 5.0f), r = normal(size, 2);
    const std::vector<float> w = normal(c, 3), b = normal(c, 4), scale = normal(n * c, 6);
    const std::vector<float> add = plain ? std::vector<float>(n * c) : normal(n * c, 5);
    const auto xh = to_half(x, dtype), rh = to_half(r, dtype);
    if (half)
        for (size_t i = 0; i < size; ++i) x[i] = from_half(xh[i], dtype), r[i] = from_half(rh[i], dtype);
    std::vector<float> y(size), sum(size);
    std::vector<uint16_t> yh(size), sumh(size);
    GroupNormSiluArgs a{};
    a.x = half ? static_cast<const void*>(xh.data()) : x.data();
    a.residual = half ? static_cast<const void*>(rh.data()) : r.data();
    a.y = half ? static_cast<void*>(yh.data()) : y.data();
    if (!plain) a.sum = half ? static_cast<void*>(sumh.data()) : sum.data();
    a.dtype = dtype;
    a.weight = {w.data(), DType::f32, 0}, a.bias = {b.data(), DType::f32, 0};
    if (!plain) a.add = {add.data(), DType::f32, c};
    a.fetch = plain ? 1 << 20 : 0;
    a.scale = {scale.data(), DType::f32, c};
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
    // rounding of the result, to nearest: half a unit in the last place, with room for fp32 before it
    const double unit = dtype == DType::f32 ? 3e-7 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
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
                    const double got = half ? from_half(yh[o], dtype) : y[o];
                    const double total = half ? from_half(sumh[o], dtype) : sum[o];
                    worst = std::fmax(worst, std::fabs(got - want));
                    largest = std::fmax(largest, std::fabs(want));
                    expect(plain || std::fabs(total - h(ch, p)) <= std::fabs(h(ch, p)) * unit + 1e-6,
                           std::string(k.isa) + " sum");
                }
        }
    const double allowed = std::fmax(unit, 2e-6) * largest + 1e-5;
    expect(worst <= allowed, std::string(k.isa) + (last ? " channels last " : " channels first ") + "dtype " +
                                 std::to_string(static_cast<int>(dtype)) + " " + std::to_string(c) + "x" +
                                 std::to_string(s) + ": " + std::to_string(worst));
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

void rescale(const Kernels& k, DType dtype, int64_t batch, int64_t inner) {
    const auto none = normal(batch * inner, 1), some = normal(batch * inner, 2);
    const auto none_half = to_half(none, dtype), some_half = to_half(some, dtype);
    const bool half = dtype != DType::f32;
    const double row[40] = {-1.5, 2.5};
    GuidanceRescaleArgs a{};
    a.row = row, a.conditional = 1, a.batch = batch, a.inner = inner;
    a.e[0] = {half ? static_cast<const void*>(none_half.data()) : none.data(), dtype, inner};
    a.e[1] = {half ? static_cast<const void*>(some_half.data()) : some.data(), dtype, inner};
    const int64_t blocks = (inner + kStepBlock - 1) / kStepBlock;
    std::vector<RescaleMoments> found(2 * batch * blocks);
    k.guidance_rescale(a, found.data(), 0, batch * blocks);
    double worst = 0;
    for (int64_t task = 0; task < batch * blocks; ++task)
        for (int which = 0; which < 2; ++which) {
            const int64_t begin = task / blocks * inner + task % blocks * kStepBlock;
            const int64_t end = std::min(begin + kStepBlock, (task / blocks + 1) * inner);
            const auto value = [&](int64_t i) {
                const double told = half ? from_half(some_half[i], dtype) : some[i];
                return which ? 2.5 * told - 1.5 * (half ? from_half(none_half[i], dtype) : none[i]) : told;
            };
            double mean = 0, squares = 0;
            for (int64_t i = begin; i < end; ++i) mean += value(i) / static_cast<double>(end - begin);
            for (int64_t i = begin; i < end; ++i) squares += (value(i) - mean) * (value(i) - mean);
            worst = std::fmax(worst, std::fabs(found[2 * task + which].mean - mean));
            worst = std::fmax(worst, std::fabs(found[2 * task + which].squares - squares) / (1 + squares));
        }
    expect(worst <= 2e-6,
           std::string(k.isa) + " guidance_rescale " + std::to_string(inner) + ": " + std::to_string(worst));
}

void squares(const Kernels& k, int64_t count) {
    const auto x = normal(count, 1);
    double want = 0;
    for (const float v : x) want += static_cast<double>(v) * v;
    const double got = k.sum_of_squares(x.data(), count);
    expect(std::fabs(got - want) <= 1e-6 * want, std::string(k.isa) + " sum_of_squares " + std::to_string(count));
}

// Values and gates, or rows and a residual: [rows, columns] of one dtype, the result beside the float64 oracle.
void tokens(const Kernels& k, int64_t rows, int64_t d, DType dtype) {
    const bool half = dtype != DType::f32;
    std::vector<float> x = normal(2 * rows * d, 1, 1.0f), y(rows * d), sum(rows * d);
    const auto weight = normal(d, 2), bias = normal(d, 3);
    const auto xh = to_half(x, dtype), wh = to_half(weight, dtype);
    std::vector<uint16_t> yh(rows * d), sumh(rows * d);
    for (size_t i = 0; half && i < x.size(); ++i) x[i] = from_half(xh[i], dtype);
    const void* from = half ? static_cast<const void*>(xh.data()) : x.data();
    void* const to = half ? static_cast<void*>(yh.data()) : y.data();
    const double unit = dtype == DType::f32 ? 3e-6 : dtype == DType::bf16 ? 0x1p-7 : 0x1p-10;
    const auto close = [&](int64_t i, double want) {
        return std::fabs((half ? from_half(yh[i], dtype) : y[i]) - want) <= unit * (1 + std::fabs(want));
    };
    const std::string name = std::string(k.isa) + " " + std::to_string(d) + " dtype " + std::to_string(int(dtype));
    for (const bool tanh : {false, true}) {
        k.geglu({from, to, dtype, rows, d, tanh}, 0, rows);
        for (int64_t i = 0; i < rows * d; ++i) {
            const double v = x[i / d * 2 * d + i % d], g = x[(i / d * 2 + 1) * d + i % d];
            const double t = tanh ? std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)) : std::erf(g / M_SQRT2);
            expect(close(i, v * g * 0.5 * (1 + t)), name + " geglu");
        }
    }
    LayerNormArgs a{};
    const void* second = half ? static_cast<const void*>(xh.data() + rows * d) : x.data() + rows * d;
    a.x = from, a.residual = second, a.y = to, a.sum = half ? static_cast<void*>(sumh.data()) : sum.data();
    a.dtype = dtype, a.rows = rows, a.columns = d, a.eps = 1e-5;
    a.weight = {half ? static_cast<const void*>(wh.data()) : weight.data(), dtype, 0};
    a.bias = a.sum_bias = {bias.data(), DType::f32, 0};
    std::vector<float> scratch(k.layer_norm_scratch(a), NAN);
    k.layer_norm(a, scratch.data(), 0, rows);
    for (int64_t row = 0; row < rows; ++row) {
        const auto h = [&](int64_t i) { return double(x[row * d + i]) + x[(rows + row) * d + i]; };
        double mean = 0, var = 0;
        for (int64_t i = 0; i < d; ++i) mean += h(i) / d;
        for (int64_t i = 0; i < d; ++i) var += (h(i) - mean) * (h(i) - mean) / d;
        for (int64_t i = 0; i < d; ++i) {
            const double w = half ? from_half(wh[i], dtype) : weight[i];
            expect(close(row * d + i, (h(i) - mean) / std::sqrt(var + 1e-5) * w + bias[i]), name + " layer_norm");
            const double s = half ? from_half(sumh[row * d + i], dtype) : sum[row * d + i];
            expect(std::fabs(s - (h(i) + bias[i])) <= unit * (1 + std::fabs(h(i) + bias[i])),
                   name + " layer_norm's sum");
        }
    }
}

// What convolutions compute: x [N, H, W, C], weight [taps, C, O].
struct Convolved {
    int64_t n, c, o, h, w, kernel, stride;
    std::vector<float> x, weight, bias, residual;

    Convolved(int64_t n, int64_t c, int64_t o, int64_t h, int64_t w, int64_t kernel, int64_t stride)
        : n(n),
          c(c),
          o(o),
          h(h),
          w(w),
          kernel(kernel),
          stride(stride),
          x(normal(n * h * w * c, 1)),
          weight(normal(kernel * kernel * c * o, 2)),
          bias(normal(o, 3)),
          residual(normal(rows() * o, 4)) {}
    int64_t out_h() const { return (h - 1) / stride + 1; }
    int64_t out_w() const { return (w - 1) / stride + 1; }
    int64_t rows() const { return n * out_h() * out_w(); }

    void describe(GemmSplitArgs& a) const { a.c = c, a.o = o, a.bias = {bias.data(), DType::f32, 0}; }
    template <class Args>
    void describe(Args& a) const {
        a.c = c, a.o = o, a.h = h, a.w = w, a.out_h = out_h(), a.out_w = out_w();
        a.kernel_h = a.kernel_w = kernel, a.pad_h = a.pad_w = kernel / 2, a.stride_h = a.stride_w = stride;
        a.bias = {bias.data(), DType::f32, 0};
    }

    // Whether found(i) is y, up to a share of the terms' sizes and of the sum. before(image, channel, x) is what is
    // done to x first, add(image, channel) what is added.
    template <class Before, class Add, class Found>
    bool right(const Before& before, const Add& add, const Found& found, double of_terms, double of_sum) const {
        bool right = true;
        for (int64_t row = 0; row < rows(); ++row)
            for (int64_t i = 0; i < o; ++i) {
                const int64_t p = row % (out_h() * out_w()), image = row / (out_h() * out_w());
                double want = bias[i] + add(image, i) + residual[row * o + i], size = std::fabs(want);
                for (int64_t d = 0; d < kernel * kernel * c; ++d) {
                    const int64_t tap = d / c, iy = p / out_w() * stride - kernel / 2 + tap / kernel;
                    const int64_t ix = p % out_w() * stride - kernel / 2 + tap % kernel;
                    if (iy < 0 || iy >= h || ix < 0 || ix >= w) continue;
                    const double value = before(image, d % c, x[((image * h + iy) * w + ix) * c + d % c]);
                    want += value * weight[d * o + i], size += std::fabs(value * weight[d * o + i]);
                }
                right = right && std::fabs(found(row * o + i) - want) <= of_terms * size + of_sum * std::fabs(want);
            }
        return right;
    }
    void report(const Kernels& k, bool right) const {
        expect(right, std::string(k.isa) + " gemm_conv " + std::to_string(c) + " to " + std::to_string(o));
    }
};

int64_t up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Whether the kernels pack the weight so: in fp32, or as pairs where T has 16 bits.
template <class T>
void expect_packed(const Kernels& k, const Convolved& given, const std::vector<T>& want, bool split = false,
                   bool geglu = false) {
    std::vector<const void*> rows;
    for (int64_t i = 0; i < given.o; ++i) rows.push_back(given.weight.data() + i);
    GemmPackArgs a{};
    a.dtype = DType::f32, a.rows = rows.data(), a.pairs = sizeof(T) == 2, a.split = split, a.geglu = geglu;
    a.o = given.o, a.c = given.c, a.kernel_h = a.kernel_w = given.kernel;
    a.stride_c = given.o, a.stride_w = given.c * given.o, a.stride_h = given.kernel * a.stride_w;
    std::vector<uint32_t> packed(want.size() * sizeof(T) / 4, 0xffffffffu);
    a.packed = packed.data();
    const int64_t panel = a.pairs ? kGemmPairColumns : kGemmColumns;
    k.gemm_conv_pack(a, 0, up(a.o, panel) / panel * (up(a.c, kGemmPairStep) / kGemmPairStep));
    expect(std::memcmp(packed.data(), want.data(), want.size() * sizeof(T)) == 0,
           std::string(k.isa) + " gemm_conv_pack " + std::to_string(a.c) + " to " + std::to_string(a.o));
}

// A strided 3x3 convolution with zeros around, or a 1x1 one whose rows are read where they lie.
void gemm(const Kernels& k, int64_t n, int64_t c, int64_t o, int64_t h, int64_t w, int64_t kernel) {
    const Convolved given(n, c, o, h, w, kernel, kernel > 1 ? 2 : 1);
    GemmConvArgs a{};
    given.describe(a);
    a.n = n, a.gathers = kernel > 1, a.run = 7, a.panels = 2;
    const int64_t depth = kernel * kernel * c, padded = up(o, kMaxWidth), columns = a.panels * kGemmColumns;
    std::vector<float> packed(depth * padded), y(given.rows() * o);
    for (int64_t d = 0; d < depth; ++d)
        for (int64_t i = 0; i < o; ++i) {
            const int64_t o0 = i / kGemmColumns * kGemmColumns;
            packed[o0 * depth + d * std::min(kGemmColumns, padded - o0) + i - o0] = given.weight[d * o + i];
        }
    expect_packed(k, given, packed);
    std::vector<float> scratch(a.run * (columns + kGemmChunk + kMaxWidth));
    a.x = given.x.data(), a.packed = packed.data(), a.residual = given.residual.data(), a.y = y.data();
    k.gemm_conv(a, scratch.data(), 0, up(given.rows(), a.run) / a.run * (up(o, columns) / columns));
    given.report(k, given.right([](int64_t, int64_t, double v) { return v; }, [](int64_t, int64_t) { return 0.0; },
                                [&](int64_t i) { return y[i]; }, 1e-6, 0));
}

// The same in bf16, of images in bf16 or fp32, with a norm and SiLU before it and a sum for each image where `fused`.
void gemm_pairs(const Kernels& k, int64_t n, int64_t c, int64_t o, int64_t h, int64_t w, int64_t kernel, int64_t stride,
                bool fused, DType dtype) {
    Convolved given(n, c, o, h, w, kernel, stride);
    const auto xh = to_half(given.x, DType::bf16), wh = to_half(given.weight, DType::bf16);
    const auto rh = to_half(given.residual, DType::bf16);
    for (auto [wide, half] : {std::pair{&given.x, &xh}, {&given.weight, &wh}, {&given.residual, &rh}})
        for (size_t i = 0; i < wide->size(); ++i) (*wide)[i] = from_half((*half)[i], DType::bf16);
    const auto multiplier = normal(n * c, 5), offset = normal(n * c, 6), add = normal(n * o, 7);
    GemmPairsArgs a{};
    given.describe(a);
    if (fused) {
        a.multiplier = {multiplier.data(), DType::f32, c}, a.offset = {offset.data(), DType::f32, c};
        a.add = {add.data(), DType::f32, o}, a.silu = true;
    }
    const int64_t taps = kernel * kernel, depth = pair_steps(a) * kGemmPairStep;
    std::vector<uint16_t> packed(depth * up(o, kGemmPairColumns));
    for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t in = 0; in < c; ++in)
            for (int64_t i = 0; i < o; ++i) {
                const int64_t d = (in / kGemmPairStep * taps + tap) * kGemmPairStep + in % kGemmPairStep;
                const int64_t o0 = i / kGemmPairColumns * kGemmPairColumns;
                packed[o0 * depth + d / 2 * 2 * kGemmPairColumns + 2 * (i - o0) + d % 2] = wh[(tap * c + in) * o + i];
            }
    expect_packed(k, given, packed);
    const bool wide = dtype == DType::f32;
    a.dtype = dtype, a.packed = packed.data(), a.run = 3, a.panels = 2;
    a.x = wide ? static_cast<const void*>(given.x.data()) : xh.data();
    a.residual = wide ? static_cast<const void*>(given.residual.data()) : rh.data();
    // Some images at a time, in bands of `tall` rows.
    const auto compute = [&](GemmPairsArgs b, int64_t images, int64_t tall) {
        std::vector<uint16_t> y(given.rows() * o * (wide ? 2 : 1));
        std::vector<int64_t> place(pair_steps(b));
        std::vector<float> scratch(b.run * kGemmTileRows * kGemmPairColumns);
        b.images = images, b.down = tall, b.y = y.data();
        std::vector<char> arranged(lay_out(b, place.data()));
        b.arranged = arranged.empty() ? nullptr : arranged.data();
        for (b.first = 0; b.first < n; b.first += images)
            for (b.top = 0; b.top < b.out_h; b.top += tall) {
                b.down = std::min(tall, b.out_h - b.top);
                if (b.arranged) k.gemm_conv_bf16_arrange(b, 0, images * ((b.down - 1) * stride + kernel));
                const int64_t tiles = images * (up(b.down * b.out_w, kGemmTileRows) / kGemmTileRows);
                const int64_t columns = b.panels * kGemmPairColumns;
                k.gemm_conv_bf16(b, scratch.data(), 0, up(tiles, b.run) / b.run * (up(o, columns) / columns));
            }
        return y;
    };
    const std::vector<uint16_t> y = compute(a, n, a.out_h);
    if (kernel > 1)
        for (int64_t tall = 1; tall <= a.out_h; ++tall)
            expect(compute(a, 1, tall) == y,
                   std::string(k.isa) + " gemm_conv_bf16 in bands of " + std::to_string(tall));
    const auto before = [&](int64_t image, int64_t channel, double v) {
        if (!fused) return v;
        const double t = v * multiplier[image * c + channel] + offset[image * c + channel];
        return t / (1 + std::exp(-t));
    };
    const auto added = [&](int64_t image, int64_t i) { return fused ? add[image * o + i] : 0.0; };
    const auto found = [&](int64_t i) {
        float value = wide ? 0 : from_half(y[i], DType::bf16);
        if (wide) std::memcpy(&value, y.data() + 2 * i, sizeof value);
        return value;
    };
    given.report(k, given.right(before, added, found, fused ? 1.0 / 256 : 1e-6, wide ? 0 : 1.0 / 256));
}

// The same in fp32 as pairs of bf16, of rows.
void gemm_split(const Kernels& k, int64_t rows, int64_t c, int64_t o, bool geglu) {
    Convolved given(1, c, o, rows, 1, 1, 1);
    GemmSplitArgs a{};
    given.describe(a);
    a.rows = rows, a.run = 2, a.panels = 2, a.geglu = geglu;
    const int64_t steps = up(c, kGemmPairStep) / kGemmPairStep, panel = steps * 2 * kGemmPairStep * kGemmPairColumns;
    std::vector<uint16_t> packed(up(o, kGemmPairColumns) / kGemmPairColumns * panel);
    for (int64_t in = 0; in < c; ++in)
        for (int64_t i = 0; i < o; ++i) {
            const int64_t column = geglu ? i % (o / 2) / 16 * 32 + i / (o / 2) * 16 + i % 16 : i;
            const int64_t tile = column / kGemmPairColumns * panel + in / kGemmPairStep * 2048;
            const int64_t at = tile + in % kGemmPairStep / 2 * 64 + column % 32 * 2 + in % 2;
            const float weight = given.weight[in * o + i],
                        high = from_half(to_half({weight}, DType::bf16)[0], DType::bf16);
            packed[at] = to_half({high}, DType::bf16)[0], packed[at + 1024] = to_half({weight - high}, DType::bf16)[0];
        }
    expect_packed(k, given, packed, true, geglu);
    std::vector<float> y(rows * (geglu ? o / 2 : o)), scratch(gemm_split_scratch(a));
    a.x = given.x.data(), a.packed = packed.data(), a.residual = given.residual.data(), a.y = y.data();
    const int64_t tiles = up(rows, kGemmTileRows) / kGemmTileRows, columns = a.panels * kGemmPairColumns;
    k.gemm_conv_split(a, scratch.data(), 0, up(tiles, a.run) / a.run * (up(o, columns) / columns));
    if (!geglu) {
        given.report(k, given.right([](int64_t, int64_t, double v) { return v; }, [](int64_t, int64_t) { return 0.0; },
                                    [&](int64_t i) { return y[i]; }, 0x1p-15, 0));
        return;
    }
    for (int64_t i = 0; i < rows * o / 2; ++i) {
        double sum[2], size[2];
        for (int half = 0; half < 2; ++half) {
            const int64_t column = half * (o / 2) + i % (o / 2);
            sum[half] = given.bias[column], size[half] = std::fabs(sum[half]);
            for (int64_t in = 0; in < c; ++in) {
                const double product = double(given.x[i / (o / 2) * c + in]) * given.weight[in * o + column];
                sum[half] += product, size[half] += std::fabs(product);
            }
        }
        const double want = sum[0] * sum[1] * 0.5 * (1 + std::erf(sum[1] / M_SQRT2)) + given.residual[i];
        const double allowed = 0x1p-14 * (size[0] * (size[1] + 1) + size[1] * (size[0] + 1));
        expect(std::fabs(y[i] - want) <= allowed, std::string(k.isa) + " gemm_conv split, geglu");
    }
}

struct ConvShape {
    int64_t n, c, o, h, w;
};
struct GroupShape {
    int64_t n, h, w;  // images, tiles
};

// fused: with everything around the convolution, and weights [O, 3, 3, C] that were packed before; else they were
// gathered, if asked for. int16: packed for products in 16-bit fixed point. Tiles of 6x6 have four times the error of
// those of 4x4. doubled: of an image half as high and wide.
void winograd(const Kernels& k, ConvShape shape, GroupShape group, bool fused, bool gathered = false,
              bool int16 = false, int64_t tile = 4, bool doubled = false) {
    const auto [n, c, o, h, w] = shape;
    const int half = doubled ? 1 : 0;
    const auto x = normal(n * (h >> half) * (w >> half) * c, 1), weight = normal(o * c * 9, 2),
               residual = normal(n * h * w * o, 3);
    const auto bias = normal(o, 4), add = normal(n * o, 5), multiplier = normal(n * c, 6), offset = normal(n * c, 7);
    std::vector<float> y(n * h * w * o);
    WinogradInt16Args a{};
    a.x = x.data(), a.doubled = doubled, a.weight = weight.data(), a.weight_last = fused, a.y = y.data();
    a.n = n, a.c = c, a.o = o, a.h = h, a.w = w, a.output_scale = fused ? 0.5f : 1.0f, a.silu = fused;
    a.group_n = group.n, a.group_h = group.h, a.group_w = group.w, a.tile = tile;
    const auto parts = [](int64_t total, int64_t size) { return (total + size - 1) / size; };
    const int64_t all = (tile + 2) * (tile + 2), weights_size = (9 + 2 * (tile + 2)) * kWinogradPoint;
    const int64_t blocks_c = parts(c, kWinogradBlock), blocks_o = parts(o, kWinogradBlock);
    const int64_t groups = parts(n, group.n) * parts(parts(h, tile), group.h) * parts(parts(w, tile), group.w);
    const int64_t down = parts(h, tile * group.h), across = parts(w, tile * group.w);
    std::vector<float> sums(n * down * across * 3 * o);
    a.sums = fused ? sums.data() : nullptr;
    const int64_t points = all * (kWinogradBlock * group.n * group.h * group.w + kMaxWidth);
    std::vector<float> v(groups * blocks_c * points), packed(blocks_o * blocks_c * all * kWinogradPoint);
    std::vector<float> patch((tile * group.h + 2) * (tile * group.w + 2) * kWinogradBlock);
    std::vector<float> products(weights_size + points), weights(9 * kWinogradPoint);
    a.v = v.data();
    if (fused) {
        a.bias = {bias.data(), DType::f32, 0}, a.add = {add.data(), DType::f32, o};
        a.multiplier = {multiplier.data(), DType::f32, c}, a.offset = {offset.data(), DType::f32, c};
        a.residual = residual.data();
        k.winograd_conv_pack(a, packed.data(), weights.data(), 0, blocks_o * blocks_c);
        a.packed = packed.data();
    }
    std::vector<float> ready(gathered ? blocks_o * blocks_c * 9 * kWinogradPoint : 0);
    if (gathered) {
        k.winograd_conv_gather(a, ready.data(), 0, blocks_o * blocks_c);
        a.gathered = ready.data();
    }
    std::vector<int16_t> pairs(int16 ? blocks_o * blocks_c * 36 * kWinogradPairs : 0);
    std::vector<int16_t> tiles(int16 ? groups * winograd_int16_group(a) : 0);
    if (int16) {
        for (int64_t task = 0; task < blocks_o * blocks_c; ++task) {
            k.winograd_conv_pack(a, packed.data(), weights.data(), task, task + 1);
            k.winograd_int16_pack(a, packed.data(), pairs.data(), task);
        }
        a.packed16 = pairs.data(), a.v16 = tiles.data();
        patch.resize(patch.size() + 36 * kWinogradBlock);
        products.resize(points);
        k.winograd_int16_input(a, patch.data(), 0, groups * blocks_c);
        k.winograd_int16_output(a, products.data(), 0, groups * blocks_o);
    } else {
        k.winograd_conv_input(a, patch.data(), 0, groups * blocks_c);
        k.winograd_conv_output(a, products.data(), 0, groups * blocks_o);
    }
    double error = 0, size = 0;
    const auto weight_at = [&](int64_t out, int64_t in, int64_t tap) {
        return static_cast<double>(weight[fused ? (out * 9 + tap) * c + in : (out * c + in) * 9 + tap]);
    };
    for (int64_t i = 0; i < n; ++i)
        for (int64_t p = 0; p < h * w; ++p)
            for (int64_t out = 0; out < o; ++out) {
                double want = 0;
                for (int64_t tap = 0; tap < 9; ++tap) {
                    const int64_t row = p / w + tap / 3 - 1, column = p % w + tap % 3 - 1;
                    if (row < 0 || row >= h || column < 0 || column >= w) continue;
                    for (int64_t in = 0; in < c; ++in) {
                        double t = x[((i * (h >> half) + (row >> half)) * (w >> half) + (column >> half)) * c + in];
                        if (fused) t = t * multiplier[i * c + in] + offset[i * c + in], t /= 1 + std::exp(-t);
                        want += t * weight_at(out, in, tap);
                    }
                }
                const size_t place = (i * h * w + p) * o + out;
                if (fused) want = 0.5 * (want + bias[out] + add[i * o + out] + residual[place]);
                error += (y[place] - want) * (y[place] - want), size += want * want;
            }
    const std::string name = int16 ? " winograd_conv in int16 " : " winograd_conv ";
    const auto sums_fit = [&](int64_t part, int64_t out) {
        const int64_t i = part / (down * across), y0 = part / across % down * tile * group.h,
                      x0 = part % across * tile * group.w;
        const int64_t y1 = std::min(h, y0 + tile * group.h), x1 = std::min(w, x0 + tile * group.w);
        const double count = static_cast<double>((y1 - y0) * (x1 - x0));
        const float* const got = sums.data() + part * 3 * o + out;
        double sum = 0, squares = 0;
        for (int64_t row = y0; row < y1; ++row)
            for (int64_t column = x0; column < x1; ++column) {
                const double deviation = double(y[((i * h + row) * w + column) * o + out]) - got[0];
                sum += deviation, squares += deviation * deviation;
            }
        return std::fabs(got[o] - sum) <= 1e-5 * (1 + std::sqrt(squares * count)) &&
               std::fabs(got[2 * o] - squares) <= 1e-5 * squares;
    };
    for (int64_t part = 0; fused && part < n * down * across; ++part)
        for (int64_t out = 0; out < o; ++out)
            expect(sums_fit(part, out), std::string(k.isa) + name + "sums of " + std::to_string(o));
    const double limit = int16 ? 1e-6 : tile == 4 ? 1e-12 : 2e-11;
    expect(error <= limit * size, std::string(k.isa) + name + std::to_string(c) + " to " + std::to_string(o) + ": " +
                                      std::to_string(std::sqrt(error / size)));
}

// q, k, v as views of [B, L, H, D]; mask: 0 none, 1 a bool of each head, 2 added, the same for every query.
void attention(const Kernels& k, int64_t b, int64_t h, int64_t l, int64_t s, int64_t d, int64_t dv, DType dtype,
               int masked) {
    const bool half = dtype != DType::f32;
    std::vector<float> inputs[3] = {normal(b * l * h * d, 1), normal(b * s * h * d, 2), normal(b * s * h * dv, 3)};
    std::vector<uint16_t> halves[3];
    for (int i = 0; half && i < 3; ++i) {
        halves[i] = to_half(inputs[i], dtype);
        for (size_t j = 0; j < inputs[i].size(); ++j) inputs[i][j] = from_half(halves[i][j], dtype);
    }
    const auto heads = [&](int i, int64_t rows, int64_t columns) {
        const void* ptr = half ? static_cast<const void*>(halves[i].data()) : inputs[i].data();
        return Heads{ptr, {rows * h * columns, columns, h * columns, 1}};
    };
    std::vector<float> added = normal(s, 4), out(b * l * h * dv);
    std::vector<uint8_t> taken(h * l * s);
    for (size_t i = 0; i < taken.size(); ++i) taken[i] = i % 3 != 0;
    std::vector<uint16_t> out_half(out.size());
    AttentionArgs a{};
    a.q = heads(0, l, d), a.k = heads(1, s, d), a.v = heads(2, s, dv);
    if (masked == 1) a.mask = {taken.data(), {0, l * s, s, 1}};
    if (masked == 2) a.mask = {added.data(), {0, 0, 0, 1}};
    a.mask_is_bool = masked == 1;
    a.out = half ? static_cast<void*>(out_half.data()) : out.data();
    a.out_stride[0] = l * h * dv, a.out_stride[1] = dv, a.out_stride[2] = h * dv;
    a.dtype = dtype, a.b = b, a.h = h, a.l = l, a.s = s, a.d = d, a.dv = dv, a.scale = 0.3f;
    const auto rounded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t packed = k.attention_packed_bytes(a);
    void* const scratch = std::aligned_alloc(64, rounded(k.attention_scratch_bytes(a)));
    if (packed) a.packed = std::aligned_alloc(64, rounded(packed));
    k.attention_pack(a, 0, packed ? b * h * ((s + kAttentionKeys - 1) / kAttentionKeys) : 0);
    k.attention(a, scratch, 0, b * h * ((l + kAttentionQueries - 1) / kAttentionQueries));
    std::free(scratch);
    std::free(a.packed);
    double worst = 0, largest = 0;
    for (int64_t n = 0; n < b * h * l; ++n) {
        const int64_t query = n % l, head = n / l % h, image = n / l / h;
        std::vector<double> weights(s), want(dv);
        double sum = 0;
        for (int64_t key = 0; key < s; ++key) {
            double score = 0;
            for (int64_t i = 0; i < d; ++i)
                score += static_cast<double>(inputs[0][((image * l + query) * h + head) * d + i]) *
                         inputs[1][((image * s + key) * h + head) * d + i];
            weights[key] = std::exp(0.3 * score + (masked == 2 ? added[key] : 0.0));
            if (masked == 1 && !taken[(head * l + query) * s + key]) weights[key] = 0;
            sum += weights[key];
        }
        for (int64_t i = 0; i < dv; ++i) {
            for (int64_t key = 0; key < s && sum > 0; ++key)
                want[i] += weights[key] / sum * inputs[2][((image * s + key) * h + head) * dv + i];
            const size_t o = ((image * l + query) * h + head) * dv + i;
            const double got = half ? from_half(out_half[o], dtype) : out[o];
            worst = std::fmax(worst, std::isnan(got) ? 1e9 : std::fabs(got - want[i]));
            largest = std::fmax(largest, std::fabs(want[i]));
        }
    }
    const double allowed = (dtype == DType::f32 ? 3e-6 : dtype == DType::bf16 ? 0x1p-6 : 0x1p-10) * largest;
    expect(worst <= allowed, std::string(k.isa) + " attention dtype " + std::to_string(static_cast<int>(dtype)) +
                                 " mask " + std::to_string(masked) + " " + std::to_string(l) + "x" + std::to_string(s) +
                                 "x" + std::to_string(d) + ": " + std::to_string(worst));
}

}  // namespace

int main() {
    int levels = 0;
    for (const char* isa : {"base", "avx2", "avx512", "avx512_bf16", "amx"}) {
        const Kernels* k = kernels_of(isa);
#ifdef DIFUSORES_EMULATES_AVX512  // compiled without its instructions: it runs wherever AVX2 does
        const Kernels emulated{"avx512",
                               avx512::group_norm_silu,
                               avx512::group_norm_silu_prepare,
                               avx512::group_norm_silu_stats,
                               avx512::group_norm_silu_combine,
                               avx512::group_norm_silu_apply,
                               avx512::geglu,
                               avx512::layer_norm_scratch,
                               avx512::layer_norm,
                               avx512::scheduler_step,
                               avx512::guidance_rescale,
                               avx512::sum_of_squares,
                               avx512::group_norm_silu_floor,
                               avx512::winograd_conv_input,
                               avx512::winograd_conv_output,
                               avx512::winograd_conv_pack,
                               avx512::winograd_conv_gather,
                               avx512::gemm_conv,
                               avx512::gemm_conv_pack,
                               avx512::attention_packed_bytes,
                               avx512::attention_scratch_bytes,
                               avx512::attention_pack,
                               avx512::attention};
        if (std::string(isa) == "avx512" && cpu_has("avx2")) k = &emulated;
#endif
        if (!k) continue;
        ++levels;
        for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
            for (const int masked : {0, 1, 2}) {
                attention(*k, 1, 2, 67, 99, 33, 7, dtype, masked);
                attention(*k, 2, 1, 3, 270, 40, 24, dtype, masked);
                attention(*k, 1, 1, 1, 1, 1, 1, dtype, masked);
                attention(*k, 1, 1, 20, 5, 130, 40, dtype, masked);
            }
        if (k->gemm_conv_bf16) {
            for (const auto& [fused, dtype] :
                 {std::pair{false, DType::bf16}, {true, DType::bf16}, {false, DType::f32}, {true, DType::f32}}) {
                gemm_pairs(*k, 2, 5, 17, 7, 4, 3, 2, fused, dtype);    // a copy of each tap
                gemm_pairs(*k, 1, 70, 70, 5, 6, 3, 1, fused, dtype);   // of each tap across
                gemm_pairs(*k, 2, 70, 33, 3, 32, 3, 2, fused, dtype);  // of none: whole tiles
                gemm_pairs(*k, 1, 96, 64, 16, 2, 1, 1, fused, dtype);  // x itself
                gemm_pairs(*k, 1, 33, 1, 3, 7, 1, 1, fused, dtype);
                gemm_pairs(*k, 2, 96, 64, 37, 1, 1, 1, fused, dtype);  // and a last tile that begins earlier
                gemm_pairs(*k, 3, 700, 65, 3, 3, 1, 1, fused, dtype);  // more than one chunk
            }
        }
        if (k->winograd_int16_output)
            for (const bool fused : {false, true}) {
                winograd(*k, {1, 1, 1, 1, 1}, {1, 1, 1}, fused, false, true);
                winograd(*k, {2, 67, 70, 6, 9}, {2, 2, 3}, fused, false, true);
                winograd(*k, {1, 40, 130, 19, 22}, {1, 3, 2}, fused, false, true);
                winograd(*k, {2, 40, 30, 6, 10}, {1, 1, 2}, fused, false, true, 4, true);
            }
        if (k->gemm_conv_split) {
            gemm_split(*k, 1, 1, 1, false);
            gemm_split(*k, 77, 1300, 70, false);  // two blocks of the depth, two shares
            gemm_split(*k, 49, 350, 64, true);
        }
        if (std::string(isa) == "avx512_bf16" || std::string(isa) == "amx") continue;  // the rest is of avx512
        for (const bool last : {false, true})
            for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
                for (const int64_t s : {1, 3, 16, 17, 33, 1025}) group_norm(*k, 2, 12, s, 3, last, dtype, false);
                for (const int64_t s : {5, 128, 384}) group_norm(*k, 2, 12, s, 3, last, dtype, true);
                group_norm(*k, 1, 70, 9, 35, last, dtype, false);
                group_norm(*k, 2, 5, 64, 1, last, dtype, false);
            }
        for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
            for (const int64_t d : {1, 7, 16, 67, 320}) tokens(*k, 3, d, dtype);
        for (const int64_t inner : {1, 7, 1023, 1024, 1025, 5000}) {
            step(*k, 2, inner);
            for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) rescale(*k, dtype, 2, inner);
        }
        for (const int64_t count : {1, 7, 63, 64, 65, 1023, 1024}) squares(*k, count);
        gemm(*k, 1, 70, 140, 5, 4, 3);  // more than one chunk and one share
        for (const bool fused : {false, true}) {
            gemm(*k, 2, fused ? 130 : 5, fused ? 70 : 17, 7, 4, fused ? 1 : 3);
            winograd(*k, {1, 1, 1, 1, 1}, {1, 1, 1}, fused);
            winograd(*k, {3, 5, 18, 4, 7}, {2, 1, 2}, fused);
            winograd(*k, {2, 67, 70, 6, 9}, {2, 2, 3}, fused);
            winograd(*k, {1, 17, 33, 19, 22}, {1, 3, 2}, fused, !fused);
            winograd(*k, {2, 17, 33, 6, 10}, {1, 1, 2}, fused, !fused, false, 4, true);
            if (std::strncmp(k->isa, "avx512", 6) == 0) {
                winograd(*k, {2, 67, 70, 6, 9}, {2, 1, 2}, fused, false, false, 6);
                winograd(*k, {1, 17, 33, 19, 22}, {1, 2, 3}, fused, !fused, false, 6);
                winograd(*k, {1, 17, 33, 8, 14}, {1, 1, 2}, fused, !fused, false, 6, true);
            }
        }
        winograd(*k, {1, 40, 33, 12, 4}, {1, 3, 1}, false, true);  // three tiles; above there are 1, 2, 4 and more
        winograd(*k, {1, 20, 33, 13, 19}, {1, 4, 5}, false);       // more than a few tiles, weights as they are
    }
    std::printf("%d levels, %d failures\n", levels, failures);
    return levels ? failures : 1;
}
