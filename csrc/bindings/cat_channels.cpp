// cat_channels on a CPU: y's channels behind x's, pixel by pixel in [N, H, W, C], image by image in [N, C, H, W].
// Least bytes: both once, and the result once.
#include <algorithm>
#include <cstring>

#include "convolution.h"

namespace difusores {
namespace {

Tensor cat_channels(Tensor x, Tensor y) {
    STD_TORCH_CHECK(x.dim() == 4 && y.dim() == 4 && x.scalar_type() == y.scalar_type(),
                    "cat_channels: the kernel takes two images of one dtype");
    for (const int64_t d : {0, 2, 3})
        STD_TORCH_CHECK(x.size(d) == y.size(d), "cat_channels: the images must agree but for their channels");
    const int64_t n = x.size(0), h = x.size(2), w = x.size(3), c = x.size(1) + y.size(1);
    const int64_t sizes[4] = {n, c, h, w};
    const auto joined = [&](int64_t rows, int64_t row, const int64_t (&strides)[4]) {
        Tensor out = new_result(x, 4, sizes, strides);
        const int64_t of_x = row * x.size(1) * x.element_size(), of_y = row * y.size(1) * x.element_size();
        const char *const from_x = static_cast<const char*>(x.data_ptr()), *const from_y =
                                                                               static_cast<const char*>(y.data_ptr());
        char* const to = static_cast<char*>(out.data_ptr());
        torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row * c)),
                                    [&](int64_t begin, int64_t end) {
                                        for (int64_t i = begin; i < end; ++i) {
                                            std::memcpy(to + i * (of_x + of_y), from_x + i * of_x, of_x);
                                            std::memcpy(to + i * (of_x + of_y) + of_x, from_y + i * of_y, of_y);
                                        }
                                    });
        return out;
    };
    if (x.is_contiguous() && y.is_contiguous()) return joined(n, h * w, {c * h * w, h * w, w, 1});
    image("cat_channels", x, "x", x.scalar_type()), image("cat_channels", y, "y", x.scalar_type());
    return joined(n * h * w, 1, {h * w * c, 1, w * c, c});
}

}  // namespace
}  // namespace difusores

STABLE_TORCH_LIBRARY_IMPL(difusores, CPU, m) { m.impl("cat_channels", TORCH_BOX(&difusores::cat_channels)); }
