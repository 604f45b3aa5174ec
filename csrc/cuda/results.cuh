// What warps with cells leave in shared memory for the warps that store it: so that nothing but the next product keeps
// them from the next step.
#pragma once

#include "../cell.h"
#include "layout.h"
#include "ptx.cuh"

namespace fastlstm::cuda {

// Results of a step, `Values` of each of a lane's two cells as vectors of four: [2][cell tile][vector][lane],
// alternating by step. The barrier of the next step lies between put() and get(), and another one before the same
// memory is used again.
template <int Values>
class Results {
 public:
  __device__ __forceinline__ Results(unsigned char* shared, int cell_tiles, int cell_tile, int lane)
      : memory_(reinterpret_cast<float4*>(shared) + cell_tile * kVectors * kWarpThreads + lane),
        step_vectors_(cell_tiles * kVectors * kWarpThreads) {}

  __device__ __forceinline__ float4& at(int n, int vector) const {
    return memory_[(n & 1) * step_vectors_ + vector * kWarpThreads];
  }
  __device__ __forceinline__ void put(int n, int vector, const float (&values)[4]) const {
    at(n, vector) = float4{values[0], values[1], values[2], values[3]};
  }
  __device__ __forceinline__ void get(int n, int vector, float (&values)[4]) const {
    const float4 from = at(n, vector);
    values[0] = from.x;
    values[1] = from.y;
    values[2] = from.z;
    values[3] = from.w;
  }

 private:
  static constexpr int kVectors = 2 * Values / 4;
  float4* const memory_;
  const int step_vectors_;
};

}  // namespace fastlstm::cuda
