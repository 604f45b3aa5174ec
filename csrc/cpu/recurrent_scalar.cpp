// The recurrent kernels for any CPU: 16-byte vectors, which every compiler lowers to what the target has (SSE2, NEON,
// AltiVec, or plain scalar code). No fused multiply-add is assumed.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../cell.h"
#include "kernels.h"

namespace fastlstm::cpu::scalar {

constexpr int kVectorBytes = 16;
constexpr int kAccumulators = 12;

template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}

#include "recurrent.inl"

}  // namespace fastlstm::cpu::scalar
