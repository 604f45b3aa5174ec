// Where the CTAs (or warps) that make a state put it for those that multiply it: so that a lane finds in 16 bytes what
// its MMAs take. A tile's states are [block] times 32 such vectors, one for each lane.
#pragma once

#include "../cell.h"
#include "elements.cuh"
#include "layout.h"

namespace fastlstm::cuda {

// The vector of h that lane 4 column + quarter multiplies in a block of K. In shared memory lanes read in turn; in the
// exchange buffer what a CTA stores lies together, because stores that share a sector of L2 with those of another CTA
// take longer: all-gathers by 48 CTAs measured on an H200 took 1170 cycles instead of 1350.
__device__ __forceinline__ int vector_by_lane(int block, int column, int quarter) {
  return block * kWarpThreads + column * 4 + quarter;
}
__device__ __forceinline__ int vector_by_octet(int block, int column, int quarter) {
  return block * kWarpThreads + quarter * kColumns + column;
}

// h of an octet: h[e] of unit lane / 4 and column 2 (lane % 4) + e. put(block, column, quarter, word, value) stores
// factors in 32-bit word number `word` of a vector. `octet` counts from the first hidden unit.
template <class E, class Put>
__device__ __forceinline__ void put_h(int octet, int lane, const float (&h)[2], const Put& put) {
  using W = Words<E>;
  if constexpr (W::kHalf) {
    // Transposed, a lane has units 2q and 2q + 1 of column g: word q of the lane that multiplies this octet.
    const uint32_t word = transpose_8x8(E::pack(h[0], h[1]));
    put(octet / 4, lane / 4, octet % 4, lane % 4, word);
  } else {
    const int unit = octet * kOctet + lane / 4;
#pragma unroll
    for (int e = 0; e < 2; ++e)
      put(unit / W::kPerBlock, 2 * (lane % 4) + e, unit % W::kPerBlock / W::kPerVector, unit % W::kPerVector,
          E::factor(h[e]));
  }
}

// The same for the gradients of the gates of an octet, as packets: put(vector, packet). Of a column, a packet holds the
// gates of units 2q and 2q + 1 (elements of 16 bits: one word for each gate) or of one unit (TF32).
template <class E, class Put>
__device__ __forceinline__ void put_gradients(int octet, int lane, const float (&d_gates)[2][kGates], const Put& put) {
  if constexpr (Words<E>::kHalf) {
    uint32_t words[kGates];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) words[gate] = transpose_8x8(E::pack(d_gates[0][gate], d_gates[1][gate]));
    put(octet * kWarpThreads + lane, uint4{words[0], words[1], words[2], words[3]});
  } else {
    const int unit = octet * kOctet + lane / 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float (&d)[kGates] = d_gates[e];
      put(unit / 4 * kWarpThreads + (2 * (lane % 4) + e) * 4 + unit % 4,
          uint4{E::factor(d[0]), E::factor(d[1]), E::factor(d[2]), E::factor(d[3])});
    }
  }
}

}  // namespace fastlstm::cuda
