// What winograd_conv and gemm_conv share: checks of images and parameters, memory that threads keep.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "../bindings.h"

namespace difusores {

constexpr int64_t kWork = 2 << 20;  // multiplications below which a second thread costs more than it brings

inline int64_t parts(int64_t a, int64_t size) { return (a + size - 1) / size; }

// Memory that a thread keeps for its next call: fresh pages would cost more than what is computed in them.
class Scratch {
  public:
    float* of(int64_t floats) {
        if (floats > size_) {
            constexpr size_t kPage = 2 << 20;
            const size_t bytes = (floats * sizeof(float) + kPage - 1) / kPage * kPage;
            memory_.reset();
            size_ = 0;
            memory_.reset(static_cast<float*>(std::aligned_alloc(kPage, bytes)));
            if (!memory_) throw std::bad_alloc();
            want_huge_pages(memory_.get(), bytes);
            size_ = floats;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t size_ = 0;
};

inline thread_local Scratch t_work;

// Memory for one call that is as large as an image: the arena's, where that is in use.
class CallScratch {
  public:
    CallScratch() = default;
    CallScratch(const CallScratch&) = delete;
    CallScratch& operator=(const CallScratch&) = delete;
    ~CallScratch() {
        if (block_) arena().give(block_, bytes_);
    }
    // Once.
    float* of(int64_t floats) {
        bytes_ = floats * int64_t{sizeof(float)};
        block_ = arena().take(bytes_);
        return block_ ? static_cast<float*>(block_) : heap_.of(floats);
    }

  private:
    void* block_ = nullptr;
    int64_t bytes_ = 0;
    Scratch heap_;
};

// [N, C, H, W] of this type whose elements lie as [N, H, W, C].
inline const void* image(const char* op, const Tensor& t, const char* name, ScalarType type) {
    STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == type, op, ": ", name, " must be 4-D ",
                    type == ScalarType::Float ? "float32" : "bfloat16");
    int64_t expected = 1;
    for (const int64_t d : {1, 3, 2, 0}) {
        STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == expected, op, ": ", name, " must be channels_last");
        expected *= t.size(d);
    }
    return t.data_ptr();
}
inline const float* image(const char* op, const Tensor& t, const char* name) {
    return static_cast<const float*>(image(op, t, name, ScalarType::Float));
}

// fp32 [rows, columns] or, of no row, [columns].
inline Param floats(const char* op, const OptionalTensor& t, int64_t rows, int64_t columns, const char* name) {
    if (!t) return {};
    const bool fits =
        rows ? t->dim() == 2 && t->size(0) == rows && t->size(1) == columns : t->dim() == 1 && t->size(0) == columns;
    STD_TORCH_CHECK(fits && t->scalar_type() == ScalarType::Float, op, ": ", name, " has the wrong shape or dtype");
    STD_TORCH_CHECK(columns == 1 || t->stride(rows ? 1 : 0) == 1, op, ": ", name,
                    " must be contiguous along the channels");
    return {t->data_ptr(), DType::f32, rows ? t->stride(0) : 0};
}

}  // namespace difusores
