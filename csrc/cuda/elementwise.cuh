// Kernels of which a thread has V consecutive elements of a row of a state: as many as fit into 16 bytes in the compute
// type if all rows allow it, else one. They have no order to keep but that of the stream.
#pragma once

#include <algorithm>
#include <limits>

#include "dispatch.cuh"
#include "step_cells.cuh"

namespace fastlstm::cuda {

constexpr int kThreads = 256;  // of a block at most

// A block has a part of one row, so that nobody divides 64-bit numbers. `width`: of rows, in threads.
inline int threads_for(int width) { return std::min(kThreads, ceil_div(width, kWarpThreads) * kWarpThreads); }
inline LaunchShape shape_for(int64_t rows, int width) {
  return {static_cast<int>(rows * ceil_div(width, threads_for(width))), threads_for(width), 0, false};
}
// This thread's place in rows of `width` elements; behind their end, it has none.
template <int V>
__device__ __forceinline__ Place own_place(int width) {
  const int blocks_of_row = ceil_div(width / V, block_threads()), row = block_index() / blocks_of_row;
  return {row, ((block_index() - row * blocks_of_row) * block_threads() + thread_index()) * V};
}

// f.operator()<E, V>().
template <class F>
cudaError_t with_vectors(Element element, bool vectors, const F& f) {
  return with_element(element, [&]<class E>(E) {
    constexpr int kVector = 16 / sizeof(typename E::Compute);
    return vectors ? f.template operator()<E, kVector>() : f.template operator()<E, 1>();
  });
}

// One thread for V elements of [rows, width].
template <int V, class Params>
cudaError_t launch_rows(void (*kernel)(Params), const Params& params, int64_t rows, int width, cudaStream_t stream) {
  if (rows > std::numeric_limits<int>::max() / ceil_div(width / V, threads_for(width / V)))
    return cudaErrorInvalidValue;
  return launch(kernel, shape_for(rows, width / V), stream, params);
}

}  // namespace fastlstm::cuda
