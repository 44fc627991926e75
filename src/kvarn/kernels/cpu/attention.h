// Paged attention over one task: for each of its kv heads, a tile of query rows (every row once per query head of
// the kv head) against the slots they may see, gathered `kChunk` at a time, with the usual running maximum and sum
// (flash attention). All heads work on a chunk before the next one is gathered: their keys are neighbours in memory.
//
// Rows of an int8 cache are widened to the query's dtype first; where the processor multiplies bytes, attention_int8.h
// does not need that. Tasks of few rows take another way, attention_decode.h.
// Both products, Q K^T and P V, are one small matrix multiply: rows of scalars times columns of vectors. A "scalar"
// is a float, or a pair of bfloat16 where the processor multiplies those (AVX512_BF16), accumulating in float.
#pragma once

#include "attention_queries.h"
#include "attention_result.h"
#include "attention_slots.h"
#include "kernels.h"
#include "simd.h"

namespace kvarn {
namespace {

constexpr int64_t kRowGroup = 4;  // rows per register tile

struct FloatTile {
  using Scalar = float;
  static constexpr int64_t kPerScalar = 1;
  KVARN_INLINE Floats multiply_add(Floats sum, float a, const float* b) { return sum + a * load(b); }
};

#if defined(__AVX512BF16__)
struct PairTile {
  using Scalar = uint32_t;
  static constexpr int64_t kPerScalar = 2;
  KVARN_INLINE Floats multiply_add(Floats sum, uint32_t a, const uint32_t* b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)load_as<Words>(b));
  }
};
#endif

// How the elements of a model's dtype are held in tiles.
template <class T>
struct TileOf {
  using type = FloatTile;
};
#if defined(__AVX512BF16__)
template <>
struct TileOf<bfloat16> {
  using type = PairTile;
};
#endif

// c[Rows][Vectors] = c * rescale + a[Rows][depth] b[depth][Vectors]; rescale null: c starts from zero.
template <class Tile, int Rows, int Vectors>
static inline void multiply_tile(const typename Tile::Scalar* a, int64_t a_stride, const typename Tile::Scalar* b,
                                 int64_t b_stride, int64_t depth, float* c, int64_t c_stride, const float* rescale) {
  Floats sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v)
      sums[r][v] = rescale ? load(c + r * c_stride + v * kLanes) * rescale[r] : Floats{};
  for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v)
        sums[r][v] = Tile::multiply_add(sums[r][v], a[r * a_stride + k], b + k * b_stride + v * kLanes);
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
}

template <class Tile, int Vectors>
static void multiply_columns(const typename Tile::Scalar* a, int64_t a_stride, int64_t rows,
                             const typename Tile::Scalar* b, int64_t b_stride, int64_t depth, float* c,
                             int64_t c_stride, const float* rescale) {
  for (int64_t r = 0; r < rows; r += kRowGroup) {
    const auto* a_rows = a + r * a_stride;
    float* c_rows = c + r * c_stride;
    const float* by = rescale ? rescale + r : nullptr;
    switch (smaller(rows - r, kRowGroup)) {
      case 1: multiply_tile<Tile, 1, Vectors>(a_rows, a_stride, b, b_stride, depth, c_rows, c_stride, by); break;
      case 2: multiply_tile<Tile, 2, Vectors>(a_rows, a_stride, b, b_stride, depth, c_rows, c_stride, by); break;
      case 3: multiply_tile<Tile, 3, Vectors>(a_rows, a_stride, b, b_stride, depth, c_rows, c_stride, by); break;
      default: multiply_tile<Tile, 4, Vectors>(a_rows, a_stride, b, b_stride, depth, c_rows, c_stride, by); break;
    }
  }
}

// `columns` is a multiple of kLanes.
template <class Tile>
static void multiply(const typename Tile::Scalar* a, int64_t a_stride, int64_t rows, const typename Tile::Scalar* b,
                     int64_t b_stride, int64_t depth, int64_t columns, float* c, int64_t c_stride,
                     const float* rescale) {
  int64_t j = 0;
  for (; j + kTileVectors * kLanes <= columns; j += kTileVectors * kLanes)
    multiply_columns<Tile, kTileVectors>(a, a_stride, rows, b + j, b_stride, depth, c + j, c_stride, rescale);
  for (; j < columns; j += kLanes)
    multiply_columns<Tile, 1>(a, a_stride, rows, b + j, b_stride, depth, c + j, c_stride, rescale);
}

