// kvarn::packed_linear for the CPU: checks the arguments, cuts the product into tasks, runs them on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace kvarn {
namespace {

constexpr int64_t kParallelWork = 1 << 17;  // multiply-adds, some 10 us at one row; below, waking a thread does not pay
constexpr int64_t kTasksPerThread = 4;      // so that a thread which was held up leaves work to the others
constexpr int64_t kTaskRows = 48;           // at least so many, before rows are shared out

// Panels times blocks of rows. Each thread goes through its own range of them in order, as memory is fastest read, then
// helps the others to finish theirs.
struct Tasks {
  int64_t panels, rows, row_blocks;

  int64_t count() const { return panels * row_blocks; }
  void run(const Kernels& use, const LinearArgs& args, int64_t i) const {
    const int64_t block = i / panels;
    use.linear(args, i % panels, rows * block / row_blocks, rows * (block + 1) / row_blocks);
  }
};

struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t end;
};

void run(const LinearArgs& args, int64_t rows, int64_t threads) {
  const Kernels& use = kernels();
  Tasks tasks{(args.out_features + kLinearPanel - 1) / kLinearPanel, rows, 1};
  if (threads == 1 || rows * args.out_features * args.in_features < kParallelWork) {
    for (int64_t i = 0; i < tasks.count(); ++i) tasks.run(use, args, i);
    return;
  }
  const int64_t wanted = (threads * kTasksPerThread + tasks.panels - 1) / tasks.panels;
  tasks.row_blocks = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, rows / kTaskRows));
  std::vector<Range> ranges(threads);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next = tasks.count() * t / threads;
    ranges[t].end = tasks.count() * (t + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t k = 0; k < threads; ++k) {
        Range& range = ranges[(worker + k) % threads];
        for (int64_t i = range.next++; i < range.end; i = range.next++) tasks.run(use, args, i);
      }
  });
}

Tensor packed_linear(const Tensor& x_, const Tensor& packed_, const std::optional<Tensor>& bias_,
                     int64_t out_features) {
  View x("x", x_), packed("packed", packed_);
  x.expect_dims(2, "[M, K]");
  x.expect_dtype(aoti_torch_dtype_bfloat16(), "bfloat16");
  x.expect_contiguous_tail(1);
  packed.expect_dims(4, "[ceil(N / 32), ceil(K / 2), 32, 2]");
  packed.expect_like(x);
  packed.expect_contiguous_tail(4);
  packed.expect_size(0, (out_features + kLinearPanel - 1) / kLinearPanel, "out_features in panels of 32");
  packed.expect_size(1, (x.size(1) + 1) / 2, "x's features in pairs");
  packed.expect_size(2, kLinearPanel, "outputs of a panel");
  packed.expect_size(3, 2, "a pair");
  LinearArgs args{};
  if (bias_) {
    View bias("bias", *bias_);
    bias.expect_dims(1, "[N]");
    bias.expect_size(0, out_features, "out_features");
    bias.expect_like(x);
    bias.expect_contiguous_tail(1);
    args.bias = bias.data;
  }
  Tensor out = empty(x, {x.size(0), out_features});
  args.x = x.data;
  args.x_row_stride = x.stride(0);
  args.packed = packed.data;
  args.out = View("out", out).data;
  args.in_features = x.size(1);
  args.out_features = out_features;
  if (x.size(0) > 0) run(args, x.size(0), torch::stable::get_num_threads());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(kvarn, CPU, library) { library.impl("packed_linear", TORCH_BOX(&packed_linear)); }

}  // namespace
}  // namespace kvarn
