// restore_blocks for the CPU: checks the arguments, puts jobs of one source together, shares them among threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace kvarn {
namespace {

constexpr int64_t kElementsPerThread = 32768;
// Targets of more bytes than this are written past the caches: they would not be in the nearest when they are read.
constexpr int64_t kCachedBytes = 1 << 18;

void expect_blocks(const View& blocks, const View& like) {
  blocks.expect_dims(6, "[blocks, L, 2, Hkv, B, D]");
  blocks.expect_like(like);
  for (int64_t dim = 1; dim < 6; ++dim) blocks.expect_size(dim, like.size(dim), "the master's shape");
  blocks.expect_contiguous_tail(5);
}

// One layer of a block, which is how far the pages may differ from the master.
void expect_pages(const View& pages, const View& master, bool is_int8) {
  const int64_t size = master.size(4), dim = master.size(5);
  if (is_int8) {
    pages.expect_dims(5, "[N, L, 2, Hkv, B * (D + 4)] bytes");
    pages.expect_size(4, size * (dim + 4), "slots of D + 4 bytes");
    if (pages.stride(0) % 4) pages.fail("blocks at whole floats");
  } else {
    pages.expect_dims(6, "[N, L, 2, Hkv, B, D]");
    pages.expect_like(master);
    pages.expect_size(4, size, "the master's block size");
    pages.expect_size(5, dim, "the master's head dimension");
  }
  for (int64_t d = 1; d < 4; ++d) pages.expect_size(d, master.size(d), "the master's shape");
  pages.expect_contiguous_tail(pages.dims - 1);
}

int64_t checked(const View& list, int64_t job, int64_t low, int64_t high, const char* of) {
  const int64_t value = list.as<int32_t>()[job];
  if (value < low || value >= high)
    list.fail("values in [" + std::to_string(low) + ", " + std::to_string(high) + ") (" + of + "), got " +
              std::to_string(value) + " for job " + std::to_string(job));
  return value;
}

void restore_blocks(const Tensor& master_, const Tensor& diffs_, const Tensor& sources_, const Tensor& starts_,
                    const Tensor& targets_, const Tensor& cos_sin_, const Tensor& pages_) {
  View master("master", master_), diffs("diffs", diffs_), cos_sin("cos_sin", cos_sin_), pages("pages", pages_);
  View sources("sources", sources_), starts("starts", starts_), targets("targets", targets_);
  master.expect_float();
  expect_blocks(master, master);
  if (master.size(2) != 2) master.fail("keys and values in dimension 2");
  if (master.size(5) % 8 || master.size(5) > 1024) master.fail("a head dimension that is a multiple of 8 up to 1024");
  expect_blocks(diffs, master);
  RestoreArgs args{};
  args.is_int8 = pages.dtype == aoti_torch_dtype_uint8();
  expect_pages(pages, master, args.is_int8);
  cos_sin.expect_dims(2, "[P, R]");
  cos_sin.expect_dtype(aoti_torch_dtype_float32(), "float32");
  cos_sin.expect_contiguous_tail(2);
  if (cos_sin.size(1) % 2 || cos_sin.size(1) > master.size(5))
    cos_sin.fail("an even rotary width of at most the head dimension, " + std::to_string(master.size(5)));
  for (const View* list : {&sources, &starts, &targets}) {
    list->expect_int32(1, "[J]");
    list->expect_size(0, sources.size(0), "one a job");
  }

  const int64_t element = master.is_bfloat16() ? 2 : 4;
  std::vector<RestoreJob> jobs(sources.size(0));
  for (int64_t j = 0; j < (int64_t)jobs.size(); ++j) {
    const int64_t source = checked(sources, j, -diffs.size(0), master.size(0), "blocks of diffs and master");
    const View& from = source < 0 ? diffs : master;
    jobs[j].source = from.as<char>() + (source < 0 ? ~source : source) * from.stride(0) * element;
    jobs[j].start = checked(starts, j, INT32_MIN, cos_sin.size(0), "rows of cos_sin");
    jobs[j].target = pages.as<char>() + checked(targets, j, 0, pages.size(0), "blocks of pages") * pages.stride(0) *
                                            (args.is_int8 ? 1 : element);
  }
  std::stable_sort(jobs.begin(), jobs.end(),
                   [](const RestoreJob& a, const RestoreJob& b) { return a.source < b.source; });
  for (size_t first = 0, end; first < jobs.size(); first = end) {
    for (end = first + 1; end < jobs.size() && jobs[end].source == jobs[first].source;) ++end;
    for (size_t j = first; j < end; ++j) {
      jobs[j].first = (int64_t)first;
      jobs[j].count = (int64_t)(end - first);
    }
  }

  args.jobs = jobs.data();
  args.layers = master.size(1);
  args.kv_heads = master.size(3);
  args.block_size = master.size(4);
  args.head_dim = master.size(5);
  args.cos_sin = cos_sin.as<float>();
  args.positions = cos_sin.size(0);
  args.rotary = cos_sin.size(1);
  args.is_bfloat16 = master.is_bfloat16();
  const int64_t items = (int64_t)jobs.size() * args.layers;
  const int64_t elements = 2 * args.kv_heads * args.block_size * args.head_dim;
  if (items == 0 || elements == 0) return;
  args.past_caches = items * elements * (args.is_int8 ? 1 : element) > kCachedBytes;
  const auto restore = [&](int64_t begin, int64_t end) { kernels().restore(args, begin, end); };
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / elements);
  if (items <= grain) return restore(0, items);
  torch::stable::parallel_for(0, items, grain, restore);
}

STABLE_TORCH_LIBRARY_IMPL(kvarn, CPU, library) { library.impl("restore_blocks", TORCH_BOX(&restore_blocks)); }

}  // namespace
}  // namespace kvarn
