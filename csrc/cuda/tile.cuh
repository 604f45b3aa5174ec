// What one warp knows of its part of a layer: a few octets of hidden units by one column tile, and a run of steps.
#pragma once

#include "layout.h"
#include "sequences.cuh"

namespace fastlstm::cuda {

template <class Run, int Octets>
class Tile {
 protected:
  __device__ __forceinline__ Tile(const LaunchParams<Run>& params, const Run& run, int first_unit, int first_column,
                                  int lane, unsigned char* memory)
      : p_(params),
        run_(run),
        order_{run.reverse},
        lane_(lane),
        first_unit_(first_unit),
        first_column_(first_column),
        memory_(memory) {}

  // A warp without cells has no memory either.
  __device__ __forceinline__ bool has_cells() const { return first_unit_ < p_.hidden; }

  // The unit and the columns of this thread.
  __device__ __forceinline__ int unit(int o) const { return first_unit_ + o * kOctet + lane_ / 4; }
  __device__ __forceinline__ int column(int e) const { return first_column_ + 2 * (lane_ % 4) + e; }
  __device__ __forceinline__ bool has_state(int o, int e) const {
    return unit(o) < p_.hidden && column(e) < p_.sequences.batch;
  }
  // Its element of a state whose rows have `stride` elements.
  __device__ __forceinline__ int64_t state_index(int o, int e, int stride) const {
    return static_cast<int64_t>(column(e)) * stride + unit(o);
  }

  const LaunchParams<Run>& p_;
  const Run& run_;
  const Order order_;
  const int lane_, first_unit_, first_column_;
  unsigned char* const memory_;
};

}  // namespace fastlstm::cuda
