// Prefill attention over an int8 cache where the processor multiplies bytes (AVX512_VNNI): flash attention as in
// attention.h, with both products in integers.
//
// Queries are rounded to int8 with one scale for a row and head; keys are as they are in the cache. A weight times the
// scale of its value is rounded to 8 bits, in 255ths of the chunk's largest such product, so that a slot with small
// values (the first token's, usually, which has most of the weight) leaves the others their digits.
// For that the logarithm of a value's scale is added to its logit, and the running maximum is one of these sums; the
// weights that are summed up for the denominator have the scale taken off again.
//
// kRowsAtOnce rows go through a whole chunk, from dot products to weighted values, without leaving the first cache. The
// values of the rows before are added while the processor waits for these rows' maxima.
#pragma once

#if defined(__AVX512VNNI__)

#include "attention_queries.h"
#include "attention_result.h"
#include "attention_slots.h"
#include "decode_products.h"

namespace kvarn {
namespace {

constexpr int kRowsAtOnce = 4;
constexpr int kChunkVectors = kChunk / kLanes;
constexpr float kLog2Of255 = 7.99435344f;

// All buffers of one task, cut out of one piece of memory. Rows are those of a kv head (times group), all kv heads one
// after another; behind the last one there is room to read kRowsAtOnce - 1 more.
template <class T>
struct Int8Buffers {
  int64_t rows, all_rows, words, width;  // words: of four bytes in a row; width: floats in a padded row of output
  uint32_t *queries, *keys, *values;     // keys [words][kChunk], values [kChunk / 4][width]
  float *factors, *sums, *maxima, *totals;
  int32_t *offsets, *positions;
  char* turning;  // of TaskQueries
  int64_t bytes;

  Int8Buffers(const AttentionArgs& args, int64_t row_count, int64_t kv_heads, char* memory) {
    rows = row_count * args.group;
    all_rows = rows * kv_heads;
    words = args.head_dim / 4;
    width = round_up(args.head_dim, kTileVectors * kLanes);
    char* p = memory;
    auto take = [&p](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(p);
      p += round_up(count * (int64_t)sizeof *pointer, 64);
    };
    constexpr int64_t more = kRowsAtOnce - 1;
    take(queries, (all_rows + more) * words);
    take(keys, words * kChunk);
    take(values, kChunk / 4 * width);
    take(sums, all_rows * width);
    take(factors, all_rows + more);
    take(maxima, all_rows + more);
    take(totals, all_rows + more);
    take(offsets, all_rows + more);
    take(positions, rows + more);
    take(turning, TaskQueries<T>::bytes(args));
    bytes = p - memory;
  }
};

// Joins the lanes of four vectors by `join`: a vector of four.
template <class Join>
KVARN_INLINE __m128 join_lanes(const Floats (&v)[kRowsAtOnce], Join join) {
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const Floats ab = join((Floats)_mm512_unpacklo_ps(a, b), (Floats)_mm512_unpackhi_ps(a, b));
  const Floats cd = join((Floats)_mm512_unpacklo_ps(c, d), (Floats)_mm512_unpackhi_ps(c, d));
  Floats all = join((Floats)_mm512_shuffle_ps((__m512)ab, (__m512)cd, 0x44),
                    (Floats)_mm512_shuffle_ps((__m512)ab, (__m512)cd, 0xee));
  all = join(all, (Floats)_mm512_shuffle_f32x4((__m512)all, (__m512)all, 0x4e));
  all = join(all, (Floats)_mm512_shuffle_f32x4((__m512)all, (__m512)all, 0xb1));
  return _mm512_castps512_ps128((__m512)all);
}

// 2^x for x <= 8, within 1.1e-4 of it; not less than 2^-126, which is nothing among weights of at least 1.
KVARN_INLINE Floats exp2_roughly(Floats x) {
  const float shifter = 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const Floats inside = vmax(x, splat(-126.f)), shifted = inside + shifter, f = inside - (shifted - shifter);
  Floats p = f * 0.0551717f + 0.2426111f;
  p = p * f + 0.6932610f;
  p = p * f + 0.9999281f;
  return (Floats)((Words)p + ((Words)shifted << 23));
}

// Of normal numbers above 0: a guess from the bits, mended by two steps of Newton's method.
KVARN_INLINE Floats log2(Floats x) {
  Floats y = __builtin_convertvector((Ints)x, Floats) * 0x1p-23f - 126.957f;
  for (int i = 0; i < 2; ++i) y += (x * exp2(-y) - 1.f) * kLog2e;
  return y;
}

template <class T>
class Int8Task {
 public:
  Int8Task(const AttentionArgs& args, const AttentionTask& task, char* scratch)
      : args_(args), task_(task), b_(args, task.row_count, task.head_count, scratch) {
    constexpr int64_t more = kRowsAtOnce - 1;
    for (int64_t r = 0; r < b_.all_rows; ++r) {
      b_.maxima[r] = -kInfinity;
      b_.totals[r] = 0.f;
    }
    for (int64_t r = b_.all_rows; r < b_.all_rows + more; ++r) {
      b_.factors[r] = b_.maxima[r] = b_.totals[r] = 0.f;
      b_.offsets[r] = 0;
    }
    memset(b_.queries + b_.all_rows * b_.words, 0, more * b_.words * sizeof(uint32_t));
    memset(b_.sums, 0, b_.all_rows * b_.width * sizeof(float));
  }

