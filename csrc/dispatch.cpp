// Which ISA level runs: the highest that is compiled in and that the processor has, or the one asked for by name.
#include <cstring>

#include "kernels.h"

namespace difusores {
namespace {

#define DIFUSORES_TABLE(isa)                                                                                           \
    Kernels {                                                                                                          \
        #isa, isa::group_norm_silu, isa::group_norm_silu_prepare, isa::group_norm_silu_stats,                          \
            isa::group_norm_silu_combine, isa::group_norm_silu_apply, isa::scheduler_step, isa::group_norm_silu_floor, \
            isa::winograd_conv_input, isa::winograd_conv_output, isa::winograd_conv_pack                               \
    }

const Kernels kTables[] = {
#ifdef DIFUSORES_HAS_AVX512
    DIFUSORES_TABLE(avx512),
#endif
#ifdef DIFUSORES_HAS_AVX2
    DIFUSORES_TABLE(avx2),
#endif
    DIFUSORES_TABLE(base),
};

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
#endif
    return false;
}

bool cpu_has_avx512_bf16() {
#if defined(__x86_64__)
    return cpu_has("avx512") && __builtin_cpu_supports("avx512bf16");
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
        if (cpu_has(table.isa)) return &table;
    return nullptr;
}

}  // namespace difusores
