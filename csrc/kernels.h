// The contract between the bindings and the kernels: plain data, no torch. One argument struct and one set of
// functions per op; every ISA level fills the same table. Offsets and sizes are int64. Work is split by the caller
// into ranges of tasks that depend on the shape alone, so that results never depend on the number of threads.
#pragma once
#include <cstdint>

namespace difusores {

constexpr int64_t kMaxWidth = 16;  // floats in the widest vector

enum class DType : int32_t { f32, bf16, f16 };

// Per-channel parameter: [C], or [N, C] with a row stride in elements. ptr == nullptr: absent.
struct Param {
    const void* ptr = nullptr;
    DType dtype = DType::f32;
    int64_t row_stride = 0;
};

// y = act((1 + scale) * GN(x + add + residual) + shift); see cpu/group_norm_silu.cpp.
struct GroupNormSiluArgs {
    const void* x;         // [N, C, S] (channels first) or [N, S, C] (channels last)
    const void* residual;  // like x, or nullptr
    void* y;               // like x
    void* sum;             // like x, or nullptr
    DType dtype;           // of x, residual, y, sum
    Param weight, bias;    // [C]
    Param scale, shift;    // [N, C]
    Param add;             // [N, C]
    int64_t n, c, s, groups;
    double eps;
    bool silu;
    // Channels first only: the largest group, in bytes, that is fetched ahead.
    int64_t fetch;
    // Channels last only. Rows of S are cut into chunks of chunk_rows; the rest is scratch.
    int64_t chunks, chunk_rows;
    int64_t padded_c;  // C rounded up to kMaxWidth
    float* scratch;    // [N, chunks, 2, padded_c]: mean and squared deviations of each channel of a chunk
    double* partial;   // [N, chunks, G, 2]: the same of each group
    float* channels;   // [N, 4, C]: add, and the center, multiplier and offset of each channel
};

// CUDA: how group_norm_silu cuts an image, whatever the batch. A tile is `chunk` elements of a group (channels first)
// or `chunk` rows of `span` channels (channels last), which are whole groups or one of `parts` of a group.
struct GroupNormPlan {
    bool channels_last;
    int vec;     // elements of an access
    bool whole;  // one kernel, which keeps its tile in shared memory: of whole groups, or of a cluster's share of them
    int64_t chunk, chunks;
    int64_t span, spans, groups_in_span, parts;
    int64_t table;         // channels first: channels of a tile at most, rounded up to 4
    unsigned threads;      // of a block
    unsigned cluster;      // blocks that share whole groups, which are then `chunks`; else 1
    int64_t partials;      // channels' moments between the two kernels, 16 bytes each; 0: one kernel
    int64_t shared_bytes;  // of the first kernel
};

// y = x[:, :D] * GELU(x[:, D:]); see cpu/geglu.cpp and cuda/geglu.cuh.
struct GegluArgs {
    const void* x;  // [rows, 2 D]
    void* y;        // [rows, D]
    DType dtype;
    int64_t rows, columns;  // columns: D
    bool tanh;              // GELU's approximation by tanh, else by erf
};

// h = x + residual, y = weight * (h - mean) / sqrt(var + eps) + bias, over rows; see cpu/layer_norm.cpp and
// cuda/layer_norm.cuh.
struct LayerNormArgs {
    const void* x;          // [rows, D]
    const void* residual;   // like x, or nullptr
    void* y;                // like x
    void* sum;              // h + sum_bias, like x, or nullptr
    DType dtype;            // of x, residual, y, sum
    Param weight, bias;     // [D]
    Param sum_bias;         // [D]
    int64_t rows, columns;  // columns: D
    double eps;
};

// CUDA: how layer_norm goes over a row: `lanes` threads, a power of two, with `per_lane` accesses of `vec` elements
// each.
struct LayerNormPlan {
    int vec, per_lane;
    unsigned lanes, threads;  // of a row, of a block
};

// y = scale * (x + bias[c] + add[n, c] + residual); see cuda/bias_residual.cuh.
struct BiasResidualArgs {
    const void* x;         // [N, C, S] (channels first) or [N, S, C] (channels last)
    const void* residual;  // like x, or nullptr
    void* y;               // like x; may be x or the residual
    DType dtype;           // of x, residual, y
    Param bias;            // [C]
    Param add;             // [N, C]
    int64_t n, c, s;
    float scale;
};

// The gradients of group_norm_silu; see cuda/group_norm_silu_backward.cuh. ptr == nullptr: not wanted.
struct GroupNormSiluGrads {
    const void* y;            // given: of y, like x
    const void* sum;          // given: of the sum, like x, or nullptr
    void* x;                  // of x and of the residual, like x
    Param weight, bias;       // written: [C]
    Param scale, shift, add;  // written: [N, C]
};

// CUDA: the tiles of the kernels backward, and how many floats they have between them. Channels first a row of `chunk`
// accesses, one of `chunks` of a channel, belongs to `lanes` threads.
struct GroupNormBackwardPlan {
    GroupNormPlan tiles;
    unsigned lanes, threads;
    int64_t chunk, chunks;
    int64_t floats;
};

// One operand of a step: [B, inner], any batch stride. ptr == nullptr: absent.
struct Operand {
    const void* ptr = nullptr;
    DType dtype = DType::f32;
    int64_t batch_stride = 0;
};

struct Result {
    void* ptr = nullptr;
    DType dtype = DType::f32;
    int64_t repeats = 1;  // written again every `batch` images
};

// See cpu/scheduler_step.cpp and difusores/ops/scheduler_step.py for the formula and the row's layout.
struct SchedulerStepArgs {
    const double* row;       // [40]; CUDA has StepRow
    Operand sample;          // x
    Operand e[3];            // model outputs
    Operand noise;           // z
    Operand variance;        // v
    Operand slots[5];        // s0 .. s4
    const float* threshold;  // [B] or nullptr
    const float* factor;     // [B] or nullptr: of e
    const int64_t* seeds;    // [B] or nullptr: in-kernel Philox noise
    Result y, d, u, x0, m;
    int64_t batch, inner;  // images, elements of an image
};

constexpr int64_t kStepBlock = 1024;

// See cpu/guidance_rescale.cpp for the formula.
struct GuidanceRescaleArgs {
    const double* row;    // [40], of scheduler_step; CUDA has StepRow
    Operand e[3];         // model outputs
    int64_t conditional;  // which of them is the conditional one
    double share;
    float* factor;         // [B]
    int64_t batch, inner;  // images, elements of an image
};

// Of a block of an image.
struct RescaleMoments {
    double mean, squares;  // squares: the sum of squared deviations from the mean
};

// CUDA: where a step's row comes from, for the host must not wait for the device to say.
struct StepRow {
    const double* table;  // [count, 40] in device memory; nullptr: `row` is the row
    const int64_t* step;  // the row's number, in device memory; nullptr: 0
    int64_t count;
    double row[40];
};

constexpr int64_t kWinogradBlock = 64;  // channels of a block, in and out
// Floats of one of the points of a block of transformed weights: a line more than a power of two, so that the points
// do not meet in one set of the cache.
constexpr int64_t kWinogradPoint = kWinogradBlock * kWinogradBlock + kMaxWidth;

// See cpu/winograd_conv.cpp for the formula and the steps. Tiles of 4x4 or 6x6 outputs are taken in groups: rectangles
// of group_h x group_w tiles, or group_n whole images. All tensors are fp32.
struct WinogradConvArgs {
    const float* x;       // [N, H, W, C], or [N, H / 2, W / 2, C] where each pixel is read as two by two
    bool doubled;         // whether it is
    const float* weight;  // [O, C, 3, 3] or, weight_last, [O, 3, 3, C]
    bool weight_last;
    int64_t tile;              // outputs down and across, 4 or 6
    const float* packed;       // what winograd_conv_pack wrote for this size of tile, or nullptr
    const float* gathered;     // what winograd_conv_gather wrote, or nullptr
    Param bias;                // [O]
    Param multiplier, offset;  // [N, C]
    Param add;                 // [N, O]
    const float* residual;     // like y, or nullptr
    float* y;                  // [N, H, W, O]
    float* sums;               // [N, groups of an image][3][O]: of y a pivot, and sums around it, or nullptr
    bool silu;
    float output_scale;
    int64_t n, h, w, c, o;
    int64_t group_n, group_h, group_w;
    int64_t first_group;  // the one of task 0
    float* v;             // [groups, C / 64][(tile + 2)^2 * (64 * tiles of a group + kMaxWidth)]: the transformed tiles
};

// int16 of one point of a block of weights in 16-bit fixed point: pairs, and 64 scales.
constexpr int64_t kWinogradPairs = kWinogradBlock * kWinogradBlock + 2 * kWinogradBlock;

// See cpu/winograd_int16.cpp.
struct WinogradInt16Args : WinogradConvArgs {
    const int16_t* packed16;  // what winograd_int16_pack wrote
    int16_t* v16;             // [groups][winograd_int16_group]: the transformed tiles and their scales
};

// int16 of the transformed tiles of a group, and of their scales.
inline int64_t winograd_int16_group(const WinogradInt16Args& a) {
    const int64_t tiles = a.group_n * a.group_h * a.group_w;
    const int64_t blocks = (a.c + kWinogradBlock - 1) / kWinogradBlock;
    const int64_t scales = (2 * blocks * tiles + 31) / 32 * 32;
    return 36 * (blocks * tiles * kWinogradBlock + 2 * kMaxWidth) + scales;
}

constexpr int64_t kGemmColumns = 64;  // of a panel of packed weights
constexpr int64_t kGemmChunk = 512;   // of the depth: what of a run's rows stays in L2 at a time

// y = conv(x, weight) + bias + residual, or GEGLU of it; see cpu/gemm_conv.cpp. All tensors are fp32.
struct GemmConvArgs {
    const void* x;         // [N, H, W, C]
    const void* packed;    // [O / 64][taps * C][64], the last panel as wide as O, rounded up to kMaxWidth
    Param bias;            // [O]
    const void* residual;  // like y, or nullptr
    void* y;               // [N, out_h, out_w, O]; with geglu O / 2
    int64_t n, h, w, c, o, out_h, out_w;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    bool gathers;    // else every output pixel's row lies in x
    bool geglu;      // packed: a vector of values and one of their gates in turn; O is a multiple of 2 kMaxWidth
    int64_t run;     // rows of a task
    int64_t panels;  // of a task
};

constexpr int64_t kGemmPairColumns = 32;  // of a panel of weights packed as pairs
constexpr int64_t kGemmPairStep = 32;     // input channels in one of AMX's tiles
constexpr int64_t kGemmTileRows = 16;     // output pixels in one
constexpr int64_t kGemmRunTiles = 32;     // of a task at most

// y = conv(act(multiplier x + offset), weight) + bias + add + residual, or GEGLU of it, plus residual; see
// cpu/gemm_conv_bf16.cpp. packed is bf16; multiplier and offset fp32.
struct GemmPairsArgs {
    DType dtype;               // of x, residual and y: bf16, or f32, where x is rounded as it is arranged
    const void* x;             // [N, H, W, C]
    const void* packed;        // [O / 32][C / 32][taps][16][32][2], C and O rounded up, zeros beyond
    bool geglu;                // packed: 16 values and their 16 gates in turn; O is a multiple of 32; there is no add
    Param bias;                // [O]
    Param multiplier, offset;  // [N, C], both or neither
    Param add;                 // [N, O]
    const void* residual;      // like y, or nullptr
    void* y;                   // [N, out_h, out_w, O]; with geglu O / 2
    bool silu;                 // of multiplier x + offset
    int64_t h, w, c, o, out_h, out_w;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int64_t first, images;  // those that are computed
    int64_t top, down;      // rows of their output that are, from `top` on
    // [images][C / 32][copies][rows][pitch][32] and room for a tile, or nullptr: tiles are read in x.
    char* arranged;
    int64_t image_bytes, copies, rows, pitch;
    bool split_w, split_h;  // whether each tap across, each tap down has a copy of its own
    const int64_t* place;   // [steps] bytes from a tile's first pixel to the 32 channels that a step multiplies
    int64_t run;            // tiles of a task
    int64_t panels;         // of a task
};

constexpr int64_t kGemmSplitDepth = 40;  // steps of the depth whose split rows stay in L2 at a time

// y = x weight^T + bias + residual of rows, or GEGLU of it; see cpu/gemm_conv_split.cpp. x, residual and y are fp32.
struct GemmSplitArgs {
    const float* x;         // [rows, C]
    const void* packed;     // [O / 32][C / 32][high, low][16][32][2] of bf16, C and O rounded up, zeros beyond
    Param bias;             // [O]
    const float* residual;  // like y, or nullptr
    float* y;               // [rows, O]; with geglu O / 2
    int64_t rows, c, o;
    bool geglu;      // packed: 16 values and their gates in turn; O is a multiple of 32
    int64_t run;     // tiles of a task
    int64_t panels;  // of a task
};

// Floats of a thread's sums and split rows.
inline int64_t gemm_split_scratch(const GemmSplitArgs& a) {
    const int64_t steps = (a.c + kGemmPairStep - 1) / kGemmPairStep, rows = a.run * kGemmTileRows;
    const int64_t panels = steps > kGemmSplitDepth ? a.panels : 1,
                  held = steps < kGemmSplitDepth ? steps : kGemmSplitDepth;
    return rows * (panels * kGemmPairColumns + held * kGemmPairStep);
}

// What the kernels above read of a weight [O, C, kernel_h, kernel_w]; see cpu/gemm_conv_pack.cpp.
struct GemmPackArgs {
    DType dtype;              // of the weight: f32 or bf16
    const void* const* rows;  // [O]: where each output channel's weights begin
    int64_t o, c, kernel_h, kernel_w;
    int64_t stride_c, stride_h, stride_w;  // in elements
    bool pairs;                            // packed as pairs of bf16, else as fp32
    bool split;                            // each weight in two of them, of one tap
    bool geglu;                            // vectors of values and of gates in turn; O is a multiple of 2 kMaxWidth
    uint32_t* packed;
};

// [B, H, rows, columns], any strides, in elements.
struct Heads {
    const void* ptr = nullptr;
    int64_t stride[4] = {};
};

// out = softmax(scale * q k^T + mask) v; see cpu/attention.cpp.
struct AttentionArgs {
    Heads q;                // [B, H, L, D]
    Heads k;                // [B, H, S, D]
    Heads v;                // [B, H, S, Dv]
    Heads mask;             // [B, H, L, S], stride 0 where it is broadcast, or absent
    void* out;              // [B, H, L, Dv], rows of Dv without gaps
    int64_t out_stride[3];  // in elements
    DType dtype;            // of q, k, v, out
    DType mask_dtype;       // where it is not bool
    bool mask_is_bool;
    int64_t b, h, l, s, d, dv;  // none is zero but s
    float scale;
    void* packed;  // attention_packed_bytes, aligned to 64, filled by attention_pack; nullptr where that is 0
    // CUDA: [B, H, padded_l], log2 of each query's sum of exp(score), or nullptr. padded_l: L rounded up to 64.
    float* log2_sums;
    int64_t padded_l;
};

// [B, H, rows, columns], rows without gaps, strides in elements.
struct Gradient {
    void* ptr;
    int64_t stride[3];
};

// CUDA: the gradients of attention but for that of the mask; see cuda/attention_backward.cuh.
struct AttentionGradArgs {
    Heads q, k, v, grad, out;
    Heads mask;  // as in AttentionArgs
    DType mask_dtype;
    bool mask_is_bool;
    Gradient grad_q, grad_k, grad_v;
    const float* log2_sums;  // [B, H, padded_l], of the forward pass
    float* delta;            // like log2_sums, written
    DType dtype;             // of all the rest
    int64_t b, h, l, s, d, dv, padded_l;
    float scale;
};

constexpr int64_t kAttentionQueries = 64;  // queries of a task
constexpr int64_t kAttentionKeys = 256;    // keys of a task of packing

// What the levels beyond AVX-512 have of their own: kernels whose time is in products of matrices.
#define DIFUSORES_DECLARE_PRODUCTS                                                     \
    int64_t attention_packed_bytes(const AttentionArgs&);                              \
    /* of one thread */                                                                \
    int64_t attention_scratch_bytes(const AttentionArgs&);                             \
    /* tasks: B * H * blocks of kAttentionKeys keys */                                 \
    void attention_pack(const AttentionArgs&, int64_t begin, int64_t end);             \
    /* tasks: B * H * blocks of kAttentionQueries queries; scratch is aligned to 64 */ \
    void attention(const AttentionArgs&, void* scratch, int64_t begin, int64_t end);

// What the levels with products of bf16 pairs alone have.
#define DIFUSORES_DECLARE_PAIRS                                                    \
    /* tasks: images * rows that taps reach */                                     \
    void gemm_conv_bf16_arrange(const GemmPairsArgs&, int64_t begin, int64_t end); \
    /* tasks: runs of tiles * shares of O; scratch: 512 run floats */              \
    void gemm_conv_bf16(const GemmPairsArgs&, float* scratch, int64_t begin, int64_t end);

// Beside them, with AVX512_VNNI.
#define DIFUSORES_DECLARE_INT16                                                                           \
    /* tasks: groups * blocks of C; scratch: 36 * 64 + (4 group_h + 2) (4 group_w + 2) * 64 floats */     \
    void winograd_int16_input(const WinogradInt16Args&, float* scratch, int64_t begin, int64_t end);      \
    /* tasks: groups * blocks of O; scratch: 36 * (64 * tiles of a group + kMaxWidth) floats */           \
    void winograd_int16_output(const WinogradInt16Args&, float* scratch, int64_t begin, int64_t end);     \
    /* task of winograd_conv_pack, points: what it wrote; packed: [O / 64][36][C / 64][kWinogradPairs] */ \
    void winograd_int16_pack(const WinogradInt16Args&, const float* points, int16_t* packed, int64_t task);

// The functions of one ISA level. They work on tasks [begin, end).
#define DIFUSORES_DECLARE_KERNELS(isa)                                                                                \
    namespace isa {                                                                                                   \
    /* channels first; tasks: N * G */                                                                                \
    void group_norm_silu(const GroupNormSiluArgs&, int64_t begin, int64_t end);                                       \
    /* channels last, in this order; tasks: N, N * chunks, N, N * chunks */                                           \
    void group_norm_silu_prepare(const GroupNormSiluArgs&, int64_t begin, int64_t end);                               \
    void group_norm_silu_stats(const GroupNormSiluArgs&, int64_t begin, int64_t end);                                 \
    void group_norm_silu_combine(const GroupNormSiluArgs&, int64_t begin, int64_t end);                               \
    void group_norm_silu_apply(const GroupNormSiluArgs&, int64_t begin, int64_t end);                                 \
    /* tasks: rows */                                                                                                 \
    void geglu(const GegluArgs&, int64_t begin, int64_t end);                                                         \
    /* tasks: rows; scratch: layer_norm_scratch floats */                                                             \
    int64_t layer_norm_scratch(const LayerNormArgs&);                                                                 \
    void layer_norm(const LayerNormArgs&, float* scratch, int64_t begin, int64_t end);                                \
    /* tasks: images * blocks of kStepBlock elements */                                                               \
    void scheduler_step(const SchedulerStepArgs&, int64_t begin, int64_t end);                                        \
    /* tasks: images * blocks of kStepBlock elements; moments: [tasks, 2], of the conditional output and the mixture  \
     */                                                                                                               \
    void guidance_rescale(const GuidanceRescaleArgs&, RescaleMoments*, int64_t begin, int64_t end);                   \
    /* of at most kStepBlock elements */                                                                              \
    double sum_of_squares(const float*, int64_t count);                                                               \
    /* tasks: groups * blocks of C; scratch: (4 group_h + 2) (4 group_w + 2) * 64 floats */                           \
    void winograd_conv_input(const WinogradConvArgs&, float* scratch, int64_t, int64_t);                              \
    /* tasks: groups * blocks of O; scratch: 21 * kWinogradPoint + 36 * (64 * tiles of a group + kMaxWidth) floats */ \
    void winograd_conv_output(const WinogradConvArgs&, float* scratch, int64_t, int64_t);                             \
    /* tasks: blocks of O * blocks of C; packed: 36 kWinogradPoint floats each, from `begin` on;                      \
       scratch: 9 kWinogradPoint */                                                                                   \
    void winograd_conv_pack(const WinogradConvArgs&, float* packed, float* scratch, int64_t, int64_t);                \
    /* tasks: blocks of O * blocks of C; gathered: tasks * 9 kWinogradPoint floats */                                 \
    void winograd_conv_gather(const WinogradConvArgs&, float* gathered, int64_t begin, int64_t end);                  \
    /* tasks: runs of rows * shares of O; scratch: run * (panels * kGemmColumns + kGemmChunk + kMaxWidth) floats */   \
    void gemm_conv(const GemmConvArgs&, float* scratch, int64_t begin, int64_t end);                                  \
    /* tasks: panels of O * blocks of kGemmPairStep of C */                                                           \
    void gemm_conv_pack(const GemmPackArgs&, int64_t begin, int64_t end);                                             \
    DIFUSORES_DECLARE_PRODUCTS                                                                                        \
    /* micro-benchmark: act, and statistics if asked, of a row of n, `repeats` times */                               \
    void group_norm_silu_floor(DType, const void*, void*, int64_t n, int64_t, bool);                                  \
    }
DIFUSORES_DECLARE_KERNELS(base)
DIFUSORES_DECLARE_KERNELS(avx2)
DIFUSORES_DECLARE_KERNELS(avx512)
namespace avx512_bf16 {
DIFUSORES_DECLARE_PRODUCTS
DIFUSORES_DECLARE_PAIRS
DIFUSORES_DECLARE_INT16
}  // namespace avx512_bf16
namespace amx {
DIFUSORES_DECLARE_PRODUCTS
DIFUSORES_DECLARE_PAIRS
// tasks: runs of tiles * shares of O; scratch: gemm_split_scratch floats
void gemm_conv_split(const GemmSplitArgs&, float* scratch, int64_t begin, int64_t end);
}  // namespace amx

// The same functions, chosen at load.
struct Kernels {
    const char* isa;
    decltype(&base::group_norm_silu) group_norm_silu;
    decltype(&base::group_norm_silu_prepare) group_norm_silu_prepare;
    decltype(&base::group_norm_silu_stats) group_norm_silu_stats;
    decltype(&base::group_norm_silu_combine) group_norm_silu_combine;
    decltype(&base::group_norm_silu_apply) group_norm_silu_apply;
    decltype(&base::geglu) geglu;
    decltype(&base::layer_norm_scratch) layer_norm_scratch;
    decltype(&base::layer_norm) layer_norm;
    decltype(&base::scheduler_step) scheduler_step;
    decltype(&base::guidance_rescale) guidance_rescale;
    decltype(&base::sum_of_squares) sum_of_squares;
    decltype(&base::group_norm_silu_floor) group_norm_silu_floor;
    decltype(&base::winograd_conv_input) winograd_conv_input;
    decltype(&base::winograd_conv_output) winograd_conv_output;
    decltype(&base::winograd_conv_pack) winograd_conv_pack;
    decltype(&base::winograd_conv_gather) winograd_conv_gather;
    decltype(&base::gemm_conv) gemm_conv;
    decltype(&base::gemm_conv_pack) gemm_conv_pack;
    decltype(&base::attention_packed_bytes) attention_packed_bytes;
    decltype(&base::attention_scratch_bytes) attention_scratch_bytes;
    decltype(&base::attention_pack) attention_pack;
    decltype(&base::attention) attention;
    // nullptr without products of bf16 pairs
    void (*gemm_conv_bf16_arrange)(const GemmPairsArgs&, int64_t begin, int64_t end);
    void (*gemm_conv_bf16)(const GemmPairsArgs&, float* scratch, int64_t begin, int64_t end);
    void (*winograd_int16_input)(const WinogradInt16Args&, float* scratch, int64_t begin, int64_t end);
    void (*winograd_int16_output)(const WinogradInt16Args&, float* scratch, int64_t begin, int64_t end);
    void (*winograd_int16_pack)(const WinogradInt16Args&, const float* points, int16_t* packed, int64_t task);
    // nullptr without AMX
    void (*gemm_conv_split)(const GemmSplitArgs&, float* scratch, int64_t begin, int64_t end);
};

// What this processor offers.
bool cpu_has(const char* isa);
bool cpu_has_avx512_bf16();
// The table of a level by name, or nullptr if it is not compiled in or this processor lacks it.
const Kernels* kernels_of(const char* isa);
// The highest level there is, or the one that DIFUSORES_ISA names; nullptr if that one is not to be had.
const Kernels* choose_kernels(const char* forced);

}  // namespace difusores
