// The recurrent kernels for any CPU: 16-byte vectors, which every compiler lowers to what the target has (SSE2, NEON,
// AltiVec, or plain scalar code). No fused multiply-add is assumed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "../cell.h"
#include "kernels.h"

namespace fastlstm::cpu::scalar {

constexpr int kVectorBytes = 16;
constexpr bool kNativeBf16 = false;
constexpr int kAccumulators = 12;

template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}

#include "recurrent.inl"

// The tables isa.cpp refers to. `extern` first: a const object would be local to this file otherwise.
extern const Kernels<float, float> kFloat;
extern const Kernels<float, Bf16Pair> kFloatBf16;
extern const Kernels<double, double> kDouble;
const Kernels<float, float> kFloat = kKernels<float, float>;
const Kernels<float, Bf16Pair> kFloatBf16 = kKernels<float, Bf16Pair>;
const Kernels<double, double> kDouble = kKernels<double, double>;

}  // namespace fastlstm::cpu::scalar
