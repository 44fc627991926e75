// The two products of decode attention over one run of `kLanes` slots: keys (transposed in registers) with queries,
// weights with values. One `KeyProduct` and one `ValueProduct` for each kind of query T and cache K says what a word
// or a row holds and how it is multiplied; multiply_keys and multiply_values are the loops.
#pragma once

#include "simd.h"

namespace kvarn {
namespace {

// The words of a run's keys against the words of `Rows` queries.
template <class Keys, int Rows>
KVARN_INLINE void multiply_keys(const char* keys, int64_t row_bytes, const typename Keys::Query* queries,
                                int64_t query_stride, const int32_t* offsets, typename Keys::Sum (&result)[Rows]) {
  constexpr int kChains = Rows <= 4 ? 2 : 1;  // sums that do not wait for each other
  typename Keys::Sum sums[kChains][Rows] = {};
  const int64_t words = row_bytes / 4;
  for (int64_t w = 0; w < words; w += kLanes) {
    const int64_t count = smaller(kLanes, words - w);
    Words rows[kLanes];
    if (count == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = load_as<Words>(keys + i * row_bytes + w * 4);
    } else {
      for (int i = 0; i < kLanes; ++i)
        rows[i] = (Words)load(reinterpret_cast<const float*>(keys + i * row_bytes + w * 4), count);
    }
    transpose(rows);
    if (count == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          sums[i % kChains][r] =
              Keys::add(sums[i % kChains][r], queries + r * query_stride + (w + i) * Keys::kPerWord, rows[i]);
    } else {
      for (int i = 0; i < count; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          sums[0][r] = Keys::add(sums[0][r], queries + r * query_stride + (w + i) * Keys::kPerWord, rows[i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    result[r] = kChains == 2 ? sums[0][r] + sums[kChains - 1][r] : sums[0][r];
    if constexpr (Keys::kHasOffset) result[r] += offsets[r];
  }
}

// Products with queries that are floats: `prepare` widens a query row and returns what its scores are multiplied by.
template <int PerWord>
struct FloatKeys {
  using Query = float;
  using Sum = Floats;
  static constexpr int kPerWord = PerWord;
  static constexpr bool kHasOffset = false;

  template <class T>
  static float prepare(const T* from, int64_t dim, float* to, int32_t&) {
    for (int64_t d = 0; d < dim; d += kLanes) store(to + d, load(from + d, dim - d), dim - d);
    return 1.f;
  }
  KVARN_INLINE Floats add(Floats sum, const float* query, Words keys) {
    if constexpr (PerWord == 1) {
      return sum + query[0] * (Floats)keys;
    } else if constexpr (PerWord == 2) {
      sum += query[0] * (Floats)(keys << 16);
      return sum + query[1] * (Floats)(keys & 0xffff0000u);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum += query[j] * __builtin_convertvector((Ints)(keys << (24 - 8 * j)) >> 24, Floats);
      return sum;
    }
  }
  KVARN_INLINE Floats as_floats(Floats sum) { return sum; }
};

template <class T, class K>
struct KeyProduct : FloatKeys<4 / sizeof(K)> {};

// Weights times the rows of a run's values, kTileVectors vectors of columns from `values` on, of which `columns` exist.
// `weights` holds the run-th run's weights of a row, the next row's `weight_stride` floats further on.
template <class Values, int Rows, class K>
KVARN_INLINE void multiply_values(const K* values, int64_t row_elements, int64_t columns, const float* weights,
                                  int64_t weight_stride, int64_t run, const float* run_scales, int64_t scale_stride,
                                  Floats (&sums)[Rows][kTileVectors]) {
  typename Values::Sum part[Rows][kTileVectors] = {};
  const bool full = columns >= kTileVectors * kLanes;
#pragma GCC unroll 4
  for (int s = 0; s < kLanes; s += Values::kSlots) {
    Words b[kTileVectors];
    if (full)
      Values::load_rows(values + s * row_elements, row_elements, kTileVectors * kLanes, b);
    else
      Values::load_rows(values + s * row_elements, row_elements, columns, b);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const auto weight = Values::weight(weights + r * weight_stride, run * kLanes + s);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        if constexpr (Values::kSumsRuns)
          part[r][v] = Values::add(part[r][v], weight, b[v]);
        else
          sums[r][v] = Values::add(sums[r][v], weight, b[v]);
      }
    }
  }
  if constexpr (Values::kSumsRuns) {
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kTileVectors; ++v)
        sums[r][v] += __builtin_convertvector(part[r][v], Floats) * run_scales[r * scale_stride];
  }
}

// Values row by row, widened to floats.
template <class K>
struct FloatValues {
  using Sum = Floats;
  static constexpr int kSlots = 1;
  static constexpr bool kSumsRuns = false;

  KVARN_INLINE float store_weights(float* row, int64_t run, Floats weights) {
    store(row + run * kLanes, weights);
    return 1.f;
  }
  KVARN_INLINE float weight(const float* row, int64_t slot) { return row[slot]; }
  KVARN_INLINE void load_rows(const K* from, int64_t, int64_t columns, Words (&to)[kTileVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t count = columns - v * kLanes;
      to[v] = count > 0 ? (Words)load(from + v * kLanes, count) : Words{};
    }
  }
  KVARN_INLINE Floats add(Floats sum, float weight, Words values) { return sum + weight * (Floats)values; }
  KVARN_INLINE void put_in_order(float*, int64_t) {}
};

template <class T, class K>
struct ValueProduct : FloatValues<K> {};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 on both sides.
template <>
struct KeyProduct<bfloat16, bfloat16> {
  using Query = uint32_t;
  using Sum = Floats;
  static constexpr int kPerWord = 1;
  static constexpr bool kHasOffset = false;

  static float prepare(const bfloat16* from, int64_t dim, uint32_t* to, int32_t&) {
    memcpy(to, from, dim * sizeof *from);
    return 1.f;
  }
  KVARN_INLINE Floats add(Floats sum, const uint32_t* query, Words keys) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)keys, (__m512bh)_mm512_set1_epi32((int)*query));
  }
  KVARN_INLINE Floats as_floats(Floats sum) { return sum; }
};

