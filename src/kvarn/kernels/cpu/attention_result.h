// What a task of attention ends with: rows divided by their denominators and written, or left unfinished for
// another task's, or another view's, to be joined with.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kvarn {
namespace {

// One finished row of a head: the sink joins the denominator, the sums are divided and written in the model's dtype.
template <class T>
static void write_head(const AttentionArgs& args, int64_t row, int64_t head, const float* sums, float maximum,
                       float total) {
  if (args.sinks) {
    float sink = args.sinks[head] * kLog2e;
    float shift = sink > maximum ? sink : maximum;
    float by = exp2(maximum - shift);
    total = total * by + exp2(sink - shift);
    total = by > 0.f ? total / by : kInfinity;
  }
  float inverse = total > 0.f ? 1.f / total : 0.f;
  T* to = static_cast<T*>(args.out) + (row * args.query_heads + head) * args.head_dim;
  for (int64_t d = 0; d < args.head_dim; d += kLanes) {
    int64_t count = args.head_dim - d;
    store(to + d, load(sums + d, count) * inverse, count);
  }
}

// Row `r` of a task, all of whose slots are in: finished, or left for what else it looks at.
template <class T>
static void write_row(const AttentionArgs& args, const AttentionTask& task, int64_t r, const float* sums, float maximum,
                      float total) {
  int64_t rows = task.row_count * args.group, dim = args.head_dim;
  int64_t head = (task.head_begin + r / rows) * args.group + r % args.group;
  int64_t row = task.row_begin + r % rows / args.group;
  if (!args.unfinished) return write_head<T>(args, row, head, sums, maximum, total);
  float* to = args.unfinished + (row * args.query_heads + head) * (dim + 2);
  memmove(to, sums, dim * sizeof(float));
  to[dim] = maximum;
  to[dim + 1] = total;
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

// Finishes the rows whose numbers are [begin, end) of the list with what their turned rows saw.
template <class T>
static void join_rows(const AttentionArgs& args, const JoinArgs& join, int64_t begin, int64_t end) {
  const int64_t dim = args.head_dim, heads = args.query_heads;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t row = join.numbers[j];
    const int32_t *first = join.turns + join.starts[j], *last = join.turns + join.starts[j + 1];
    for (int64_t head = 0; head < heads; ++head) {
      float* into = join.rows + (row * heads + head) * (dim + 2);
      auto part_of = [&](int32_t turn) { return join.turned + (turn * heads + head) * (dim + 2); };
      float highest = into[dim];
      for (const int32_t* turn = first; turn < last; ++turn)
        highest = part_of(*turn)[dim] > highest ? part_of(*turn)[dim] : highest;
      const float shift = highest == -kInfinity ? 0.f : highest, keep = exp2(into[dim] - shift);
      float total = into[dim + 1] * keep;
      if (keep != 1.f)
        for (int64_t d = 0; d < dim; ++d) into[d] *= keep;
      for (const int32_t* turn = first; turn < last; ++turn) {
        const float* part = part_of(*turn);
        const float by = exp2(part[dim] - shift);
        total += part[dim + 1] * by;
        for (int64_t d = 0; d < dim; ++d) into[d] += part[d] * by;
      }
      write_head<T>(args, row, head, into, highest, total);
    }
  }
}

}  // namespace
}  // namespace kvarn
