// attention on a CPU: check the tensors, fill the struct, run the kernel over torch's threads.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "bindings.h"

namespace difusores {
namespace {

constexpr int64_t kLeastWork = 1 << 21;  // multiplications below which a second thread costs more than it brings

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

Memory memory(int64_t bytes) {
    constexpr int64_t kLine = 64;
    Memory p(std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine));
    STD_TORCH_CHECK(p, "attention: there is no memory for ", bytes, " bytes");
    return p;
}

Tensor attention(Tensor q, Tensor k, Tensor v, OptionalTensor mask, double scale) {
    AttentionArgs a = attention_args(q, k, v, scale);
    // In memory [B, L, H, Dv], so that joining the heads copies nothing.
    const int64_t sizes[4] = {a.b, a.h, a.l, a.dv}, strides[4] = {a.l * a.h * a.dv, a.dv, a.h * a.dv, 1};
    Tensor out = new_result(q, 4, sizes, strides);
    if (a.b * a.h * a.l * a.dv == 0) return out;
    a.out = out.data_ptr();
    std::copy(strides, strides + 3, a.out_stride);
    if (mask) set_mask(*mask, a);
    Memory packed;
    if (const int64_t bytes = g_kernels->attention_packed_bytes(a)) {
        packed = memory(bytes);
        want_huge_pages(packed.get(), bytes);
        a.packed = packed.get();
        const int64_t blocks = (a.s + kAttentionKeys - 1) / kAttentionKeys;
        const int64_t elements = kAttentionKeys * (a.d + a.dv);
        torch::stable::parallel_for(0, a.b * a.h * blocks, std::max<int64_t>(1, kGrain / elements),
                                    [&](int64_t begin, int64_t end) { g_kernels->attention_pack(a, begin, end); });
    }
    const int64_t blocks = (a.l + kAttentionQueries - 1) / kAttentionQueries;
    const int64_t work = kAttentionQueries * (a.s + 8) * (a.d + a.dv);  // a query costs as much as 8 keys
    torch::stable::parallel_for(0, a.b * a.h * blocks, std::max<int64_t>(1, kLeastWork / work),
                                [&](int64_t begin, int64_t end) {
                                    const Memory scratch = memory(g_kernels->attention_scratch_bytes(a));
                                    g_kernels->attention(a, scratch.get(), begin, end);
                                });
    return out;
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) { m.impl("attention", TORCH_BOX(&difusores::attention)); }