template <>
struct ValueProduct<bfloat16, bfloat16> {
  using Sum = Floats;
  static constexpr int kSlots = 2;
  static constexpr bool kSumsRuns = false;

  KVARN_INLINE float store_weights(float* row, int64_t run, Floats weights) {
    store(reinterpret_cast<bfloat16*>(row) + run * kLanes, weights);
    return 1.f;
  }
  KVARN_INLINE uint32_t weight(const float* row, int64_t slot) {
    return reinterpret_cast<const uint32_t*>(row)[slot / 2];
  }
  // Two rows interleaved, 2 * kLanes columns at a time.
  KVARN_INLINE void load_rows(const bfloat16* from, int64_t row_elements, int64_t columns,
                              Words (&to)[kTileVectors]) {
    constexpr auto lanes = std::make_index_sequence<2 * kLanes>();
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; v += 2) {
      const int64_t count = (columns - v * kLanes) / 2;  // of pairs: columns are even
      WideHalves a{}, b{};
      if (count > 0) {
        a = (WideHalves)load(reinterpret_cast<const float*>(from + v * kLanes), count);
        b = (WideHalves)load(reinterpret_cast<const float*>(from + row_elements + v * kLanes), count);
      }
      to[v] = (Words)interleave<0>(a, b, lanes);
      to[v + 1] = (Words)interleave<kLanes>(a, b, lanes);
    }
  }
  KVARN_INLINE Floats add(Floats sum, uint32_t weights, Words values) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)values, (__m512bh)_mm512_set1_epi32((int)weights));
  }
  KVARN_INLINE void put_in_order(float*, int64_t) {}
};
#endif

#if defined(__AVX512VNNI__)
// Four int8 at a time. The instruction multiplies unsigned by signed bytes: keys are made unsigned by adding 128, which
// adds 128 times the sum of the query's bytes to every dot product; `offset` takes it off.
template <class T>
struct KeyProduct<T, int8_t> {
  using Query = uint32_t;
  using Sum = Ints;
  static constexpr int kPerWord = 1;
  static constexpr bool kHasOffset = true;

