// kvarn::paged_attention for the CPU: checks the arguments, cuts the batch into tasks, runs them on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace kvarn {
namespace {

constexpr int64_t kTileRows = 48;            // query rows times heads of a group in one task
constexpr int64_t kTasksPerThread = 4;       // so that uneven tasks still end together
constexpr int64_t kShortestSplit = 128;      // slots; below, merging costs more than the split wins
constexpr int64_t kParallelWork = 1 << 18;  // multiply-adds, some 20 us; below, waking a thread does not pay

struct Plan {
  std::vector<AttentionTask> tasks;
  std::vector<int64_t> work;  // of each task, in multiply-adds
  std::vector<MergeTask> merges;
  std::vector<float> partials;
  int64_t total_work = 0;
  int64_t rows_per_task = 0, heads_per_task = 1;
};

int64_t partial_floats(const AttentionArgs& args, const AttentionTask& task) {
  return task.row_count * task.head_count * args.group * (args.head_dim + 2);
}

void check_block_tables(const View& block_tables, const View& kv_slots, int64_t block_size, int64_t blocks) {
  const int64_t reach = block_tables.size(1) * block_size;
  for (int64_t s = 0; s < kv_slots.size(0); ++s) {
    int64_t slots = kv_slots.as<int32_t>()[s];
    if (slots < 0 || slots > reach)
      kv_slots.fail("between 0 and " + std::to_string(reach) + " slots (block_tables' width times block size), got " +
                    std::to_string(slots) + " for sequence " + std::to_string(s));
    const int32_t* table = block_tables.as<int32_t>() + s * block_tables.size(1);
    uint32_t largest = 0;
    for (int64_t i = 0; i * block_size < slots; ++i) largest = std::max(largest, (uint32_t)table[i]);
    if (slots > 0 && largest >= blocks)
      block_tables.fail("block ids in [0, " + std::to_string(blocks) + "), got " + std::to_string((int32_t)largest) +
                        " for sequence " + std::to_string(s));
  }
}

void check_query_starts(const View& query_starts, int64_t sequences, int64_t rows) {
  const int32_t* starts = query_starts.as<int32_t>();
  bool rising = starts[0] == 0 && starts[sequences] == rows;
  for (int64_t s = 0; s < sequences; ++s) rising &= starts[s] <= starts[s + 1];
  if (!rising) query_starts.fail("values rising from 0 to the number of query rows, " + std::to_string(rows));
}

Plan cut_into_tiles(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots,
                    int64_t sequences, int64_t threads) {
  Plan plan;
  const int64_t tile_rows = std::max<int64_t>(1, kTileRows / args.group);
  int64_t tiles = 0;
  for (int64_t s = 0; s < sequences; ++s) tiles += (query_starts[s + 1] - query_starts[s] + tile_rows - 1) / tile_rows;
  // A task reads all heads of its slots, which lie side by side, unless that leaves threads without work.
  const bool enough = threads == 1 || tiles >= threads * kTasksPerThread;
  plan.heads_per_task = enough ? args.kv_heads : 1;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t row = query_starts[s]; row < query_starts[s + 1]; row += tile_rows) {
      int64_t rows = std::min(tile_rows, query_starts[s + 1] - row);
      // Positions usually rise with the rows: what lies behind the last one is skipped, so it is no work.
      int64_t seen = std::clamp<int64_t>(args.positions[row + rows - 1] + 1, 1, std::max(1, kv_slots[s]));
      int64_t work = 2 * rows * args.group * plan.heads_per_task * seen * args.head_dim;
      for (int64_t head = 0; head < args.kv_heads; head += plan.heads_per_task) {
        plan.tasks.push_back({s, head, plan.heads_per_task, row, rows, 0, kv_slots[s], nullptr});
        plan.work.push_back(work);
        plan.total_work += work;
      }
      plan.rows_per_task = std::max(plan.rows_per_task, rows);
    }
  }
  return plan;
}

