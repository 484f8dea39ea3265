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

Heads heads_of(const Tensor& t, int64_t b, int64_t h, int64_t rows, int64_t columns, const char* name) {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == b && t.size(1) == h && t.size(2) == rows && t.size(3) == columns,
                    "attention: ", name, " has the wrong shape");
    return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

// Any shape that broadcasts to [B, H, L, S]; a repeated dimension has stride 0.
Heads mask_of(const Tensor& t, const AttentionArgs& a) {
    const int64_t sizes[4] = {a.b, a.h, a.l, a.s}, missing = 4 - t.dim();
    STD_TORCH_CHECK(missing >= 0, "attention: mask must have at most 4 dimensions");
    Heads mask{t.data_ptr(), {}};
    for (int64_t d = 0; d < t.dim(); ++d) {
        const int64_t size = t.size(d);
        STD_TORCH_CHECK(size == 1 || size == sizes[missing + d], "attention: mask does not broadcast to [B, H, L, S]");
        mask.stride[missing + d] = size == 1 ? 0 : t.stride(d);
    }
    return mask;
}

Tensor attention(Tensor q, Tensor k, Tensor v, OptionalTensor mask, double scale) {
    STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "attention: q, k, v must have 4 dimensions");
    AttentionArgs a{};
    a.b = q.size(0), a.h = q.size(1), a.l = q.size(2), a.d = q.size(3), a.s = v.size(2), a.dv = v.size(3);
    a.q = heads_of(q, a.b, a.h, a.l, a.d, "q");
    a.k = heads_of(k, a.b, a.h, a.s, a.d, "k");
    a.v = heads_of(v, a.b, a.h, a.s, a.dv, "v");
    a.dtype = dtype_of(q, "q");
    STD_TORCH_CHECK(dtype_of(k, "k") == a.dtype && dtype_of(v, "v") == a.dtype,
                    "attention: q, k, v must have one dtype");
    STD_TORCH_CHECK(a.d > 0, "attention: D must be at least 1");
    // In memory [B, L, H, Dv], so that joining the heads copies nothing.
    const int64_t sizes[4] = {a.b, a.h, a.l, a.dv}, strides[4] = {a.l * a.h * a.dv, a.dv, a.h * a.dv, 1};
    Tensor out = new_empty(q, 4, sizes, strides);
    if (a.b * a.h * a.l * a.dv == 0) return out;
    want_huge_pages(out);
    a.out = out.data_ptr();
    std::copy(strides, strides + 3, a.out_stride);
    a.scale = static_cast<float>(scale);
    if (mask && a.s > 0) {
        a.mask = mask_of(*mask, a);
        a.mask_is_bool = mask->scalar_type() == ScalarType::Bool;
        if (!a.mask_is_bool) a.mask_dtype = dtype_of(*mask, "mask");
    }
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
