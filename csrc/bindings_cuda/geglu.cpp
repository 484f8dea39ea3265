// geglu on CUDA: check the tensor, fill the struct, launch.
#include <string>
#include <vector>

#include "bindings_cuda.h"

namespace difusores {
namespace {

Tensor geglu(Tensor x, std::string approximate) {
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0, "geglu: the last dimension of x must be even");
    STD_TORCH_CHECK(x.is_contiguous(), "geglu: the kernel takes contiguous tensors");
    STD_TORCH_CHECK(x.size(x.dim() - 1) < int64_t{1} << 30, "geglu: the kernel takes at most 2^30 columns");
    const OnDevice device(x);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() /= 2;
    Tensor y = device.contiguous(x, sizes);
    if (y.numel() == 0) return y;
    OnDevice::check(cuda::geglu(geglu_args(x, approximate == "tanh", y), device.stream()), "geglu");
    return y;
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CUDA, m) { m.impl("geglu", TORCH_BOX(&difusores::geglu)); }
