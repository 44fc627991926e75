// The forward pass of a Llama-family decoder: the same row functions, products and attention tasks as the single ops,
// one after another, without anything in between that asks Python or torch.
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <vector>

#include "attention_plan.h"
#include "attention_views.h"
#include "linear_tasks.h"
#include "team.h"

namespace kvarn {
namespace {

using Half = uint16_t;  // a bfloat16, only moved around here

// Memory for everything between two layers, kept from step to step.
struct Buffers {
  Half *residual, *hidden, *projected, *qkv, *query, *key, *attended, *gate_up, *activated;
  int8_t* codes;
  float *scales, *sums;

  Buffers(const LlamaModel& model, int64_t rows) {
    const int64_t heads = model.heads * model.head_dim, kv_heads = model.kv_heads * model.head_dim;
    const int64_t widest = std::max({model.hidden, heads, model.middle});
    const int64_t groups = rows * ((widest + kLinearGroup - 1) / kLinearGroup);
    size_t bytes = 0;
    auto lay = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory() + bytes);
      bytes += (count * sizeof *pointer + 63) / 64 * 64;
    };
    for (int round = 0; round < 2; ++round) {  // the first counts
      bytes = 0;
      for (Half** pointer : {&residual, &hidden, &projected}) lay(*pointer, rows * model.hidden);
      lay(qkv, rows * (heads + 2 * kv_heads));
      lay(query, rows * heads);
      lay(key, rows * kv_heads);
      lay(attended, rows * heads);
      lay(gate_up, rows * 2 * model.middle);
      lay(activated, rows * model.middle);
      lay(codes, groups * kLinearGroup);
      lay(scales, groups);
      lay(sums, groups);
      storage().resize(std::max(storage().size(), bytes + 64));
    }
  }

 private:
  static std::vector<char>& storage() {
    thread_local std::vector<char> kept;
    return kept;
  }
  static char* memory() { return reinterpret_cast<char*>(((uintptr_t)storage().data() + 63) & ~(uintptr_t)63); }
};

