// Threads that go through the time steps together, without a fork-join for each.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include "runtime.h"

namespace fastlstm::cpu {

// Cores of the machine, as far as the system tells. More threads than that would only wait for each other.
inline int core_count() {
  static const int count = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  return count;
}

// Phases of work that follow each other at once: a fork-join of torch's threads takes microseconds, which is longer
// than a time step of a small layer, so that one is made for all phases and the threads meet at a counter between them.
//
// Nobody waits for a thread that has not come. The leader divides each phase among those who have by then, so a nested
// call, a pool whose threads are busy or fewer threads than asked for cost time and never hang. Those who came are
// running threads: waiting for them ends, however many share a core.
class Lockstep {
 public:
  // The threads that are worth having.
  static int most_threads() { return std::min(thread_count(), core_count()); }

  // f(phase, part, parts) for phases 0, 1, ... in order, every part of a phase on another of at most `threads` threads.
  // It must not throw: the others would wait for ever.
  template <class F>
  static void run(int threads, int64_t phases, const F& f) {
    Lockstep team(threads);
    parallel(threads, 1, [&](int64_t begin, int64_t end) {
      if (begin > 0)
        team.follow(f);
      else
        team.lead(phases, end < threads, f);
    });
  }

 private:
  static constexpr int kPartBits = 16;
  static constexpr int64_t kFinished = INT64_MAX;
  static constexpr int kPatience = 4000;  // looks at a counter before the core is offered to others

  explicit Lockstep(int threads) : threads_(threads) {}

  template <class F>
  void lead(int64_t phases, bool others_come, const F& f) {
    if (others_come) wait(kPatience, [&] { return arrived_.load(std::memory_order_relaxed) == threads_ - 1; });
    int64_t expected = 0;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t parts = 1 + arrived_.load(std::memory_order_relaxed);
      order_.store(phase << kPartBits | parts, std::memory_order_release);
      f(phase, int64_t{0}, parts);
      expected += parts - 1;
      wait([&] { return done_.load(std::memory_order_acquire) == expected; });
    }
    order_.store(kFinished, std::memory_order_release);
  }

  template <class F>
  void follow(const F& f) {
    const int64_t part = 1 + arrived_.fetch_add(1, std::memory_order_relaxed);
    for (int64_t last = -1, order = -1;; last = order) {
      wait([&] { return (order = order_.load(std::memory_order_acquire)) != last; });
      if (order == kFinished) return;
      const int64_t parts = order & ((1 << kPartBits) - 1);
      if (part >= parts) continue;  // the leader had not seen this thread yet
      f(order >> kPartBits, part, parts);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  template <class Condition>
  static void wait(const Condition& condition) {
    while (!wait(kPatience, condition)) std::this_thread::yield();
  }

  // Whether the condition came true within so many looks.
  template <class Condition>
  static bool wait(int looks, const Condition& condition) {
    for (; looks > 0; --looks) {
      if (condition()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    return false;
  }

  const int threads_;
  // On cache lines of their own: each is written by one side while the other looks.
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> order_{-1};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace fastlstm::cpu
