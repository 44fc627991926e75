// The vector code, compiled once per instruction set: KVARN_VARIANT names the table it fills.
#include "kernels.h"

#include "attention.h"
#include "attention_decode.h"
#include "attention_int8.h"
#include "linear.h"
#include "linear_int.h"
#include "restore.h"
#include "rowwise.h"
#include "sampling.h"

#define KVARN_JOIN_(a, b) a##b
#define KVARN_JOIN(a, b) KVARN_JOIN_(a, b)
#define KVARN_STRING_(a) #a
#define KVARN_STRING(a) KVARN_STRING_(a)

namespace kvarn {
namespace {

// Runs F<float> or F<bfloat16>.
#define KVARN_BY_DTYPE(function, args, ...) \
  ((args).is_bfloat16 ? function<bfloat16>(args, __VA_ARGS__) : function<float>(args, __VA_ARGS__))

// The ways of prefill attention: over bytes where the processor multiplies them, else over numbers of T.
template <class T, class K>
int64_t blocked_bytes(const AttentionArgs& args, int64_t rows, int64_t kv_heads) {
#if defined(__AVX512VNNI__)
  if constexpr (std::is_same_v<K, int8_t>) return Int8Buffers<T>(args, rows, kv_heads, nullptr).bytes;
#endif
  return Tiles<T, K>(args, rows, kv_heads, nullptr).bytes;
}
template <class T, class K>
void blocked(const AttentionArgs& args, const AttentionTask& task, char* scratch) {
#if defined(__AVX512VNNI__)
  if constexpr (std::is_same_v<K, int8_t>) return Int8Task<T>(args, task, scratch).run();
#endif
  blocked_task<T, K>(args, task, scratch);
}

template <class T, class K>
int64_t scratch_bytes_of(const AttentionArgs& args, int64_t rows, int64_t kv_heads) {
  const int64_t few = smaller(rows, larger(1, kFewRows / args.group));
  return larger(blocked_bytes<T, K>(args, rows, kv_heads),
                DecodeBuffers<T, K>(args, few, kv_heads, nullptr).bytes);
}
template <class T, class K>
void attention_of(const AttentionArgs& args, const AttentionTask& task, char* scratch) {
  if (task.view_count == 0 && takes_decode(args, task.row_count))
    DecodeTask<T, K>(args, task, scratch).run();
  else
    blocked<T, K>(args, task, scratch);
}

// Runs F<query type, kv type>.
#define KVARN_BY_DTYPES(function, args, ...)                                                                       \
  ((args).is_int8 ? ((args).is_bfloat16 ? function<bfloat16, int8_t>(args, __VA_ARGS__)                            \
                                        : function<float, int8_t>(args, __VA_ARGS__))                              \
                  : ((args).is_bfloat16 ? function<bfloat16, bfloat16>(args, __VA_ARGS__)                          \
                                        : function<float, float>(args, __VA_ARGS__)))

int64_t attention_scratch_bytes(const AttentionArgs& args, int64_t rows, int64_t kv_heads) {
  return KVARN_BY_DTYPES(scratch_bytes_of, args, rows, kv_heads);
}
void attention(const AttentionArgs& args, const AttentionTask& task, void* scratch) {
  KVARN_BY_DTYPES(attention_of, args, task, static_cast<char*>(scratch));
}
void attention_merge(const AttentionArgs& args, const MergeTask& task) { KVARN_BY_DTYPE(merge_task, args, task); }
void attention_join(const AttentionArgs& args, const JoinArgs& join, int64_t begin, int64_t end) {
  KVARN_BY_DTYPE(join_rows, args, join, begin, end);
}
void turn_back(const TurnArgs& args, int64_t begin, int64_t end) { KVARN_BY_DTYPE(turn_back_rows, args, begin, end); }
void rms_norm(const NormArgs& args, int64_t begin, int64_t end) { KVARN_BY_DTYPE(rms_norm_rows, args, begin, end); }
void rope_and_cache(const CacheArgs& args, int64_t begin, int64_t end) {
  KVARN_BY_DTYPES(rope_and_cache_rows, args, begin, end);
}
void restore(const RestoreArgs& args, int64_t begin, int64_t end) {
  KVARN_BY_DTYPES(restore_layers, args, begin, end);
}
void silu_mul(const SiluArgs& args, int64_t begin, int64_t end) { KVARN_BY_DTYPE(silu_mul_rows, args, begin, end); }
void linear(const LinearArgs& args, int64_t panel, int64_t row_begin, int64_t row_end) {
  switch (args.format) {
    case WeightFormat::bfloat16: return linear_panel(args, panel, row_begin, row_end);
    case WeightFormat::int8: return int_panel<8>(args, panel, row_begin, row_end);
    case WeightFormat::int4: return int_panel<4>(args, panel, row_begin, row_end);
  }
}
void sample(const SampleArgs& args, int64_t begin, int64_t end, double* scratch) {
  KVARN_BY_DTYPE(sample_tokens, args, begin, end, scratch);
}
void token_logprobs(const LogprobArgs& args, int64_t begin, int64_t end, double* scratch) {
  KVARN_BY_DTYPE(row_logprobs, args, begin, end, scratch);
}

}  // namespace

const Kernels KVARN_JOIN(kernels_, KVARN_VARIANT) = {
    KVARN_STRING(KVARN_VARIANT), attention_scratch_bytes, attention, attention_merge,
    attention_join, turn_back, rms_norm, rope_and_cache, restore, silu_mul, linear, quantize_rows, sample,
    token_logprobs,
};

}  // namespace kvarn