// `count` (<= kLanes) scalars of a row as raw words: floats, or pairs of bfloat16 left as they are.
template <class Tile, class T>
KVARN_INLINE Words load_scalars(const T* p, int64_t count) {
  if constexpr (Tile::kPerScalar == 1) {
    return (Words)load(p, count);
  } else {
    return (Words)load(reinterpret_cast<const float*>(p), count);
  }
}

// All buffers of one task, cut out of one piece of memory.
template <class T, class K>
struct Tiles {
  using Tile = typename TileOf<T>::type;
  using Scalar = typename Tile::Scalar;
  int64_t rows, all_rows;  // of one kv head (times group), and of all the task's kv heads one after another
  int64_t depth, width;    // depth: scalars in a Q or K row; width: floats in a padded V or output row
  Scalar *queries, *keys, *values, *weights;
  T* widened;  // rows of keys, then of values, of an int8 cache
  float *scores, *sums, *maxima, *totals, *rescale;
  int32_t* positions;
  char* turning;  // of TaskQueries

  Tiles(const AttentionArgs& args, int64_t row_count, int64_t kv_heads, char* memory) {
    rows = row_count * args.group;
    all_rows = rows * kv_heads;
    depth = args.head_dim / Tile::kPerScalar;
    width = round_up(args.head_dim, 2 * kLanes);
    char* p = memory;
    auto take = [&p](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(p);
      p += round_up(count * (int64_t)sizeof *pointer, 64);
    };
    take(queries, all_rows * depth);
    if constexpr (std::is_same_v<K, int8_t>) take(widened, 2 * kChunk * args.head_dim);
    take(keys, depth * kChunk);
    take(values, kChunk / Tile::kPerScalar * width);
    take(scores, rows * kChunk);
    take(sums, all_rows * width);
    take(maxima, all_rows);
    take(totals, all_rows);
    take(rescale, rows);
    take(positions, rows);
    take(turning, TaskQueries<T>::bytes(args));
    weights = reinterpret_cast<Scalar*>(scores);  // a row's weights replace its scores
    bytes = p - memory;
  }
  int64_t bytes;
};

template <class T, class K>
static void load_queries(const TaskQueries<T>& queries, Tiles<T, K>& t) {
  using Tile = typename TileOf<T>::type;
  queries.each([&](int64_t r, const T* from) {
    auto* to = reinterpret_cast<float*>(t.queries + r * t.depth);
    for (int64_t d = 0; d < t.depth; d += kLanes) {
      int64_t count = smaller(kLanes, t.depth - d);
      store(to + d, (Floats)load_scalars<Tile>(from + d * Tile::kPerScalar, count), count);
    }
  });
  for (int64_t r = 0; r < t.rows; ++r) t.positions[r] = queries.position(r);
}

// The keys and values of a chunk of an int8 cache, as rows of T.
template <class T>
static void widen_chunk(const AttentionArgs& args, const Chunk<int8_t>& chunk, int64_t columns, T* to) {
  const int64_t dim = args.head_dim, offset = args.value_offset;
  for (int64_t s = 0; s < columns; ++s, to += dim) {
    const int8_t *key = chunk.keys[s], *value = key + offset;
    const float key_scale = chunk.scales[s][0], value_scale = chunk.scales[s][offset / 4];
    for (int64_t d = 0; d < dim; d += kLanes) {
      store(to + d, load(key + d, dim - d) * key_scale, dim - d);
      store(to + kChunk * dim + d, load(value + d, dim - d) * value_scale, dim - d);
    }
  }
}

