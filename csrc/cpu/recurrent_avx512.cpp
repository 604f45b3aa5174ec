// The recurrent kernels for AVX-512 (F, VL, DQ, BW). Standard headers come before the target switch, so that no inline
// function of theirs is compiled for AVX-512 and then linked into code for older CPUs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#endif

#include "../cell.h"

namespace fastlstm::cpu::avx512 {

constexpr int kVectorBytes = 64;
constexpr bool kNativeBf16 = false;
constexpr int kAccumulators = 24;  // of 32 registers

inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
// With a mask of all lanes: the plain forms start from an undefined vector, which GCC 12 warns about.
inline __m512 larger(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline __m512d larger(__m512d a, __m512d b) { return _mm512_maskz_max_pd(0xff, a, b); }
inline __m512 smaller(__m512 a, __m512 b) { return _mm512_maskz_min_ps(0xffff, a, b); }
inline __m512d smaller(__m512d a, __m512d b) { return _mm512_maskz_min_pd(0xff, a, b); }

#include "recurrent.inl"

// The tables isa.cpp refers to. `extern` first: a const object would be local to this file otherwise.
extern const Kernels<float, float> kFloat;
extern const Kernels<float, Bf16Pair> kFloatBf16;
extern const Kernels<double, double> kDouble;
const Kernels<float, float> kFloat = kKernels<float, float>;
const Kernels<float, Bf16Pair> kFloatBf16 = kKernels<float, Bf16Pair>;
const Kernels<double, double> kDouble = kKernels<double, double>;

}  // namespace fastlstm::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // x86-64
