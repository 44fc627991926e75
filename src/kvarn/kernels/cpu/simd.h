// Vectors of `kLanes` floats for whatever instruction set this is compiled for, written with the compiler's vector
// extensions so that one source serves AVX-512, AVX2, SSE2 and NEON. Everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define KVARN_INLINE static inline __attribute__((always_inline))

namespace kvarn {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileVectors = 4;  // 4 rows x 4 vectors of accumulators in 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileVectors = 2;  // 4 rows x 2 vectors in 16 registers
#else
constexpr int kLanes = 4;
constexpr int kTileVectors = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint16_t WideHalves __attribute__((vector_size(4 * kLanes)));

struct bfloat16 {
  uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.4426950408889634f;

KVARN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
KVARN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
KVARN_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <class V>
KVARN_INLINE V load_as(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

KVARN_INLINE Floats splat(float x) { return Floats{} + x; }

KVARN_INLINE Floats widen(Halves h) { return (Floats)(__builtin_convertvector(h, Words) << 16); }

KVARN_INLINE Halves narrow(Floats v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  Words bits = (Words)v;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  Words quiet_nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet_nan, Halves);
#endif
}

KVARN_INLINE Floats load(const float* p) { return load_as<Floats>(p); }
KVARN_INLINE Floats load(const bfloat16* p) { return widen(load_as<Halves>(p)); }
KVARN_INLINE Floats load(const int8_t* p) {
  return __builtin_convertvector(__builtin_convertvector(load_as<Bytes>(p), Ints), Floats);
}
KVARN_INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
KVARN_INLINE void store(bfloat16* p, Floats v) {
  Halves h = narrow(v);
  memcpy(p, &h, sizeof h);
}

// The first `count` elements, zeros behind them; and the store of only those.
template <class T>
KVARN_INLINE Floats load(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}
template <class T>
KVARN_INLINE void store(T* p, Floats v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  T padded[kLanes];
  store(padded, v);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

#if defined(__AVX512F__)
KVARN_INLINE Floats load(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  return (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
#endif

// Bit i is set where lane i of a comparison holds.
KVARN_INLINE uint32_t lane_bits(Ints holds) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)holds);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)holds);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (holds[i] ? 1u : 0u) << i;
  return bits;
#endif
}
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

template <size_t... I>
KVARN_INLINE Ints lane_numbers(std::index_sequence<I...>) {
  return Ints{(int32_t)I...};
}
KVARN_INLINE Ints lane_numbers() { return lane_numbers(std::make_index_sequence<kLanes>()); }

KVARN_INLINE Floats vmax(Floats a, Floats b) { return a > b ? a : b; }
KVARN_INLINE Floats vmin(Floats a, Floats b) { return a < b ? a : b; }

// Lane k of the result is lane I[k] of a and b laid end to end. `Lanes` has the width of V's elements.
template <class Lanes, size_t... I, class V>
KVARN_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Lanes{I...});  // the other spelling came with GCC 12
#endif
}

template <int Step, size_t... I>
KVARN_INLINE Floats swap_halves(Floats v, std::index_sequence<I...>) {
  return shuffle<Words, (I ^ Step)...>(v, v);
}
template <int Step = kLanes / 2>
KVARN_INLINE float sum(Floats v) {
  v += swap_halves<Step>(v, std::make_index_sequence<kLanes>());
  if constexpr (Step > 1) return sum<Step / 2>(v);
  return v[0];
}
template <int Step = kLanes / 2>
KVARN_INLINE float maximum(Floats v) {
  v = vmax(v, swap_halves<Step>(v, std::make_index_sequence<kLanes>()));
  if constexpr (Step > 1) return maximum<Step / 2>(v);
  return v[0];
}

// True when a lane of a comparison's result is.
KVARN_INLINE bool any(Ints mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int64_t words[kLanes / 2];
  memcpy(words, &mask, sizeof words);
  return (words[0] | words[1]) != 0;
#endif
}

// 2^x, about one unit in the last place; exactly 0 below 2^-126.
KVARN_INLINE Floats exp2(Floats x) {
  const float shifter = 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  Floats inside = vmin(vmax(x, splat(-126.f)), splat(127.f));
  Floats shifted = inside + shifter;
  Floats f = inside - (shifted - shifter);
  Floats p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  Floats scaled = (Floats)((Words)p + ((Words)shifted << 23));
  return x < -126.f ? Floats{} : scaled;
}

KVARN_INLINE float exp2(float x) { return exp2(splat(x))[0]; }

KVARN_INLINE Floats tanh(Floats x) {
  Floats e = exp2(x * (2.f * kLog2e));
  return 1.f - 2.f / (e + 1.f);
}

// One stage of a transpose: of rows a and b, swap b's lanes without bit `Step` with a's lanes with it.
template <int Step, size_t... I>
KVARN_INLINE void exchange(Words& a, Words& b, std::index_sequence<I...>) {
  Words low = shuffle<Words, ((I & Step) ? kLanes + (I ^ Step) : I)...>(a, b);
  Words high = shuffle<Words, ((I & Step) ? kLanes + I : (I ^ Step))...>(a, b);
  a = low;
  b = high;
}
template <int Step = kLanes / 2>
KVARN_INLINE void transpose(Words (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Step)) exchange<Step>(rows[i], rows[i | Step], std::make_index_sequence<kLanes>());
  if constexpr (Step > 1) transpose<Step / 2>(rows);
}

// a0 b0 a1 b1 ...: of two rows of 2 * kLanes halves, the first (Offset 0) or second (Offset kLanes) half interleaved.
template <int Offset, size_t... I>
KVARN_INLINE WideHalves interleave(WideHalves a, WideHalves b, std::index_sequence<I...>) {
  return shuffle<WideHalves, (Offset + I / 2 + (I % 2) * 2 * kLanes)...>(a, b);
}

}  // namespace
}  // namespace kvarn
