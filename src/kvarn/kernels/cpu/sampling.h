// Tokens from logits, a row at a time and without sorting: the largest, a draw from what top-k, top-p and min-p keep,
// log-probabilities. Everything a row keeps is what reaches a threshold, so thresholds are all that is searched for.
//
// The first pass notes the largest logit of every chunk of tokens; later passes skip the chunks that hold nothing as
// large as they look for, which of a language model's logits is nearly all of them. A threshold is then found by
// histograms of ever narrower ranges of logits. Weights are floats, their sums doubles in order of the ids.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kvarn {
namespace {

constexpr int kBins = 1024;
// Logits below the largest that are told apart at first, where nothing is known of the smallest one looked for.
constexpr float kFirstRange = 64.f;

typedef float HalfFloats __attribute__((vector_size(2 * kLanes)));
typedef double Doubles __attribute__((vector_size(4 * kLanes)));

template <class T>
struct LogitRow {
  const T* logits;
  int64_t count;
  const float* maxima;  // of every chunk, or null: nothing is skipped
  float top;            // the largest logit
  float heat;           // log2(e) / temperature

  int64_t chunks() const { return (count + kSampleChunk - 1) / kSampleChunk; }
  bool skips(int64_t chunk, float lowest) const { return maxima && maxima[chunk] < lowest; }
  Floats weight(Floats v) const { return exp2((v - top) * heat); }
};

// The first `left` logits, -inf behind them.
template <class T>
KVARN_INLINE Floats load_logits(const T* logits, int64_t left) {
  if (left >= kLanes) return load(logits);
  float padded[kLanes];
  store(padded, load(logits, larger(left, 0)));
  for (int64_t i = larger(left, 0); i < kLanes; ++i) padded[i] = -kInfinity;
  return load(padded);
}

// visit(vector of logits, index of the first) for every vector of one chunk.
template <class T, class Visit>
KVARN_INLINE void over_chunk(const LogitRow<T>& row, int64_t chunk, Visit&& visit) {
  const int64_t begin = chunk * kSampleChunk, left = row.count - begin;
  const T* logits = row.logits + begin;
  if (left >= kSampleChunk) {
    for (int64_t i = 0; i < kSampleChunk; i += kLanes) visit(load(logits + i), i);
  } else {
    for (int64_t i = 0; i < kSampleChunk; i += kLanes) visit(load_logits(logits + smaller(i, left), left - i), i);
  }
}

template <class T, class Visit>
KVARN_INLINE void over_row(const LogitRow<T>& row, float lowest, Visit&& visit) {
  for (int64_t chunk = 0; chunk < row.chunks(); ++chunk)
    if (!row.skips(chunk, lowest)) over_chunk(row, chunk, [&](Floats v, int64_t) { visit(v); });
}

// Fills in `maxima` and returns the row that has them.
template <class T>
static LogitRow<T> survey(const T* logits, int64_t count, double temperature, float* maxima) {
  LogitRow<T> row{logits, count, nullptr, -kInfinity, (float)(kLog2e / temperature)};
  for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
    Floats best = splat(-kInfinity);
    over_chunk(row, chunk, [&](Floats v, int64_t) { best = vmax(v, best); });
    maxima[chunk] = maximum(best);
    row.top = maxima[chunk] > row.top ? maxima[chunk] : row.top;
  }
  row.maxima = maxima;
  return row;
}

// The lowest id of a logit as large as the row's largest.
template <class T>
static int64_t first_of_largest(const LogitRow<T>& row) {
  for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
    if (row.maxima[chunk] != row.top) continue;
    float logits[kSampleChunk];
    over_chunk(row, chunk, [&](Floats v, int64_t i) { store(logits + i, v); });
    for (int64_t i = 0; i < kSampleChunk; ++i)
      if (logits[i] == row.top) return smaller(chunk * kSampleChunk + i, row.count - 1);
  }
  return 0;  // a row of NaN
}

// Which bin a logit falls into, larger logits first, and the bounds themselves into the first and the last.
struct Bins {
  float low, high, per_logit;

  Bins(float low, float high) : low(low), high(high) {
    const float range = high - low;
    per_logit = (kBins - 2) / (range < kInfinity ? range : kFirstRange);
  }
  Ints inside(Floats v) const { return (v >= low) & (v <= high); }
  Ints of(Floats v) const {
    const Floats place = vmin(vmax((high - v) * per_logit, Floats{}), splat(kBins - 2));
    return v > low ? __builtin_convertvector(place, Ints) : Ints{} + (kBins - 1);
  }
};

