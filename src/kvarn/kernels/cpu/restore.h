// Blocks of keys and values on their way from storage to the cache: read once for all that want them, turned to the
// place they go to, written once.
#pragma once

#include "kernels.h"
#include "rowwise.h"
#include "simd.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace kvarn {
namespace {

// memcpy past the caches: lines that are written whole need not be read first, and push nothing else out.
KVARN_INLINE void stream(void* to, const void* from, int64_t bytes) {
#if defined(__x86_64__)
  typedef long long Line __attribute__((vector_size(4 * kLanes)));
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const int64_t ahead = smaller(bytes, -(intptr_t)out & (sizeof(Line) - 1));
  memcpy(out, in, ahead);
  int64_t i = ahead;
  for (; i + (int64_t)sizeof(Line) <= bytes; i += sizeof(Line)) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)(out + i), (__m512i)load_as<Line>(in + i));
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i*)(out + i), (__m256i)load_as<Line>(in + i));
#else
    _mm_stream_si128((__m128i*)(out + i), (__m128i)load_as<Line>(in + i));
#endif
  }
  memcpy(out + i, in + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}

KVARN_INLINE void put(void* to, const void* from, int64_t bytes, bool past_caches) {
  if (past_caches)
    stream(to, from, bytes);
  else
    memcpy(to, from, bytes);
}

constexpr int64_t kStagedElements = 4 * kMostHeadDim;

// The rows [B, D] of one head, keys turned from `start` on unless it is negative.
template <class T, class K>
KVARN_INLINE void restore_head(const RestoreArgs& args, const T* from, K* to, int64_t start) {
  const int64_t dim = args.head_dim, size = args.block_size;
  T turned[kStagedElements];
  int8_t codes[kStagedElements];
  const int64_t most = kStagedElements / dim;
  for (int64_t row = 0; row < size; row += most) {
    const int64_t rows = smaller(most, size - row);
    const T* here = from + row * dim;
    if (start >= 0) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* cosines = args.cos_sin + smaller(start + row + r, args.positions - 1) * args.rotary;
        rotate(here + r * dim, turned + r * dim, cosines, cosines + args.rotary / 2, args.rotary, dim);
      }
      here = turned;
    }
    if constexpr (std::is_same_v<T, K>) {
      put(to + row * dim, here, rows * dim * sizeof(T), args.past_caches);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        const float scale = quantise(here + r * dim, codes + r * dim, dim);
        memcpy(to + size * dim + (row + r) * 4, &scale, 4);
      }
      put(to + row * dim, codes, rows * dim, args.past_caches);
    }
  }
}

// Items [begin, end) of jobs times layers. They count all layers of one source's jobs, then the next source's: and of
// these a layer's jobs one after another, which find their source in the cache.
template <class T, class K>
static void restore_layers(const RestoreArgs& args, int64_t begin, int64_t end) {
  const int64_t from_head = args.block_size * args.head_dim;
  const int64_t to_head = args.block_size * (args.head_dim + (std::is_same_v<T, K> ? 0 : 4));
  for (int64_t item = begin; item < end; ++item) {
    const RestoreJob& sibling = args.jobs[item / args.layers];
    const int64_t within = item - sibling.first * args.layers;
    const RestoreJob& job = args.jobs[sibling.first + within % sibling.count];
    const int64_t heads = within / sibling.count * 2 * args.kv_heads;
    const T* from = static_cast<const T*>(job.source) + heads * from_head;
    K* to = static_cast<K*>(job.target) + heads * to_head;
    for (int64_t head = 0; head < 2 * args.kv_heads; ++head, from += from_head, to += to_head)
      restore_head(args, from, to, head < args.kv_heads ? job.start : -1);
  }
#if defined(__x86_64__)
  if (args.past_caches) _mm_sfence();
#endif
}

}  // namespace
}  // namespace kvarn
