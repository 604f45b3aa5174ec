// The recurrent kernels with bfloat16 products for AVX512_BF16; everything in full precision is recurrent_avx512.cpp's.
// Standard headers come before the target switch, so that no inline function of theirs is compiled for AVX-512 and then
// linked into code for older CPUs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

#if defined(FASTLSTM_EMULATE_AVX512)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")
#endif

#include "../cell.h"

namespace fastlstm::cpu::avx512_bf16 {

#include "avx512.h"

#if defined(FASTLSTM_EMULATE_AVX512)
constexpr bool kNativeBf16 = false;
#else
constexpr bool kNativeBf16 = true;
template <class Pairs>
inline __m512 native_multiply_pairs(__m512 sum, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
inline __m512i native_round_to_pairs(__m512 first, __m512 second) {
  const __m512i lane = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(lane, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
#endif

#include "recurrent.inl"

// The table isa.cpp refers to. `extern` first: a const object would be local to this file otherwise.
extern const Kernels<float, Bf16Pair> kFloatBf16;
const Kernels<float, Bf16Pair> kFloatBf16 = kKernels<float, Bf16Pair>;

}  // namespace fastlstm::cpu::avx512_bf16

#if defined(__clang__) && !defined(FASTLSTM_EMULATE_AVX512)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // x86-64
