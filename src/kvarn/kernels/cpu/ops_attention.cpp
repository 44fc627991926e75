// kvarn::paged_attention and kvarn::shared_attention for the CPU: check the arguments, cut the batch into tasks, run
// them on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "attention_plan.h"
#include "attention_views.h"
#include "batch_checks.h"
#include "kernels.h"
#include "tensors.h"

namespace kvarn {
namespace {

constexpr int64_t kParallelWork = 1 << 18;  // multiply-adds, some 10 us; below, waking a thread does not pay

// The multiply-adds of a batch, counted without a plan.
int64_t work_of(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots, int64_t sequences) {
  int64_t pairs = 0;
  for (int64_t s = 0; s < sequences; ++s) pairs += (int64_t)(query_starts[s + 1] - query_starts[s]) * kv_slots[s];
  return 2 * pairs * args.query_heads * args.head_dim;
}

void run(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots, int64_t sequences) {
  const bool small = work_of(args, query_starts, kv_slots, sequences) < kParallelWork;
  const int64_t threads = small ? 1 : torch::stable::get_num_threads();
  const AttentionPlan plan = plan_attention(args, query_starts, kv_slots, sequences, threads);
  const int64_t tasks = (int64_t)plan.tasks.size();
  if (threads == 1) {
    void* scratch = thread_scratch(plan.scratch_bytes);
    for (int64_t i = 0; i < tasks; ++i) run_attention_task(args, plan, i, scratch);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(plan.scratch_bytes);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = next++; i < tasks; i = next++) run_attention_task(args, plan, i, scratch);
  });
  run_attention_merges(args, plan);
}

void run(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots, int64_t sequences,
         const AttentionViews& views) {
  const int64_t work = work_of(args, query_starts, kv_slots, sequences) +
                       work_of(args, views.row_starts, views.kv_slots, views.views);
  Team::gather(work < kParallelWork ? 1 : torch::stable::get_num_threads(), [&](Team& team) {
    ViewsPlan(args, query_starts, kv_slots, sequences, views, team.size()).run(team, args);
  });
}

std::vector<float> sink_logits(const std::optional<Tensor>& sinks, int64_t heads) {
  std::vector<float> logits;
  if (!sinks) return logits;
  View view("sinks", *sinks);
  view.expect_dims(1, "[Hq]");
  view.expect_size(0, heads, "query heads");
  view.expect_float();
  view.expect_contiguous_tail(1);
  logits.resize(heads);
  for (int64_t h = 0; h < heads; ++h) {
    uint32_t bits = view.is_bfloat16() ? (uint32_t)view.as<uint16_t>()[h] << 16 : view.as<uint32_t>()[h];
    std::memcpy(&logits[h], &bits, sizeof bits);
  }
  return logits;
}

AttentionArgs checked(const View& query, const View& kv, const View& slot_positions, const View& block_tables,
                      const View& kv_slots, const View& query_starts, const View& positions) {
  query.expect_dims(3, "[T, Hq, D]");
  query.expect_float();
  query.expect_contiguous_tail(1);
  const CacheShape cache(kv, query);
  if (query.size(2) % 8 != 0) query.fail("a head dimension that is a multiple of 8");
  if (kv.size(2) == 0 || query.size(1) % kv.size(2) != 0)
    query.fail("a number of heads that is a multiple of the kv heads, " + std::to_string(kv.size(2)));
  slot_positions.expect_int32(2, "[N, B]");
  slot_positions.expect_size(0, kv.size(0), "kv's blocks");
  slot_positions.expect_size(1, cache.block_size, "kv's block size");
  block_tables.expect_int32(2, "[S, M]");
  kv_slots.expect_int32(1, "[S]");
  kv_slots.expect_size(0, block_tables.size(0), "block_tables' sequences");
  query_starts.expect_int32(1, "[S + 1]");
  query_starts.expect_size(0, block_tables.size(0) + 1, "block_tables' sequences plus one");
  positions.expect_int32(1, "[T]");
  positions.expect_size(0, query.size(0), "query rows");
  AttentionArgs args{};
  args.query = query.data;
  args.query_row_stride = query.stride(0);
  args.query_head_stride = query.stride(1);
  args.kv = kv.data;
  args.block_stride = kv.stride(0);
  args.value_offset = kv.stride(1);
  args.head_stride = kv.stride(2);
  args.is_int8 = cache.is_int8;
  args.slot_positions = slot_positions.as<int32_t>();
  args.slot_positions_stride = slot_positions.size(1);
  args.block_tables = block_tables.as<int32_t>();
  args.block_tables_stride = block_tables.size(1);
  args.positions = positions.as<int32_t>();
  args.query_heads = query.size(1);
  args.kv_heads = kv.size(2);
  args.group = args.query_heads / args.kv_heads;
  args.head_dim = query.size(2);
  args.block_size = cache.block_size;
  args.is_bfloat16 = query.is_bfloat16();
  return args;
}

