// The recurrent kernels for AVX-512 (F, VL, DQ, BW). Standard headers come before the target switch, so that no inline
// function of theirs is compiled for AVX-512 and then linked into code for older CPUs.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#endif

#include "../cell.h"

namespace fastlstm::cpu::avx512 {

#include "avx512.h"

constexpr bool kNativeBf16 = false;

#include "recurrent.inl"

// The tables isa.cpp refers to. `extern` first: a const object would be local to this file otherwise.
extern const Kernels<float, float> kFloat;
extern const Kernels<float, Bf16Pair> kFloatBf16;
extern const Kernels<double, double> kDouble;
const Kernels<float, float> kFloat = kKernels<float, float>;
const Kernels<float, Bf16Pair> kFloatBf16 = kKernels<float, Bf16Pair>;
const Kernels<double, double> kDouble = kKernels<double, double>;

}  // namespace fastlstm::cpu::avx512

#if defined(__clang__) && !defined(FASTLSTM_EMULATE_AVX512)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // x86-64