  static float prepare(const T* from, int64_t dim, uint32_t* to, int32_t& offset) {
    Floats largest{};
    for (int64_t d = 0; d < dim; d += kLanes) {
      const Floats x = load(from + d, dim - d);
      largest = vmax(largest, vmax(x, -x));
    }
    const float high = maximum(largest), by = high > 0.f ? 127.f / high : 0.f;
    __m512i total = _mm512_setzero_si512();
    for (int64_t d = 0; d < dim; d += kLanes) {
      const __m512i rounded = _mm512_cvtps_epi32((__m512)(load(from + d, dim - d) * by));
      total = _mm512_add_epi32(total, rounded);
      const __m128i packed = _mm512_cvtsepi32_epi8(rounded);
      char* codes = reinterpret_cast<char*>(to) + d;
      if (dim - d >= kLanes)
        memcpy(codes, &packed, kLanes);  // of a fixed size it is one instruction
      else
        memcpy(codes, &packed, dim - d);
    }
    offset = -128 * _mm512_reduce_add_epi32(total);
    return high / 127.f;
  }
  KVARN_INLINE Ints add(Ints sum, const uint32_t* query, Words keys) {
    const Words shifted = keys ^ 0x80808080u;
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)shifted, _mm512_set1_epi32((int)*query));
  }
  KVARN_INLINE Floats as_floats(Ints sum) { return __builtin_convertvector(sum, Floats); }
};

// Up to 64 columns of four rows, interleaved byte by byte: in quarter q of vector v are columns 16 q + 4 v to
// 16 q + 4 v + 3, which put_in_order mends in the result.
KVARN_INLINE void interleave_rows(const int8_t* row_0, const int8_t* row_1, const int8_t* row_2, const int8_t* row_3,
                                  int64_t columns, Words (&to)[kTileVectors]) {
  const __mmask64 exist = columns >= 64 ? ~0ull : (1ull << columns) - 1;
  const __m512i a = _mm512_maskz_loadu_epi8(exist, row_0), b = _mm512_maskz_loadu_epi8(exist, row_1);
  const __m512i c = _mm512_maskz_loadu_epi8(exist, row_2), d = _mm512_maskz_loadu_epi8(exist, row_3);
  const __m512i low_ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
  const __m512i low_cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
  to[0] = (Words)_mm512_unpacklo_epi16(low_ab, low_cd);
  to[1] = (Words)_mm512_unpackhi_epi16(low_ab, low_cd);
  to[2] = (Words)_mm512_unpacklo_epi16(high_ab, high_cd);
  to[3] = (Words)_mm512_unpackhi_epi16(high_ab, high_cd);
}

template <class T>
struct ValueProduct<T, int8_t> {
  using Sum = Ints;
  static constexpr int kSlots = 4;
  static constexpr bool kSumsRuns = true;

  // Weights in 255ths of the run's largest; returns what a 255th is worth.
  KVARN_INLINE float store_weights(float* row, int64_t run, Floats weights) {
    const float high = maximum(weights), by = high > 0.f ? 255.f / high : 0.f;
    const __m128i packed = _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32((__m512)(weights * by)));
    memcpy(reinterpret_cast<char*>(row) + run * kLanes, &packed, sizeof packed);
    return high / 255.f;
  }
  KVARN_INLINE uint32_t weight(const float* row, int64_t slot) {
    return reinterpret_cast<const uint32_t*>(row)[slot / 4];
  }
  KVARN_INLINE void load_rows(const int8_t* from, int64_t row_elements, int64_t columns, Words (&to)[kTileVectors]) {
    interleave_rows(from, from + row_elements, from + 2 * row_elements, from + 3 * row_elements, columns, to);
  }
  KVARN_INLINE Ints add(Ints sum, uint32_t weights, Words values) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32((int)weights), (__m512i)values);
  }
  static void put_in_order(float* row, int64_t width) {
    for (int64_t column = 0; column < width; column += 64) {
      // Quarter q of vector v goes to quarter v of vector q.
      float* at = row + column;
      const __m512 a = (__m512)load(at), b = (__m512)load(at + 16), c = (__m512)load(at + 32), d = (__m512)load(at + 48);
      const __m512 low_ab = _mm512_shuffle_f32x4(a, b, 0x44), high_ab = _mm512_shuffle_f32x4(a, b, 0xee);
      const __m512 low_cd = _mm512_shuffle_f32x4(c, d, 0x44), high_cd = _mm512_shuffle_f32x4(c, d, 0xee);
      store(at, (Floats)_mm512_shuffle_f32x4(low_ab, low_cd, 0x88));
      store(at + 16, (Floats)_mm512_shuffle_f32x4(low_ab, low_cd, 0xdd));
      store(at + 32, (Floats)_mm512_shuffle_f32x4(high_ab, high_cd, 0x88));
      store(at + 48, (Floats)_mm512_shuffle_f32x4(high_ab, high_cd, 0xdd));
    }
  }
};
#endif

}  // namespace
}  // namespace kvarn
