// Which slots a task of prefill attention looks at: those that some of its rows may see, gathered `kChunk` at a time.
// Slots are picked one by one by position, so empty slots, holes, slots in the future of every row and slots behind the
// window cost nothing but the look.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kvarn {
namespace {

constexpr int64_t kChunk = 64;  // slots per step

// The slots of one chunk. `keys` are addresses of K rows of one kv head; a slot's V row lies `value_offset` further on.
template <class K>
struct Chunk {
  const K* keys[kChunk];
  const float* scales[kChunk];  // of an int8 cache
  int32_t positions[kChunk];
  int64_t count;
  int32_t lowest, highest;

  void move_to_next_head(int64_t padded, int64_t head_stride) {
    for (int64_t i = 0; i < padded; ++i) keys[i] += head_stride;
    if constexpr (std::is_same_v<K, int8_t>)
      for (int64_t i = 0; i < padded; ++i) scales[i] += head_stride / 4;
  }

  // Fill up to whole vectors with slots that no row may see.
  int64_t pad() {
    int64_t padded = round_up(count, kLanes);
    for (int64_t i = count; i < padded; ++i) {
      keys[i] = keys[0];
      scales[i] = scales[0];
      positions[i] = INT32_MAX;
    }
    return padded;
  }
};

// Walks the task's slots in table order, then one view's after another, and hands out those that some row of the tile
// may see.
template <class K>
class SlotWalk {
 public:
  SlotWalk(const AttentionArgs& args, const AttentionTask& task)
      : args_(args), next_(task.slot_begin), end_(task.slot_end) {
    table_ = args.block_tables + task.sequence * args.block_tables_stride;
    keys_ = static_cast<const K*>(args.kv) + task.head_begin * args.head_stride;
    for (int64_t r = 0; r < task.row_count; ++r) {
      int32_t position = args.positions[task.row_begin + r];
      first_ = position < first_ ? position : first_;
      last_ = position > last_ ? position : last_;
    }
    look_from(0);
  }

  // Goes on to the slots of a view, which are handed out with the positions that they hold.
  void enter(const ViewedSlots& view) {
    table_ = view.table;
    next_ = view.slot_begin;
    end_ = view.slot_end;
    look_from(view.shift);
  }

  bool fill(Chunk<K>& chunk) {
    int64_t count = 0;
    int32_t lowest = INT32_MAX, highest = -1;
    while (next_ < end_ && count < kChunk) {
      int64_t block = table_[next_ / args_.block_size];
      int64_t offset = next_ % args_.block_size;
      int64_t take = smaller(smaller(args_.block_size - offset, end_ - next_), kChunk - count);
      const int32_t* positions = args_.slot_positions + block * args_.slot_positions_stride + offset;
      const K* key = keys_ + block * args_.block_stride + offset * args_.head_dim;
      const auto* scales = reinterpret_cast<const float*>(keys_ + block * args_.block_stride +
                                                          args_.block_size * args_.head_dim) + offset;
      for (int64_t i = 0; i < take; ++i, key += args_.head_dim) {
        int32_t position = positions[i];
        chunk.keys[count] = key;
        if constexpr (std::is_same_v<K, int8_t>) chunk.scales[count] = scales + i;
        chunk.positions[count] = position;
        bool seen = (position >= lowest_) & (position <= highest_);
        count += seen;
        lowest = seen & (position < lowest) ? position : lowest;
        highest = seen & (position > highest) ? position : highest;
      }
      next_ += take;
    }
    chunk.count = count;
    chunk.lowest = lowest;
    chunk.highest = highest;
    return count > 0;
  }

 private:
  const AttentionArgs& args_;
  const int32_t* table_;
  const K* keys_;
  int64_t next_, end_;
  int32_t first_ = INT32_MAX, last_ = -1;  // lowest and highest position of a row
  int32_t lowest_, highest_;               // of what they may see

  void look_from(int32_t shift) {
    highest_ = last_ - shift;
    lowest_ = args_.window > 0 ? (int32_t)larger(0, (int64_t)first_ - shift - args_.window + 1) : 0;
  }
};

}  // namespace
}  // namespace kvarn
