// x W^T for weights of 8 or 4 bits. Weights are unsigned bytes, activations signed ones, since that is what processors
// multiply: rows of x are quantised here in groups of 32 inputs, each with its own scale, and every group's integer
// sum is scaled into a float sum. What the weights' zero points add is the group's sum of x times a constant.
//
// A panel is 32 outputs; for each group of inputs it holds
//   8 bits: [8 quads][32 outputs][4] codes; behind the last group 32 float scales. weight = (code - 128) * scale
//   4 bits: [4][32 outputs][4] bytes, the low halves one quad, the high halves the next; then 32 scales and 32 minimums,
//           float16. weight = code * scale + minimum
#pragma once

#include "kernels.h"
#include "linear_store.h"
#include "simd.h"

namespace kvarn {
namespace {

#if defined(__AVX512F__)
constexpr int kIntRows = 6;  // 6 rows x 2 vectors of sums, integer and float, in 32 registers
#else
constexpr int kIntRows = 1;
#endif
constexpr int kQuads = kLinearGroup / 4;
typedef uint8_t Codes __attribute__((vector_size(kLanes)));

// sum + in each lane, the four products of unsigned bytes of `weights` and signed bytes of `x`.
// Small: no byte of `weights` is above 15.
template <bool Small>
KVARN_INLINE Ints add_quad_product(Ints sum, Words weights, uint32_t x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32((int)x));
#elif defined(__AVX512BW__)
  const __m512i quad = _mm512_set1_epi32((int)x), nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi16(1);
  const __m512i low = _mm512_and_si512((__m512i)weights, nibble);  // sums of two products fit 16 bits only if small
  Ints products = (Ints)_mm512_madd_epi16(_mm512_maddubs_epi16(low, quad), ones);
  if constexpr (!Small) {
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16((__m512i)weights, 4), nibble);
    products += (Ints)_mm512_madd_epi16(_mm512_maddubs_epi16(high, quad), _mm512_set1_epi16(16));
  }
  return sum + products;
#elif defined(__AVX2__)
  const __m256i quad = _mm256_set1_epi32((int)x), nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const __m256i low = _mm256_and_si256((__m256i)weights, nibble);
  Ints products = (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(low, quad), ones);
  if constexpr (!Small) {
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16((__m256i)weights, 4), nibble);
    products += (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(high, quad), _mm256_set1_epi16(16));
  }
  return sum + products;
#else
  for (int byte = 0; byte < 4; ++byte)
    sum += (Ints)((weights >> (8 * byte)) & 0xff) * (int32_t)(int8_t)(x >> (8 * byte));
  return sum;
#endif
}

KVARN_INLINE Floats widen_float16(const uint16_t* p) {
  Halves h = load_as<Halves>(p);
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)h);
#else
  Words bits = __builtin_convertvector(h, Words);
  Floats magnitude = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;  // the multiplication also mends denormal numbers
  return (Floats)((Words)magnitude | ((bits & 0x8000) << 16));
#endif
}

// Rows of x -> codes, scales and scaled sums of every group of 32; inputs past the last one count as zero.
static void quantize_rows(const QuantizeArgs& args, int64_t begin, int64_t end) {
  const int64_t groups = args.groups;
  for (int64_t row = begin; row < end; ++row) {
    const auto* x = static_cast<const bfloat16*>(args.x) + row * args.x_row_stride;
    int8_t* codes = args.codes + row * groups * kLinearGroup;
    for (int64_t g = 0; g < groups; ++g) {
      constexpr int kVectors = kLinearGroup / kLanes;
      Floats values[kVectors], highest{};
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = g * kLinearGroup + v * kLanes, count = args.in_features - at;
        values[v] = count > 0 ? load(x + at, count) : Floats{};
        highest = vmax(highest, vmax(values[v], -values[v]));
      }
      const float largest = maximum(highest);
      const float by = largest > 0.f ? 127.f / largest : 0.f, scale = largest / 127.f;
      Ints total{};
      for (int v = 0; v < kVectors; ++v) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
        Ints rounded = (Ints)(values[v] * by + 12582912.f) - 0x4b400000;
        total += rounded;
        Codes narrowed = __builtin_convertvector(rounded, Codes);
        memcpy(codes + g * kLinearGroup + v * kLanes, &narrowed, sizeof narrowed);
      }
      args.scales[row * groups + g] = scale;
      args.sums[row * groups + g] = scale * sum(__builtin_convertvector(total, Floats));
    }
  }
}

