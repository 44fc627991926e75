// Paged attention of a few query rows of one sequence (decode, or the few rows of a speculation step), where the time
// is that of reading keys and values once. They go from memory straight into registers: `kLanes` rows of keys are
// transposed there, so that a vector holds one word (a float, a pair of bfloat16 or four int8) of `kLanes` slots;
// values are multiplied row by row, pair by pair, or four by four. All query heads of a kv head share each read.
//
// The sequence is taken in stretches of `kStretch` slots. In a stretch, slots that no row may see are dropped by runs
// of `kLanes`, others are masked. While it computes with one run, the code asks for the run that comes next but one:
// the blocks of a sequence lie anywhere, so the processor cannot guess.
//
// An int8 cache on a processor with AVX512_VNNI is multiplied as it is: the query is rounded to int8 with one scale
// for a row and head, the weights to 8 bits with one scale for a run.
#pragma once

#include "attention_result.h"
#include "decode_products.h"
#include "kernels.h"
#include "simd.h"

namespace kvarn {
namespace {

constexpr int64_t kStretch = 256;       // slots whose scores are held at once
constexpr int64_t kRuns = kStretch / kLanes;
constexpr int64_t kFewRows = 16;        // query rows times heads of a group, at most
constexpr int64_t kRunsAhead = 4;       // how far ahead memory is asked for
constexpr int kScoreRows = kLanes == 16 ? 8 : 4;

// `kLanes` neighbouring slots of a block. Addresses are those of the task's first kv head.
struct Run {
  const char *keys, *scales;  // scales: those of an int8 cache's keys
  uint32_t seen;              // bits of the slots that some row may see
  bool whole;                 // all rows see all slots
  Ints positions;
};

// All buffers of one task, cut out of one piece of memory.
template <class T, class K>
struct DecodeBuffers {
  using Keys = KeyProduct<T, K>;
  int64_t rows, all_rows, width, query_words;
  typename Keys::Query* queries;
  float *factors, *scores, *sums, *maxima, *totals, *rescale, *run_scales;
  int32_t *offsets, *positions;
  char* cleaned;  // a run's values with zeros in place of slots nobody sees
  Run* runs;
  int64_t bytes;

  DecodeBuffers(const AttentionArgs& args, int64_t row_count, int64_t kv_heads, char* memory) {
    rows = row_count * args.group;
    all_rows = rows * kv_heads;
    width = round_up(args.head_dim, kTileVectors * kLanes);
    query_words = args.head_dim * (int64_t)sizeof(K) / 4 * Keys::kPerWord;
    char* p = memory;
    auto take = [&p](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(p);
      p += round_up(count * (int64_t)sizeof *pointer, 64);
    };
    take(runs, kRuns);
    take(queries, all_rows * query_words);
    take(factors, all_rows);
    take(offsets, all_rows);
    take(scores, rows * kStretch);
    take(sums, all_rows * width);
    take(maxima, all_rows);
    take(totals, all_rows);
    take(rescale, rows);
    take(run_scales, rows * kRuns);
    take(positions, rows);
    take(cleaned, kLanes * args.head_dim * (int64_t)sizeof(K));
    bytes = p - memory;
  }
};

template <class T, class K>
class DecodeTask {
 public:
  using Keys = KeyProduct<T, K>;
  using Values = ValueProduct<T, K>;
  static constexpr bool kScaled = std::is_same_v<K, int8_t>;

  DecodeTask(const AttentionArgs& args, const AttentionTask& task, char* scratch)
      : args_(args), task_(task), b_(args, task.row_count, task.head_count, scratch), next_(task.slot_begin) {
    table_ = args.block_tables + task.sequence * args.block_tables_stride;
    const int64_t element = sizeof(K);
    kv_ = static_cast<const char*>(args.kv) + task.head_begin * args.head_stride * element;
    row_bytes_ = args.head_dim * element;
    head_bytes_ = args.head_stride * element;
    value_bytes_ = args.value_offset * element;
    first_ = INT32_MAX, last_ = -1;
    for (int64_t r = 0; r < b_.rows; ++r) {
      const int32_t position = args.positions[task.row_begin + r / args.group];
      b_.positions[r] = position;
      first_ = position < first_ ? position : first_;
      last_ = position > last_ ? position : last_;
    }
    load_queries();
  }

  void run() {
    while (find_runs()) {
      for (int64_t unit = 0; unit < kRunsAhead; ++unit) ask(0, unit);
      for (int64_t head = 0; head < task_.head_count; ++head) {
        score(head);
        for (int64_t r = 0; r < b_.rows; ++r) weigh(head, r);
        add_values(head);
      }
    }
    for (int64_t r = 0; r < b_.all_rows; ++r) Values::put_in_order(b_.sums + r * b_.width, b_.width);
    finish<T>(args_, task_, b_.all_rows, b_.sums, b_.width, b_.maxima, b_.totals);
  }