// keys[depth][kChunk] = transposed K rows.
template <class T, class K>
static void pack_keys(const T* const* from, int64_t columns, Tiles<T, K>& t) {
  using Tile = typename TileOf<T>::type;
  using Scalar = typename Tile::Scalar;
  for (int64_t s = 0; s < columns; s += kLanes) {
    for (int64_t d = 0; d < t.depth; d += kLanes) {
      int64_t count = smaller(kLanes, t.depth - d);
      Words rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = load_scalars<Tile>(from[s + i] + d * Tile::kPerScalar, count);
      transpose(rows);
      Scalar* to = t.keys + d * kChunk + s;
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) memcpy(to + i * kChunk, &rows[i], sizeof(Words));
      } else {
        for (int i = 0; i < count; ++i) memcpy(to + i * kChunk, &rows[i], sizeof(Words));
      }
    }
  }
}

// values[columns][width] = V rows as floats, or values[columns / 2][width] = two V rows interleaved. A V row lies
// `offset` behind its K row.
template <class T, class K>
static void pack_values(const AttentionArgs& args, const T* const* keys, int64_t offset, int64_t columns,
                        Tiles<T, K>& t) {
  using Tile = typename TileOf<T>::type;
  const int64_t dim = args.head_dim, width = t.width;
  if constexpr (Tile::kPerScalar == 1) {
    for (int64_t s = 0; s < columns; ++s) {
      const T* from = keys[s] + offset;
      for (int64_t d = 0; d < dim; d += kLanes) store(t.values + s * width + d, load(from + d, dim - d));
    }
  } else {
    for (int64_t s = 0; s < columns; s += 2) {
      const T *even = keys[s] + offset, *odd = keys[s + 1] + offset;
      auto* to = t.values + s / 2 * width;
      for (int64_t d = 0; d < dim; d += 2 * kLanes) {
        int64_t count = (dim - d) / 2;  // dim is even
        auto a = (WideHalves)load(reinterpret_cast<const float*>(even + d), count);
        auto b = (WideHalves)load(reinterpret_cast<const float*>(odd + d), count);
        constexpr auto lanes = std::make_index_sequence<2 * kLanes>();
        WideHalves low = interleave<0>(a, b, lanes), high = interleave<kLanes>(a, b, lanes);
        memcpy(to + d, &low, sizeof low);
        memcpy(to + d + kLanes, &high, sizeof high);
      }
    }
  }
}

template <class Tile>
KVARN_INLINE void store_weights(typename Tile::Scalar* row, int64_t column, Floats weights) {
  if constexpr (Tile::kPerScalar == 1) {
    store(row + column, weights);
  } else {
    store(reinterpret_cast<bfloat16*>(row) + column, weights);
  }
}

// 2^x for x <= 0, as exact as weights of this tile are kept.
template <class Tile>
KVARN_INLINE Floats exp2_weight(Floats x) {
#if defined(__AVX512BF16__)
  if constexpr (Tile::kPerScalar == 2) {
    const __m512 inside = _mm512_max_ps((__m512)x, _mm512_set1_ps(-160.f));  // not -inf, and 2^-160 is 0
    const __m512 f = _mm512_reduce_ps(inside, 0);                            // to the nearest integer
    Floats p = (Floats)f * 0.0551717f + 0.2426111f;                          // within 1.1e-4
    p = p * (Floats)f + 0.6932610f;
    p = p * (Floats)f + 0.9999281f;
    return (Floats)_mm512_scalef_ps((__m512)p, _mm512_sub_ps(inside, f));
  }
#endif
  return exp2(x);
}

