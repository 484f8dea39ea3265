#include "recycler.h"

#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace difusores {
namespace {

constexpr int64_t kPage = 2 << 20;  // a huge one
constexpr int64_t kLine = 64;

void* allocate(int64_t bytes) {
    const int64_t alignment = bytes >= 4 * kPage ? kPage : kLine;
    void* const block = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (block) want_huge_pages(block, bytes);
    return block;
}

}  // namespace

void want_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
    if (end >= begin + 4 * kPage) madvise(reinterpret_cast<void*>(begin), (end - begin) / kPage * kPage, MADV_HUGEPAGE);
#endif
}

void* Recycler::reuse(int64_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    return lock && count_ > 0 && bytes_ == bytes ? kept_[--count_] : nullptr;
}

void* Recycler::take(int64_t bytes) {
    void* block = reuse(bytes);
    if (!block) block = allocate(bytes);
    if (block && poison_) std::memset(block, 0xff, bytes);  // NaN in every floating-point format
    return block;
}

void Recycler::give(void* block, int64_t bytes) {
    {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (lock && bytes_ != bytes) {
            while (count_ > 0) std::free(kept_[--count_]);
            bytes_ = bytes;
        }
        if (lock && count_ < kMostBlocks && (count_ + 1) * bytes <= kMostBytes) {
            kept_[count_++] = block;
            return;
        }
    }
    std::free(block);
}

Recycler& recycler() {
    static Recycler* const the_one = new Recycler;
    return *the_one;
}

}  // namespace difusores