// Adds the time from here to the end of the block to a phase, when anybody wants to know.
class Timed {
 public:
  Timed(double* seconds, Phase phase) : into_(seconds ? seconds + (int)phase : nullptr) {
    if (into_) started_ = Clock::now();
  }
  ~Timed() {
    if (into_) *into_ += std::chrono::duration<double>(Clock::now() - started_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  double* into_;
  Clock::time_point started_;
};

class Forward {
 public:
  Forward(const LlamaModel& model, LlamaBatch& batch, Team& team)
      : model_(model), batch_(batch), team_(team), use_(kernels()), buffers_(model, batch.rows), rows_(batch.rows),
        plan_(batch.views.entries ? AttentionPlan{} : plan_attention(batch.attention, batch.query_starts,
                                                                     batch.kv_slots, batch.sequences, team.size())) {
    if (batch.views.entries)
      views_.emplace(batch.attention, batch.query_starts, batch.kv_slots, batch.sequences, batch.views, team.size());
  }

  void run() {
    std::memcpy(buffers_.residual, batch_.inputs, rows_ * model_.hidden * sizeof(Half));
    norm(model_.layer[0].input_norm, nullptr, model_.layer[0].qkv);
    for (int64_t i = 0; i < model_.layers; ++i) {
      const LlamaLayer& layer = model_.layer[i];
      multiply(Phase::qkv, layer.qkv, buffers_.hidden, buffers_.qkv);
      attend(layer, i);
      const bool last = i + 1 == model_.layers;
      if (last && !keep_logit_rows()) return;
      quantize(layer.output, buffers_.attended);
      multiply(Phase::output, layer.output, buffers_.attended, buffers_.projected);
      norm(layer.mlp_norm, buffers_.projected, layer.gate_up);
      multiply(Phase::gate_up, layer.gate_up, buffers_.hidden, buffers_.gate_up);
      activate(layer.down);
      multiply(Phase::down, layer.down, buffers_.activated, buffers_.projected);
      const LlamaLayer& next = model_.layer[last ? i : i + 1];
      norm(last ? model_.final_norm : next.input_norm, buffers_.projected, last ? model_.head : next.qkv);
    }
    multiply(Phase::head, model_.head, buffers_.hidden, batch_.logits, true);
  }

 private:
  static void copy_row(Half* to, int64_t row, const Half* from, int64_t from_row, int64_t width) {
    std::memmove(to + row * width, from + from_row * width, width * sizeof(Half));
  }

  QuantizeArgs quantize_args(const LinearWeights& weights, const void* x) const {
    const int64_t groups = (weights.in_features + kLinearGroup - 1) / kLinearGroup;
    return {x, weights.in_features, weights.in_features, groups, buffers_.codes, buffers_.scales, buffers_.sums};
  }

  // Rows of `x`, if the layer they go into multiplies integers; for the whole batch and for some rows of it.
  void quantize(const LinearWeights& into, const void* x) {
    Timed timed(batch_.seconds, Phase::quantize);
    if (into.format != WeightFormat::bfloat16)
      run_rows(team_, rows_, into.in_features, [&](int64_t begin, int64_t end) { quantize(into, x, begin, end); });
  }
  void quantize(const LinearWeights& into, const void* x, int64_t begin, int64_t end) const {
    if (into.format != WeightFormat::bfloat16) use_.quantize_rows(quantize_args(into, x), begin, end);
  }

  // hidden = norm(residual), or residual += added first; ready for the layer it goes into.
  void norm(const void* weight, const Half* added, const LinearWeights& into) {
    Timed timed(batch_.seconds, Phase::norm);
    NormArgs args{};
    args.x = added ? added : buffers_.residual;
    args.x_outer_stride = args.residual_outer_stride = args.features = model_.hidden;
    args.residual = added ? buffers_.residual : nullptr;
    args.weight = weight;
    args.out = buffers_.hidden;
    args.inner = 1;
    args.eps = (float)model_.eps;
    args.is_bfloat16 = true;
    run_rows(team_, rows_, model_.hidden, [&](int64_t begin, int64_t end) {
      use_.rms_norm(args, begin, end);
      quantize(into, buffers_.hidden, begin, end);
    });
  }

  // `x` has been quantised when the weights are.
  void multiply(Phase phase, const LinearWeights& weights, const void* x, void* out, bool float_out = false) {
    Timed timed(batch_.seconds, phase);
    LinearArgs args{};
    args.format = weights.format;
    args.x = x;
    args.x_row_stride = args.in_features = weights.in_features;
    args.codes = buffers_.codes;
    args.scales = buffers_.scales;
    args.sums = buffers_.sums;
    args.groups = (weights.in_features + kLinearGroup - 1) / kLinearGroup;
    args.packed = weights.packed;
    args.panel_bytes = weights.panel_bytes;
    args.bias = weights.bias;
    args.out = out;
    args.out_features = weights.out_features;
    args.float_out = float_out;
    run_linear(team_, args, rows_);
  }

  void attend(const LlamaLayer& layer, int64_t index) {
    const CacheArgs cache = rotate(layer, index);
    Timed timed(batch_.seconds, Phase::attention);
    AttentionArgs args = batch_.attention;
    args.query = cache.query;
    args.query_row_stride = cache.query_row_stride;
    args.query_head_stride = model_.head_dim;
    args.kv = cache.kv;
    args.out = buffers_.attended;
    args.window = layer.window;
    if (views_) return views_->run(team_, args);
    team_.run((int64_t)plan_.tasks.size(),
              [&](int64_t i) { run_attention_task(args, plan_, i, thread_scratch(plan_.scratch_bytes)); });
    run_attention_merges(args, plan_);
  }

  // Norms heads where the model does, turns queries and keys and writes keys and values into the layer's pages.
  CacheArgs rotate(const LlamaLayer& layer, int64_t index) {
    Timed timed(batch_.seconds, Phase::rope);
    const int64_t dim = model_.head_dim, width = (model_.heads + 2 * model_.kv_heads) * dim;
    CacheArgs cache = batch_.cache;
    cache.kv = batch_.pages + index * batch_.layer_bytes;
    cache.query = buffers_.qkv;
    cache.key = buffers_.qkv + model_.heads * dim;
    cache.value = buffers_.qkv + (model_.heads + model_.kv_heads) * dim;
    cache.query_row_stride = cache.key_row_stride = cache.value_row_stride = width;
    cache.query_head_stride = cache.key_head_stride = cache.value_head_stride = dim;
    if (layer.query_norm) {
      cache.query = head_norm(layer.query_norm, buffers_.qkv, model_.heads, buffers_.query);
      cache.key = head_norm(layer.key_norm, buffers_.qkv + model_.heads * dim, model_.kv_heads, buffers_.key);
      cache.query_row_stride = model_.heads * dim;
      cache.key_row_stride = model_.kv_heads * dim;
    }
    run_rows(team_, rows_, width, [&](int64_t begin, int64_t end) { use_.rope_and_cache(cache, begin, end); });
    return cache;
  }

  // The heads of one kind in qkv, each normed, without gaps.
  Half* head_norm(const void* weight, const Half* heads, int64_t count, Half* out) {
    NormArgs args{};
    args.x = heads;
    args.x_outer_stride = (model_.heads + 2 * model_.kv_heads) * model_.head_dim;
    args.x_inner_stride = args.features = model_.head_dim;
    args.weight = weight;
    args.out = out;
    args.inner = count;
    args.eps = (float)model_.eps;
    args.is_bfloat16 = true;
    run_rows(team_, rows_ * count, model_.head_dim, [&](int64_t begin, int64_t end) { use_.rms_norm(args, begin, end); });
    return out;
  }

  // activated = silu(gate) * up, ready for the layer it goes into.
  void activate(const LinearWeights& into) {
    Timed timed(batch_.seconds, Phase::activation);
    const SiluArgs args{buffers_.gate_up, 2 * model_.middle, buffers_.activated, model_.middle, true};
    run_rows(team_, rows_, 2 * model_.middle, [&](int64_t begin, int64_t end) {
      use_.silu_mul(args, begin, end);
      quantize(into, buffers_.activated, begin, end);
    });
  }

  // Only rows that want logits go on, moved to the front; false when there are none.
  bool keep_logit_rows() {
    const int64_t heads = model_.heads * model_.head_dim;
    for (int64_t i = 0; i < batch_.logit_count; ++i) {
      copy_row(buffers_.attended, i, buffers_.attended, batch_.logit_rows[i], heads);
      copy_row(buffers_.residual, i, buffers_.residual, batch_.logit_rows[i], model_.hidden);
    }
    rows_ = batch_.logit_count;
    return rows_ > 0;
  }

  const LlamaModel& model_;
  const LlamaBatch& batch_;
  Team& team_;
  const Kernels& use_;
  const Buffers buffers_;
  int64_t rows_;
  const AttentionPlan plan_;         // of a batch without views,
  std::optional<ViewsPlan> views_;  // or of one with them
};

}  // namespace

void llama_forward(const LlamaModel& model, LlamaBatch& batch, int64_t threads) {
  Team::gather(threads, [&](Team& team) { Forward(model, batch, team).run(); });
}

}  // namespace kvarn
