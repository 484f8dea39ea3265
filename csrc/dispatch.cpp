// Which ISA level runs: the highest that is compiled in and that the processor has, or the one asked for by name.
#include <cstring>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace difusores {
namespace {

// `products`: the level of the kernels that DIFUSORES_DECLARE_PRODUCTS lists; the rest: those of bf16 pairs.
#define DIFUSORES_TABLE(isa, products, ...)                                                                           \
    Kernels {                                                                                                         \
        #products, isa::group_norm_silu, isa::group_norm_silu_prepare, isa::group_norm_silu_stats,                    \
            isa::group_norm_silu_combine, isa::group_norm_silu_apply, isa::geglu, isa::layer_norm_scratch,            \
            isa::layer_norm, isa::scheduler_step, isa::guidance_rescale, isa::sum_of_squares,                         \
            isa::group_norm_silu_floor, isa::winograd_conv_input, isa::winograd_conv_output, isa::winograd_conv_pack, \
            isa::winograd_conv_gather, isa::gemm_conv, isa::gemm_conv_pack, products::attention_packed_bytes,         \
            products::attention_scratch_bytes, products::attention_pack, products::attention, __VA_ARGS__             \
    }

#define DIFUSORES_INT16 \
    avx512_bf16::winograd_int16_input, avx512_bf16::winograd_int16_output, avx512_bf16::winograd_int16_pack

const Kernels kTables[] = {
#ifdef DIFUSORES_HAS_AMX
    DIFUSORES_TABLE(avx512, amx, amx::gemm_conv_bf16_arrange, amx::gemm_conv_bf16, DIFUSORES_INT16,
                    amx::gemm_conv_split),
#endif
#ifdef DIFUSORES_HAS_AVX512_BF16
    DIFUSORES_TABLE(avx512, avx512_bf16, avx512_bf16::gemm_conv_bf16_arrange, avx512_bf16::gemm_conv_bf16,
                    DIFUSORES_INT16, nullptr),
#endif
#ifdef DIFUSORES_HAS_AVX512
    DIFUSORES_TABLE(avx512, avx512, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr),
#endif
#ifdef DIFUSORES_HAS_AVX2
    DIFUSORES_TABLE(avx2, avx2, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr),
#endif
    DIFUSORES_TABLE(base, base, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr),
};

// Whether the processor has tiles of bf16 and Linux lets this process use them, which it has to be asked for.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
    static const bool found = [] {
        constexpr long kRequestPermission = 0x1023, kTileData = 18;
        constexpr unsigned kTiles = 1u << 24 | 1u << 22;  // amx-tile, amx-bf16
        unsigned a = 0, b = 0, c = 0, d = 0;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles &&
               syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return found;
#else
    return false;
#endif
}

// Whether a level is worth taking unasked: Intel's products of bf16 pairs take twice as long as those of fp32.
bool is_fast(const char* isa) {
#if defined(__x86_64__)
    return std::strcmp(isa, "avx512_bf16") != 0 || !__builtin_cpu_is("intel");
#else
    return isa != nullptr;
#endif
}

}  // namespace

// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool cpu_has(const char* isa) {
    if (std::strcmp(isa, "base") == 0) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (std::strcmp(isa, "avx2") == 0) return avx2;
    if (std::strcmp(isa, "avx512") == 0)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (std::strcmp(isa, "avx512_bf16") == 0) return cpu_has_avx512_bf16();
    if (std::strcmp(isa, "amx") == 0) return cpu_has_avx512_bf16() && has_amx();
#endif
    return false;
}

bool cpu_has_avx512_bf16() {
#if defined(__x86_64__)
    return cpu_has("avx512") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

const Kernels* kernels_of(const char* isa) {
    for (const Kernels& table : kTables)
        if (std::strcmp(table.isa, isa) == 0) return cpu_has(isa) ? &table : nullptr;
    return nullptr;
}

const Kernels* choose_kernels(const char* forced) {
    if (forced && *forced) return kernels_of(forced);
    for (const Kernels& table : kTables)
        if (cpu_has(table.isa) && is_fast(table.isa)) return &table;
    return nullptr;
}

}  // namespace difusores
