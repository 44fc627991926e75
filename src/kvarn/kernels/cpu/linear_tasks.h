// Cutting a linear layer into tasks for a team: panels of outputs times blocks of rows.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "team.h"

namespace kvarn {

inline void run_linear(Team& team, const LinearArgs& args, int64_t rows) {
  constexpr int64_t kTasksPerThread = 4;  // so that a thread which was held up leaves work to the others
  constexpr int64_t kTaskRows = 48;       // at least so many, before rows are shared out
  const Kernels& use = kernels();
  const int64_t panels = (args.out_features + kLinearPanel - 1) / kLinearPanel;
  const int64_t wanted = (team.size() * kTasksPerThread + panels - 1) / panels;
  const int64_t blocks = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, rows / kTaskRows));
  team.run(panels * blocks, [&](int64_t i) {
    const int64_t block = i / panels;
    use.linear(args, i % panels, rows * block / blocks, rows * (block + 1) / blocks);
  });
}

// Shares out rows of a row-by-row function; few elements are not worth another thread's attention.
template <class F>
void run_rows(Team& team, int64_t rows, int64_t row_elements, const F& work) {
  constexpr int64_t kTaskElements = 8192;
  const int64_t tasks = std::clamp<int64_t>(rows * row_elements / kTaskElements, 1, rows);
  team.run(tasks, [&](int64_t i) { work(rows * i / tasks, rows * (i + 1) / tasks); });
}

}  // namespace kvarn
