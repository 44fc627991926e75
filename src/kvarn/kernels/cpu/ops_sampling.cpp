// The sampling ops for the CPU: check the arguments, describe them to the vector code, share rows among threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace kvarn {
namespace {

// Logits a thread must have before another one is woken: a pass over the row is all that the largest one takes.
constexpr int64_t kLargestPerThread = 131072;
constexpr int64_t kSampledPerThread = 32768;

// Rows differ tenfold in what they take, so threads fetch them one by one.
template <class Args>
void over_rows(void (*rows)(const Args&, int64_t, int64_t, double*), const Args& args, int64_t count,
               int64_t logits_per_thread) {
  if (count == 0) return;
  const int64_t chunks = (args.vocab + kSampleChunk - 1) / kSampleChunk;
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    std::vector<double> scratch(chunks + (chunks + 1) / 2);
    for (int64_t row = next++; row < count; row = next++) rows(args, row, row + 1, scratch.data());
  };
  const int64_t worthwhile = count * args.vocab / logits_per_thread;
  const int64_t threads = std::min<int64_t>(worthwhile, torch::stable::get_num_threads());
  if (threads <= 1) return work(0, 1);
  torch::stable::parallel_for(0, threads, 1, work);
}

template <class Args>
Args logits_args(const View& logits) {
  logits.expect_dims(2, "[R, V]");
  logits.expect_float();
  logits.expect_contiguous_tail(1);
  if (logits.size(1) < 1) logits.fail("at least one logit a row");
  Args args{};
  args.logits = logits.data;
  args.row_stride = logits.stride(0);
  args.vocab = logits.size(1);
  args.is_bfloat16 = logits.is_bfloat16();
  return args;
}

template <class T>
const T* per_row(const View& view, const View& logits, int32_t dtype, const char* dtype_name) {
  view.expect_dims(1, "[R]");
  view.expect_size(0, logits.size(0), "rows of logits");
  view.expect_dtype(dtype, dtype_name);
  view.expect_contiguous_tail(1);
  return view.as<T>();
}

Tensor largest(const Tensor& logits_) {
  View logits("logits", logits_);
  SampleArgs args = logits_args<SampleArgs>(logits);
  Tensor out = empty({logits.size(0)}, aoti_torch_dtype_int64());
  args.out = View("out", out).as<int64_t>();
  over_rows(kernels().sample, args, logits.size(0), kLargestPerThread);
  return out;
}

Tensor sample(const Tensor& logits_, const Tensor& temperature_, const Tensor& top_k_, const Tensor& top_p_,
              const Tensor& min_p_, const Tensor& uniform_) {
  View logits("logits", logits_);
  SampleArgs args = logits_args<SampleArgs>(logits);
  const auto numbers = [&](const char* name, const Tensor& tensor) {
    return per_row<double>(View(name, tensor), logits, aoti_torch_dtype_float64(), "float64");
  };
  args.temperature = numbers("temperature", temperature_);
  args.top_k = per_row<int64_t>(View("top_k", top_k_), logits, aoti_torch_dtype_int64(), "int64");
  args.top_p = numbers("top_p", top_p_);
  args.min_p = numbers("min_p", min_p_);
  args.uniform = numbers("uniform", uniform_);
  Tensor out = empty({logits.size(0)}, aoti_torch_dtype_int64());
  args.out = View("out", out).as<int64_t>();
  over_rows(kernels().sample, args, logits.size(0), kSampledPerThread);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits_, const Tensor& tokens_, int64_t count) {
  View logits("logits", logits_), tokens("tokens", tokens_);
  LogprobArgs args = logits_args<LogprobArgs>(logits);
  args.tokens = per_row<int64_t>(tokens, logits, aoti_torch_dtype_int64(), "int64");
  for (int64_t i = 0; i < tokens.size(0); ++i)
    if (int64_t token = args.tokens[i]; token < 0 || token >= args.vocab)
      tokens.fail("tokens in [0, " + std::to_string(args.vocab) + "), got " + std::to_string(token) + " for row " +
                  std::to_string(i));
  if (count < 0 || count > args.vocab)
    logits.fail("a count from 0 to the number of logits in a row, got " + std::to_string(count));
  args.count = count;
  Tensor chosen = empty({logits.size(0)}, aoti_torch_dtype_float32());
  Tensor ids = empty({logits.size(0), count}, aoti_torch_dtype_int64());
  Tensor values = empty({logits.size(0), count}, aoti_torch_dtype_float32());
  args.chosen = View("chosen", chosen).as<float>();
  args.ids = View("ids", ids).as<int64_t>();
  args.values = View("values", values).as<float>();
  over_rows(kernels().token_logprobs, args, logits.size(0), kSampledPerThread);
  return {chosen, ids, values};
}

STABLE_TORCH_LIBRARY_IMPL(kvarn, CPU, library) {
  library.impl("largest", TORCH_BOX(&largest));
  library.impl("sample", TORCH_BOX(&sample));
  library.impl("token_logprobs", TORCH_BOX(&token_logprobs));
}

}  // namespace
}  // namespace kvarn
