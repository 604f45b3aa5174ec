// Recurrent weights as A operands, read from W_hh as it is stored, and their products with states.
#pragma once

#include "../cell.h"
#include "elements.cuh"
#include "layout.h"

namespace fastlstm::cuda {

// The A operands of the two MMAs of a tile of 16 rows and a block of K, from the 16 bytes that a lane has of row g and
// of row g + 8.
class OperandWords {
 public:
  static constexpr int kCount = 8;

  __device__ __forceinline__ OperandWords(const uint4& low, const uint4& high)
      : words_{low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w} {}
  __device__ __forceinline__ uint32_t operator[](int j) const { return words_[j]; }

 private:
  uint32_t words_[kCount];
};

// A state as a tensor has it, as a factor of the products below. TF32 is rounded, lest an MMA cuts it off.
template <class E>
__device__ __forceinline__ uint4 as_factors(const uint4& state) {
  if constexpr (E::kParts > 1) return state;
  return uint4{E::part(state.x, 0), E::part(state.y, 0), E::part(state.z, 0), E::part(state.w, 0)};
}

// first + second += A times B of a block of K: two MMAs for each product of parts, one to each of the sums, which may
// be the same. a(part, j): word j of a part of A. `state`: the words of B, of 32-bit elements of two parts still whole.
template <class E, class Operands>
__device__ __forceinline__ void multiply_block(float (&first)[4], float (&second)[4], const uint4& state,
                                               const Operands& a) {
  // Of two parts each, the product of the small ones is left out; those with one of them come first.
#pragma unroll
  for (int parts = 2 * E::kParts - 2; parts >= 0; --parts) {
    const int of_weights = parts == 2 ? 1 : 0, of_state = parts == 1 ? 1 : 0;
    const auto b = [&](uint32_t word) { return E::kParts == 1 ? word : E::part(word, of_state); };
    uint32_t words[OperandWords::kCount];
#pragma unroll
    for (int j = 0; j < OperandWords::kCount; ++j) words[j] = a(of_weights, j);
    E::mma(first, words[0], words[1], words[2], words[3], b(state.x), b(state.y));
    E::mma(second, words[4], words[5], words[6], words[7], b(state.z), b(state.w));
  }
}

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
        const OperandWords words(rows(m, 0, b), rows(m, 1, b));
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

  // sums[set][m] += weights of a block times state, in turn to the sets.
  template <int Sets>
  __device__ __forceinline__ void multiply(float (&sums)[Sets][MTiles][4], int block, const uint4& state) const {
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
      const int i = m * Blocks + block;
      multiply_block<E>(sums[0][m], sums[Sets - 1][m], state, [&](int part, int j) {
        if (i < InRegisters) return registers_[i % InRegisters][part][j];
        return reinterpret_cast<const uint32_t*>(shared_ + shared_vector(i, part, j / 4))[j % 4];
      });
    }
  }

 private:
  static constexpr int kWords = OperandWords::kCount;
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
