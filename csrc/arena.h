// Memory for the images of accelerated networks, which come and go in sizes that fit into each other. A heap puts small
// things into the gaps between them, and what is left of a gap is then too short for the next image: it grows to twice
// of what is held at a time. Here nothing else is put, a gap is taken by the image that fits it best, and pages stay
// for the next step: a page fault for every 4 KB would cost more than the writing.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>

namespace difusores {

class Arena {
  public:
    static constexpr int64_t kLeast = 4 << 20;  // bytes; smaller blocks are the heap's
    // At a page's begin, contents undefined (NaN where `poison` asks for it). nullptr: the arena is not in use, or has
    // no room; the caller then asks the heap.
    void* take(int64_t bytes);
    // What take(bytes) gave; any thread.
    void give(void* block, int64_t bytes);
    // Where addresses are limited (RLIMIT_AS) it stays out of use. Not in use, it gives free pages back to the system,
    // then and whenever a block comes back.
    void use(bool on);
    // As the recycler's.
    void poison(bool on) { poison_ = on; }
    // For a fork: its child has what other threads had locked in a state that can be used.
    void lock() { mutex_.lock(); }
    void unlock() { mutex_.unlock(); }

  private:
    bool reserve();
    char* grow(int64_t bytes);
    std::mutex mutex_;
    std::map<char*, int64_t> gaps_;                            // below top_: where, and bytes
    char *begin_ = nullptr, *top_ = nullptr, *end_ = nullptr;  // address space, of which that below `mapped_` may
    char* mapped_ = nullptr;                                   // be written
    bool used_ = false, poison_ = false;
};

// Never destroyed: tensors may be dropped after everything else.
Arena& arena();

}  // namespace difusores
