// kvarn::llama_forward for the CPU: checks a batch against the model's description, then runs the whole forward pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "batch_checks.h"
#include "llama.h"
#include "tensors.h"

namespace kvarn {
namespace {

static_assert(sizeof(LinearWeights) == 6 * 8 && sizeof(LlamaLayer) == (5 + 4 * 6) * 8 && sizeof(LlamaModel) == 19 * 8,
              "kernels/llama.py writes eight bytes a field");

Tensor llama_forward(const Tensor& description_, const Tensor& inputs_, const Tensor& positions_, const Tensor& slots_,
                     const Tensor& block_tables_, const Tensor& kv_slots_, const Tensor& query_starts_,
                     const Tensor& logit_rows_, const Tensor& pages_, const Tensor& slot_positions_,
                     const std::optional<Tensor>& seconds_, const std::optional<Tensor>& view_tables,
                     const std::optional<Tensor>& view_slots, const std::optional<Tensor>& row_starts,
                     const std::optional<Tensor>& view_rows, const std::optional<Tensor>& shifts) {
  View description("description", description_), inputs("inputs", inputs_), positions("positions", positions_);
  View slots("slots", slots_), block_tables("block_tables", block_tables_), kv_slots("kv_slots", kv_slots_);
  View query_starts("query_starts", query_starts_), logit_rows("logit_rows", logit_rows_), pages("pages", pages_);
  View slot_positions("slot_positions", slot_positions_);
  description.expect_dims(1, "[fields] as kernels/llama.py writes them");
  description.expect_dtype(aoti_torch_dtype_int64(), "int64");
  const LlamaModel& model = *description.as<const LlamaModel>();

  const int64_t rows = inputs.size(0);
  pages.expect_contiguous_tail(pages.dims - 1);
  slot_positions.expect_int32(2, "[N, B]");
  const int64_t blocks = slot_positions.size(0), block_size = slot_positions.size(1);
  const bool is_int8 = pages.dtype == aoti_torch_dtype_uint8();
  pages.expect_dims(is_int8 ? 5 : 6, "[N, layers, 2, Hkv, B, D], or [N, layers, 2, Hkv, B * (D + 4)] of int8");
  if (!is_int8) pages.expect_dtype(aoti_torch_dtype_bfloat16(), "bfloat16, or uint8");
  pages.expect_size(0, blocks, "slot_positions' blocks");
  pages.expect_size(1, model.layers, "the model's layers");
  pages.expect_size(3, model.kv_heads, "the model's kv heads");
  pages.expect_size(-1, is_int8 ? block_size * (model.head_dim + 4) : model.head_dim, "the model's head dimension");
  inputs.expect_dims(2, "[T, hidden]");
  inputs.expect_dtype(aoti_torch_dtype_bfloat16(), "bfloat16");
  inputs.expect_size(1, model.hidden, "the model's hidden size");
  inputs.expect_contiguous_tail(2);
  logit_rows.expect_dtype(aoti_torch_dtype_int64(), "int64");
  positions.expect_int32(1, "[T]");
  slots.expect_int32(1, "[T]");
  positions.expect_size(0, rows, "inputs");
  slots.expect_size(0, rows, "inputs");
  block_tables.expect_int32(2, "[S, M]");
  kv_slots.expect_int32(1, "[S]");
  query_starts.expect_int32(1, "[S + 1]");
  kv_slots.expect_size(0, block_tables.size(0), "block_tables' sequences");
  query_starts.expect_size(0, block_tables.size(0) + 1, "block_tables' sequences plus one");
  expect_range<int32_t>(positions, 0, model.positions, "positions");
  expect_range<int32_t>(slots, 0, blocks * block_size, "slots");
  expect_range<int64_t>(logit_rows, 0, rows, "rows");
  check_block_tables(block_tables, kv_slots, block_size, blocks);
  check_query_starts(query_starts, kv_slots.size(0), rows);

  LlamaBatch batch{};
  batch.rows = rows;
  batch.sequences = kv_slots.size(0);
  batch.logit_count = logit_rows.size(0);
  batch.inputs = inputs.data;
  batch.logit_rows = logit_rows.as<int64_t>();
  batch.query_starts = query_starts.as<int32_t>();
  batch.kv_slots = kv_slots.as<int32_t>();
  AttentionArgs& attention = batch.attention;
  attention.block_stride = pages.stride(0);
  attention.value_offset = pages.stride(2);
  attention.head_stride = pages.stride(3);
  attention.slot_positions = slot_positions.as<int32_t>();
  attention.slot_positions_stride = block_size;
  attention.block_tables = block_tables.as<int32_t>();
  attention.block_tables_stride = block_tables.size(1);
  attention.positions = positions.as<int32_t>();
  attention.query_heads = model.heads;
  attention.kv_heads = model.kv_heads;
  attention.group = model.heads / model.kv_heads;
  attention.head_dim = model.head_dim;
  attention.block_size = block_size;
  attention.scale = (float)model.scale;
  attention.is_bfloat16 = true;
  attention.is_int8 = is_int8;
  CacheArgs& cache = batch.cache;
  cache.cos_sin = model.cos_sin;
  cache.rotary = model.rotary;
  cache.positions = positions.as<int32_t>();
  cache.slots = slots.as<int32_t>();
  cache.block_stride = pages.stride(0);
  cache.value_offset = pages.stride(2);
  cache.head_stride = pages.stride(3);
  cache.query_heads = model.heads;
  cache.kv_heads = model.kv_heads;
  cache.head_dim = model.head_dim;
  cache.block_size = block_size;
  cache.is_bfloat16 = true;
  cache.is_int8 = is_int8;
  if (view_tables && view_slots && row_starts && view_rows && shifts)
    batch.views = checked_views(View("view_tables", *view_tables), View("view_slots", *view_slots),
                                View("row_starts", *row_starts), View("view_rows", *view_rows),
                                View("shifts", *shifts), block_size, blocks, rows, model.cos_sin, model.positions,
                                model.rotary);
  batch.pages = pages.as<char>();
  batch.layer_bytes = pages.stride(1) * (is_int8 ? 1 : 2);
  if (seconds_) {
    View seconds("seconds", *seconds_);
    seconds.expect_dims(1, "[phases]");
    seconds.expect_dtype(aoti_torch_dtype_float64(), "float64");
    seconds.expect_size(0, (int64_t)Phase::count, "phases");
    batch.seconds = seconds.as<double>();
  }
  Tensor logits = empty({batch.logit_count, model.vocab}, aoti_torch_dtype_float32());
  batch.logits = View("logits", logits).as<float>();
  if (rows > 0) kvarn::llama_forward(model, batch, torch::stable::get_num_threads());
  return logits;
}

STABLE_TORCH_LIBRARY_FRAGMENT(kvarn, library) {
  library.def(
      "llama_forward(Tensor description, Tensor inputs, Tensor positions, Tensor slots, Tensor block_tables, "
      "Tensor kv_slots, Tensor query_starts, Tensor logit_rows, Tensor(a!) pages, Tensor slot_positions, "
      "Tensor(b!)? seconds, Tensor? view_tables=None, Tensor? view_slots=None, Tensor? row_starts=None, "
      "Tensor? view_rows=None, Tensor? shifts=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(kvarn, CPU, library) { library.impl("llama_forward", TORCH_BOX(&llama_forward)); }

}  // namespace
}  // namespace kvarn