// The smallest logit of at least `low` for which the weight of all larger ones is below `target`. Weights are
// probabilities times some constant, or one for each logit.
template <bool Weighted, class T>
static float find_threshold(const LogitRow<T>& row, float low, double target) {
  float high = row.top;
  double above = 0.0;  // weight of what is larger than `high`
  for (;;) {
    const Bins bins(low, high);
    double histogram[kBins] = {};
    over_row(row, low, [&](Floats v) {
      const Ints inside = bins.inside(v);
      if (!any(inside)) return;
      int32_t bin[kLanes];
      float weight[kLanes];
      const Ints places = bins.of(v);
      memcpy(bin, &places, sizeof bin);
      store(weight, inside ? (Weighted ? row.weight(v) : splat(1.f)) : Floats{});
      for (int i = 0; i < kLanes; ++i) histogram[bin[i]] += weight[i];
    });
    int chosen = 0;
    double larger_weight = above;
    for (int bin = 0; bin < kBins; ++bin) {
      if (!(histogram[bin] > 0.0)) continue;
      chosen = bin;
      above = larger_weight;
      larger_weight += histogram[bin];
      if (larger_weight >= target) break;
    }
    Floats smallest = splat(kInfinity), largest = splat(-kInfinity);
    over_row(row, low, [&](Floats v) {
      const Ints here = bins.inside(v) & (bins.of(v) == chosen);
      smallest = vmin(here ? v : splat(kInfinity), smallest);
      largest = vmax(here ? v : splat(-kInfinity), largest);
    });
    low = -maximum(-smallest);
    high = maximum(largest);
    if (!(low < high)) return high;  // the bounds never share a bin, so the range shrinks until this is so
  }
}

// The k-th largest logit. At least k chunks have maxima as large as the k-th largest of the maxima.
template <class T>
static float kth_largest(const LogitRow<T>& row, int64_t k) {
  float low = -kInfinity;
  if (k <= row.chunks()) {
    const LogitRow<float> maxima{row.maxima, row.chunks(), nullptr, row.top, 0.f};
    low = find_threshold<false>(maxima, low, (double)k);
  }
  return find_threshold<false>(row, low, (double)k);
}

// Weights of one chunk's logits, 0 for those below `lowest`.
template <class T>
KVARN_INLINE void chunk_weights(const LogitRow<T>& row, int64_t chunk, float lowest, float (&weights)[kSampleChunk]) {
  over_chunk(row, chunk, [&](Floats v, int64_t i) { store(weights + i, v >= lowest ? row.weight(v) : Floats{}); });
}

// Sums of every chunk's weights; returns their sum.
template <class T>
static double sum_weights(const LogitRow<T>& row, float lowest, double* masses) {
  double total = 0.0;
  for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
    masses[chunk] = 0.0;
    if (row.skips(chunk, lowest)) continue;
    float weights[kSampleChunk];
    chunk_weights(row, chunk, lowest, weights);
    Doubles sums{};
    for (int i = 0; i < kSampleChunk; i += kLanes / 2)
      sums += __builtin_convertvector(load_as<HalfFloats>(weights + i), Doubles);
    double parts[kLanes / 2];
    memcpy(parts, &sums, sizeof parts);
    for (int step = kLanes / 4; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
    masses[chunk] = parts[0];
    total += parts[0];
  }
  return total;
}

// The first token at which the cumulative weight of what reaches `lowest` exceeds `uniform` of the total.
template <class T>
static int64_t invert(const LogitRow<T>& row, float lowest, double uniform, double* masses) {
  const double target = uniform * sum_weights(row, lowest, masses);
  double before = 0.0, cumulative = 0.0;
  int64_t chosen = 0;
  for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
    if (!(masses[chunk] > 0.0)) continue;
    chosen = chunk;
    before = cumulative;
    cumulative += masses[chunk];
    if (cumulative > target) break;
  }
  float weights[kSampleChunk];
  chunk_weights(row, chosen, lowest, weights);
  int64_t token = 0;
  for (int64_t i = 0; i < kSampleChunk; ++i) {
    if (!(weights[i] > 0.f)) continue;
    token = i;  // stays the last one with weight if rounding puts the target behind it
    before += weights[i];
    if (before > target) break;
  }
  return smaller(chosen * kSampleChunk + token, row.count - 1);
}

