// Attention of rows to their own sequences' slots and beside them to views: runs of blocks that rows of several
// sequences look at, each at positions of its own.
//
// A row sees a slot of position q in a view, shifted by d, as one of position q + d. Only differences of positions turn
// keys against queries, so it looks at the view as a row d positions before itself, with its query turned back by as
// much. There are two ways to get that done:
//
// - Rows walk: a task that has a tile of several rows of one sequence goes through the views behind its own slots, with
//   one running softmax. That is what prefill's rows do, which cost as much as over slots of their own.
// - Rows meet: the turned row is one more row of one more sequence, the view. Rows of all sequences so lie in the same
//   tiles, which read a view once for all; what a row saw in its own slots and in views is joined in the end as the
//   splits of a long sequence are. That is for sequences of few rows (decode), whose time is that of reading.
#pragma once

#include <memory>
#include <vector>

#include "attention_plan.h"
#include "tensors.h"
#include "team.h"

namespace kvarn {

struct AttentionViews {
  const int32_t* block_tables;  // [V, W]
  int64_t block_tables_stride;
  const int32_t *kv_slots, *row_starts;  // [V], [V + 1]
  const int32_t *rows, *shifts;          // [U]
  int64_t views, entries;
  const float* cos_sin;  // [P, R]
  int64_t rotary;
};

// Checks view tensors against a pool of `blocks` blocks and a batch of `rows` rows, and describes them.
AttentionViews checked_views(const View& view_tables, const View& view_slots, const View& row_starts, const View& rows,
                             const View& shifts, int64_t block_size, int64_t blocks, int64_t batch_rows,
                             const float* cos_sin, int64_t positions, int64_t rotary);

// Like an AttentionPlan, for a batch with views.
class ViewsPlan {
 public:
  // Arguments as for `plan_attention`.
  ViewsPlan(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots, int64_t sequences,
            const AttentionViews& views, int64_t threads);

  // One layer; `args` are those of the plan with its tensors.
  void run(Team& team, const AttentionArgs& args);

 private:
  AttentionViews views_;
  std::vector<bool> meets_;  // [T] not: walks
  // Of rows that meet: how they look at views, one view's rows after another's, and the rows that are joined from that.
  std::vector<int32_t> rows_, shifts_, positions_;  // [U']
  std::vector<int32_t> numbers_, starts_, turns_;   // as in JoinArgs
  AttentionPlan own_, shared_;
  // What lies between the steps of a layer, of rows that meet.
  std::unique_ptr<float[]> queries_;           // [U', Hq, D] of the query's dtype
  std::unique_ptr<float[]> results_, turned_;  // [T, Hq, D + 2], [U', Hq, D + 2]

  // Returns where each view's rows start.
  std::vector<int32_t> gather(const int32_t* positions);
};

}  // namespace kvarn
