#include "team.h"

#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>

namespace kvarn {
namespace {

using Clock = std::chrono::steady_clock;
constexpr uint64_t kOver = ~0ull;          // the phase in which helpers go home
constexpr int kSpins = 2000;               // some 30 us; phases follow each other faster
constexpr auto kStall = std::chrono::microseconds(500);  // tasks take tens of us: who holds one longer has lost its processor
// How long the leader then goes on alone. One stall is a process that woke up for a moment, such as the one that sends our
// tokens out: a long rest would cost more than it. Stall upon stall is one that stays, which every attempt to work
// together gives a time slice: rests double.
constexpr Clock::duration kFirstRest = std::chrono::milliseconds(2), kLongestRest = std::chrono::milliseconds(40);
constexpr Clock::duration kAgain = std::chrono::milliseconds(8);  // sooner after a rest, a stall goes on from the last

// Of all teams of the process, in ticks of Clock. Leaders that stall at once may lose a doubling, no more.
std::atomic<int64_t> rest_until{0}, last_rest{0};

int64_t ticks(Clock::time_point moment) { return moment.time_since_epoch().count(); }

void rest_after_stall(Clock::time_point started, Clock::time_point ended) {
  const bool again = ticks(started) - rest_until.load(std::memory_order_relaxed) < kAgain.count();
  const int64_t longer = std::min<int64_t>(2 * last_rest.load(std::memory_order_relaxed), kLongestRest.count());
  const int64_t rest = again ? std::max<int64_t>(longer, kFirstRest.count()) : kFirstRest.count();
  last_rest.store(rest, std::memory_order_relaxed);
  rest_until.store(ticks(ended) + rest, std::memory_order_relaxed);
}

// Spins while `waiting()`, then lets other threads have this processor in between.
template <class F>
void wait(const F& waiting) {
  for (int i = 0; waiting(); ++i) {
    if (i >= kSpins) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
}

}  // namespace

bool Team::resting() { return ticks(Clock::now()) < rest_until.load(std::memory_order_relaxed); }

void Team::gather(Lead lead, const void* argument) {
  if (size() == 1 || resting()) return lead(*this, argument);
  torch::stable::parallel_for(0, size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      if (worker > 0) {
        help(worker);
        continue;
      }
      struct GoHome {
        std::atomic<uint64_t>& phase;
        ~GoHome() { phase.store(kOver, std::memory_order_release); }
      } at_the_end{phase_};
      lead(*this, argument);
    }
  });
}

void Team::run(Task task, const void* argument, int64_t tasks) {
  task_ = task;
  argument_ = argument;
  failed_.store(false, std::memory_order_relaxed);
  remaining_.store(tasks, std::memory_order_relaxed);
  const int64_t threads = size();
  for (int64_t t = 0; t < threads; ++t) {
    const uint64_t begin = tasks * t / threads, end = tasks * (t + 1) / threads;
    ranges_[t].state.store(end << 32 | begin, std::memory_order_release);
  }
  phase_.fetch_add(1, std::memory_order_release);
  work(0);
  if (remaining_.load(std::memory_order_acquire) > 0) {
    const auto started = Clock::now();
    wait([&] { return remaining_.load(std::memory_order_acquire) > 0; });
    const auto ended = Clock::now();
    if (ended - started > kStall) rest_after_stall(started, ended);
  }
  if (failed_.load(std::memory_order_acquire)) std::rethrow_exception(error_);
}

void Team::help(int64_t worker) {
  for (uint64_t seen = 0; seen != kOver;) {
    uint64_t phase = seen;
    wait([&] { return (phase = phase_.load(std::memory_order_acquire)) == seen; });
    seen = phase;
    if (seen != kOver) work(worker);
  }
}

// Takes tasks until there are none. A task that is taken holds its phase open, so `task_` is that phase's.
void Team::work(int64_t worker) {
  const int64_t threads = size();
  int64_t done = 0;
  for (int64_t k = 0; k < threads; ++k) {
    std::atomic<uint64_t>& state = ranges_[(worker + k) % threads].state;
    for (;;) {
      uint64_t range = state.load(std::memory_order_relaxed);
      if ((uint32_t)range >= range >> 32) break;
      range = state.fetch_add(1, std::memory_order_acquire);
      if ((uint32_t)range >= range >> 32) break;
      try {
        task_(argument_, (int64_t)(uint32_t)range);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
      ++done;
    }
  }
  // Counted at the end, or a late helper's increment would touch the next phase.
  if (done > 0) remaining_.fetch_sub(done, std::memory_order_acq_rel);
}

}  // namespace kvarn
