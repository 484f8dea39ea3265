// One stage of any sampler; formula and row layout: difusores/ops/scheduler_step.py.
//
//     e = f sum g_k e_k,  xh = x + r z,  x0 = clamp(p_x xh + p_e e),  (y, d, u) = W [x0, xh, e, z*, s0 .. s4],
//     m = c_in y
//
// Bytes: every operand that the row reads once, every output once. Layout: [B, inner]. Vectors: a thread has the
// elements of one image that 128 bits hold of the widest dtype in the call, keeps all of their operands in registers,
// and asks for every operand before it computes (of a row that reads much: every operand but the slots, then these).
// Dtypes are the instance's; what the row reads is a word that all threads share, so a branch costs a test. What does
// not fit vectors (mixtures of dtypes, addresses, lengths, strides of images) goes element by element in an instance of
// its own.
//
// The row is read from device memory, by a counter that is there too: nothing waits for the host. An operand that the
// row reads and that is not there counts as NaN, as does every number of a row whose counter points outside its table.
// Sums are written as fmaf, so that an element has the same bits in every instance. p_x, p_e and W's weights of x are
// two fp32 numbers each, what rounding leaves of them first; x comes last, or before the slots where the step begins
// from one.
#pragma once
#include "cuda/common.cuh"
#include "cuda/philox.cuh"

