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

inline void check_query_starts(const View& query_starts, int64_t sequences, int64_t rows) {
  const int32_t* starts = query_starts.as<int32_t>();
  bool rising = starts[0] == 0 && starts[sequences] == rows;
  for (int64_t s = 0; s < sequences; ++s) rising &= starts[s] <= starts[s + 1];
  if (!rising) query_starts.fail("values rising from 0 to the number of query rows, " + std::to_string(rows));
}

}  // namespace kvarn
