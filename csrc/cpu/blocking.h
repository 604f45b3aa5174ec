// How the kernels cut their products, as far as the planner's cost model depends on it.
#pragma once

#include <cstdint>

namespace fastlstm::cpu {

constexpr int64_t kChunkRows = 36;      // rows of a forward step that a pass over packed weights serves ...
constexpr int64_t kFarBytes = 8 << 20;  // ... and of weights of more bytes, which come from memory at each pass ...
constexpr int64_t kFarRows = 8 * kChunkRows;  // ... so many
constexpr int64_t kBlockRows = 144;           // rows of products other than those of a forward step, likewise
constexpr int64_t kStoredRows = 4;            // rows that meet k-major weights in place together

// Rows that one pass over weights of this many bytes serves.
constexpr int64_t rows_per_pass(int64_t weight_bytes) { return weight_bytes > kFarBytes ? kFarRows : kChunkRows; }

}  // namespace fastlstm::cpu