 private:
  const AttentionArgs& args_;
  const AttentionTask& task_;
  DecodeBuffers<T, K> b_;
  const int32_t* table_;
  const char* kv_;
  int64_t next_, count_ = 0;  // the next slot to look at; runs in this stretch
  int64_t row_bytes_, head_bytes_, value_bytes_;
  int32_t first_, last_;  // lowest and highest position of a row

  void load_queries() {
    const bool capped = args_.softcap > 0.f;
    const float factor = capped ? args_.scale / args_.softcap : args_.scale * kLog2e;
    for (int64_t r = 0; r < b_.all_rows; ++r) {
      const int64_t row = task_.row_begin + r % b_.rows / args_.group;
      const int64_t head = (task_.head_begin + r / b_.rows) * args_.group + r % args_.group;
      const T* from = static_cast<const T*>(args_.query) + row * args_.query_row_stride + head * args_.query_head_stride;
      b_.factors[r] = factor * Keys::prepare(from, args_.head_dim, b_.queries + r * b_.query_words, b_.offsets[r]);
      b_.maxima[r] = -kInfinity;
      b_.totals[r] = 0.f;
    }
    memset(b_.sums, 0, b_.all_rows * b_.width * sizeof(float));
  }

  // Collects the next stretch's runs; false when no slot is left.
  bool find_runs() {
    const int64_t size = args_.block_size;
    // Positions behind `lowest` are out of every row's window, those up to `reached` out of some row's.
    const int32_t lowest = args_.window > 0 ? (int32_t)larger(0, first_ - args_.window + 1) : 0;
    const int32_t reached = args_.window > 0 ? (int32_t)larger(-1, last_ - args_.window) : -1;
    count_ = 0;
    while (next_ < task_.slot_end && count_ < kRuns) {
      const int64_t block = table_[next_ / size], offset = next_ % size, left = task_.slot_end - next_;
      Ints at = load_as<Ints>(args_.slot_positions + block * args_.slot_positions_stride + offset);
      if (left < kLanes) at = lane_numbers() < (int32_t)left ? at : INT32_MAX - Ints{};
      next_ += kLanes;
      const uint32_t seen = lane_bits((at >= lowest) & (at <= last_));
      if (!seen) continue;
      Run& run = b_.runs[count_++];
      const char* base = kv_ + block * args_.block_stride * (int64_t)sizeof(K);
      run.keys = base + offset * row_bytes_;
      run.scales = base + size * row_bytes_ + offset * 4;
      run.seen = seen;
      run.whole = lane_bits((at > reached) & (at <= first_)) == kAllLanes;
      run.positions = at;
    }
    return count_ > 0;
  }

  // Asks for the memory of the head's keys (the first `count_` units) or values (the next ones), or what follows. Must be
  // inlined: the compiler takes a function that only prefetches for one without effects, and drops the call.
  __attribute__((always_inline)) void ask(int64_t head, int64_t unit) const {
    if (unit >= 2 * count_) {
      unit -= 2 * count_;
      if (++head >= task_.head_count || unit >= count_) return;
    }
    const Run& run = b_.runs[unit < count_ ? unit : unit - count_];
    const int64_t shift = head * head_bytes_ + (unit < count_ ? 0 : value_bytes_);
    const char* from = run.keys + shift;
    for (int64_t i = 0; i < kLanes * row_bytes_; i += 64) __builtin_prefetch(from + i, 0, 2);
    if constexpr (kScaled) __builtin_prefetch(run.scales + shift, 0, 2);
  }

  void score(int64_t head) {
    for (int64_t i = 0; i < count_; ++i) {
      ask(head, i + kRunsAhead);
      for (int64_t r = 0; r < b_.rows; r += kScoreRows)
        score_rows_of(smaller(kScoreRows, b_.rows - r), head, r, i, std::make_index_sequence<kScoreRows>());
    }
  }

  template <size_t... I>
  void score_rows_of(int64_t rows, int64_t head, int64_t r, int64_t i, std::index_sequence<I...>) {
    using Function = void (DecodeTask::*)(int64_t, int64_t, int64_t);
    static constexpr Function functions[] = {&DecodeTask::score_rows<I + 1>...};
    (this->*functions[rows - 1])(head, r, i);
  }

  // Scores (logits in units of log2, -infinity where hidden) of `Rows` rows from the head's row `r` on with run i.
  template <int Rows>
  void score_rows(int64_t head, int64_t r, int64_t i) {
    const Run& run = b_.runs[i];
    const int64_t all = head * b_.rows + r;
    typename Keys::Sum sums[Rows];
    multiply_keys<Keys, Rows>(run.keys + head * head_bytes_, row_bytes_, b_.queries + all * b_.query_words,
                              b_.query_words, b_.offsets + all, sums);
    Floats scales;
    if constexpr (kScaled) scales = load(reinterpret_cast<const float*>(run.scales + head * head_bytes_));
    for (int k = 0; k < Rows; ++k) {
      Floats logits = Keys::as_floats(sums[k]) * b_.factors[all + k];
      if constexpr (kScaled) logits *= scales;
      if (args_.softcap > 0.f) logits = tanh(logits) * (args_.softcap * kLog2e);
      if (!run.whole) {
        const int32_t position = b_.positions[r + k];
        const int32_t behind = args_.window > 0 ? (int32_t)larger(-1, position - args_.window) : -1;
        logits = (run.positions <= position) & (run.positions > behind) ? logits : splat(-kInfinity);
      }
      store(b_.scores + (r + k) * kStretch + i * kLanes, logits);
    }
  }

