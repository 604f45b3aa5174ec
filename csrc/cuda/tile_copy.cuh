// Copies of the inputs of a tile to shared memory.
#pragma once

#include "layout.h"
#include "ptx.cuh"

namespace fastlstm::cuda {

// Starts to copy 8 consecutive elements to shared memory, of which `count` exist (negative: none); the others become
// zero.
template <class Storage>
__device__ __forceinline__ void copy_octet(Storage* to_shared, const Storage* from, int count, bool aligned) {
  if (aligned) {
    constexpr int kElements = 16 / sizeof(Storage);
#pragma unroll
    for (int first = 0; first < kOctet; first += kElements) {
      const int here = count - first < 0 ? 0 : count - first < kElements ? count - first : kElements;
      copy_async_16(to_shared + first, here > 0 ? from + first : from, here * static_cast<int>(sizeof(Storage)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) to_shared[i] = i < count ? from[i] : Storage(0);
  }
}

// The same of 8 that exist, or none, aligned.
template <class Storage>
__device__ __forceinline__ void copy_whole_octet(Storage* to_shared, const Storage* from, bool exists) {
  constexpr int kElements = 16 / sizeof(Storage);
#pragma unroll
  for (int first = 0; first < kOctet; first += kElements)
    copy_async_16(to_shared + first, exists ? from + first : from, exists ? 16 : 0);
}

}  // namespace fastlstm::cuda