namespace difusores {
namespace cuda {

constexpr unsigned kStepThreads = 128;
constexpr unsigned kStepBlocks = 8;  // a multiprocessor
// Blocks at most, about what runs at once: each waits for the counter and then for the row before it reads its first
// element, so it takes many.
constexpr int64_t kStepGrid = 1056;
constexpr int64_t kGridHeight = 65535;  // the most that there is

enum Position { kG = 0, kR = 3, kPX, kPE, kLo, kHi, kNu0, kNu1, kMode, kCin, kW = 12, kDraw = 39 };
constexpr int kColumns = 9;  // x0, xh, e, z*, s0 .. s4
constexpr int kFirstSlot = 4;

// What a row reads for the outputs that were asked for: bit j, column j; bit kColumns + p, position p is not 0; and:
constexpr unsigned kReadsX0 = 1u << 21, kReadsXh = 1u << 22, kReadsE = 1u << 23 /* and the next two */,
                   kReadsZ = 1u << 26, kReadsV = 1u << 27, kClips = 1u << 28, kBeginsFromSlot = 1u << 29;
constexpr unsigned kColumnZ = 1u << 3, kLateSlots = 7u << (kFirstSlot + 2);
__device__ __forceinline__ bool nonzero(unsigned reads, int position) { return reads >> (kColumns + position) & 1; }

// The first image of a block, and the only one where each has a factor f: that is a part of the block's row then, as
// f g_k, and the loops know nothing of it.
__device__ __forceinline__ int64_t first_image() { return int64_t{blockIdx.z} * gridDim.y + blockIdx.y; }

// A row in shared memory, written by the first kRow threads of a block.
struct Stage {
    float4 weights[kColumns];  // of a column: for y, d, u; 0 for what was not asked for
    float row[kW];
    float rest_x, rest_e;  // what rounding left of p_x, p_e
    float4 rest;           // and of the weights of xh
    float draw;
    // missing: kColumnZ, the slots' columns and kReadsV, as in what is read: operands that are not there.
    __device__ __forceinline__ void set(const SchedulerStepArgs& args, unsigned missing, int position, double exact) {
        const float nan = __uint_as_float(~0u), value = static_cast<float>(exact);
        if (position < kW) {
            const bool lacks = position == kR ? missing & kColumnZ : position == kMode && missing & kReadsV;
            row[position] = lacks && value != 0.0f ? nan : value;
            if (position == kPX) rest_x = static_cast<float>(exact - double{value});
            if (position == kPE) rest_e = static_cast<float>(exact - double{value});
            if (position < kR && value != 0.0f && args.factor && first_image() < args.batch)
                row[position] *= args.factor[first_image()];
        } else if (position < kDraw) {
            const int output = (position - kW) / kColumns, column = (position - kW) % kColumns;
            const bool wanted =
                output == 0 ? args.y.ptr || args.m.ptr : (output == 1 ? args.d.ptr : args.u.ptr) != nullptr;
            const bool lacks = missing >> column & 1 && value != 0.0f;
            reinterpret_cast<float*>(weights + column)[output] = !wanted ? 0.0f : lacks ? nan : value;
            if (column == 1)
                reinterpret_cast<float*>(&rest)[output] = wanted ? static_cast<float>(exact - double{value}) : 0.0f;
        } else {
            draw = value;
        }
    }
    // What it reads; the same in every thread.
    __device__ __forceinline__ unsigned reads(const SchedulerStepArgs& args) const {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        bool on = false;
        if (lane < kColumns) {
            const float4 w = weights[lane];
            on = w.x != 0.0f || w.y != 0.0f || w.z != 0.0f;
        } else if (lane < kColumns + kW) {
            on = row[lane - kColumns] != 0.0f;
        }
        unsigned all = __ballot_sync(kAllLanes, on);
        const bool x0 = args.x0.ptr || all & 1;
        const bool xh = all & 2 || (x0 && nonzero(all, kPX)), e = all & 4 || (x0 && nonzero(all, kPE));
        if (x0) all |= kReadsX0;
        if (xh) all |= kReadsXh;
        for (int k = 0; k < 3; ++k)
            if (e && args.e[k].ptr && nonzero(all, kG + k)) all |= kReadsE << k;
        if (all & kColumnZ || (xh && nonzero(all, kR))) all |= kReadsZ;
        if (all & kColumnZ && nonzero(all, kMode)) all |= kReadsV;
        const float most = __uint_as_float(0x7F800000u);
        if (!(row[kLo] == -most && row[kHi] == most)) all |= kClips;
        const bool begins = lane >= kFirstSlot && lane < kColumns && weights[lane].x == 1.0f;
        if (__ballot_sync(kAllLanes, begins)) all |= kBeginsFromSlot;
        return all;
    }
};

// --- where the elements of a thread are: what goes with the sample (x, z, slots, y, d, u, x0), what with the model ---

// Vectors of the sample's dtype S, image beside image, and of the model's dtype E, with one step between images.
template <DType S, DType E, int kElements>
struct Vectors {
    static constexpr int kVec = kElements;
    using Narrow = Vectors<S, E, 4>;  // for rows that read much
    using Count = unsigned;           // of images, and of the vectors of one
    using OfSample = RawOf<S, kVec>;
    using OfModel = RawOf<E, kVec>;
    int64_t at, of_model;
    static __device__ __forceinline__ bool fp32(const SchedulerStepArgs&) { return S == DType::f32; }
    __device__ __forceinline__ Vectors(const SchedulerStepArgs& args, int64_t b, int64_t i)
        : at(b * args.inner + i), of_model(b * args.e[0].batch_stride + i) {}
    __device__ __forceinline__ OfSample sample(const Operand& o) const {
        return *reinterpret_cast<const OfSample*>(static_cast<const char*>(o.ptr) + at * bytes_of(S));
    }
    __device__ __forceinline__ OfModel model(const Operand& o) const {
        return *reinterpret_cast<const OfModel*>(static_cast<const char*>(o.ptr) + of_model * bytes_of(E));
    }
    static __device__ __forceinline__ void widen_sample(const OfSample& raw, float (&out)[kVec]) {
        unpack<S, kVec>(raw, out);
    }
    static __device__ __forceinline__ void widen_model(const OfModel& raw, float (&out)[kVec]) {
        unpack<E, kVec>(raw, out);
    }
    __device__ __forceinline__ void put_sample(const Result& r, const float (&v)[kVec]) const {
        store<S, kVec>(r.ptr, at, v);
    }
    __device__ __forceinline__ void put_model(const Result& r, int64_t next, const float (&v)[kVec]) const {
        const RawOf<E, kVec> packed = pack<E, kVec>(v);
        char* p = static_cast<char*>(r.ptr) + at * bytes_of(E);
        for (int64_t repeat = 0; repeat < r.repeats; ++repeat, p += next * bytes_of(E))
            *reinterpret_cast<RawOf<E, kVec>*>(p) = packed;
    }
};

// Single elements of any dtypes, as the call says, with any step between images.
struct Elements {
    static constexpr int kVec = 1;
    using Narrow = Elements;
    using Count = int64_t;
    using OfSample = float;
    using OfModel = float;
    int64_t b, i, at;
    static __device__ __forceinline__ bool fp32(const SchedulerStepArgs& args) {
        return args.sample.dtype == DType::f32;
    }
    __device__ __forceinline__ Elements(const SchedulerStepArgs& args, int64_t b, int64_t i)
        : b(b), i(i), at(b * args.inner + i) {}
    __device__ __forceinline__ float sample(const Operand& o) const {
        return load_one(o.ptr, o.dtype, b * o.batch_stride + i);
    }
    __device__ __forceinline__ float model(const Operand& o) const { return sample(o); }
    static __device__ __forceinline__ void widen_sample(float v, float (&out)[1]) { out[0] = v; }
    static __device__ __forceinline__ void widen_model(float v, float (&out)[1]) { out[0] = v; }
    __device__ __forceinline__ void put_sample(const Result& r, const float (&v)[1]) const { put_model(r, 0, v); }
    __device__ __forceinline__ void put_model(const Result& r, int64_t next, const float (&v)[1]) const {
        const Packed<1> packed = pack<1>(r.dtype, v);
#pragma unroll 1
        for (int64_t repeat = 0; repeat < r.repeats; ++repeat) put<1>(r.ptr, at + repeat * next, r.dtype, packed);
    }
};

// total[k] += W[k, column] * operand, for the outputs k that read it.
template <int kOutputs, int kVec>
__device__ __forceinline__ void add_column(const float4& weights, const float (&operand)[kVec],
                                           float (&total)[kOutputs][kVec]) {
    const float w[3] = {weights.x, weights.y, weights.z};
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
        if (w[k] == 0.0f) continue;
#pragma unroll
        for (int i = 0; i < kVec; ++i) total[k][i] = fmaf(w[k], operand[i], total[k][i]);
    }
}

// x0 = clamp(p_x xh + p_e e, lo, hi), or clamp(., -s, s) / s. NaN stays NaN.
template <int kVec>
__device__ __forceinline__ void predict(const Stage& stage, unsigned reads, const float (&xh)[kVec],
                                        const float (&e)[kVec], bool fp32, const float* threshold, float (&x0)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) x0[i] = 0.0f;
    const auto add = [&](bool on, float weight, const float (&operand)[kVec]) {
        if (!on) return;
#pragma unroll
        for (int i = 0; i < kVec; ++i) x0[i] = fmaf(weight, operand[i], x0[i]);
    };
    add(fp32 && nonzero(reads, kPX), stage.rest_x, xh);
    add(fp32 && nonzero(reads, kPE), stage.rest_e, e);
    add(nonzero(reads, kPX), stage.row[kPX], xh);
    add(nonzero(reads, kPE), stage.row[kPE], e);
    if (!threshold && !(reads & kClips)) return;
    const float s = threshold ? *threshold : 1.0f;
    const float lo = threshold ? -s : stage.row[kLo], hi = threshold ? s : stage.row[kHi];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        x0[i] = x0[i] < lo ? lo : x0[i];
        x0[i] = x0[i] > hi ? hi : x0[i];
    }
    if (threshold) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) x0[i] /= s;
    }
}