  // The scores of a row become unnormalised weights in their place; its maximum and sum move on.
  void weigh(int64_t head, int64_t r) {
    float* scores = b_.scores + r * kStretch;
    float &running_maximum = b_.maxima[head * b_.rows + r], &running_total = b_.totals[head * b_.rows + r];
    Floats highest = splat(-kInfinity);
    for (int64_t i = 0; i < count_; ++i) highest = vmax(highest, load(scores + i * kLanes));
    const float before = running_maximum, here = maximum(highest), after = here > before ? here : before;
    const bool nothing = after == -kInfinity;
    const float shift = nothing ? 0.f : after;
    Floats total{};
    for (int64_t i = 0; i < count_; ++i) {
      Floats weights = exp2(load(scores + i * kLanes) - shift);
      total += weights;
      if constexpr (kScaled) {
        const Run& run = b_.runs[i];
        const auto* at = reinterpret_cast<const float*>(run.scales + head * head_bytes_ + value_bytes_);
        Floats scaled = weights * load(at);
        if (run.seen != kAllLanes) scaled = weights > 0.f ? scaled : Floats{};  // the scale may be rubbish
        b_.run_scales[r * kRuns + i] = Values::store_weights(scores, i, scaled);
      } else {
        Values::store_weights(scores, i, weights);
      }
    }
    const float by = nothing || before == after ? 1.f : exp2(before - after);
    running_total = running_total * by + sum(total);
    running_maximum = after;
    b_.rescale[r] = by;
  }

  void add_values(int64_t head) {
    constexpr int64_t tile = kTileVectors * kLanes;
    for (int64_t r = 0; r < b_.rows; r += kTileRows) {
      for (int64_t column = 0; column < args_.head_dim; column += tile) {
        switch (smaller(kTileRows, b_.rows - r)) {
          case 1: add_tile<1>(head, r, column); break;
          case 2: add_tile<2>(head, r, column); break;
          case 3: add_tile<3>(head, r, column); break;
          default: add_tile<4>(head, r, column); break;
        }
      }
    }
  }

  static constexpr int64_t kTileRows = 4;

  // sums = sums * rescale + weights times values, for `Rows` rows and kTileVectors vectors of columns.
  template <int Rows>
  void add_tile(int64_t head, int64_t r, int64_t column) {
    float* into = b_.sums + (head * b_.rows + r) * b_.width + column;
    Floats sums[Rows][kTileVectors];
    for (int k = 0; k < Rows; ++k)
      for (int v = 0; v < kTileVectors; ++v)
        sums[k][v] = load(into + k * b_.width + v * kLanes) * b_.rescale[r + k];
    const bool first_read = r == 0 && column == 0;
    const int64_t columns = args_.head_dim - column;
    for (int64_t i = 0; i < count_; ++i) {
      if (first_read) ask(head, count_ + i + kRunsAhead);
      const Run& run = b_.runs[i];
      const char* values = run.keys + head * head_bytes_ + value_bytes_;
      if (!kScaled && run.seen != kAllLanes) values = cleaned(values, run.seen);
      const K* from = reinterpret_cast<const K*>(values) + column;
      const float* weights = b_.scores + r * kStretch;
      multiply_values<Values, Rows>(from, args_.head_dim, columns, weights, kStretch, i,
                                    b_.run_scales + r * kRuns + i, kRuns, sums);
    }
    for (int k = 0; k < Rows; ++k)
      for (int v = 0; v < kTileVectors; ++v) store(into + k * b_.width + v * kLanes, sums[k][v]);
  }

  // A slot that nobody sees may hold anything, even NaN, which a weight of zero does not silence.
  const char* cleaned(const char* values, uint32_t seen) {
    for (int i = 0; i < kLanes; ++i) {
      char* to = b_.cleaned + i * row_bytes_;
      if (seen >> i & 1)
        memcpy(to, values + i * row_bytes_, row_bytes_);
      else
        memset(to, 0, row_bytes_);
    }
    return b_.cleaned;
  }
};

// Whether a task's rows are few and its blocks whole runs.
KVARN_INLINE bool takes_decode(const AttentionArgs& args, int64_t row_count) {
  return row_count * args.group <= kFewRows && args.block_size % kLanes == 0;
}

}  // namespace
}  // namespace kvarn
