// One stage of any sampler; formula and row layout: difusores/ops/scheduler_step.py.
//
// Bytes: every operand that the row reads once, every output once. An image is cut into blocks of kStepBlock elements
// whose intermediate values (e, xh, x0, z*) stay in L1; an fp32 operand is read in place, others are widened there.
// Layout: [B, inner] with any batch stride; blocks never cross images, so an image's bits do not depend on its batch.
// Sums, as ops/scheduler_step.py orders them: p_x, p_e and W's weights of x are two fp32 numbers each, what rounding
// leaves of them first; x comes last, or before the slots where one of them is what the step begins from.
#include "step_block.h"

namespace difusores {
namespace DIFUSORES_ISA_NAME {
namespace {

enum Position { kG = 0, kR = 3, kPX, kPE, kLo, kHi, kNu0, kNu1, kMode, kCin, kW = 12, kDraw = 39 };
constexpr int kColumns = 9;  // x0, xh, e, z*, s0 .. s4
constexpr int kOrders[2][kColumns] = {{0, 3, 2, 4, 5, 6, 7, 8, 1}, {0, 3, 2, 1, 4, 5, 6, 7, 8}};
constexpr int kInFull[] = {kPX, kPE, kW + 1, kW + kColumns + 1, kW + 2 * kColumns + 1};

void write(const Result& r, int64_t batch, int64_t inner, int64_t b, int64_t i, int64_t count, const float* v) {
    for (int64_t repeat = 0; repeat < r.repeats; ++repeat) {
        const int64_t first = (repeat * batch + b) * inner + i;
        switch (r.dtype) {
            case DType::f32: narrow<DType::f32>(r.ptr, first, count, v); break;
            case DType::bf16: narrow<DType::bf16>(r.ptr, first, count, v); break;
            case DType::f16: narrow<DType::f16>(r.ptr, first, count, v); break;
        }
    }
}

// Philox4x32-10 on counters [first, first + kWidth) in the lanes; draw in the third word, key = the image's seed.
void philox(uint64_t seed, uint64_t first, uint32_t draw, u32v out[4]) {
    for (int lane = 0; lane < kWidth; ++lane) {
        const uint64_t index = first + static_cast<uint64_t>(lane);
        uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = draw, c3 = 0;
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
            c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
            c1 = static_cast<uint32_t>(p1);
            c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
            c3 = static_cast<uint32_t>(p0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        out[0][lane] = c0, out[1][lane] = c1, out[2][lane] = c2, out[3][lane] = c3;
    }
}

// Standard normals for elements [i, i + count) of an image; i is a multiple of kStepBlock. Box-Muller on pairs.
void normals(uint64_t seed, uint32_t draw, int64_t i, int64_t count, Block& out) {
    for (int64_t k = 0; k < count; k += 4 * kWidth) {
        u32v bits[4];
        philox(seed, static_cast<uint64_t>((i + k) / 4), draw, bits);
        f32v n[4];
        for (int pair = 0; pair < 4; pair += 2) {
            const f32v a = __builtin_convertvector((i32v)(bits[pair] >> 9), f32v);
            const f32v t = __builtin_convertvector((i32v)(bits[pair + 1] >> 8), f32v) * 0x1p-24f;
            const f32v minus = -2.0f * log_f32((a + 0.5f) * 0x1p-23f);
            f32v radius, cosine, sine;
            for (int lane = 0; lane < kWidth; ++lane) radius[lane] = __builtin_sqrtf(minus[lane]);
            cos_sin_turns(t, &cosine, &sine);
            n[pair] = radius * cosine;
            n[pair + 1] = radius * sine;
        }
        for (int lane = 0; lane < kWidth; ++lane)
            for (int j = 0; j < 4; ++j) out.v[k + 4 * lane + j] = n[j][lane];
    }
}

// x0 = clamp(px * xh + pe * e, lo, hi), or clamp(., -s, s) / s. NaN stays NaN. rest: what rounding left of the row.
void predict(const float* row, const float* rest, const float* xh, const float* e, const float* s, int64_t padded,
             float* out) {
    const float lo = s ? -*s : row[kLo], hi = s ? *s : row[kHi], divisor = s ? *s : 1.0f;
    const f32v px = splat(row[kPX]), pe = splat(row[kPE]), low = splat(lo), high = splat(hi);
    const f32v px_rest = splat(rest[kPX]), pe_rest = splat(rest[kPE]);
    const bool clamps = lo != -__builtin_inff() || hi != __builtin_inff();
    for (int64_t k = 0; k < padded; k += kWidth) {
        f32v v = {};
        if (rest[kPX] != 0.0f) v = px_rest * load<DType::f32>(xh, k);
        if (rest[kPE] != 0.0f) v += pe_rest * load<DType::f32>(e, k);
        if (row[kPX] != 0.0f) v += px * load<DType::f32>(xh, k);
        if (row[kPE] != 0.0f) v += pe * load<DType::f32>(e, k);
        if (clamps) {
            v = v < low ? low : v;
            v = v > high ? high : v;
        }
        if (s) v /= divisor;
        store<DType::f32>(out, k, v);
    }
}

// z* = z * exp(nu0 + nu1 * v), or z * sqrt(v)
void scale_noise(const float* row, const float* z, const float* v, int64_t padded, float* out) {
    for (int64_t k = 0; k < padded; k += kWidth) {
        const f32v a = load<DType::f32>(v, k);
        f32v factor[1] = {a * row[kNu1] + row[kNu0]};
        if (row[kMode] == 1.0f) exp_f32(factor);
        else
            for (int lane = 0; lane < kWidth; ++lane) factor[0][lane] = __builtin_sqrtf(a[lane]);
        store<DType::f32>(out, k, load<DType::f32>(z, k) * factor[0]);
    }
}

// Which operands the row reads for the outputs that were asked for.
struct Reads {
    bool column[kColumns] = {};
    bool x0, z;
    explicit Reads(const SchedulerStepArgs& args, const float* row) {
        const bool wanted[3] = {args.y.ptr || args.m.ptr, args.d.ptr != nullptr, args.u.ptr != nullptr};
        for (int k = 0; k < 3; ++k)
            for (int j = 0; j < kColumns; ++j) column[j] |= wanted[k] && row[kW + kColumns * k + j] != 0.0f;
        x0 = args.x0.ptr || column[0];
        column[2] |= x0 && row[kPE] != 0.0f;  // e
        column[1] |= x0 && row[kPX] != 0.0f;  // xh
        z = column[3] || (column[1] && row[kR] != 0.0f);
    }
};

}  // namespace

void scheduler_step(const SchedulerStepArgs& args, int64_t begin, int64_t end) {
    float row[40];
    for (int k = 0; k < 40; ++k) row[k] = static_cast<float>(args.row[k]);
    float rest[40] = {};
    bool begins_from_slot = false;
    for (int j = 4; j < kColumns; ++j) begins_from_slot |= row[kW + j] == 1.0f;
    const auto& order = kOrders[begins_from_slot];
    for (const int k : kInFull) rest[k] = static_cast<float>(args.row[k] - double{row[k]});
    const Reads reads(args, row);
    const int64_t blocks = (args.inner + kStepBlock - 1) / kStepBlock;
    Block scratch[kColumns + 4];  // one per column, then x, v and two more model outputs
    Block next;                   // y, where the model's input is made from it
    for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks, i = task % blocks * kStepBlock;
        const int64_t count = args.inner - i < kStepBlock ? args.inner - i : kStepBlock;
        const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;
        const float* p[kColumns] = {};
        if (reads.column[2]) {
            p[2] = mix(args.e, row + kG, b, i, count, padded, scratch[2], scratch + kColumns + 2);
            if (args.factor) {
                combine<1, DType::f32>(p + 2, args.factor + b, padded, scratch[2].v, 0);
                p[2] = scratch[2].v;
            }
        }
        const float* z = nullptr;
        if (reads.z) {
            if (args.seeds) {
                normals(static_cast<uint64_t>(args.seeds[b]), static_cast<uint32_t>(row[kDraw]), i, count, scratch[3]);
                z = scratch[3].v;
            } else {
                z = read(args.noise, b, i, count, scratch[3]);
            }
        }
        if (reads.column[1]) {
            p[1] = read(args.sample, b, i, count, scratch[1]);
            if (row[kR] != 0.0f) {
                const float* terms[2] = {p[1], z};
                const float factors[2] = {1.0f, row[kR]};
                combine<2, DType::f32>(terms, factors, padded, scratch[1].v, 0);
                p[1] = scratch[1].v;
            }
        }
        if (reads.x0) {
            const bool in_place = args.x0.ptr && args.x0.dtype == DType::f32 && padded == count;
            float* out = in_place ? static_cast<float*>(args.x0.ptr) + b * args.inner + i : scratch[0].v;
            if (args.x0.ptr) fetch_next<true>(args.x0.ptr, args.x0.dtype, b * args.inner + i);
            predict(row, rest, p[1], p[2], args.threshold ? args.threshold + b : nullptr, padded, out);
            p[0] = out;
            if (args.x0.ptr && !in_place) write(args.x0, args.batch, args.inner, b, i, count, out);
        }
        if (reads.column[3]) {
            p[3] = z;
            if (row[kMode] != 0.0f) {
                scale_noise(row, z, read(args.variance, b, i, count, scratch[kColumns + 1]), padded, scratch[3].v);
                p[3] = scratch[3].v;
            }
        }
        for (int k = 0; k < 5; ++k)
            if (reads.column[4 + k]) p[4 + k] = read(args.slots[k], b, i, count, scratch[4 + k]);
        const Result* targets[3] = {&args.y, &args.d, &args.u};
        for (int k = 0; k < 3; ++k) {
            const bool model_input = k == 0 && args.m.ptr;
            if (!targets[k]->ptr && !model_input) continue;
            const float* operand[kColumns + 1];
            float weight[kColumns + 1];
            int terms = 0;
            if (const float of_x = rest[kW + kColumns * k + 1]; of_x != 0.0f) weight[0] = of_x, operand[terms++] = p[1];
            for (const int j : order)
                if (row[kW + kColumns * k + j] != 0.0f) {
                    weight[terms] = row[kW + kColumns * k + j];
                    operand[terms++] = p[j];
                }
            if (!model_input) {
                const int64_t to = b * args.inner + i;
                fetch_next<true>(targets[k]->ptr, targets[k]->dtype, to);
                switch (targets[k]->dtype) {
                    case DType::f32: combine<DType::f32>(terms, operand, weight, count, targets[k]->ptr, to); break;
                    case DType::bf16: combine<DType::bf16>(terms, operand, weight, count, targets[k]->ptr, to); break;
                    case DType::f16: combine<DType::f16>(terms, operand, weight, count, targets[k]->ptr, to); break;
                }
                continue;
            }
            combine<DType::f32>(terms, operand, weight, padded, next.v);
            if (args.y.ptr) write(args.y, args.batch, args.inner, b, i, count, next.v);
            const float* y[1] = {next.v};
            combine<1, DType::f32>(y, row + kCin, padded, next.v, 0);
            write(args.m, args.batch, args.inner, b, i, count, next.v);
        }
    }
}

// In four chains of fp32 lanes, so that no sum is of more than a few dozen squares; between blocks in fp64.
double sum_of_squares(const float* x, int64_t count) {
    f32v sums[4] = {};
    int64_t k = 0;
    for (; k + 4 * kWidth <= count; k += 4 * kWidth)
        for (int j = 0; j < 4; ++j) {
            const f32v v = load<DType::f32>(x, k + j * kWidth);
            sums[j] += v * v;
        }
    for (; k < count; k += kWidth) {
        const bool whole = k + kWidth <= count;
        const f32v v = whole ? load<DType::f32>(x, k) : load_tail<DType::f32>(x, k, static_cast<int>(count - k));
        sums[0] += v * v;
    }
    double total = 0;
    for (const f32v& sum : sums)
        for (int lane = 0; lane < kWidth; ++lane) total += static_cast<double>(sum[lane]);
    return total;
}

}  // namespace DIFUSORES_ISA_NAME
}  // namespace difusores
