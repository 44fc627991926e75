// What all linear kernels share: the shape of a panel in vectors, and writing a row of its 32 outputs.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kvarn {
namespace {

constexpr int kPanelVectors = kLinearPanel / kLanes;

template <class T>
KVARN_INLINE void store_as(const LinearArgs& args, Floats (&sums)[kPanelVectors], int64_t row, int64_t column) {
  T* out = static_cast<T*>(args.out) + row * args.out_features + column;
#pragma GCC unroll 8
  for (int v = 0; v < kPanelVectors; ++v) {
    const int64_t from = v * kLanes, count = args.out_features - column - from;
    if (count <= 0) break;
    if (args.bias) sums[v] += load(static_cast<const bfloat16*>(args.bias) + column + from, count);
    store(out + from, sums[v], count);
  }
}

// Adds the bias and writes the outputs from `column` on, as float32 or rounded to bfloat16.
KVARN_INLINE void store_outputs(const LinearArgs& args, Floats (&sums)[kPanelVectors], int64_t row, int64_t column) {
  args.float_out ? store_as<float>(args, sums, row, column) : store_as<bfloat16>(args, sums, row, column);
}

}  // namespace
}  // namespace kvarn
