// x W^T for weights packed in panels of 32 outputs, pairs of inputs side by side: [panels][K / 2][32][2] bfloat16.
// A vector holds one pair of inputs of `kLanes` outputs, so a step is: broadcast a pair of a row of x, multiply, add.
//
// Every output is summed pair by pair in the order of K, in one float: the sum does not depend on how many rows are
// computed together. With few rows the time is that of reading the weights once, so each tile also asks for its share
// of the panel that comes next.
#pragma once

#include "linear_store.h"

namespace kvarn {
namespace {

#if defined(__AVX512F__)
constexpr int kLinearRows = 12;  // 12 rows x 2 vectors of sums in 32 registers
#elif defined(__AVX2__)
constexpr int kLinearRows = 2;  // 2 rows x 4 vectors in 16 registers
#else
constexpr int kLinearRows = 1;
#endif

// sum + the products of a pair of bfloat16 with every pair in `weights`.
KVARN_INLINE Floats add_pair_product(Floats sum, uint32_t pair, Words weights) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)pair));
#else
  Words x = Words{} + pair;
  sum += (Floats)(x << 16) * (Floats)(weights << 16);
  return sum + (Floats)(x & 0xffff0000u) * (Floats)(weights & 0xffff0000u);
#endif
}

// Rows x one panel. Asks for memory `ahead`, one line every `ahead_bytes`, `ahead_count` times, while it computes.
template <int Rows>
static void linear_tile(const LinearArgs& args, int64_t row, const uint32_t* panel, int64_t column, const char* ahead,
                        int64_t ahead_bytes, int64_t ahead_count) {
  const bfloat16* x = static_cast<const bfloat16*>(args.x) + row * args.x_row_stride;
  Floats sums[Rows][kPanelVectors] = {};
  const int64_t pairs = args.in_features / 2;
  auto step = [&](int64_t k, auto pair_at) __attribute__((always_inline)) {
    Words weights[kPanelVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) weights[v] = load_as<Words>(panel + k * kLinearPanel + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const uint32_t pair = pair_at(x + r * args.x_row_stride + 2 * k);
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = add_pair_product(sums[r][v], pair, weights[v]);
    }
  };
  for (int64_t k = 0; k < pairs; ++k) {
    if (k < ahead_count) __builtin_prefetch(ahead + k * ahead_bytes, 0, 2);
    step(k, [](const bfloat16* at) { return load_as<uint32_t>(at); });
  }
  if (args.in_features % 2) step(pairs, [](const bfloat16* at) { return (uint32_t)at->bits; });
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) store_outputs(args, sums[r], row + r, column);
}

using LinearTile = decltype(&linear_tile<1>);

template <size_t... I>
KVARN_INLINE LinearTile linear_tile_of(int64_t rows, std::index_sequence<I...>) {
  static constexpr LinearTile tiles[] = {linear_tile<I + 1>...};
  return tiles[rows - 1];
}

static void linear_panel(const LinearArgs& args, int64_t panel, int64_t row_begin, int64_t row_end) {
  const int64_t count = row_end - row_begin, tiles = (count + kLinearRows - 1) / kLinearRows;
  const int64_t words = (args.in_features + 1) / 2 * kLinearPanel, column = panel * kLinearPanel;
  const uint32_t* weights = static_cast<const uint32_t*>(args.packed) + panel * words;
  const bool last = column + kLinearPanel >= args.out_features;
  const char* ahead = reinterpret_cast<const char*>(weights + (last ? 0 : words));
  // A few rows per tile keep the loads busy enough; there asking ahead only gets in the way (measured at 4 rows).
  const bool few = count > 1 && count <= 8;
  const int64_t ahead_bytes = tiles == 1 ? 128 : 64;
  const int64_t ahead_count = few ? 0 : words * 4 / (ahead_bytes * tiles);
  for (int64_t t = 0; t < tiles; ++t) {
    // Tiles of equal height, not high ones and a low rest, which would wait for memory.
    const int64_t begin = row_begin + count * t / tiles, rows = row_begin + count * (t + 1) / tiles - begin;
    linear_tile_of(rows, std::make_index_sequence<kLinearRows>())(args, begin, weights, column,
                                                                  ahead + words * 4 * t / tiles, ahead_bytes,
                                                                  ahead_count);
  }
}

}  // namespace
}  // namespace kvarn