  void run() {
    TaskQueries<T> queries(args_, task_, b_.turning);
    SlotWalk<int8_t> walk(args_, task_);
    load_queries(queries);
    attend(walk);
    for (int64_t i = 0; i < task_.view_count; ++i) {
      queries.turn_back(task_.views[i]);
      walk.enter(task_.views[i]);
      load_queries(queries);
      attend(walk);
    }
    for (int64_t r = 0; r < b_.all_rows; ++r) Values::put_in_order(b_.sums + r * b_.width, b_.width);
    finish<T>(args_, task_, b_.all_rows, b_.sums, b_.width, b_.maxima, b_.totals);
  }

 private:
  using Values = ValueProduct<T, int8_t>;
  const AttentionArgs& args_;
  const AttentionTask& task_;
  const Int8Buffers<T> b_;
  Chunk<int8_t> chunk_;
  int64_t columns_;
  int32_t lowest_[kChunkVectors];  // position in each vector of slots
  // Of the chunk's slots: scales of keys and values; logarithms of the latter, and 1 over them.
  alignas(64) float key_scales_[kChunk], value_scales_[kChunk];
  Floats logarithms_[kChunkVectors], inverses_[kChunkVectors];
  // Rows with their weights, whose values are still to be added.
  struct {
    alignas(64) uint32_t codes[kRowsAtOnce][kChunk / 4];
    float keep[kRowsAtOnce], add[kRowsAtOnce];
    int64_t row, count, vectors = 0;
  } weighed_;

  // Goes through the slots that `walk` is at.
  void attend(SlotWalk<int8_t>& walk) {
    while (walk.fill(chunk_)) {
      columns_ = chunk_.pad();
      find_lowest();
      for (int64_t head = 0; head < task_.head_count; ++head) {
        load_scales();
        pack_keys();
        pack_values();
        for (int64_t r = 0; r < b_.rows; r += kRowsAtOnce) attend(head * b_.rows + r, r);
        add_values();
        chunk_.move_to_next_head(columns_, args_.head_stride);
      }
    }
  }

  void load_queries(const TaskQueries<T>& queries) {
    const bool capped = args_.softcap > 0.f;
    const float factor = capped ? args_.scale / args_.softcap : args_.scale * kLog2e;
    queries.each([&](int64_t r, const T* from) {
      b_.factors[r] =
          factor * KeyProduct<T, int8_t>::prepare(from, args_.head_dim, b_.queries + r * b_.words, b_.offsets[r]);
    });
    for (int64_t r = 0; r < b_.rows; ++r) b_.positions[r] = queries.position(r);
    for (int64_t i = 0; i < kRowsAtOnce - 1; ++i) b_.positions[b_.rows + i] = b_.positions[b_.rows - 1];
  }

  void find_lowest() {
    for (int64_t v = 0; v < columns_ / kLanes; ++v) {
      lowest_[v] = INT32_MAX;
      for (int64_t i = v * kLanes; i < (v + 1) * kLanes; ++i)
        lowest_[v] = chunk_.positions[i] < lowest_[v] ? chunk_.positions[i] : lowest_[v];
    }
  }

  void load_scales() {
    const int64_t offset = args_.value_offset / 4;
    for (int64_t i = 0; i < columns_; ++i) {
      key_scales_[i] = chunk_.scales[i][0];
      value_scales_[i] = chunk_.scales[i][offset];
    }
    for (int64_t v = 0; v < columns_ / kLanes; ++v) {
      // Values that are all zero have a weight, too.
      logarithms_[v] = log2(vmax(load(value_scales_ + v * kLanes), splat(0x1p-60f)));
      inverses_[v] = exp2(-logarithms_[v]);
    }
  }