// One row of scores becomes unnormalised weights; its maximum and sum move on.
template <class T, class K>
static void softmax_row(const AttentionArgs& args, const Chunk<K>& chunk, int64_t columns, bool masked, int64_t r,
                        float& running_maximum, float& running_total, Tiles<T, K>& t) {
  float* scores = t.scores + r * kChunk;
  int32_t position = t.positions[r];
  int64_t behind = args.window > 0 ? larger(-1, position - args.window) : -1;  // the last position out of sight
  const bool capped = args.softcap > 0.f;
  const float to_log2 = capped ? 1.f : args.scale * kLog2e;  // of what is kept as scores
  Floats highest = splat(-kInfinity);
  for (int64_t j = 0; j < columns; j += kLanes) {
    Floats logits = load(scores + j);
    if (capped) logits = tanh(logits * (args.scale / args.softcap)) * (args.softcap * kLog2e);
    if (masked) {
      Ints at = load_as<Ints>(chunk.positions + j);
      logits = (at <= position) & (at > (int32_t)behind) ? logits : splat(-kInfinity);
    }
    if (capped | masked) store(scores + j, logits);
    highest = vmax(highest, logits);
  }
  float before = running_maximum, after = maximum(highest) * to_log2;
  after = after > before ? after : before;
  bool nothing = after == -kInfinity;
  float shift = nothing ? 0.f : after;
  Floats total{};
  for (int64_t j = 0; j < columns; j += kLanes) {
    Floats weights = exp2_weight<typename TileOf<T>::type>(load(scores + j) * to_log2 - shift);
    total += weights;
    store_weights<typename TileOf<T>::type>(t.weights + r * kChunk, j, weights);
  }
  t.rescale[r] = nothing ? 1.f : exp2(before - after);
  running_total = running_total * t.rescale[r] + sum(total);
  running_maximum = after;
}

// Goes through the slots that `walk` is at.
template <class T, class K>
static void attend(const AttentionArgs& args, SlotWalk<K>& walk, Tiles<T, K>& t) {
  using Tile = typename TileOf<T>::type;
  int32_t first = INT32_MAX, last = -1;
  for (int64_t r = 0; r < t.rows; ++r) {
    first = t.positions[r] < first ? t.positions[r] : first;
    last = t.positions[r] > last ? t.positions[r] : last;
  }
  Chunk<K> chunk;
  const T* widened[kChunk];
  if constexpr (!std::is_same_v<T, K>)
    for (int64_t i = 0; i < kChunk; ++i) widened[i] = t.widened + i * args.head_dim;
  while (walk.fill(chunk)) {
    int64_t columns = chunk.pad();
    bool masked = columns > chunk.count || chunk.highest > first ||
                  (args.window > 0 && chunk.lowest <= last - args.window);
    for (int64_t head_row = 0; head_row < t.all_rows; head_row += t.rows) {
      const T* const* keys;
      int64_t value_offset = args.value_offset;
      if constexpr (std::is_same_v<T, K>) {
        keys = chunk.keys;
      } else {
        widen_chunk(args, chunk, columns, t.widened);
        keys = widened;
        value_offset = kChunk * args.head_dim;
      }
      pack_keys(keys, columns, t);
      multiply<Tile>(t.queries + head_row * t.depth, t.depth, t.rows, t.keys, kChunk, t.depth, columns, t.scores,
                     kChunk, nullptr);
      for (int64_t r = 0; r < t.rows; ++r)
        softmax_row(args, chunk, columns, masked, r, t.maxima[head_row + r], t.totals[head_row + r], t);
      pack_values(args, keys, value_offset, columns, t);
      multiply<Tile>(t.weights, kChunk, t.rows, t.values, t.width, columns / Tile::kPerScalar,
                     round_up(args.head_dim, kLanes), t.sums + head_row * t.width, t.width, t.rescale);
      chunk.move_to_next_head(columns, args.head_stride);
    }
  }
}

template <class T, class K>
static void blocked_task(const AttentionArgs& args, const AttentionTask& task, char* scratch) {
  Tiles<T, K> t(args, task.row_count, task.head_count, scratch);
  for (int64_t r = 0; r < t.all_rows; ++r) {
    t.maxima[r] = -kInfinity;
    t.totals[r] = 0.f;
  }
  memset(t.sums, 0, t.all_rows * t.width * sizeof(float));
  TaskQueries<T> queries(args, task, t.turning);
  SlotWalk<K> walk(args, task);
  load_queries(queries, t);
  attend(args, walk, t);
  for (int64_t i = 0; i < task.view_count; ++i) {
    queries.turn_back(task.views[i]);
    walk.enter(task.views[i]);
    load_queries(queries, t);
    attend(args, walk, t);
  }
  finish<T>(args, task, t.all_rows, t.sums, t.width, t.maxima, t.totals);
}

}  // namespace
}  // namespace kvarn
