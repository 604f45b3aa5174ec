// The recurrent kernels for AVX2 and FMA. Standard headers come before the target switch, so that no inline function
// of theirs is compiled for AVX2 and then linked into code for older CPUs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "../cell.h"

namespace fastlstm::cpu::avx2 {

constexpr int kVectorBytes = 32;
constexpr bool kNativeBf16 = false;
constexpr int kAccumulators = 12;  // of 16 registers; the tile also holds its broadcasts and one weight vector

inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
inline __m256 larger(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
inline __m256d larger(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }
inline __m256 smaller(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
inline __m256d smaller(__m256d a, __m256d b) { return _mm256_min_pd(a, b); }

#include "recurrent.inl"

// The tables isa.cpp refers to. `extern` first: a const object would be local to this file otherwise.
extern const Kernels<float, float> kFloat;
extern const Kernels<float, Bf16Pair> kFloatBf16;
extern const Kernels<double, double> kDouble;
const Kernels<float, float> kFloat = kKernels<float, float>;
const Kernels<float, Bf16Pair> kFloatBf16 = kKernels<float, Bf16Pair>;
const Kernels<double, double> kDouble = kKernels<double, double>;

}  // namespace fastlstm::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // x86-64
