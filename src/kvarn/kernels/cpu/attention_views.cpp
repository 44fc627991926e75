#include "attention_views.h"

#include <algorithm>

#include "batch_checks.h"
#include "linear_tasks.h"

namespace kvarn {

AttentionViews checked_views(const View& view_tables, const View& view_slots, const View& row_starts, const View& rows,
                             const View& shifts, int64_t block_size, int64_t blocks, int64_t batch_rows,
                             const float* cos_sin, int64_t positions, int64_t rotary) {
  view_tables.expect_int32(2, "[V, W]");
  view_slots.expect_int32(1, "[V]");
  row_starts.expect_int32(1, "[V + 1]");
  rows.expect_int32(1, "[U]");
  shifts.expect_int32(1, "[U]");
  const int64_t views = view_tables.size(0), entries = rows.size(0);
  view_slots.expect_size(0, views, "view_tables' views");
  row_starts.expect_size(0, views + 1, "view_tables' views plus one");
  shifts.expect_size(0, entries, "rows");
  check_block_tables(view_tables, view_slots, block_size, blocks);
  check_starts(row_starts, views, entries, "rows that look at views");
  expect_range<int32_t>(rows, 0, batch_rows, "query rows");
  expect_range<int32_t>(shifts, 1 - positions, positions, "shifts");
  return {view_tables.as<int32_t>(), view_tables.size(1), view_slots.as<int32_t>(), row_starts.as<int32_t>(),
          rows.as<int32_t>(), shifts.as<int32_t>(), views, entries, cos_sin, rotary};
}

ViewsPlan::ViewsPlan(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots,
                     int64_t sequences, const AttentionViews& views, int64_t threads)
    : views_(views), rows_(query_starts[sequences]), positions_(views.entries), starts_(rows_ + 1),
      turns_(views.entries) {
  for (int64_t i = 0; i < views.entries; ++i) {
    positions_[i] = args.positions[views.rows[i]] - views.shifts[i];
    ++starts_[views.rows[i] + 1];
  }
  for (int64_t row = 0; row < rows_; ++row) starts_[row + 1] += starts_[row];
  std::vector<int32_t> next(starts_.begin(), starts_.end() - 1);
  for (int64_t i = 0; i < views.entries; ++i) turns_[next[views.rows[i]]++] = (int32_t)i;
  own_ = plan_attention(args, query_starts, kv_slots, sequences, threads);
  AttentionArgs turned = args;
  turned.positions = positions_.data();
  shared_ = plan_attention(turned, views.row_starts, views.kv_slots, views.views, threads);
  const int64_t heads = args.query_heads, dim = args.head_dim;
  queries_.reset(new float[views.entries * heads * dim]);
  results_.reset(new float[rows_ * heads * (dim + 2)]);
  turned_.reset(new float[views.entries * heads * (dim + 2)]);
}

void ViewsPlan::run(Team& team, const AttentionArgs& args) {
  const Kernels& use = kernels();
  const int64_t width = args.query_heads * args.head_dim;
  const TurnArgs turn{args.query, args.query_row_stride, args.query_head_stride, views_.cos_sin, views_.rotary,
                      views_.rows, views_.shifts, queries_.get(), args.query_heads, args.head_dim, args.is_bfloat16};
  run_rows(team, views_.entries, width, [&](int64_t begin, int64_t end) { use.turn_back(turn, begin, end); });

  AttentionArgs own = args, shared = args;
  own.unfinished = results_.get();
  shared.unfinished = turned_.get();
  shared.query = queries_.get();
  shared.query_row_stride = width;
  shared.query_head_stride = args.head_dim;
  shared.positions = positions_.data();
  shared.block_tables = views_.block_tables;
  shared.block_tables_stride = views_.block_tables_stride;
  const int64_t first = (int64_t)shared_.tasks.size(), scratch = std::max(own_.scratch_bytes, shared_.scratch_bytes);
  team.run(first + (int64_t)own_.tasks.size(), [&](int64_t i) {
    if (i < first)
      run_attention_task(shared, shared_, i, thread_scratch(scratch));
    else
      run_attention_task(own, own_, i - first, thread_scratch(scratch));
  });
  run_attention_merges(shared, shared_);
  run_attention_merges(own, own_);

  const JoinArgs join{results_.get(), turned_.get(), starts_.data(), turns_.data()};
  run_rows(team, rows_, width, [&](int64_t begin, int64_t end) { use.attention_join(args, join, begin, end); });
}

}  // namespace kvarn
