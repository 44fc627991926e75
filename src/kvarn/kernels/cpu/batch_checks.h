// Checks of a batch's metadata that every op over block tables makes.
#pragma once

#include <algorithm>
#include <string>

#include "tensors.h"

namespace kvarn {

inline void check_block_tables(const View& block_tables, const View& kv_slots, int64_t block_size, int64_t blocks) {
  const int64_t reach = block_tables.size(1) * block_size;
  for (int64_t s = 0; s < kv_slots.size(0); ++s) {
    int64_t slots = kv_slots.as<int32_t>()[s];
    if (slots < 0 || slots > reach)
      kv_slots.fail("between 0 and " + std::to_string(reach) + " slots (block_tables' width times block size), got " +
                    std::to_string(slots) + " for sequence " + std::to_string(s));
    const int32_t* table = block_tables.as<int32_t>() + s * block_tables.size(1);
    uint32_t largest = 0;
    for (int64_t i = 0; i * block_size < slots; ++i) largest = std::max(largest, (uint32_t)table[i]);
    if (slots > 0 && largest >= blocks)
      block_tables.fail("block ids in [0, " + std::to_string(blocks) + "), got " + std::to_string((int32_t)largest) +
                        " for sequence " + std::to_string(s));
  }
}

inline void check_starts(const View& view, int64_t count, int64_t end, const char* what) {
  const int32_t* starts = view.as<int32_t>();
  bool rising = starts[0] == 0 && starts[count] == end;
  for (int64_t i = 0; i < count; ++i) rising &= starts[i] <= starts[i + 1];
  if (!rising) view.fail("values rising from 0 to the number of " + std::string(what) + ", " + std::to_string(end));
}

inline void check_query_starts(const View& query_starts, int64_t sequences, int64_t rows) {
  check_starts(query_starts, sequences, rows, "query rows");
}

template <class T>
void expect_range(const View& view, int64_t begin, int64_t end, const char* what) {
  const T* values = view.as<T>();
  for (int64_t i = 0; i < view.size(0); ++i)
    if (values[i] < begin || values[i] >= end)
      view.fail(std::string(what) + " in [" + std::to_string(begin) + ", " + std::to_string(end) + "), got " +
                std::to_string(values[i]));
}

}  // namespace kvarn
