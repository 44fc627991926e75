// What a task of attention ends with: rows divided by their denominators and written, or left unfinished for
// another task's to be joined with.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kvarn {
namespace {

// One finished row: the sink joins the denominator, the sums are divided and written in the model's dtype.
template <class T>
static void write_row(const AttentionArgs& args, const AttentionTask& task, int64_t r, const float* sums, float maximum,
                      float total) {
  int64_t rows = task.row_count * args.group;
  int64_t head = (task.head_begin + r / rows) * args.group + r % args.group;
  if (args.sinks) {
    float sink = args.sinks[head] * kLog2e;
    float shift = sink > maximum ? sink : maximum;
    float by = exp2(maximum - shift);
    total = total * by + exp2(sink - shift);
    total = by > 0.f ? total / by : kInfinity;
  }
  float inverse = total > 0.f ? 1.f / total : 0.f;
  int64_t row = task.row_begin + r % rows / args.group;
  T* to = static_cast<T*>(args.out) + (row * args.query_heads + head) * args.head_dim;
  for (int64_t d = 0; d < args.head_dim; d += kLanes) {
    int64_t count = args.head_dim - d;
    store(to + d, load(sums + d, count) * inverse, count);
  }
}

// Writes the task's result, or keeps it unfinished: sums of `width` floats a row, maxima (in units of log2), totals.
template <class T>
static void finish(const AttentionArgs& args, const AttentionTask& task, int64_t rows, const float* sums, int64_t width,
                   const float* maxima, const float* totals) {
  if (!task.partial) {
    for (int64_t r = 0; r < rows; ++r) write_row<T>(args, task, r, sums + r * width, maxima[r], totals[r]);
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    memcpy(task.partial + r * args.head_dim, sums + r * width, args.head_dim * sizeof(float));
  memcpy(task.partial + rows * args.head_dim, maxima, rows * sizeof(float));
  memcpy(task.partial + rows * (args.head_dim + 1), totals, rows * sizeof(float));
}

// Joins the partial results of one tile in place of the first of them.
template <class T>
static void merge_task(const AttentionArgs& args, const MergeTask& merge) {
  int64_t rows = merge.whole.row_count * merge.whole.head_count * args.group;
  int64_t dim = args.head_dim, size = rows * (dim + 2);
  float* into = merge.whole.partial;
  for (int64_t r = 0; r < rows; ++r) {
    float highest = -kInfinity, total = 0.f;
    for (int64_t i = 0; i < merge.splits; ++i) {
      float m = into[i * size + rows * dim + r];
      highest = m > highest ? m : highest;
    }
    for (int64_t i = 0; i < merge.splits; ++i) {
      const float* part = into + i * size;
      float by = highest == -kInfinity ? 0.f : exp2(part[rows * dim + r] - highest);
      total += part[rows * (dim + 1) + r] * by;
      for (int64_t d = 0; d < dim; ++d) into[r * dim + d] = part[r * dim + d] * by + (i ? into[r * dim + d] : 0.f);
    }
    write_row<T>(args, merge.whole, r, into + r * dim, highest, total);
  }
}

}  // namespace
}  // namespace kvarn
