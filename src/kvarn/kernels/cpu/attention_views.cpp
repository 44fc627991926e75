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

namespace {

constexpr int64_t kFewestWalking = 4;  // rows of a sequence

// What each row looks at.
class Looks {
 public:
  Looks(const AttentionArgs& args, const AttentionViews& views, int64_t rows)
      : args_(args), views_(views), starts_(rows + 1), looks_(views.entries), reaches_(views.views) {
    for (int64_t i = 0; i < views.entries; ++i) ++starts_[views.rows[i] + 1];
    for (int64_t row = 0; row < rows; ++row) starts_[row + 1] += starts_[row];
    std::vector<int32_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t v = 0; v < views.views; ++v) {
      for (int64_t i = views.row_starts[v]; i < views.row_starts[v + 1]; ++i)
        looks_[next[views.rows[i]]++] = {v, views.shifts[i]};
      find_reach(v);
    }
  }

  bool any(int64_t row_begin, int64_t row_count) const { return starts_[row_begin] < starts_[row_begin + row_count]; }

  // Whether some rows look at the same views with the same shifts. Rows that can see nothing of a view may be left out
  // of it, and views of which no row sees anything are left out of `through`.
  bool alike(int64_t row_begin, int64_t row_count, std::vector<ViewedSlots>& through) const {
    struct Found {
      int64_t looking = 0, seeing = 0;
      int32_t shift = 0;
    };
    std::vector<Found> found(views_.views);
    for (int64_t row = row_begin; row < row_begin + row_count; ++row) {
      for (int64_t i = starts_[row]; i < starts_[row + 1]; ++i) {
        const Look look = looks_[i];
        Found& view = found[look.view];
        if (view.looking++ == 0) view.shift = look.shift;
        const bool twice = i > starts_[row] && looks_[i - 1].view == look.view;
        if (twice || view.shift != look.shift) return false;
        view.seeing += args_.positions[row] - look.shift >= reaches_[look.view].lowest;
      }
    }
    const int32_t *positions = args_.positions + row_begin, *end = positions + row_count;
    const int64_t first = *std::min_element(positions, end);
    for (int64_t v = 0; v < views_.views; ++v) {
      if (found[v].looking == 0) continue;
      const int32_t shift = found[v].shift;
      const Reach reach = reaches_[v];
      if (found[v].seeing != std::count_if(positions, end, [=](int32_t p) { return p - shift >= reach.lowest; }))
        return false;
      const bool behind = args_.window > 0 && first - shift - args_.window >= reach.highest;
      if (found[v].seeing > 0 && !behind)
        through.push_back({views_.block_tables + v * views_.block_tables_stride, 0, views_.kv_slots[v], shift,
                           reach.lowest});
    }
    return true;
  }

 private:
  struct Look {
    int64_t view;
    int32_t shift;
  };
  struct Reach {  // of the positions that a view's slots hold
    int32_t lowest = INT32_MAX, highest = -1;
  };
  const AttentionArgs& args_;
  const AttentionViews& views_;
  std::vector<int32_t> starts_;  // [T + 1]: row r has looks_[starts_[r]] to looks_[starts_[r + 1] - 1], views rising
  std::vector<Look> looks_;
  std::vector<Reach> reaches_;

  void find_reach(int64_t v) {
    const int32_t* table = views_.block_tables + v * views_.block_tables_stride;
    Reach& reach = reaches_[v];
    for (int64_t i = 0; i < views_.kv_slots[v]; ++i) {
      const int32_t position =
          args_.slot_positions[table[i / args_.block_size] * args_.slot_positions_stride + i % args_.block_size];
      if (position >= 0) reach.lowest = std::min(reach.lowest, position);
      reach.highest = std::max(reach.highest, position);
    }
  }
};

}  // namespace