// What nearly every row reads: x, one or two outputs of the model, given noise, two slots; y and d. Not churn, a third
// output, a learned variance, more slots, u, or a threshold of each image.
__device__ __forceinline__ bool usual(const SchedulerStepArgs& args, unsigned reads) {
    constexpr unsigned kAlways = kReadsXh | kReadsE;
    constexpr unsigned kNever = kReadsE << 2 | kReadsV | kLateSlots | 1u << (kColumns + kR);
    return (reads & (kAlways | kNever)) == kAlways && !args.u.ptr && !args.threshold;
}

// The elements from i on of image b. kAll: of any row, else of a usual one.
template <class Where, bool kPhilox, bool kAll>
__device__ __forceinline__ void step_elements(const SchedulerStepArgs& args, const Stage& stage, unsigned reads,
                                              int64_t b, int64_t i) {
    constexpr int kVec = Where::kVec, kModels = kAll ? 3 : 2, kSlots = kAll ? 5 : 2, kOutputs = kAll ? 3 : 2;
    const Where where(args, b, i);
    typename Where::OfSample raw_x{}, raw_z{}, raw_s[kSlots]{};
    typename Where::OfModel raw_e[kModels]{}, raw_v{};
    const auto reads_e = [&](int k) { return (!kAll && k == 0) || reads & kReadsE << k; };
    const auto ask_for_slots = [&] {
#pragma unroll
        for (int k = 0; k < kSlots; ++k)
            if (reads >> (kFirstSlot + k) & 1) raw_s[k] = where.sample(args.slots[k]);
    };
    if (!kAll || reads & kReadsXh) raw_x = where.sample(args.sample);
#pragma unroll
    for (int k = 0; k < kModels; ++k)
        if (reads_e(k)) raw_e[k] = where.model(args.e[k]);
    if (!kPhilox && reads & kReadsZ) raw_z = where.sample(args.noise);
    if (kAll && reads & kReadsV) raw_v = where.model(args.variance);
    if (!kAll) ask_for_slots();

    float x0[kVec], xh[kVec] = {}, e[kVec] = {}, z[kVec] = {}, v[kVec], total[kOutputs][kVec] = {};
#pragma unroll
    for (int k = 0; k < kModels; ++k) {
        if (!reads_e(k)) continue;
        where.widen_model(raw_e[k], v);
#pragma unroll
        for (int j = 0; j < kVec; ++j) e[j] = fmaf(stage.row[kG + k], v[j], e[j]);
    }
    where.widen_sample(raw_x, xh);
    if (kAll && reads & kReadsZ) {
        if constexpr (kPhilox)
            normals<kVec>(static_cast<uint64_t>(args.seeds[b]), i, static_cast<unsigned>(stage.draw), z);
        else where.widen_sample(raw_z, z);
        if (nonzero(reads, kR)) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) xh[j] = fmaf(stage.row[kR], z[j], xh[j]);
        }
    }
    const bool fp32 = Where::fp32(args), begins_from_slot = reads & kBeginsFromSlot;
    if (fp32 && reads & 2) add_column(stage.rest, xh, total);
    if (reads & kReadsX0) {
        predict<kVec>(stage, reads, xh, e, fp32, kAll && args.threshold ? args.threshold + b : nullptr, x0);
        if (args.x0.ptr) where.put_sample(args.x0, x0);
        if (reads & 1) add_column(stage.weights[0], x0, total);
    }
    if (!fp32 && reads & 2) add_column(stage.weights[1], xh, total);
    if (reads & kColumnZ) {
        if (!kAll) where.widen_sample(raw_z, z);
        if (kAll && reads & kReadsV) {
            const float mode = stage.row[kMode];
            where.widen_model(raw_v, v);
#pragma unroll
            for (int j = 0; j < kVec; ++j)
                z[j] *= mode == 1.0f   ? expf(fmaf(v[j], stage.row[kNu1], stage.row[kNu0]))
                        : mode == 2.0f ? sqrtf(v[j])
                                       : __uint_as_float(~0u);
        }
        add_column(stage.weights[3], z, total);
    }
    if (reads & 4) add_column(stage.weights[2], e, total);
    if (kAll) ask_for_slots();  // into registers that the noise and the model's outputs had
    if (fp32 && reads & 2 && begins_from_slot) add_column(stage.weights[1], xh, total);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
        if (!(reads >> (kFirstSlot + k) & 1)) continue;
        where.widen_sample(raw_s[k], v);
        add_column(stage.weights[kFirstSlot + k], v, total);
    }
    if (fp32 && reads & 2 && !begins_from_slot) add_column(stage.weights[1], xh, total);
    if (args.y.ptr) where.put_sample(args.y, total[0]);
    if (args.d.ptr) where.put_sample(args.d, total[1]);
    if (kAll && args.u.ptr) where.put_sample(args.u, total[kOutputs - 1]);
    if (args.m.ptr) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) total[0][j] *= stage.row[kCin];
        where.put_model(args.m, args.batch * args.inner, total[0]);
    }
}

