// Which rows the steps of a batch of sequences have, and in which order a direction takes them.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace fastlstm::cuda {

// Steps of column b; columns behind the batch have none.
__device__ __forceinline__ int length_of(const Sequences& s, int b) {
  if (b >= s.batch) return 0;
  if (s.lengths == nullptr) return s.steps;
  const int64_t length = s.lengths[b];
  return length < 0 ? 0 : length > s.steps ? s.steps : static_cast<int>(length);
}

__device__ __forceinline__ int64_t row_of(const Sequences& s, int t, int b) {
  return (s.offsets != nullptr ? s.offsets[t] : static_cast<int64_t>(t) * s.batch) + b;
}
// The same of fewer than 2^32 rows, in fewer instructions.
__device__ __forceinline__ uint32_t row_of_few(const Sequences& s, int t, int b) {
  const uint32_t first = s.offsets != nullptr ? static_cast<uint32_t>(s.offsets[t])
                                              : static_cast<uint32_t>(t) * static_cast<uint32_t>(s.batch);
  return first + static_cast<uint32_t>(b);
}

// The h that the first step of a run reads.
__device__ __forceinline__ const void* initial_h(const ForwardRun& run) {
  return run.begin > 0 ? run.carried_h : run.h_0;
}

// The order in which a direction takes the steps, and where its states begin anew.
struct Order {
  bool reverse;

  // The step that is the n-th, of `steps`, to be computed in the forward pass.
  __device__ __forceinline__ int time(int n, int steps) const { return reverse ? steps - 1 - n : n; }
  // Whether step t is the first that a sequence of this length computes: it reads the initial states.
  __device__ __forceinline__ bool first(int t, int length) const { return t == (reverse ? length - 1 : 0); }
  // Whether it is the last, which makes the final states.
  __device__ __forceinline__ bool last(int t, int length) const { return t == (reverse ? 0 : length - 1); }
  // Whether the states before step t < length are zero, because column b is cut between it and the step computed
  // before.
  __device__ __forceinline__ bool restarts(const Sequences& s, int t, int b, int length) const {
    if (s.resets == nullptr) return false;
    const int cut = reverse ? t + 1 : t;
    return cut < length && s.resets[row_of(s, cut, b)];
  }
};

}  // namespace fastlstm::cuda
