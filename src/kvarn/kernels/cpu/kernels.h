// What the torch-facing code (ops_*.cpp) and the vector code (kernels.cpp, compiled once per instruction set)
// tell each other: plain structs of pointers and sizes, and one table of functions per instruction set.
// Nothing here or in the vector code includes torch or the C++ standard library's templates: an inline function
// compiled with AVX-512 must never be the copy the linker keeps for everyone.
#pragma once

#include <cstdint>

namespace kvarn {

// Keys and values are float32 or bfloat16 like the query, [N, 2, Hkv, B, D], or int8 with one float32 scale for each
// slot and head, [N, 2, Hkv, B * (D + 4)] bytes: B rows of int8, then B scales.
//
// Sizes and strides are in elements (of an int8 cache: bytes), slot and row numbers count from 0.
struct AttentionArgs {
  const void* query;            // [T, Hq, D]
  int64_t query_row_stride, query_head_stride;
  const void* kv;
  int64_t block_stride, value_offset, head_stride;
  const int32_t* slot_positions;  // [N, B]
  int64_t slot_positions_stride;
  const int32_t* block_tables;  // [S, M]
  int64_t block_tables_stride;
  const int32_t* positions;     // [T]
  const float* sinks;           // [Hq] or null
  void* out;                    // [T, Hq, D] contiguous
  float* unfinished;            // [T, Hq, D + 2] to be joined with others, instead of `out`; or null
  int64_t query_heads, kv_heads, group, head_dim, block_size;
  float scale, softcap;
  int64_t window;
  const float* cos_sin;  // [P, R], where tasks may have views; or null
  int64_t rotary;
  bool is_bfloat16;  // query and out
  bool is_int8;      // kv
};

// Slots of a view, in each of which a task's rows find the token of a position `shift` further on.
struct ViewedSlots {
  const int32_t* table;
  int64_t slot_begin, slot_end;  // slot_begin is the first of a block
  int32_t shift, lowest;         // lowest: position that a slot of the view holds
};

// One piece of attention: some rows of one sequence, the query heads of some kv heads, a range of its slots.
struct AttentionTask {
  int64_t sequence;
  int64_t head_begin, head_count;  // kv heads
  int64_t row_begin, row_count;
  int64_t slot_begin, slot_end;    // slot_begin is the first of a block
  // Where the unfinished result goes when the slots are split over several tasks; null: finish and write to `out`.
  float* partial;
  // What the rows look at after their sequence's slots.
  const ViewedSlots* views;
  int64_t view_count;
};

// An unfinished result is, of a row and head, the weighted sums, the maximum (in units of log2) and the sum of weights.
// A partial result is rows * group * kv heads times head_dim + 2 floats: the weighted sums, then every row's maximum,
// then its sum.
struct MergeTask {
  AttentionTask whole;  // `partial` is the first of `splits` consecutive partial results
  int64_t splits;
};

// Query rows as seen from positions `shifts` further on: those of `rows`, turned back by so many positions.
struct TurnArgs {
  const void* query;  // [T, Hq, D]
  int64_t query_row_stride, query_head_stride;
  const float* cos_sin;  // [P, R]
  int64_t rotary;
  const int32_t *rows, *shifts;  // [U], shifts in (-P, P)
  void* out;                     // [U, Hq, D] contiguous
  int64_t query_heads, head_dim;
  bool is_bfloat16;
};

// Unfinished results of rows and of the turned rows that belong to them.
struct JoinArgs {
  float* rows;                    // [T, Hq, D + 2], used up
  const float* turned;            // [U, Hq, D + 2]
  const int32_t* numbers;         // [J]: the rows to be joined
  const int32_t *starts, *turns;  // [J + 1], [U]: the j-th has turned rows turns[starts[j]] to turns[starts[j + 1] - 1]
};

struct NormArgs {
  const void* x;  // [A, B, F]
  int64_t x_outer_stride, x_inner_stride;
  void* residual;  // [A, B, F] or null
  int64_t residual_outer_stride, residual_inner_stride;
  const void* weight;  // [F]
  void* out;           // [A, B, F] contiguous
  int64_t inner, features;
  float eps;
  bool is_bfloat16;
};

struct CacheArgs {
  void* query;  // [T, Hq, D] or null: nothing to rotate, keys are stored as they are
  const void *key, *value;  // [T, Hkv, D]
  int64_t query_row_stride, key_row_stride, value_row_stride;
  int64_t query_head_stride, key_head_stride, value_head_stride;
  const float* cos_sin;  // [P, R]
  int64_t rotary;
  const int32_t *positions, *slots;  // [T]
  void* kv;                          // as in AttentionArgs
  int64_t block_stride, value_offset, head_stride;
  int64_t query_heads, kv_heads, head_dim, block_size;
  bool is_bfloat16;  // query, key and value
  bool is_int8;      // kv
};

// One block, of one of the jobs that are restored from the same source; these lie together.
struct RestoreJob {
  const void* source;    // [L, 2, Hkv, B, D] contiguous
  void* target;          // the same, or [L, 2, Hkv, B * (D + 4)] bytes
  int64_t start;         // position of its first key; negative: keys are copied
  int64_t first, count;  // the first job of this source, and how many there are
};

struct RestoreArgs {
  const RestoreJob* jobs;
  int64_t layers, kv_heads, block_size, head_dim;
  const float* cos_sin;  // [P, R]
  int64_t positions, rotary;
  bool is_bfloat16;  // sources
  bool is_int8;      // targets
  bool past_caches;  // targets are too large to stay in them
};

struct SiluArgs {
  const void* gate_up;  // [T, 2F]
  int64_t row_stride;
  void* out;  // [T, F] contiguous
  int64_t features;
  bool is_bfloat16;
};

constexpr int64_t kLinearPanel = 32;  // outputs whose weights lie together
constexpr int64_t kLinearGroup = 32;  // inputs that share a scale when quantised

constexpr int64_t kInt8GroupBytes = kLinearPanel * kLinearGroup;  // of a panel, for one group of inputs
constexpr int64_t kInt8ScaleBytes = kLinearPanel * sizeof(float);
constexpr int64_t kInt4GroupBytes = kLinearPanel * (kLinearGroup / 2 + 2 * sizeof(uint16_t));

enum class WeightFormat : int64_t { bfloat16 = 16, int8 = 8, int4 = 4 };

struct LinearArgs {
  WeightFormat format;
  const void* x;  // [M, K] bfloat16, of a bfloat16 product
  int64_t x_row_stride;
  const int8_t* codes;  // [M, groups, 32]: the quantised x of the others, and
  const float* scales;  // [M, groups]
  const float* sums;    // [M, groups]: scale times the sum of the codes
  int64_t groups;       // ceil(K / 32)
  const void* packed;   // linear.h and linear_int.h say how
  int64_t panel_bytes;
  const void* bias;  // [N] bfloat16 or null
  void* out;         // [M, N] contiguous, float32 or bfloat16
  int64_t in_features, out_features;
  bool float_out;
};

struct QuantizeArgs {
  const void* x;  // [M, K] bfloat16
  int64_t x_row_stride, in_features, groups;
  int8_t* codes;
  float *scales, *sums;
};

constexpr int64_t kSampleChunk = 64;  // tokens whose largest logit is noted, to pass over them together

struct SampleArgs {
  const void* logits;  // [R, V]
  int64_t row_stride, vocab;
  const double *temperature, *top_p, *min_p, *uniform;  // [R]; without temperature, or where it is 0: the largest
  const int64_t* top_k;                                 // [R]
  int64_t* out;                                         // [R]
  bool is_bfloat16;
};

struct LogprobArgs {
  const void* logits;  // [R, V]
  int64_t row_stride, vocab;
  const int64_t* tokens;  // [R]
  float* chosen;          // [R]
  int64_t count;
  int64_t* ids;   // [R, count]
  float* values;  // [R, count]
  bool is_bfloat16;
};

// Row functions work on rows [begin, end). Those of the sampler want scratch of 12 bytes a chunk of tokens.
struct Kernels {
  const char* name;
  int64_t (*attention_scratch_bytes)(const AttentionArgs&, int64_t rows, int64_t kv_heads);
  void (*attention)(const AttentionArgs&, const AttentionTask&, void* scratch);
  void (*attention_merge)(const AttentionArgs&, const MergeTask&);
  void (*attention_join)(const AttentionArgs&, const JoinArgs&, int64_t begin, int64_t end);
  void (*turn_back)(const TurnArgs&, int64_t begin, int64_t end);
  void (*rms_norm)(const NormArgs&, int64_t begin, int64_t end);
  void (*rope_and_cache)(const CacheArgs&, int64_t begin, int64_t end);
  void (*restore)(const RestoreArgs&, int64_t begin, int64_t end);
  void (*silu_mul)(const SiluArgs&, int64_t begin, int64_t end);
  void (*linear)(const LinearArgs&, int64_t panel, int64_t row_begin, int64_t row_end);
  void (*quantize_rows)(const QuantizeArgs&, int64_t begin, int64_t end);
  void (*sample)(const SampleArgs&, int64_t begin, int64_t end, double* scratch);
  void (*token_logprobs)(const LogprobArgs&, int64_t begin, int64_t end, double* scratch);
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_vnni;
extern const Kernels kernels_avx512_bf16;
#endif

// The table in use, chosen by what the processor can do (library.cpp).
const Kernels& kernels();

}  // namespace kvarn
