// Recurrent weights as A operands that stay in a warp for the whole sequence, read from W_hh as it is stored.
#pragma once

#include "../cell.h"
#include "elements.cuh"
#include "layout.h"

namespace fastlstm::cuda {

// Weights of one warp: MTiles tiles of 16 rows by Blocks blocks of K, as A operands, InRegisters of them in registers.
template <class E, int MTiles, int Blocks, int InRegisters>
class ResidentWeights {
 public:
  static constexpr int kMTiles = MTiles, kBlocks = Blocks;

  // rows(m, half, block): the 16 bytes of row 8 * half + g of tile m that this lane multiplies in a block of this warp.
  // `shared`: this warp's room for what does not fit into registers. Every lane reads back only what it wrote.
  template <class Rows>
  __device__ __forceinline__ ResidentWeights(uint4* shared, int lane, const Rows& rows) : shared_(shared + lane) {
#pragma unroll
    for (int m = 0; m < MTiles; ++m)
#pragma unroll
      for (int b = 0; b < Blocks; ++b) {
        const uint4 low = rows(m, 0, b), high = rows(m, 1, b);
        const uint32_t words[kWords] = {low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w};
        const int i = m * Blocks + b;
#pragma unroll
        for (int part = 0; part < E::kParts; ++part)
#pragma unroll
          for (int j = 0; j < kWords; ++j) {
            const uint32_t word = E::part(words[j], part);
            if (i < InRegisters)
              registers_[i % InRegisters][part][j] = word;
            else
              reinterpret_cast<uint32_t*>(shared_ + shared_vector(i, part, j / 4))[j % 4] = word;
          }
        warp_barrier();  // loads that ran further ahead would take registers that there are not
      }
  }

  // sums[set][m] += weights of a block times state; two MMAs per tile and product of parts, which use the sets in turn.
  template <int Sets>
  __device__ __forceinline__ void multiply(float (&sums)[Sets][MTiles][4], int block, const uint4& state) const {
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
      const int i = m * Blocks + block;
      // Of two parts each, the product of the small ones is left out; those with one of them come first.
#pragma unroll
      for (int parts = 2 * E::kParts - 2; parts >= 0; --parts) {
        const int of_weights = parts == 2 ? 1 : 0, of_state = parts == 1 ? 1 : 0;
        uint32_t a[kWords];
        if (i < InRegisters) {
#pragma unroll
          for (int j = 0; j < kWords; ++j) a[j] = registers_[i % InRegisters][of_weights][j];
        } else {
          const uint4 first = shared_[shared_vector(i, of_weights, 0)],
                      second = shared_[shared_vector(i, of_weights, 1)];
          const uint32_t words[kWords] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
          for (int j = 0; j < kWords; ++j) a[j] = words[j];
        }
        const auto b = [&](uint32_t word) { return E::kParts == 1 ? word : E::part(word, of_state); };
        E::mma(sums[0][m], a[0], a[1], a[2], a[3], b(state.x), b(state.y));
        E::mma(sums[Sets - 1][m], a[4], a[5], a[6], a[7], b(state.z), b(state.w));
      }
    }
  }

 private:
  static constexpr int kWords = 8;  // of a thread in a tile
  static constexpr int shared_vector(int tile, int part, int half) {
    return (((tile - InRegisters) * E::kParts + part) * 2 + half) * kWarpThreads;
  }
  uint32_t registers_[InRegisters][E::kParts][kWords];
  uint4* const shared_;
};

// The 16 bytes of a row that this lane multiplies in a block of K; the row has `stride` elements.
template <class E>
__device__ __forceinline__ const uint4* row_vector(const void* rows, int64_t row, int stride, int block, int lane) {
  using W = Words<E>;
  return reinterpret_cast<const uint4*>(static_cast<const typename E::Storage*>(rows) + row * stride +
                                        block * W::kPerBlock + lane % 4 * W::kPerVector);
}

// Forward: of W_hh, the row of a gate of hidden unit `first` + g.
template <class E>
__device__ __forceinline__ uint4 forward_weights(const void* w_hh, int hidden, int stride, int gate, int first,
                                                 int block, int lane) {
  const int unit = first + lane / 4, k = block * Words<E>::kPerBlock + lane % 4 * Words<E>::kPerVector;
  if (unit >= hidden || k >= stride) return uint4{};
  return *row_vector<E>(w_hh, static_cast<int64_t>(gate) * hidden + unit, stride, block, lane);
}

// Backward: of W_hh^T, the row of hidden unit `first` + g in a block of K, which runs over the gates of all units: 8
// units for elements of 16 bits, 4 for those of 32.
template <class E>
__device__ __forceinline__ uint4 transposed_weights(const void* w_hh, int hidden, int stride, int first, int block,
                                                    int lane) {
  const auto* const w = static_cast<const typename E::Storage*>(w_hh);
  uint32_t words[4] = {};
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) {
    if constexpr (Words<E>::kHalf) {
      // Row g of an 8 x 8 matrix of units by hidden units, two columns; transposed, a lane has two units of row g.
      const int unit = block * kOctet + lane / 4, column = first + lane % 4 * 2;
      if (unit < hidden && column < stride)
        words[gate] =
            *reinterpret_cast<const uint32_t*>(w + (static_cast<int64_t>(gate) * hidden + unit) * stride + column);
      words[gate] = transpose_8x8(words[gate]);
    } else {
      const int unit = block * 4 + lane % 4, column = first + lane / 4;
      if (unit < hidden && column < stride)
        words[gate] = bits_of(w[(static_cast<int64_t>(gate) * hidden + unit) * stride + column]);
    }
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

}  // namespace fastlstm::cuda
