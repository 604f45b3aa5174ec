// The types of tensors and of the factors of products: conversions, tensor-core products, nonlinearities.
#pragma once

#include <cmath>

#include "layout.h"
#include "ptx.cuh"

namespace fastlstm::cuda {

// sigmoid and tanh, as cell.h takes them, in three accuracies.
struct ApproximateMath {  // relative error 2^-11, of the order of bfloat16's rounding; one instruction each
  static __device__ __forceinline__ float sigmoid(float x) { return 0.5f * tanh_approx(0.5f * x) + 0.5f; }
  static __device__ __forceinline__ float tanh(float x) { return tanh_approx(x); }
};
struct FastMath {  // absolute error of about 2e-7; two instructions of the special-function unit each
  static __device__ __forceinline__ float sigmoid(float x) {
    return reciprocal_approx(1.f + exp2_approx(-1.4426950408889634f * x));  // -1 / ln 2
  }
  static __device__ __forceinline__ float tanh(float x) {
    return 1.f - 2.f * reciprocal_approx(1.f + exp2_approx(2.885390081777927f * x));  // 2 / ln 2
  }
};
template <class T>
struct LibraryMath {  // a few units in the last place of T
  static __device__ __forceinline__ T sigmoid(T x) { return T(1) / (T(1) + std::exp(-x)); }
  static __device__ __forceinline__ T tanh(T x) { return std::tanh(x); }
};

// Elements as tensors hold them. Compute: the type of sums and of the cell state.
template <class T>
struct Full {  // float32 or float64 where no products are taken
  using Storage = T;
  using Compute = T;
  using Math = LibraryMath<T>;
  static __device__ __forceinline__ T load(T x) { return x; }
  static __device__ __forceinline__ T store(T x) { return x; }
};

// Those that tensor cores multiply. part(): what an MMA takes of a word of factors, for each of kParts.
struct Half {  // 16 bits
  using Storage = uint16_t;
  using Compute = float;
  static constexpr int kParts = 1;
  static __device__ __forceinline__ uint32_t part(uint32_t word, int) { return word; }
};
struct Bf16 : Half {
  using Math = ApproximateMath;
  static constexpr uint32_t kOne = 0x3f80;
  static __device__ __forceinline__ float load(uint16_t x) { return float_of_bits(static_cast<uint32_t>(x) << 16); }
  static __device__ __forceinline__ uint16_t store(float x) { return static_cast<uint16_t>(pack_bf16(x, 0.f)); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  template <class... Operands>
  static __device__ __forceinline__ void mma(float (&d)[4], Operands... operands) {
    mma_bf16(d, operands...);
  }
};
struct Fp16 : Half {
  using Math = FastMath;
  static constexpr uint32_t kOne = 0x3c00;
  static __device__ __forceinline__ float load(uint16_t x) { return float_of_fp16(x); }
  static __device__ __forceinline__ uint16_t store(float x) { return static_cast<uint16_t>(pack_fp16(x, 0.f)); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_fp16(low, high); }
  template <class... Operands>
  static __device__ __forceinline__ void mma(float (&d)[4], Operands... operands) {
    mma_fp16(d, operands...);
  }
};

// Tensors of float32. factor(): what is exchanged for a product.
struct Single : Full<float> {
  static constexpr uint32_t kOne = 0x3f800000;
  template <class... Operands>
  static __device__ __forceinline__ void mma(float (&d)[4], Operands... operands) {
    mma_tf32(d, operands...);
  }
};
struct Tf32 : Single {  // products of factors rounded to TF32
  using Math = FastMath;
  static constexpr int kParts = 1;
  static __device__ __forceinline__ uint32_t factor(float x) { return round_tf32(x); }
  static __device__ __forceinline__ uint32_t part(uint32_t word, int) { return round_tf32(float_of_bits(word)); }
};
struct Fp32 : Single {  // products of nearly all of its bits: see Factors in layout.h
  static constexpr int kParts = 2;
  static __device__ __forceinline__ uint32_t factor(float x) { return bits_of(x); }
  // Its TF32 value, and what that lacks; nothing if it is infinite.
  static __device__ __forceinline__ uint32_t part(uint32_t word, int which) {
    const uint32_t high = round_tf32(float_of_bits(word));
    if (which == 0) return high;
    const float low = float_of_bits(word) - float_of_bits(high);
    return (high & 0x7fffffffu) == 0x7f800000u ? 0 : round_tf32(low);
  }
};

// How factors of products lie in 32-bit words. Elements of 16 bits: two in a word, the first in the low half.
template <class E>
struct Words {
  static constexpr bool kHalf = sizeof(typename E::Storage) == 2;
  static constexpr int kBytes = sizeof(typename E::Storage);
  static constexpr Factors kFactors = {kBytes, E::kParts};
  static constexpr int kPerVector = 16 / kBytes;    // elements of a lane's part of a block of K
  static constexpr int kPerBlock = 4 * kPerVector;  // elements of a block of K

  // The top bit of the exponent, in all elements of a word: 0 in every |x| < 2.
  static constexpr uint32_t kTag = kHalf ? 0x40004000u : 0x40000000u;
  // Added to a number whose tag bit is clear, it carries into that bit exactly if the magnitude is greater than 1.
  static constexpr uint32_t kUpToTag = kHalf ? (0x3fffu - E::kOne) * 0x10001u : 0x3fffffffu - E::kOne;
};

}  // namespace fastlstm::cuda
