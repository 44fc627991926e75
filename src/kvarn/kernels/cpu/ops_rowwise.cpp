// The row-by-row ops for the CPU: check the arguments, describe them to the vector code, share rows among threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"
#include "tensors.h"

namespace kvarn {
namespace {

// Elements a thread must have before another one is woken.
constexpr int64_t kElementsPerThread = 32768;

template <class Args>
void over_rows(void (*rows)(const Args&, int64_t, int64_t), const Args& args, int64_t count, int64_t row_elements) {
  if (count == 0) return;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, row_elements));
  if (count <= grain) return rows(args, 0, count);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

Tensor norm(const View& x, const View* residual, const View& weight, double eps) {
  if (x.dims < 1 || x.dims > 3) x.fail("[..., F] with one to three dimensions");
  x.expect_float();
  x.expect_contiguous_tail(1);
  weight.expect_dims(1, "[F]");
  weight.expect_size(0, x.size(-1), "x's features");
  weight.expect_like(x);
  weight.expect_contiguous_tail(1);
  NormArgs args{};
  const int64_t outer = x.dims > 1 ? x.size(0) : 1;
  args.inner = x.dims > 2 ? x.size(1) : 1;
  args.features = x.size(-1);
  args.x = x.data;
  args.x_outer_stride = x.dims > 1 ? x.stride(0) : 0;
  args.x_inner_stride = x.dims > 2 ? x.stride(1) : 0;
  if (residual) {
    residual->expect_dims(x.dims, "x's shape");
    for (int64_t dim = 0; dim < x.dims; ++dim) residual->expect_size(dim, x.size(dim), "x's shape");
    residual->expect_like(x);
    residual->expect_contiguous_tail(1);
    args.residual = residual->data;
    args.residual_outer_stride = x.dims > 1 ? residual->stride(0) : 0;
    args.residual_inner_stride = x.dims > 2 ? residual->stride(1) : 0;
  }
  Tensor out = x.dims == 1   ? empty(x, {args.features})
               : x.dims == 2 ? empty(x, {outer, args.features})
                             : empty(x, {outer, args.inner, args.features});
  args.weight = weight.data;
  args.out = View("out", out).data;
  args.eps = (float)eps;
  args.is_bfloat16 = x.is_bfloat16();
  over_rows(kernels().rms_norm, args, outer * args.inner, args.features);
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return norm(View("x", x), nullptr, View("weight", weight), eps);
}

Tensor add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  View into("residual", residual);
  return norm(View("x", x), &into, View("weight", weight), eps);
}

// What rope_and_cache and write_cache have in common.
CacheArgs cache_args(const View& key, const View& value, const View& kv, const View& slots) {
  key.expect_dims(3, "[T, Hkv, D]");
  key.expect_float();
  key.expect_contiguous_tail(1);
  value.expect_dims(3, "[T, Hkv, D]");
  value.expect_like(key);
  value.expect_contiguous_tail(1);
  const CacheShape cache(kv, key);
  kv.expect_size(2, key.size(1), "the key's heads");
  for (int64_t dim = 0; dim < 3; ++dim) value.expect_size(dim, key.size(dim), "the key's shape");
  slots.expect_int32(1, "[T]");
  slots.expect_size(0, key.size(0), "key rows");
  const int64_t capacity = kv.size(0) * cache.block_size;
  for (int64_t t = 0; t < slots.size(0); ++t)
    if (int64_t slot = slots.as<int32_t>()[t]; slot < 0 || slot >= capacity)
      slots.fail("slots in [0, " + std::to_string(capacity) + "), got " + std::to_string(slot) + " for row " +
                 std::to_string(t));
  CacheArgs args{};
  args.key = key.data;
  args.value = value.data;
  args.key_row_stride = key.stride(0);
  args.key_head_stride = key.stride(1);
  args.value_row_stride = value.stride(0);
  args.value_head_stride = value.stride(1);
  args.slots = slots.as<int32_t>();
  args.kv = kv.data;
  args.block_stride = kv.stride(0);
  args.value_offset = kv.stride(1);
  args.head_stride = kv.stride(2);
  args.kv_heads = key.size(1);
  args.head_dim = key.size(2);
  args.block_size = cache.block_size;
  args.is_int8 = cache.is_int8;
  args.is_bfloat16 = key.is_bfloat16();
  return args;
}

void rope_and_cache(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& cos_sin_,
                    const Tensor& positions_, const Tensor& kv_, const Tensor& slots_) {
  View query("query", query_), key("key", key_), value("value", value_), cos_sin("cos_sin", cos_sin_);
  View positions("positions", positions_), kv("kv", kv_), slots("slots", slots_);
  CacheArgs args = cache_args(key, value, kv, slots);
  query.expect_dims(3, "[T, Hq, D]");
  query.expect_like(key);
  query.expect_contiguous_tail(1);
  query.expect_size(0, key.size(0), "key rows");
  query.expect_size(2, key.size(2), "the key's head dimension");
  cos_sin.expect_dims(2, "[P, R]");
  cos_sin.expect_dtype(aoti_torch_dtype_float32(), "float32");
  cos_sin.expect_contiguous_tail(2);
  if (cos_sin.size(1) % 2 || cos_sin.size(1) > args.head_dim)
    cos_sin.fail("an even rotary width of at most the head dimension, " + std::to_string(args.head_dim));
  positions.expect_int32(1, "[T]");
  positions.expect_size(0, key.size(0), "key rows");
  for (int64_t t = 0; t < positions.size(0); ++t)
    if (int64_t position = positions.as<int32_t>()[t]; position < 0 || position >= cos_sin.size(0))
      positions.fail("positions in [0, " + std::to_string(cos_sin.size(0)) + ") (rows of cos_sin), got " +
                     std::to_string(position) + " for row " + std::to_string(t));
  args.query = query.data;
  args.query_row_stride = query.stride(0);
  args.query_head_stride = query.stride(1);
  args.query_heads = query.size(1);
  args.cos_sin = cos_sin.as<float>();
  args.rotary = cos_sin.size(1);
  args.positions = positions.as<int32_t>();
  over_rows(kernels().rope_and_cache, args, key.size(0), (args.query_heads + 2 * args.kv_heads) * args.head_dim);
}

void write_cache(const Tensor& key_, const Tensor& value_, const Tensor& kv_, const Tensor& slots_) {
  View key("key", key_), value("value", value_), kv("kv", kv_), slots("slots", slots_);
  CacheArgs args = cache_args(key, value, kv, slots);
  over_rows(kernels().rope_and_cache, args, key.size(0), 2 * args.kv_heads * args.head_dim);
}

Tensor silu_mul(const Tensor& gate_up_) {
  View gate_up("gate_up", gate_up_);
  gate_up.expect_dims(2, "[T, 2F]");
  gate_up.expect_float();
  gate_up.expect_contiguous_tail(1);
  if (gate_up.size(1) % 2) gate_up.fail("[T, 2F]: an even number of columns");
  SiluArgs args{};
  args.features = gate_up.size(1) / 2;
  Tensor out = empty(gate_up, {gate_up.size(0), args.features});
  args.gate_up = gate_up.data;
  args.row_stride = gate_up.stride(0);
  args.out = View("out", out).data;
  args.is_bfloat16 = gate_up.is_bfloat16();
  over_rows(kernels().silu_mul, args, gate_up.size(0), 2 * args.features);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(kvarn, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("rope_and_cache", TORCH_BOX(&rope_and_cache));
  library.impl("write_cache", TORCH_BOX(&write_cache));
  library.impl("silu_mul", TORCH_BOX(&silu_mul));
}

}  // namespace
}  // namespace kvarn
