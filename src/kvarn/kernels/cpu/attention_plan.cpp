#include "attention_plan.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace kvarn {
namespace {

constexpr int64_t kTileRows = 144;      // query rows times heads of a group in one task
constexpr int64_t kTasksPerThread = 4;   // so that uneven tasks still end together
constexpr int64_t kShortestSplit = 128;  // slots; below, merging costs more than the split wins

struct Tile {
  AttentionTask task;
  int64_t work, splits;
};

int64_t partial_floats(const AttentionArgs& args, const AttentionTask& task) {
  return task.row_count * task.head_count * args.group * (args.head_dim + 2);
}

// Tiles of rows, each with all its sequence's slots.
std::vector<Tile> cut_rows(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots,
                           int64_t sequences, int64_t threads) {
  const int64_t tile_rows = std::max<int64_t>(1, kTileRows / args.group);
  int64_t count = 0;
  for (int64_t s = 0; s < sequences; ++s) count += (query_starts[s + 1] - query_starts[s] + tile_rows - 1) / tile_rows;
  // A task reads all heads of its slots, which lie side by side, unless that leaves threads without work.
  const bool enough = threads == 1 || count >= threads * kTasksPerThread;
  std::vector<Tile> tiles;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t row = query_starts[s]; row < query_starts[s + 1]; row += tile_rows) {
      const int64_t rows = std::min(tile_rows, query_starts[s + 1] - row);
      // Slots that can be split up are as good as heads.
      const bool whole = enough || kv_slots[s] >= kShortestSplit * threads * kTasksPerThread;
      const int64_t heads = whole ? args.kv_heads : 1;
      // What lies behind the highest position is skipped, so it is no work.
      const int32_t highest = *std::max_element(args.positions + row, args.positions + row + rows);
      int64_t seen = std::clamp<int64_t>((int64_t)highest + 1, 1, std::max(1, kv_slots[s]));
      if (args.window > 0) seen = std::min(seen, args.window + rows);
      const int64_t work = 2 * rows * args.group * heads * seen * args.head_dim;
      for (int64_t head = 0; head < args.kv_heads; head += heads)
        tiles.push_back({{s, head, heads, row, rows, 0, kv_slots[s], nullptr}, work, 1});
    }
  }
  return tiles;
}

// Splits the slots of tiles too large for their share, at block borders.
void split_slots(const AttentionArgs& args, std::vector<Tile>& tiles, int64_t work, int64_t threads) {
  const int64_t share = work / (threads * kTasksPerThread) + 1;
  for (Tile& tile : tiles) {
    const int64_t most = tile.task.slot_end / std::max(kShortestSplit, args.block_size);
    tile.splits = std::clamp<int64_t>((tile.work + share - 1) / share, 1, std::max<int64_t>(1, most));
  }
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Tile& a, const Tile& b) { return a.work / a.splits > b.work / b.splits; });
}

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots,
                             int64_t sequences, int64_t threads) {
  std::vector<Tile> tiles = cut_rows(args, query_starts, kv_slots, sequences, threads);
  AttentionPlan plan;
  for (const Tile& tile : tiles) plan.work += tile.work;
  if (threads > 1) split_slots(args, tiles, plan.work, threads);
  int64_t floats = 0, tasks = 0, most_rows = 0, most_heads = 0;
  for (const Tile& tile : tiles) {
    if (tile.splits > 1) floats += tile.splits * partial_floats(args, tile.task);
    tasks += tile.splits;
    most_rows = std::max(most_rows, tile.task.row_count);
    most_heads = std::max(most_heads, tile.task.head_count);
  }
  plan.scratch_bytes = kernels().attention_scratch_bytes(args, most_rows, most_heads);
  plan.tasks.reserve(tasks);
  plan.partials.resize(floats);
  float* partial = plan.partials.data();
  for (const Tile& tile : tiles) {
    AttentionTask task = tile.task;
    if (tile.splits == 1) {
      plan.tasks.push_back(task);
      continue;
    }
    task.partial = partial;
    plan.merges.push_back({task, tile.splits});
    const int64_t end = task.slot_end, blocks = (end + args.block_size - 1) / args.block_size;
    for (int64_t k = 0; k < tile.splits; ++k) {
      task.slot_begin = blocks * k / tile.splits * args.block_size;
      task.slot_end = std::min(end, blocks * (k + 1) / tile.splits * args.block_size);
      task.partial = partial;
      partial += partial_floats(args, task);
      plan.tasks.push_back(task);
    }
  }
  return plan;
}

void run_attention_task(const AttentionArgs& args, const AttentionPlan& plan, int64_t task, void* scratch) {
  kernels().attention(args, plan.tasks[task], scratch);
}

void run_attention_merges(const AttentionArgs& args, const AttentionPlan& plan) {
  for (const MergeTask& merge : plan.merges) kernels().attention_merge(args, merge);
}

void* thread_scratch(size_t bytes) {
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

}  // namespace kvarn
