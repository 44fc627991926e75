// Which instruction set runs: the best one the processor has, unless Python (ops.py) asks for another by name.
#include "kernels.h"

namespace kvarn {
namespace {

constexpr int kVariants = 5;

// Fills in the tables this processor can run, best first; returns how many.
int runnable(const Kernels* (&tables)[kVariants]) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) tables[count++] = &kernels_avx512_bf16;
  if (vnni) tables[count++] = &kernels_avx512_vnni;
  if (avx512) tables[count++] = &kernels_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables[count++] = &kernels_avx2;
#endif
  tables[count++] = &kernels_portable;
  return count;
}

const Kernels* best() {
  const Kernels* tables[kVariants];
  runnable(tables);
  return tables[0];
}

const Kernels* in_use = best();

}  // namespace

const Kernels& kernels() { return *in_use; }

}  // namespace kvarn

#define KVARN_EXPORT extern "C" __attribute__((visibility("default")))

// The name of the index-th best variant this processor runs, null past the last.
KVARN_EXPORT const char* kvarn_kernels_variant(int index) {
  const kvarn::Kernels* tables[kvarn::kVariants];
  int count = kvarn::runnable(tables);
  return index >= 0 && index < count ? tables[index]->name : nullptr;
}

KVARN_EXPORT void kvarn_kernels_select(int index) {
  const kvarn::Kernels* tables[kvarn::kVariants];
  int count = kvarn::runnable(tables);
  if (index >= 0 && index < count) kvarn::in_use = tables[index];
}