// What `shared_attention` has more than `paged_attention`.
struct Views {
  const Tensor &tables, &slots, &row_starts, &rows, &shifts, &cos_sin;

  AttentionViews checked(const View& query, int64_t block_size, int64_t blocks) const {
    View angles("cos_sin", cos_sin);
    angles.expect_dims(2, "[P, R]");
    angles.expect_dtype(aoti_torch_dtype_float32(), "float32");
    angles.expect_contiguous_tail(2);
    if (angles.size(0) < 1 || angles.size(1) % 2 || angles.size(1) > query.size(2))
      angles.fail("an even number of angles up to the head dimension, " + std::to_string(query.size(2)));
    return checked_views(View("view_tables", tables), View("view_slots", slots), View("row_starts", row_starts),
                         View("rows", rows), View("shifts", shifts), block_size, blocks, query.size(0),
                         angles.as<float>(), angles.size(0), angles.size(1));
  }
};

Tensor attention(const Tensor& query_, const Tensor& kv_, const Tensor& slot_positions_, const Tensor& block_tables_,
                 const Tensor& kv_slots_, const Tensor& query_starts_, const Tensor& positions_, const Views* shared,
                 double scale, int64_t window, double softcap, const std::optional<Tensor>& sinks) {
  View query("query", query_), kv("kv", kv_), slot_positions("slot_positions", slot_positions_);
  View block_tables("block_tables", block_tables_), kv_slots("kv_slots", kv_slots_);
  View query_starts("query_starts", query_starts_), positions("positions", positions_);
  AttentionArgs args = checked(query, kv, slot_positions, block_tables, kv_slots, query_starts, positions);
  const int64_t sequences = block_tables.size(0);
  check_block_tables(block_tables, kv_slots, args.block_size, kv.size(0));
  check_query_starts(query_starts, sequences, query.size(0));
  std::vector<float> sink_values = sink_logits(sinks, args.query_heads);
  Tensor out = empty(query, {query.size(0), query.size(1), query.size(2)});
  args.out = View("out", out).data;
  args.sinks = sink_values.empty() ? nullptr : sink_values.data();
  args.scale = (float)scale;
  args.softcap = (float)softcap;
  args.window = window;
  if (shared) {
    const AttentionViews views = shared->checked(query, args.block_size, kv.size(0));
    if (views.entries > 0) {
      run(args, query_starts.as<int32_t>(), kv_slots.as<int32_t>(), sequences, views);
      return out;
    }
  }
  run(args, query_starts.as<int32_t>(), kv_slots.as<int32_t>(), sequences);
  return out;
}

Tensor paged_attention(const Tensor& query, const Tensor& kv, const Tensor& slot_positions, const Tensor& block_tables,
                       const Tensor& kv_slots, const Tensor& query_starts, const Tensor& positions, double scale,
                       int64_t window, double softcap, std::optional<Tensor> sinks) {
  return attention(query, kv, slot_positions, block_tables, kv_slots, query_starts, positions, nullptr, scale, window,
                   softcap, sinks);
}

Tensor shared_attention(const Tensor& query, const Tensor& kv, const Tensor& slot_positions,
                        const Tensor& block_tables, const Tensor& kv_slots, const Tensor& query_starts,
                        const Tensor& positions, const Tensor& view_tables, const Tensor& view_slots,
                        const Tensor& row_starts, const Tensor& rows, const Tensor& shifts, const Tensor& cos_sin,
                        double scale, int64_t window, double softcap, std::optional<Tensor> sinks) {
  const Views views{view_tables, view_slots, row_starts, rows, shifts, cos_sin};
  return attention(query, kv, slot_positions, block_tables, kv_slots, query_starts, positions, &views, scale, window,
                   softcap, sinks);
}

STABLE_TORCH_LIBRARY_IMPL(kvarn, CPU, library) {
  library.impl("paged_attention", TORCH_BOX(&paged_attention));
  library.impl("shared_attention", TORCH_BOX(&shared_attention));
}

}  // namespace
}  // namespace kvarn
