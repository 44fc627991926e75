// The query rows of a task of prefill attention: as they are, or as they look at a view, turned back by its shift.
#pragma once

#include "kernels.h"
#include "rowwise.h"
#include "simd.h"

namespace kvarn {
namespace {

template <class T>
class TaskQueries {
 public:
  // Room for one row and the angles it is turned by, where tasks may have views.
  static int64_t bytes(const AttentionArgs& args) {
    return args.cos_sin ? args.rotary * (int64_t)sizeof(float) + args.head_dim * (int64_t)sizeof(T) : 0;
  }

  TaskQueries(const AttentionArgs& args, const AttentionTask& task, char* memory)
      : args_(args), task_(task), angles_(reinterpret_cast<float*>(memory)),
        turned_(reinterpret_cast<T*>(angles_ + args.rotary)) {}

  // From here on rows are those positions before themselves from which they look at a view, and only those that see
  // something of it. Angles are divided as in `turn_back_rows`.
  void turn_back(const ViewedSlots& view) {
    const int32_t shift = view.shift;
    const int64_t half = args_.rotary / 2;
    const float* cosines = args_.cos_sin + (shift < 0 ? -shift : shift) * args_.rotary;
    shift_ = shift;
    lowest_ = view.lowest;
    for (int64_t i = 0; i < half; ++i) {
      const float factor = args_.cos_sin[i], sine = cosines[half + i] / factor;
      angles_[i] = cosines[i] / factor;
      angles_[half + i] = shift < 0 ? sine : -sine;
    }
  }

  // Calls use(r, query) for all heads of rows, r counting all rows in the order in which tiles have them.
  template <class F>
  __attribute__((always_inline)) void each(const F& use) const {
    int64_t r = 0;
    for (int64_t kv_head = task_.head_begin; kv_head < task_.head_begin + task_.head_count; ++kv_head)
      for (int64_t row = task_.row_begin; row < task_.row_begin + task_.row_count; ++row) {
        if (args_.positions[row] - shift_ < lowest_) {
          r += args_.group;
          continue;
        }
        const T* from = static_cast<const T*>(args_.query) + row * args_.query_row_stride +
                        kv_head * args_.group * args_.query_head_stride;
        for (int64_t g = 0; g < args_.group; ++g, ++r, from += args_.query_head_stride) use(r, turned(from));
      }
  }

  // Of row `r` of a tile.
  int32_t position(int64_t r) const { return args_.positions[task_.row_begin + r / args_.group] - shift_; }

 private:
  const AttentionArgs& args_;
  const AttentionTask& task_;
  float* angles_;
  T* turned_;
  int32_t shift_ = 0, lowest_ = INT32_MIN;

  __attribute__((always_inline)) const T* turned(const T* from) const {
    if (shift_ == 0) return from;
    rotate(from, turned_, angles_, angles_ + args_.rotary / 2, args_.rotary, args_.head_dim);
    return turned_;
  }
};

}  // namespace
}  // namespace kvarn
