#include "arena.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "recycler.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace difusores {
#if defined(__linux__)
namespace {

constexpr int64_t kSmallPage = 4096, kGrowth = 64 << 20;

int64_t whole_pages(int64_t bytes, int64_t page = kSmallPage) { return (bytes + page - 1) / page * page; }

}  // namespace

// Addresses cost nothing, where they are not limited; twice as many as the machine has memory leave room for gaps.
bool Arena::reserve() {
    if (begin_) return true;
    rlimit limit{};
    if (getrlimit(RLIMIT_AS, &limit) || limit.rlim_cur != RLIM_INFINITY) return false;
    const int64_t bytes = 2 * whole_pages(int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE), kGrowth);
    void* const space = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return false;
    begin_ = top_ = mapped_ = static_cast<char*>(space), end_ = begin_ + bytes;
    return true;
}

char* Arena::grow(int64_t bytes) {
    if (bytes > end_ - top_) return nullptr;
    if (top_ + bytes > mapped_) {
        const int64_t more = std::min<int64_t>(whole_pages(top_ + bytes - mapped_, kGrowth), end_ - mapped_);
        if (mprotect(mapped_, more, PROT_READ | PROT_WRITE)) return nullptr;
        want_huge_pages(mapped_, more);
        mapped_ += more;
    }
    char* const block = top_;
    top_ += bytes;
    return block;
}

void* Arena::take(int64_t bytes) {
    const int64_t size = whole_pages(bytes);
    char* block = nullptr;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!used_) return nullptr;
        auto best = gaps_.end();
        for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap)
            if (gap->second >= size && (best == gaps_.end() || gap->second < best->second)) best = gap;
        if (best == gaps_.end()) {
            // the gap at the end, if there is one, is the new block's begin
            auto last = gaps_.empty() ? gaps_.end() : std::prev(gaps_.end());
            if (last != gaps_.end() && last->first + last->second == top_) {
                if (grow(size - last->second)) block = last->first, gaps_.erase(last);
            } else {
                block = grow(size);
            }
        } else {
            block = best->first;
            if (best->second > size) gaps_.emplace(block + size, best->second - size);
            gaps_.erase(block);
        }
    }
    if (block && poison_) std::memset(block, 0xff, bytes);
    return block;
}

void Arena::give(void* block, int64_t bytes) {
    char* const begin = static_cast<char*>(block);
    const int64_t size = whole_pages(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!used_) madvise(begin, size, MADV_DONTNEED);
    auto gap = gaps_.emplace(begin, size).first;
    const auto next = std::next(gap);
    if (next != gaps_.end() && begin + size == next->first) gap->second += next->second, gaps_.erase(next);
    if (gap == gaps_.begin()) return;
    const auto before = std::prev(gap);
    if (before->first + before->second == begin) before->second += gap->second, gaps_.erase(gap);
}

void Arena::use(bool on) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ = on && reserve();
    if (!used_)
        for (const auto& [begin, size] : gaps_) madvise(begin, size, MADV_DONTNEED);
}

Arena& arena() {
    static Arena* const the_one = [] {
        Arena* const made = new Arena;
        pthread_atfork([] { arena().lock(); }, [] { arena().unlock(); }, [] { arena().unlock(); });
        return made;
    }();
    return *the_one;
}

#else

void* Arena::take(int64_t) { return nullptr; }
void Arena::give(void*, int64_t) {}
void Arena::use(bool) {}

Arena& arena() {
    static Arena the_one;
    return the_one;
}

#endif
}  // namespace difusores
