// Memory for the outputs of a loop. What a dropped tensor held is kept and given to the next one of the same size:
// fresh large memory costs a page fault for every 4 KB, several times the price of writing it. Blocks of one size are
// kept, at most kMostBlocks of them and kMostBytes in all; a block of another size empties the store first.
#pragma once
#include <cstdint>
#include <mutex>

namespace difusores {

class Recycler {
  public:
    // 64 bytes aligned, contents undefined (NaN where `poison` asks for it); nullptr: no memory.
    void* take(int64_t bytes);
    // What take(bytes) gave; any thread.
    void give(void* block, int64_t bytes);
    // Whether blocks are handed out full of NaN, so that an element which is never written shows.
    void poison(bool on) { poison_ = on; }

  private:
    static constexpr int kMostBlocks = 8;
    static constexpr int64_t kMostBytes = int64_t{128} << 20;
    void* reuse(int64_t bytes);
    // Only ever tried: who does not get it (another thread has it, or had it when this process was forked) goes on to
    // the allocator.
    std::mutex mutex_;
    void* kept_[kMostBlocks] = {};
    int count_ = 0;
    int64_t bytes_ = 0;  // of each
    bool poison_ = false;
};

// Never destroyed: tensors may be dropped after everything else.
Recycler& recycler();

// A hint that large new memory be backed by huge pages, 512 times fewer faults; where the kernel refuses it, nothing
// changes.
void want_huge_pages(void* data, int64_t bytes);

}  // namespace difusores