// Splits the slots of tasks too large for their share, and puts the large tasks first.
Plan balanced(const AttentionArgs& args, const Plan& tiles, int64_t threads) {
  Plan plan;
  plan.total_work = tiles.total_work;
  plan.rows_per_task = tiles.rows_per_task;
  plan.heads_per_task = tiles.heads_per_task;
  const int64_t share = tiles.total_work / (threads * kTasksPerThread) + 1;
  std::vector<int64_t> order;
  int64_t floats = 0;
  std::vector<int64_t> splits(tiles.tasks.size());
  for (size_t i = 0; i < tiles.tasks.size(); ++i) {
    const AttentionTask& task = tiles.tasks[i];
    splits[i] = std::clamp<int64_t>((tiles.work[i] + share - 1) / share, 1,
                                    std::max<int64_t>(1, task.slot_end / kShortestSplit));
    if (splits[i] > 1) floats += splits[i] * partial_floats(args, task);
    order.push_back((int64_t)i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return tiles.work[a] / splits[a] > tiles.work[b] / splits[b];
  });
  plan.partials.resize(floats);
  float* partial = plan.partials.data();
  for (int64_t i : order) {
    AttentionTask task = tiles.tasks[i];
    if (splits[i] == 1) {
      plan.tasks.push_back(task);
      continue;
    }
    AttentionTask whole = task;
    whole.partial = partial;
    plan.merges.push_back({whole, splits[i]});
    for (int64_t k = 0; k < splits[i]; ++k) {
      task.slot_begin = whole.slot_end * k / splits[i];
      task.slot_end = whole.slot_end * (k + 1) / splits[i];
      task.partial = partial;
      partial += partial_floats(args, task);
      plan.tasks.push_back(task);
    }
  }
  return plan;
}

// Working memory that each thread keeps between calls.
void* scratch_of_this_thread(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  if (capacity < bytes) {
    capacity = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, capacity));
    if (!memory) {
      capacity = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

void run(const AttentionArgs& args, Plan plan, int64_t threads) {
  const Kernels& use = kernels();
  const size_t bytes = use.attention_scratch_bytes(args, plan.rows_per_task, plan.heads_per_task);
  if (threads == 1 || plan.total_work < kParallelWork) {
    void* scratch = scratch_of_this_thread(bytes);
    for (const AttentionTask& task : plan.tasks) use.attention(args, task, scratch);
    return;
  }
  plan = balanced(args, plan, threads);
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    void* scratch = scratch_of_this_thread(bytes);
    for (int64_t worker = begin; worker < end; ++worker)
      for (size_t i = next++; i < plan.tasks.size(); i = next++) use.attention(args, plan.tasks[i], scratch);
  });
  for (const MergeTask& merge : plan.merges) use.attention_merge(args, merge);
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
  kv.expect_dims(5, "[N, 2, Hkv, B, D]");
  kv.expect_like(query);
  kv.expect_contiguous_tail(4);
  kv.expect_size(1, 2, "keys and values");
  kv.expect_size(4, query.size(2), "the query's head dimension");
  if (query.size(2) % 8 != 0) query.fail("a head dimension that is a multiple of 8");
  if (kv.size(2) == 0 || query.size(1) % kv.size(2) != 0)
    query.fail("a number of heads that is a multiple of the kv heads, " + std::to_string(kv.size(2)));
  slot_positions.expect_int32(2, "[N, B]");
  slot_positions.expect_size(0, kv.size(0), "kv's blocks");
  slot_positions.expect_size(1, kv.size(3), "kv's block size");
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
  args.slot_positions = slot_positions.as<int32_t>();
  args.slot_positions_stride = slot_positions.size(1);
  args.block_tables = block_tables.as<int32_t>();
  args.block_tables_stride = block_tables.size(1);
  args.positions = positions.as<int32_t>();
  args.query_heads = query.size(1);
  args.kv_heads = kv.size(2);
  args.group = args.query_heads / args.kv_heads;
  args.head_dim = query.size(2);
  args.block_size = kv.size(3);
  args.is_bfloat16 = query.is_bfloat16();
  return args;
}

Tensor paged_attention(const Tensor& query_, const Tensor& kv_, const Tensor& slot_positions_,
                       const Tensor& block_tables_, const Tensor& kv_slots_, const Tensor& query_starts_,
                       const Tensor& positions_, double scale, int64_t window, double softcap,
                       std::optional<Tensor> sinks) {
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
  const int64_t threads = torch::stable::get_num_threads();
  run(args, cut_into_tiles(args, query_starts.as<int32_t>(), kv_slots.as<int32_t>(), sequences, threads), threads);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(kvarn, CPU, library) { library.impl("paged_attention", TORCH_BOX(&paged_attention)); }

}  // namespace
}  // namespace kvarn