ViewsPlan::ViewsPlan(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots,
                     int64_t sequences, const AttentionViews& views, int64_t threads)
    : views_(views), meets_(query_starts[sequences]) {
  const int64_t rows = query_starts[sequences];
  const Looks looks(args, views, rows);
  AttentionArgs own = args, turned = args;
  own.cos_sin = views.cos_sin;
  own.rotary = views.rotary;
  own_ = plan_attention(own, query_starts, kv_slots, sequences, threads, [&](int64_t s, int64_t row, int64_t count) {
    std::vector<ViewedSlots> through;
    const bool many = query_starts[s + 1] - query_starts[s] >= kFewestWalking;
    if (!looks.any(row, count) || (many && looks.alike(row, count, through))) return through;
    std::fill_n(meets_.begin() + row, count, true);
    return std::vector<ViewedSlots>{};
  });
  const std::vector<int32_t> row_starts = gather(args.positions);
  if (numbers_.empty()) return;
  turned.positions = positions_.data();
  shared_ = plan_attention(turned, row_starts.data(), views.kv_slots, views.views, threads);
  const int64_t heads = args.query_heads, dim = args.head_dim, entries = (int64_t)rows_.size();
  queries_.reset(new float[entries * heads * dim]);
  results_.reset(new float[rows * heads * (dim + 2)]);
  turned_.reset(new float[entries * heads * (dim + 2)]);
}

std::vector<int32_t> ViewsPlan::gather(const int32_t* positions) {
  std::vector<int32_t> counts(meets_.size()), next(meets_.size()), row_starts{0};
  for (int64_t i = 0; i < views_.entries; ++i) ++counts[views_.rows[i]];
  starts_.push_back(0);
  for (size_t row = 0; row < meets_.size(); ++row) {
    if (!meets_[row]) continue;
    numbers_.push_back((int32_t)row);
    next[row] = starts_.back();
    starts_.push_back(starts_.back() + counts[row]);
  }
  turns_.resize(starts_.back());
  for (int64_t v = 0; v < views_.views; ++v) {
    for (int64_t i = views_.row_starts[v]; i < views_.row_starts[v + 1]; ++i) {
      const int32_t row = views_.rows[i], shift = views_.shifts[i];
      if (!meets_[row]) continue;
      turns_[next[row]++] = (int32_t)rows_.size();
      rows_.push_back(row);
      shifts_.push_back(shift);
      positions_.push_back(positions[row] - shift);
    }
    row_starts.push_back((int32_t)rows_.size());
  }
  return row_starts;
}

void ViewsPlan::run(Team& team, const AttentionArgs& args) {
  const Kernels& use = kernels();
  const int64_t width = args.query_heads * args.head_dim, meeting = (int64_t)numbers_.size();
  if (meeting > 0) {
    const TurnArgs turn{args.query, args.query_row_stride, args.query_head_stride, views_.cos_sin, views_.rotary,
                        rows_.data(), shifts_.data(), queries_.get(), args.query_heads, args.head_dim,
                        args.is_bfloat16};
    run_rows(team, (int64_t)rows_.size(), width,
             [&](int64_t begin, int64_t end) { use.turn_back(turn, begin, end); });
  }

  AttentionArgs walking = args, own = args, shared = args;
  walking.cos_sin = views_.cos_sin;
  walking.rotary = views_.rotary;
  own.unfinished = results_.get();
  shared.unfinished = turned_.get();
  shared.query = queries_.get();
  shared.query_row_stride = width;
  shared.query_head_stride = args.head_dim;
  shared.positions = positions_.data();
  shared.block_tables = views_.block_tables;
  shared.block_tables_stride = views_.block_tables_stride;
  const auto args_of = [&](const AttentionTask& task) -> const AttentionArgs& {
    return meets_[task.row_begin] ? own : walking;
  };
  const int64_t first = (int64_t)shared_.tasks.size();
  const size_t scratch = std::max(own_.scratch_bytes, shared_.scratch_bytes);
  team.run(first + (int64_t)own_.tasks.size(), [&](int64_t i) {
    if (i < first)
      use.attention(shared, shared_.tasks[i], thread_scratch(scratch));
    else
      use.attention(args_of(own_.tasks[i - first]), own_.tasks[i - first], thread_scratch(scratch));
  });
  run_attention_merges(shared, shared_);
  for (const MergeTask& merge : own_.merges) use.attention_merge(args_of(merge.whole), merge);

  if (meeting == 0) return;
  const JoinArgs join{results_.get(), turned_.get(), numbers_.data(), starts_.data(), turns_.data()};
  run_rows(team, meeting, width, [&](int64_t begin, int64_t end) { use.attention_join(args, join, begin, end); });
}

}  // namespace kvarn