// The smallest float that is not below `bound`.
static float at_least(double bound) {
  const float near = (float)bound;
  return (double)near < bound ? __builtin_nextafterf(near, kInfinity) : near;
}

// The smallest logit that top-k, top-p and min-p keep, each applied to what the one before it keeps.
template <class T>
static float kept_from(const LogitRow<T>& row, const SampleArgs& args, int64_t index, double* masses) {
  const double temperature = args.temperature[index], top_p = args.top_p[index], min_p = args.min_p[index];
  const int64_t top_k = args.top_k[index];
  float lowest = -kInfinity;
  if (top_k > 0 && top_k < row.count) lowest = kth_largest(row, top_k);
  const float likely = min_p > 0.0 ? at_least(row.top + temperature * __builtin_log(min_p)) : -kInfinity;
  if (top_p < 1.0) {
    const double total = sum_weights(row, lowest, masses);
    // Whatever lies this far below the largest logit weighs less than 1 - top_p of the total, all of it together.
    const double reach = __builtin_log((double)row.count / ((1.0 - top_p) * total)) + 0.01;
    const float bound = (float)(row.top - reach * temperature - 1e-6 * __builtin_fabs(row.top));
    float low = lowest > likely ? lowest : likely;
    low = low > bound ? low : bound;
    lowest = find_threshold<true>(row, low, top_p * total);
  }
  return lowest > likely ? lowest : likely;
}

template <class T>
static void sample_tokens(const SampleArgs& args, int64_t begin, int64_t end, double* scratch) {
  const int64_t chunks = (args.vocab + kSampleChunk - 1) / kSampleChunk;
  float* maxima = reinterpret_cast<float*>(scratch + chunks);
  for (int64_t i = begin; i < end; ++i) {
    const T* logits = static_cast<const T*>(args.logits) + i * args.row_stride;
    const bool greedy = !args.temperature || !(args.temperature[i] > 0.0);
    const LogitRow<T> row = survey(logits, args.vocab, greedy ? 1.0 : args.temperature[i], maxima);
    if (greedy || !(__builtin_fabsf(row.top) < kInfinity))
      args.out[i] = first_of_largest(row);
    else
      args.out[i] = invert(row, kept_from(row, args, i, scratch), args.uniform[i], scratch);
  }
}

// The `count` largest logits in descending order, the lower id first of equal ones.
template <class T>
static void largest_logits(const LogitRow<T>& row, int64_t count, float* values, int64_t* ids) {
  const float lowest = kth_largest(row, count);
  int64_t found = 0;
  for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
    if (row.skips(chunk, lowest)) continue;
    float logits[kSampleChunk];
    over_chunk(row, chunk, [&](Floats v, int64_t i) { store(logits + i, v); });
    for (int64_t i = 0; i < smaller(kSampleChunk, row.count - chunk * kSampleChunk); ++i) {
      const float logit = logits[i];
      if (!(logit >= lowest) || (found == count && !(logit > values[found - 1]))) continue;
      int64_t place = found < count ? found++ : count - 1;
      for (; place > 0 && logit > values[place - 1]; --place) {
        values[place] = values[place - 1];
        ids[place] = ids[place - 1];
      }
      values[place] = logit;
      ids[place] = chunk * kSampleChunk + i;
    }
  }
  for (; found < count; ++found) {  // only of rows with NaN
    values[found] = __builtin_nanf("");
    ids[found] = 0;
  }
}

template <class T>
static void row_logprobs(const LogprobArgs& args, int64_t begin, int64_t end, double* scratch) {
  const int64_t chunks = (args.vocab + kSampleChunk - 1) / kSampleChunk;
  float* maxima = reinterpret_cast<float*>(scratch + chunks);
  for (int64_t i = begin; i < end; ++i) {
    const T* logits = static_cast<const T*>(args.logits) + i * args.row_stride;
    const LogitRow<T> row = survey(logits, args.vocab, 1.0, maxima);
    const double total = row.top + __builtin_log(sum_weights(row, -kInfinity, scratch));
    args.chosen[i] = (float)(load(logits + args.tokens[i], 1)[0] - total);
    if (args.count == 0) continue;
    float* values = args.values + i * args.count;
    largest_logits(row, args.count, values, args.ids + i * args.count);
    for (int64_t j = 0; j < args.count; ++j) values[j] = (float)(values[j] - total);
  }
}

}  // namespace
}  // namespace kvarn
