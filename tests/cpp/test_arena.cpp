// The arena among threads and across a fork. Prints one line per failure; exits with their number.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "arena.h"

using namespace difusores;

namespace {

constexpr int64_t kSizes[] = {4 << 20, 5 << 20, (8 << 20) + 100, 12 << 20};

// Takes and gives blocks, up to four at a time, whose ends keep this number; counts those which did not.
void take_and_give(int number, int steps, std::atomic<int>& wrong) {
    std::mt19937 draw(number);
    std::vector<std::pair<int64_t*, int64_t>> held;
    for (int step = 0; step < steps; ++step) {
        const int64_t bytes = kSizes[draw() % 4];
        int64_t* const block = static_cast<int64_t*>(arena().take(bytes));
        if (!block) {
            ++wrong;
            return;
        }
        block[0] = block[bytes / 8 - 1] = number;
        held.emplace_back(block, bytes);
        if (held.size() < 4) continue;
        std::swap(held[draw() % 4], held.back());
        const auto [oldest, size] = held.back();
        if (oldest[0] != number || oldest[size / 8 - 1] != number) ++wrong;
        arena().give(oldest, size);
        held.pop_back();
    }
    for (const auto& [block, bytes] : held) arena().give(block, bytes);
}

int threads() {
    std::atomic<int> wrong{0};
    std::vector<std::thread> workers;
    for (int number = 1; number <= 4; ++number)
        workers.emplace_back([number, &wrong] { take_and_give(number, 20000, wrong); });
    for (std::thread& worker : workers) worker.join();
    if (wrong) std::printf("FAILED %d blocks were another thread's too, or could not be had\n", wrong.load());
    return wrong;
}

// A child that waits for a lock which no thread of its own holds is ended by its alarm.
int forks() {
    std::atomic<bool> done{false};
    std::atomic<int> wrong{0};
    std::thread worker([&] {
        while (!done) take_and_give(9, 100, wrong);
    });
    int failures = 0;
    for (int i = 0; i < 50 && !failures; ++i) {
        const pid_t child = fork();
        if (!child) {
            alarm(10);
            take_and_give(5, 10, wrong);
            _exit(wrong);
        }
        int status = 0;
        waitpid(child, &status, 0);
        failures += status != 0;
    }
    done = true;
    worker.join();
    if (failures) std::printf("FAILED a child did not find the arena as it was\n");
    return failures;
}

}  // namespace

int main() {
    if (arena().take(Arena::kLeast)) {
        std::printf("FAILED it gives memory while it is not in use\n");
        return 1;
    }
    arena().use(true);
    const int failures = threads() + forks();
    std::printf("arena: %d failures\n", failures);
    return failures;
}
