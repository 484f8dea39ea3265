#include "cuda/attention_wgmma.cuh"
#include "cuda/launch.cuh"

namespace difusores {
namespace cuda {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, asked for at run time: the module does not link to the driver.
cudaError_t find_encode(Encode& encode) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    encode = reinterpret_cast<Encode>(found);
    return error != cudaSuccess ? error : result == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorSymbolNotFound;
}

// [B, H, rows, D] in boxes of kMapRows rows and a chunk of columns; innermost first.
cudaError_t make_map(Encode encode, const AttentionArgs& args, const Heads& t, int64_t rows, CUtensorMap& map) {
    const int span = chunk_bytes(static_cast<int>(args.d));
    const auto extent = [](int64_t n) { return static_cast<cuuint64_t>(n); };
    // A dimension of one element may have any stride; a map wants multiples of 16 bytes.
    const auto bytes = [&](int64_t stride, int64_t size) {
        return static_cast<cuuint64_t>(2 * (size > 1 ? stride : args.d));
    };
    const cuuint64_t sizes[4] = {extent(args.d), extent(rows), extent(args.h), extent(args.b)};
    const cuuint64_t strides[3] = {bytes(t.stride[2], rows), bytes(t.stride[1], args.h), bytes(t.stride[0], args.b)};
    const cuuint32_t box[4] = {static_cast<cuuint32_t>(span / 2), kMapRows, 1, 1}, ones[4] = {1, 1, 1, 1};
    const CUresult result =
        encode(&map, args.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
               const_cast<void*>(t.ptr), sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
               span == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
               : span == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                            : CU_TENSOR_MAP_SWIZZLE_32B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

const char* attention_wgmma_refuses(const AttentionArgs& args, int64_t shared_limit, int capability) {
    return refuses_attention_wgmma(args, shared_limit, capability);
}

cudaError_t attention_wgmma(const AttentionArgs& args, cudaStream_t stream) {
    Encode encode = nullptr;
    CUtensorMap q, k, v;
    cudaError_t error = find_encode(encode);
    if (error == cudaSuccess) error = make_map(encode, args, args.q, args.l, q);
    if (error == cudaSuccess) error = make_map(encode, args, args.k, args.s, k);
    if (error == cudaSuccess) error = make_map(encode, args, args.v, args.s, v);
    if (error != cudaSuccess) return error;

    AttentionPlan plan{};
    plan.rows = kMapRows, plan.blocks = static_cast<unsigned>((args.l + kMapRows - 1) / kMapRows);
    const dim3 grid = {static_cast<unsigned>(plan.blocks * args.b * args.h), 1, 1};
    const auto of_width = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        const size_t shared = map_shared_bytes(kWidth);
        const OnStream launch{stream};
        return args.dtype == DType::f16
                   ? launch(attention_wgmma<DType::f16, kWidth>, grid, kMapThreads, shared, args, plan, q, k, v)
                   : launch(attention_wgmma<DType::bf16, kWidth>, grid, kMapThreads, shared, args, plan, q, k, v);
    };
    switch (args.d) {
        case 64: return of_width(Constant<64>{});
        case 80: return of_width(Constant<80>{});
        case 96: return of_width(Constant<96>{});
        case 128: return of_width(Constant<128>{});
        default: return of_width(Constant<160>{});
    }
}

}  // namespace cuda
}  // namespace difusores