// Rows of codes x one panel.
template <int Rows, int Bits>
static void int_tile(const LinearArgs& args, int64_t row, const uint8_t* panel, int64_t column, const char* ahead) {
  const int64_t groups = args.groups, width = groups * kLinearGroup;
  constexpr int64_t kCodeBytes = kLinearPanel * kLinearGroup * Bits / 8;
  const int8_t* x = args.codes + row * width;
  const float *scales = args.scales + row * groups, *x_sums = args.sums + row * groups;
  Floats sums[Rows][kPanelVectors] = {};
  float zeros[Rows] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Ints dots[Rows][kPanelVectors] = {};
    auto add = [&](const Words* weights, int quad, auto small) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const uint32_t bytes = load_as<uint32_t>(x + r * width + g * kLinearGroup + 4 * quad);
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v)
          dots[r][v] = add_quad_product<decltype(small)::value>(dots[r][v], weights[v], bytes);
      }
    };
    if (ahead)
      for (int64_t line = 0; line < kCodeBytes; line += 64) __builtin_prefetch(ahead + g * kCodeBytes + line, 0, 2);
#pragma GCC unroll 8
    for (int i = 0; i < kQuads * Bits / 8; ++i) {
      Words weights[kPanelVectors], high[kPanelVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v)
        weights[v] = load_as<Words>(panel + (i * kLinearPanel + v * kLanes) * 4);
      if constexpr (Bits == 8) {
        add(weights, i, std::false_type{});
      } else {
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; ++v) {
          high[v] = (weights[v] >> 4) & 0x0f0f0f0f;
          weights[v] &= 0x0f0f0f0f;
        }
        add(weights, 2 * i, std::true_type{});
        add(high, 2 * i + 1, std::true_type{});
      }
    }
    panel += kCodeBytes;
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) {
      if constexpr (Bits == 8) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          sums[r][v] += __builtin_convertvector(dots[r][v], Floats) * scales[r * groups + g];
      } else {
        const auto* factors = reinterpret_cast<const uint16_t*>(panel) + v * kLanes;
        const Floats scale = widen_float16(factors), minimum = widen_float16(factors + kLinearPanel);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          sums[r][v] += __builtin_convertvector(dots[r][v], Floats) * (scale * scales[r * groups + g]);
          sums[r][v] += minimum * x_sums[r * groups + g];
        }
      }
    }
    if constexpr (Bits == 4) {
      panel += 2 * kLinearPanel * sizeof(uint16_t);
    } else {
      for (int r = 0; r < Rows; ++r) zeros[r] += x_sums[r * groups + g];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    if constexpr (Bits == 8)
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; ++v)
        sums[r][v] = (sums[r][v] - 128.f * zeros[r]) * load(reinterpret_cast<const float*>(panel) + v * kLanes);
    store_outputs(args, sums[r], row + r, column);
  }
}

using IntTile = decltype(&int_tile<1, 8>);

template <int Bits, size_t... I>
KVARN_INLINE IntTile int_tile_of(int64_t rows, std::index_sequence<I...>) {
  static constexpr IntTile tiles[] = {int_tile<I + 1, Bits>...};
  return tiles[rows - 1];
}

template <int Bits>
static void int_panel(const LinearArgs& args, int64_t panel, int64_t row_begin, int64_t row_end) {
  constexpr auto heights = std::make_index_sequence<kIntRows>();
  const int64_t count = row_end - row_begin, tiles = (count + kIntRows - 1) / kIntRows;
  const auto* weights = static_cast<const uint8_t*>(args.packed) + panel * args.panel_bytes;
  const int64_t column = panel * kLinearPanel;
  const bool last = column + kLinearPanel >= args.out_features;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = row_begin + count * t / tiles, rows = row_begin + count * (t + 1) / tiles - begin;
    const char* ahead = t == 0 && !last ? reinterpret_cast<const char*>(weights) + args.panel_bytes : nullptr;
    int_tile_of<Bits>(rows, heights)(args, begin, weights, column, ahead);
  }
}

}  // namespace
}  // namespace kvarn
