// The row-by-row kernels: RMS norm (with the residual added first, or not), rotary embedding with the write to the
// cache, its reverse for queries, and SiLU times gate. All compute in float and round once, when they store.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kvarn {
namespace {

template <class T>
static void rms_norm_rows(const NormArgs& args, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(args.weight);
  const int64_t n = args.features;
  for (int64_t row = begin; row < end; ++row) {
    int64_t outer = row / args.inner, inner = row % args.inner;
    const T* x = static_cast<const T*>(args.x) + outer * args.x_outer_stride + inner * args.x_inner_stride;
    T* residual = nullptr;
    if (args.residual)
      residual =
          static_cast<T*>(args.residual) + outer * args.residual_outer_stride + inner * args.residual_inner_stride;
    Floats squares{};
    for (int64_t i = 0; i < n; i += kLanes) {
      Floats v = load(x + i, n - i);
      if (residual) {
        store(residual + i, v + load(residual + i, n - i), n - i);
        v = load(residual + i, n - i);  // the norm is of what was stored
      }
      squares += v * v;
    }
    float inverse = 1.f / __builtin_sqrtf(sum(squares) / (float)n + args.eps);
    const T* from = residual ? residual : x;
    T* out = static_cast<T*>(args.out) + row * n;
    for (int64_t i = 0; i < n; i += kLanes)
      store(out + i, load(from + i, n - i) * inverse * load(weight + i, n - i), n - i);
  }
}

// to = from rotated by the angles whose cosines and sines are given: the first half of the first `rotary` elements
// pairs with the second half; elements behind them are copied.
template <class T>
KVARN_INLINE void rotate(const T* from, T* to, const float* cosines, const float* sines, int64_t rotary, int64_t dim) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    int64_t count = half - i;
    Floats a = load(from + i, count), b = load(from + half + i, count);
    Floats c = load(cosines + i, count), s = load(sines + i, count);
    store(to + i, a * c - b * s, count);
    store(to + half + i, b * c + a * s, count);
  }
  if (to != from && rotary < dim) memcpy(to + rotary, from + rotary, (dim - rotary) * sizeof(T));
}

// Angles of position 0 are all 0, so its cosines are the factor that the table was made with (YaRN's), which a query
// has had once already.
template <class T>
static void turn_back_rows(const TurnArgs& args, int64_t begin, int64_t end) {
  const int64_t dim = args.head_dim, half = args.rotary / 2, heads = args.query_heads, step = args.query_head_stride;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t shift = args.shifts[i];
    const float* cosines = args.cos_sin + (shift < 0 ? -shift : shift) * args.rotary;
    const T* row = static_cast<const T*>(args.query) + args.rows[i] * args.query_row_stride;
    T* turned = static_cast<T*>(args.out) + i * heads * dim;
    for (int64_t d = 0; d < half; d += kLanes) {
      const int64_t count = half - d;
      const Floats factor = load(args.cos_sin + d, count), s = load(cosines + half + d, count) / factor;
      const Floats cosine = load(cosines + d, count) / factor, sine = shift < 0 ? -s : s;
      const T* from = row + d;
      for (T* to = turned + d; to < turned + heads * dim; from += step, to += dim) {
        const Floats a = load(from, count), b = load(from + half, count);
        store(to, a * cosine + b * sine, count);
        store(to + half, b * cosine - a * sine, count);
      }
    }
    for (int64_t h = 0; h < heads; ++h)
      memcpy(turned + h * dim + args.rotary, row + h * step + args.rotary, (dim - args.rotary) * sizeof(T));
  }
}

// to = from in 127ths of its largest magnitude, which is the scale that is returned times 127.
template <class T>
KVARN_INLINE float quantise(const T* from, int8_t* to, int64_t dim) {
  Floats largest{};
  for (int64_t i = 0; i < dim; i += kLanes) {
    const Floats x = load(from + i, dim - i);
    largest = vmax(largest, vmax(x, -x));
  }
  const float high = maximum(largest), by = high > 1e-30f ? 127.f / high : 0.f;
  for (int64_t i = 0; i < dim; i += kLanes) {
    const float shifter = 12582912.f;  // 1.5 * 2^23: adding it leaves the rounded number in the low bits
    const Ints bits = (Ints)(load(from + i, dim - i) * by + shifter);
    const Bytes rounded = __builtin_convertvector(bits - 0x4b400000, Bytes);
    memcpy(to + i, &rounded, smaller(kLanes, dim - i));
  }
  return high * (1.f / 127.f);
}

constexpr int64_t kMostHeadDim = 1024;

template <class T, class K>
static void rope_and_cache_rows(const CacheArgs& args, int64_t begin, int64_t end) {
  const int64_t dim = args.head_dim;
  for (int64_t row = begin; row < end; ++row) {
    const float *cosines = nullptr, *sines = nullptr;
    if (args.cos_sin) {
      cosines = args.cos_sin + args.positions[row] * args.rotary;
      sines = cosines + args.rotary / 2;
    }
    if (args.query) {
      T* query = static_cast<T*>(args.query) + row * args.query_row_stride;
      for (int64_t h = 0; h < args.query_heads; ++h, query += args.query_head_stride)
        rotate(query, query, cosines, sines, args.rotary, dim);
    }
    const int64_t block = args.slots[row] / args.block_size, offset = args.slots[row] % args.block_size;
    K* head = static_cast<K*>(args.kv) + block * args.block_stride;
    const T* key = static_cast<const T*>(args.key) + row * args.key_row_stride;
    const T* value = static_cast<const T*>(args.value) + row * args.value_row_stride;
    for (int64_t h = 0; h < args.kv_heads; ++h, head += args.head_stride) {
      K* to = head + offset * dim;
      const T *from_key = key + h * args.key_head_stride, *from_value = value + h * args.value_head_stride;
      if constexpr (std::is_same_v<T, K>) {
        rotate(from_key, to, cosines, sines, args.rotary, dim);
        memcpy(to + args.value_offset, from_value, dim * sizeof(T));
      } else {
        T rotated[kMostHeadDim];
        rotate(from_key, rotated, cosines, sines, args.rotary, dim);
        const float scales[2] = {quantise(rotated, to, dim), quantise(from_value, to + args.value_offset, dim)};
        K* at = head + args.block_size * dim + offset * 4;
        memcpy(at, &scales[0], 4);
        memcpy(at + args.value_offset, &scales[1], 4);
      }
    }
  }
}

template <class T>
static void silu_mul_rows(const SiluArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.features;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.gate_up) + row * args.row_stride;
    T* out = static_cast<T*>(args.out) + row * n;
    for (int64_t i = 0; i < n; i += kLanes) {
      Floats g = load(gate + i, n - i), up = load(gate + n + i, n - i);
      store(out + i, g / (1.f + exp2(g * -kLog2e)) * up, n - i);
    }
  }
}

}  // namespace
}  // namespace kvarn
