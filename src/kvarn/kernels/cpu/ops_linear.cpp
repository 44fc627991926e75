// kvarn::packed_linear and kvarn::int_linear for the CPU: check the arguments, describe them, run them on a team.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "kernels.h"
#include "linear_tasks.h"
#include "tensors.h"

namespace kvarn {
namespace {

constexpr int64_t kParallelWork = 1 << 17;  // multiply-adds, some 10 us at one row; below, waking a thread does not pay

// What both products check and describe in the same way.
LinearArgs linear_args(const View& x, const View& packed, const std::optional<Tensor>& bias_, int64_t out_features,
                       bool float_out) {
  x.expect_dims(2, "[M, K]");
  x.expect_dtype(aoti_torch_dtype_bfloat16(), "bfloat16");
  x.expect_contiguous_tail(1);
  packed.expect_contiguous_tail(packed.dims);
  packed.expect_size(0, (out_features + kLinearPanel - 1) / kLinearPanel, "out_features in panels of 32");
  LinearArgs args{};
  if (bias_) {
    View bias("bias", *bias_);
    bias.expect_dims(1, "[N]");
    bias.expect_size(0, out_features, "out_features");
    bias.expect_like(x);
    bias.expect_contiguous_tail(1);
    args.bias = bias.data;
  }
  args.x = x.data;
  args.x_row_stride = x.stride(0);
  args.packed = packed.data;
  args.in_features = x.size(1);
  args.out_features = out_features;
  args.groups = (x.size(1) + kLinearGroup - 1) / kLinearGroup;
  args.float_out = float_out;
  return args;
}

Tensor output(const View& x, LinearArgs& args) {
  Tensor out = args.float_out ? empty({x.size(0), args.out_features}, aoti_torch_dtype_float32())
                              : empty(x, {x.size(0), args.out_features});
  args.out = View("out", out).data;
  return out;
}

template <class F>
void with_team(const LinearArgs& args, int64_t rows, const F& run) {
  if (rows == 0) return;
  const bool small = rows * args.out_features * args.in_features < kParallelWork;
  Team::gather(small ? 1 : torch::stable::get_num_threads(), run);
}

Tensor packed_linear(const Tensor& x_, const Tensor& packed_, const std::optional<Tensor>& bias, int64_t out_features,
                     bool float32) {
  View x("x", x_), packed("packed", packed_);
  packed.expect_dims(4, "[ceil(N / 32), ceil(K / 2), 32, 2]");
  LinearArgs args = linear_args(x, packed, bias, out_features, float32);
  packed.expect_like(x);
  packed.expect_size(1, (x.size(1) + 1) / 2, "x's features in pairs");
  packed.expect_size(2, kLinearPanel, "outputs of a panel");
  packed.expect_size(3, 2, "a pair");
  args.format = WeightFormat::bfloat16;
  Tensor out = output(x, args);
  with_team(args, x.size(0), [&](Team& team) { run_linear(team, args, x.size(0)); });
  return out;
}

Tensor int_linear(const Tensor& x_, const Tensor& packed_, const std::optional<Tensor>& bias, int64_t out_features,
                  int64_t bits, bool float32) {
  View x("x", x_), packed("packed", packed_);
  packed.expect_dims(2, "[ceil(N / 32), bytes of a panel]");
  packed.expect_dtype(aoti_torch_dtype_uint8(), "uint8");
  LinearArgs args = linear_args(x, packed, bias, out_features, float32);
  args.format = bits == 4 ? WeightFormat::int4 : WeightFormat::int8;
  args.panel_bytes = bits == 4 ? args.groups * kInt4GroupBytes : args.groups * kInt8GroupBytes + kInt8ScaleBytes;
  packed.expect_size(1, args.panel_bytes, "bytes for x's features");
  Tensor out = output(x, args);
  const int64_t rows = x.size(0), groups = rows * args.groups;
  std::vector<int8_t> codes(groups * kLinearGroup);
  std::vector<float> scales(groups), sums(groups);
  QuantizeArgs quantize{args.x, args.x_row_stride, args.in_features, args.groups,
                        codes.data(), scales.data(), sums.data()};
  args.codes = codes.data();
  args.scales = scales.data();
  args.sums = sums.data();
  with_team(args, rows, [&](Team& team) {
    const Kernels& use = kernels();
    run_rows(team, rows, args.in_features, [&](int64_t begin, int64_t end) { use.quantize_rows(quantize, begin, end); });
    run_linear(team, args, rows);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(kvarn, CPU, library) {
  library.impl("packed_linear", TORCH_BOX(&packed_linear));
  library.impl("int_linear", TORCH_BOX(&int_linear));
}

}  // namespace
}  // namespace kvarn
