// Threads that wait for work: a product takes microseconds, less than it takes to start a thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace apt {

class Pool {
  public:
    // Runs work(part) for each part, on the calling thread and on others; returns when all are done.
    // Calls from several threads take turns.
    void run(int parts, const std::function<void(int)> &work) {
        if (parts <= 1) {
            if (parts == 1) work(0);
            return;
        }
        std::lock_guard<std::mutex> turn(turn_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(threads_.size()) < parts - 1) {
                threads_.emplace_back([this, round = round_.load()] { wait(round); });
                threads_.back().detach();
            }
            work_ = &work;
            parts_ = parts;
            next_.store(0);
            busy_.store(static_cast<int>(threads_.size()));
            round_.fetch_add(1);
        }
        begun_.notify_all();
        take();
        while (busy_.load(std::memory_order_acquire)) std::this_thread::yield();
    }

  private:
    static constexpr int SPINS = 2000;  // about 20 µs: the next product of a model follows soon

    void take() {
        for (int part; (part = next_.fetch_add(1)) < parts_;) (*work_)(part);
    }

    void wait(uint64_t seen) {
        for (;;) {
            for (int i = 0; i < SPINS && round_.load(std::memory_order_acquire) == seen; ++i) {
                std::this_thread::yield();
            }
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                begun_.wait(lock, [&] { return round_.load() != seen; });
            }
            ++seen;
            take();
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable begun_;
    std::vector<std::thread> threads_;
    std::atomic<uint64_t> round_{0};
    std::atomic<int> next_{0}, busy_{0};
    const std::function<void(int)> *work_ = nullptr;
    int parts_ = 0;
};

}  // namespace apt