  // A word of kLanes keys in each vector, 128 added to every byte since the instruction wants one side unsigned.
  void pack_keys() {
    for (int64_t s = 0; s < columns_; s += kLanes) {
      for (int64_t w = 0; w < b_.words; w += kLanes) {
        const int64_t count = smaller(kLanes, b_.words - w);
        Words rows[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          rows[i] = (Words)load(reinterpret_cast<const float*>(chunk_.keys[s + i] + w * 4), count);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const Words shifted = rows[i] ^ 0x80808080u;
          if (i < count) memcpy(b_.keys + (w + i) * kChunk + s, &shifted, sizeof shifted);
        }
      }
    }
  }

  void pack_values() {
    for (int64_t s = 0; s < columns_; s += 4) {
      const int8_t* const* rows = chunk_.keys + s;
      for (int64_t d = 0; d < args_.head_dim; d += kTileVectors * kLanes) {
        const int64_t at = args_.value_offset + d;
        Words packed[kTileVectors];
        interleave_rows(rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at, args_.head_dim - d, packed);
        memcpy(b_.values + s / 4 * b_.width + d, packed, sizeof packed);
      }
    }
  }

  // kRowsAtOnce rows from row `all` on, which is row `r` of its head, with as much of the chunk as they may see.
  void attend(int64_t all, int64_t r) {
    int32_t first = INT32_MAX, last = -1;
    for (int k = 0; k < kRowsAtOnce; ++k) {
      first = (int32_t)smaller(first, b_.positions[r + k]);
      last = (int32_t)larger(last, b_.positions[r + k]);
    }
    int64_t vectors = columns_ / kLanes;
    while (vectors > 0 && lowest_[vectors - 1] > last) --vectors;
    const bool masked = columns_ > chunk_.count || chunk_.highest > first ||
                        (args_.window > 0 && chunk_.lowest <= last - args_.window);
    switch (vectors) {
      case 0: break;
      case 1: attend<1>(all, r, masked); break;
      case 2: attend<2>(all, r, masked); break;
      case 3: attend<3>(all, r, masked); break;
      default: attend<4>(all, r, masked); break;
    }
  }

  template <int Vectors>
  __attribute__((noinline)) void attend(int64_t all, int64_t r, bool masked) {
    Floats logits[kRowsAtOnce][Vectors], highest[kRowsAtOnce];
    score(all, logits);
#pragma GCC unroll 4
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (masked) mask(b_.positions[r + k], logits[k]);
      highest[k] = logits[k][0];
#pragma GCC unroll 4
      for (int v = 1; v < Vectors; ++v) highest[k] = vmax(highest[k], logits[k][v]);
    }
    const __m128 none = _mm_set1_ps(-kInfinity), zero = _mm_setzero_ps();
    const __m128 here = join_lanes(highest, [](Floats a, Floats b) { return vmax(a, b); });
    const __m128 before = _mm_loadu_ps(b_.maxima + all), after = _mm_max_ps(before, here);
    const __m128 base = _mm_mask_blend_ps(_mm_cmp_ps_mask(after, none, _CMP_EQ_OQ), after, zero);
    // What earlier sums and this chunk's are multiplied by; a weight of 1 is the byte 255 here.
    const Floats by = exp2((Floats)_mm512_insertf32x4(_mm512_castps128_ps512(_mm_sub_ps(before, base)),
                                                      _mm_sub_ps(here, base), 1));
    const __m128 keep = _mm512_castps512_ps128((__m512)by);
    const __m128 add = _mm_mul_ps(_mm512_extractf32x4_ps((__m512)by, 1), _mm_set1_ps(1.f / 255.f));
    float shifts[kRowsAtOnce];
    _mm_storeu_ps(shifts, _mm_sub_ps(_mm_mask_blend_ps(_mm_cmp_ps_mask(here, none, _CMP_EQ_OQ), here, zero),
                                     _mm_set1_ps(kLog2Of255)));

    add_values();  // of the rows before, while the processor waits for the maxima

    Floats totals[kRowsAtOnce];
#pragma GCC unroll 4
    for (int k = 0; k < kRowsAtOnce; ++k) totals[k] = weigh(logits[k], shifts[k], weighed_.codes[k]);
    const __m128 total = join_lanes(totals, [](Floats a, Floats b) { return a + b; });
    weighed_.row = all;
    weighed_.count = smaller(kRowsAtOnce, b_.rows - r);
    weighed_.vectors = Vectors;
    _mm_storeu_ps(weighed_.keep, keep);
    _mm_storeu_ps(weighed_.add, add);
    const __mmask8 exist = (__mmask8)((1 << weighed_.count) - 1);
    _mm_mask_storeu_ps(b_.maxima + all, exist, after);
    _mm_mask_storeu_ps(b_.totals + all, exist,
                       _mm_fmadd_ps(_mm_loadu_ps(b_.totals + all), keep, _mm_mul_ps(total, add)));
  }

