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
  int64_t work, splits;             // work: without that of views
  std::vector<ViewedSlots> views;
  int64_t view_work = 0;

  int64_t share() const { return (work + view_work) / splits; }
};

int64_t partial_floats(const AttentionArgs& args, const AttentionTask& task) {
  return task.row_count * task.head_count * args.group * (args.head_dim + 2);
}

// Tiles of rows, each with all its sequence's slots.
std::vector<Tile> cut_rows(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots,
                           int64_t sequences, int64_t threads, const ViewsOfTile& views_of_tile) {
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
      const int64_t of_slot = 2 * rows * args.group * heads * args.head_dim;
      const std::vector<ViewedSlots> views = views_of_tile ? views_of_tile(s, row, rows) : std::vector<ViewedSlots>{};
      int64_t viewed = 0;
      for (const ViewedSlots& view : views) viewed += view.slot_end;
      for (int64_t head = 0; head < args.kv_heads; head += heads)
        tiles.push_back({{s, head, heads, row, rows, 0, kv_slots[s], nullptr, nullptr, 0}, of_slot * seen, 1, views,
                         of_slot * viewed});
    }
  }
  return tiles;
}

// Splits the slots of tiles too large for their share, at block borders.
void split_slots(const AttentionArgs& args, std::vector<Tile>& tiles, int64_t threads) {
  int64_t work = 0, view_work = 0;
  for (const Tile& tile : tiles) {
    work += tile.work;
    view_work += tile.view_work;
  }
  for (Tile& tile : tiles) {
    const int64_t share = (tile.views.empty() ? work : work + view_work) / (threads * kTasksPerThread) + 1;
    int64_t slots = tile.task.slot_end;
    for (const ViewedSlots& view : tile.views) slots += view.slot_end;
    const int64_t most = slots / std::max(kShortestSplit, args.block_size);
    tile.splits =
        std::clamp<int64_t>((tile.work + tile.view_work + share - 1) / share, 1, std::max<int64_t>(1, most));
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.share() > b.share(); });
}

// The k-th of a tile's pieces: all its blocks, its sequence's and then each view's, are shared out evenly.
AttentionTask piece_of(const Tile& tile, int64_t k, int64_t block_size, AttentionPlan& plan) {
  const auto blocks_of = [=](int64_t slots) { return (slots + block_size - 1) / block_size; };
  int64_t blocks = blocks_of(tile.task.slot_end);
  for (const ViewedSlots& view : tile.views) blocks += blocks_of(view.slot_end);
  int64_t begin = blocks * k / tile.splits, end = blocks * (k + 1) / tile.splits;
  const auto cut = [&](auto& of) {
    const int64_t count = blocks_of(of.slot_end), slots = of.slot_end;
    of.slot_begin = std::min(slots, std::clamp<int64_t>(begin, 0, count) * block_size);
    of.slot_end = std::min(slots, std::clamp<int64_t>(end, 0, count) * block_size);
    begin -= count;
    end -= count;
    return of.slot_begin < of.slot_end;
  };
  AttentionTask piece = tile.task;
  cut(piece);
  std::vector<ViewedSlots> views;
  for (ViewedSlots view : tile.views)
    if (cut(view)) views.push_back(view);
  if (views.empty()) return piece;
  plan.views.push_back(std::move(views));
  piece.views = plan.views.back().data();
  piece.view_count = (int64_t)plan.views.back().size();
  return piece;
}

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& args, const int32_t* query_starts, const int32_t* kv_slots,
                             int64_t sequences, int64_t threads, const ViewsOfTile& views_of_tile) {
  std::vector<Tile> tiles = cut_rows(args, query_starts, kv_slots, sequences, threads, views_of_tile);
  AttentionPlan plan;
  if (threads > 1) split_slots(args, tiles, threads);
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
    if (tile.splits > 1) {
      plan.merges.push_back({tile.task, tile.splits});
      plan.merges.back().whole.partial = partial;
    }
    for (int64_t k = 0; k < tile.splits; ++k) {
      AttentionTask task = piece_of(tile, k, args.block_size, plan);
      if (tile.splits > 1) {
        task.partial = partial;
        partial += partial_floats(args, task);
      }
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