template <class Where, bool kPhilox, bool kAll>
__device__ __forceinline__ void step_images(const SchedulerStepArgs& args, const Stage& stage, unsigned reads) {
    using Count = typename Where::Count;
    const Count vectors = static_cast<Count>(args.inner / Where::kVec), step = Count{gridDim.x} * blockDim.x;
    const Count images = static_cast<Count>(args.batch);
    for (Count b = static_cast<Count>(first_image()); b < images; b += gridDim.y * gridDim.z)
        for (Count k = Count{blockIdx.x} * blockDim.x + threadIdx.x; k < vectors; k += step) {
            asm volatile("" ::: "memory");  // the row stays in shared memory: registers are for operands
            step_elements<Where, kPhilox, kAll>(args, stage, reads, b, int64_t{k} * Where::kVec);
        }
}

template <class Where, bool kPhilox>
__global__ void __launch_bounds__(kStepThreads, kStepBlocks)
    scheduler_step_kernel(const __grid_constant__ SchedulerStepArgs args, const __grid_constant__ StepRow source,
                          unsigned missing) {
    DIFUSORES_SHARED(Stage, stage, 1);
    if (threadIdx.x < kRow) {
        const int position = static_cast<int>(threadIdx.x);
        stage->set(args, missing, position, number_of(source, index_of(source), position));
    }
    __syncthreads();
    const unsigned reads = stage->reads(args);
    if constexpr (Where::kVec > 1 && !kPhilox)
        if (usual(args, reads)) return step_images<Where, kPhilox, false>(args, *stage, reads);
    step_images<typename Where::Narrow, kPhilox, true>(args, *stage, reads);
}

