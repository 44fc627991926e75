// A few threads working through one phase of independent tasks after another, without meeting in between.
//
// One parallel region of torch's own thread pool lasts for all phases. A phase is over when its tasks are, not when
// every thread has come by, so a thread that lost its processor to another process delays the others only by the task
// it holds. When that happens the leader goes on alone for a while: waiting for a thread that shares its processor
// costs more than it brings.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

namespace kvarn {

class Team {
 public:
  // Calls lead(team) on this thread; torch's other threads, `threads` in all, help with what it runs.
  template <class F>
  static void gather(int64_t threads, const F& lead) {
    Team team(threads);
    team.gather([](Team& team, const void* lead) { (*static_cast<const F*>(lead))(team); }, &lead);
  }

  // Calls task(i) for every i in [0, tasks), in any order, on any thread; returns when all are done. Every thread goes
  // through its own range of them in order, as memory is fastest read, then helps the others to finish theirs.
  // Rethrows what a task throws. Only the leader may call this.
  template <class F>
  void run(int64_t tasks, const F& task) {
    if (tasks <= 1 || size() == 1 || resting()) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
    } else {
      run([](const void* task, int64_t i) { (*static_cast<const F*>(task))(i); }, &task, tasks);
    }
  }

  int64_t size() const { return (int64_t)ranges_.size(); }

 private:
  using Lead = void (*)(Team&, const void*);
  using Task = void (*)(const void*, int64_t);

  // Tasks not yet taken, in one word so that they are taken one at a time: the end in the high half, the next low.
  struct alignas(64) Range {
    std::atomic<uint64_t> state{0};
    Range() = default;
    Range(const Range&) : Range() {}
  };

  explicit Team(int64_t threads) : ranges_(threads) {}
  void gather(Lead lead, const void* argument);
  void run(Task task, const void* argument, int64_t tasks);
  void help(int64_t worker);
  void work(int64_t worker);
  static bool resting();

  std::vector<Range> ranges_;
  Task task_ = nullptr;
  const void* argument_ = nullptr;
  std::exception_ptr error_;
  alignas(64) std::atomic<uint64_t> phase_{0};
  alignas(64) std::atomic<int64_t> remaining_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace kvarn
