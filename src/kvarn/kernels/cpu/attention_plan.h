// How the attention of a batch is cut into tasks. A plan depends on shapes, positions and block tables only, so one
// serves all layers of a step: plan once; then for each layer run all tasks (in any order, on any threads), wait until
// they are done, and run the merges.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"

namespace kvarn {

struct AttentionPlan {
  std::vector<AttentionTask> tasks;  // the largest first
  std::vector<MergeTask> merges;     // of the tasks whose slots are split
  std::vector<float> partials;       // what tasks leave for the merges: one layer at a time
  std::vector<std::vector<ViewedSlots>> views;  // of the tasks that have any
  size_t scratch_bytes = 0;          // working memory that each thread hands to its tasks, 64-byte aligned
};

// What a tile of rows of one sequence, which it is called once for, looks at beside the sequence's slots.
using ViewsOfTile = std::function<std::vector<ViewedSlots>(int64_t sequence, int64_t row_begin, int64_t row_count)>;

// Of `args` all but the pointers to a layer's tensors (query, kv, sinks, out) must be set. `query_starts` [S + 1] and
// `kv_slots` [S] as for the op; `threads` run the tasks: with one, nothing is split. Tiles without views are cut as they
// are where nobody has any.
AttentionPlan plan_attention(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots,
                             int64_t sequences, int64_t threads, const ViewsOfTile& views_of_tile = {});

// `args` are those of the plan with a layer's tensors.
void run_attention_task(const AttentionArgs& args, const AttentionPlan& plan, int64_t task, void* scratch);
void run_attention_merges(const AttentionArgs& args, const AttentionPlan& plan);

// Memory of at least `bytes` that the calling thread keeps between calls, 64-byte aligned.
void* thread_scratch(size_t bytes);

}  // namespace kvarn