// Whether there are vectors for this call, which every operand and result has whole.
inline __host__ bool step_fits(const SchedulerStepArgs& args) {
    const DType of_sample = args.sample.dtype, of_model = args.e[0].dtype;
    const int vec = of_sample == DType::f32 || of_model == DType::f32 ? 4 : 8;
    bool fits = args.inner % vec == 0 && args.inner / 4 < int64_t{1} << 31 && args.batch < int64_t{1} << 31 &&
                (of_model == of_sample || of_sample == DType::f32);
    const auto demand = [&](const void* p, DType dtype, int64_t stride, DType wanted, int64_t wanted_stride) {
        if (args.batch == 1) stride = wanted_stride = 0;
        fits = fits &&
               (!p || (dtype == wanted && stride == wanted_stride && aligned(p, stride, dtype, vec * bytes_of(dtype))));
    };
    const Operand* const like_sample[] = {&args.sample,   &args.noise,    &args.slots[0], &args.slots[1],
                                          &args.slots[2], &args.slots[3], &args.slots[4]};
    for (const Operand* o : like_sample) demand(o->ptr, o->dtype, o->batch_stride, of_sample, args.inner);
    for (const Operand* o : {&args.e[0], &args.e[1], &args.e[2], &args.variance})
        demand(o->ptr, o->dtype, o->batch_stride, of_model, args.e[0].batch_stride);
    for (const Result* r : {&args.y, &args.d, &args.u, &args.x0})
        demand(r->ptr, r->dtype, args.inner, of_sample, args.inner);
    demand(args.m.ptr, args.m.dtype, args.inner, of_model, args.inner);
    return fits;
}

// missing: as Stage::set takes it.
template <class Where, class Launch>
__host__ auto launch_step_of(const SchedulerStepArgs& args, const StepRow& row, unsigned missing,
                             const Launch& launch) {
    constexpr int64_t kOfBlock = int64_t{kStepThreads} * Where::kVec;
    const int64_t blocks = (args.inner + kOfBlock - 1) / kOfBlock;
    const int64_t of_image = args.batch < kStepGrid ? kStepGrid / args.batch : 1;
    const dim3 grid = {static_cast<unsigned>(blocks < of_image ? blocks : of_image),
                       static_cast<unsigned>(args.batch < kGridHeight ? args.batch : kGridHeight),
                       args.factor ? static_cast<unsigned>((args.batch + kGridHeight - 1) / kGridHeight) : 1};
    const auto kernel = args.seeds ? scheduler_step_kernel<Where, true> : scheduler_step_kernel<Where, false>;
    return launch(kernel, grid, kStepThreads, size_t{0}, args, row, missing);
}

// The instance for a call. launch(kernel, grid, threads, dynamic shared bytes, arguments of the kernel …)
template <class Launch>
__host__ auto launch_scheduler_step(const SchedulerStepArgs& given, const StepRow& row, const Launch& launch) {
    SchedulerStepArgs args = given;
    unsigned missing = 0;  // something else stands in for what is not there, times NaN
    if (!args.noise.ptr) args.noise = args.sample, missing |= args.seeds ? 0 : kColumnZ;
    if (!args.variance.ptr) args.variance = args.e[0], missing |= kReadsV;
    for (int k = 0; k < 5; ++k)
        if (!args.slots[k].ptr) args.slots[k] = args.sample, missing |= 1u << (kFirstSlot + k);
    constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
    const DType of_sample = args.sample.dtype, of_model = args.e[0].dtype;
    if (!step_fits(args)) return launch_step_of<Elements>(args, row, missing, launch);
    if (of_sample == bf16) return launch_step_of<Vectors<bf16, bf16, 8>>(args, row, missing, launch);
    if (of_sample == f16) return launch_step_of<Vectors<f16, f16, 8>>(args, row, missing, launch);
    if (of_model == bf16) return launch_step_of<Vectors<f32, bf16, 4>>(args, row, missing, launch);
    if (of_model == f16) return launch_step_of<Vectors<f32, f16, 4>>(args, row, missing, launch);
    return launch_step_of<Vectors<f32, f32, 4>>(args, row, missing, launch);
}

}  // namespace cuda
}  // namespace difusores
