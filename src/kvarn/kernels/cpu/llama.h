// A decoder of the Llama family as the native forward pass sees it: plain structs of pointers and sizes that
// `kernels/llama.py` fills in, eight bytes a field, in this order.
#pragma once

#include <cstdint>

#include "attention_views.h"
#include "kernels.h"

namespace kvarn {

struct LinearWeights {
  WeightFormat format;
  const void* packed;
  int64_t panel_bytes;
  const void* bias;  // or null
  int64_t in_features, out_features;
};

// Norms are [features] bfloat16.
struct LlamaLayer {
  const void* input_norm;
  const void *query_norm, *key_norm;  // over a head, or both null
  const void* mlp_norm;
  int64_t window;  // positions attention looks back, 0 for all
  LinearWeights qkv, output, gate_up, down;
};

struct LlamaModel {
  int64_t layers, hidden, heads, kv_heads, head_dim, middle, vocab;
  double eps, scale;
  const float* cos_sin;  // [positions, rotary]
  int64_t positions, rotary;
  const void* final_norm;
  LinearWeights head;
  LlamaLayer layer[];
};

// What a forward pass spends its time on; `kernels/llama.py` names them in this order.
enum class Phase { qkv, rope, attention, output, gate_up, down, head, norm, activation, quantize, count };

// T rows of S sequences, R of which want logits; see ops.py.
struct LlamaBatch {
  int64_t rows, sequences, logit_count;
  const void* inputs;        // [T, hidden] bfloat16
  const int64_t* logit_rows; // [R], rising
  const int32_t *query_starts, *kv_slots;
  // What all layers' attention and cache writes have in common; the fields of one layer are filled in on the way.
  AttentionArgs attention;
  CacheArgs cache;
  AttentionViews views;  // of no entries: attention without them
  char* pages;
  int64_t layer_bytes;  // from one layer's pages to the next
  float* logits;        // [R, vocab]
  double* seconds;      // [Phase::count], added to; or null
};

// Writes the keys and values of all rows and the logits of those that want them.
void llama_forward(const LlamaModel& model, LlamaBatch& batch, int64_t threads);

}  // namespace kvarn
