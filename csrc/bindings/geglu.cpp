// geglu on a CPU: check the tensor, fill the struct, run the kernel over torch's threads.
#include <algorithm>
#include <string>
#include <vector>

#include "bindings.h"

namespace difusores {
namespace {

Tensor geglu(Tensor x, std::string approximate) {
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0, "geglu: the last dimension of x must be even");
    STD_TORCH_CHECK(x.is_contiguous(), "geglu: the kernel takes contiguous tensors");
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() /= 2;
    Tensor y = new_contiguous(x, sizes);
    if (y.numel() == 0) return y;
    const GegluArgs args = geglu_args(x, approximate == "tanh", y);
    torch::stable::parallel_for(0, args.rows, std::max<int64_t>(1, kGrain / args.columns),
                                [&](int64_t begin, int64_t end) { g_kernels->geglu(args, begin, end); });
    return y;
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) { m.impl("geglu", TORCH_BOX(&difusores::geglu)); }