  // Logits in units of log2, plus the logarithms of the values' scales.
  template <int Vectors>
  void score(int64_t all, Floats (&logits)[kRowsAtOnce][Vectors]) {
    Ints dots[kRowsAtOnce][Vectors];
#pragma GCC unroll 4
    for (int k = 0; k < kRowsAtOnce; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) dots[k][v] = Ints{} + b_.offsets[all + k];
    const uint32_t *queries = b_.queries + all * b_.words, *keys = b_.keys;
    for (int64_t w = 0; w < b_.words; ++w, keys += kChunk) {
      Words of_keys[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) of_keys[v] = load_as<Words>(keys + v * kLanes);
#pragma GCC unroll 4
      for (int k = 0; k < kRowsAtOnce; ++k) {
        const __m512i query = _mm512_set1_epi32((int)queries[k * b_.words + w]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
          dots[k][v] = (Ints)_mm512_dpbusd_epi32((__m512i)dots[k][v], (__m512i)of_keys[v], query);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const float factor = b_.factors[all + k];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const Floats scaled = __builtin_convertvector(dots[k][v], Floats) * load(key_scales_ + v * kLanes);
        logits[k][v] = args_.softcap > 0.f ? tanh(scaled * factor) * (args_.softcap * kLog2e) + logarithms_[v]
                                           : scaled * factor + logarithms_[v];
      }
    }
  }

  template <int Vectors>
  void mask(int32_t position, Floats (&logits)[Vectors]) const {
    const int32_t behind = args_.window > 0 ? (int32_t)larger(-1, position - args_.window) : -1;
    for (int v = 0; v < Vectors; ++v) {
      const Ints at = load_as<Ints>(chunk_.positions + v * kLanes);
      logits[v] = (at <= position) & (at > behind) ? logits[v] : splat(-kInfinity);
    }
  }

  // One row's weights times the values' scales, as bytes: quad 4 q + v has those of slots 16 v + 4 q to 16 v + 4 q + 3.
  // Returns the sums of the weights alone.
  template <int Vectors>
  Floats weigh(const Floats (&logits)[Vectors], float shift, uint32_t (&codes)[kChunk / 4]) const {
    Floats total{};
    __m512i rounded[kChunkVectors] = {};
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const Floats weights = exp2_roughly(logits[v] - shift);
      total += weights * inverses_[v];
      rounded[v] = _mm512_cvtps_epi32((__m512)weights);
    }
    const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(rounded[0], rounded[1]),
                                               _mm512_packs_epi32(rounded[2], rounded[3]));
    memcpy(codes, &packed, sizeof packed);
    return total;
  }

  // sums = sums * keep + weights times values * add, of the rows weighed last.
  void add_values() {
    for (int64_t column = 0; column < b_.width && weighed_.vectors; column += kTileVectors * kLanes) add_values(column);
    weighed_.vectors = 0;
  }

  void add_values(int64_t column) {
    Ints part[kRowsAtOnce][kTileVectors] = {};
    const uint32_t* values = b_.values + column;
#pragma GCC unroll 1
    for (int64_t v = 0; v < weighed_.vectors; ++v) {
#pragma GCC unroll 4
      for (int q = 0; q < kLanes / 4; ++q, values += b_.width) {
        Words of_values[kTileVectors];
#pragma GCC unroll 4
        for (int c = 0; c < kTileVectors; ++c) of_values[c] = load_as<Words>(values + c * kLanes);
#pragma GCC unroll 4
        for (int k = 0; k < kRowsAtOnce; ++k)
#pragma GCC unroll 4
          for (int c = 0; c < kTileVectors; ++c)
            part[k][c] = Values::add(part[k][c], weighed_.codes[k][4 * q + v], of_values[c]);
      }
    }
    float* into = b_.sums + weighed_.row * b_.width + column;
#pragma GCC unroll 4
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (k >= weighed_.count) break;
#pragma GCC unroll 4
      for (int c = 0; c < kTileVectors; ++c) {
        float* at = into + k * b_.width + c * kLanes;
        store(at, load(at) * weighed_.keep[k] + __builtin_convertvector(part[k][c], Floats) * weighed_.add[k]);
      }
    }
  }
};

}  // namespace
}  // namespace kvarn

#endif
