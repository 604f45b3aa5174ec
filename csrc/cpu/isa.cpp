#include "isa.h"

#include <unistd.h>

#include <mutex>

namespace fastlstm::cpu {

#define FASTLSTM_DECLARE_KERNELS(isa)               \
  namespace isa {                                   \
  extern const Kernels<float, float> kFloat;        \
  extern const Kernels<float, Bf16Pair> kFloatBf16; \
  extern const Kernels<double, double> kDouble;     \
  }
FASTLSTM_DECLARE_KERNELS(scalar)
#if defined(__x86_64__)
FASTLSTM_DECLARE_KERNELS(avx2)
FASTLSTM_DECLARE_KERNELS(avx512)
namespace avx512_bf16 {
extern const Kernels<float, Bf16Pair> kFloatBf16;
}
#endif
#undef FASTLSTM_DECLARE_KERNELS

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    default: return "scalar";
  }
}

std::vector<Isa> compiled_isas() {
#if defined(__x86_64__)
  return {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};
#else
  return {Isa::kScalar};
#endif
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas = {Isa::kScalar};
#if defined(FASTLSTM_EMULATE_AVX512)
  isas = compiled_isas();
#elif defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back(Isa::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw")) {
      isas.push_back(Isa::kAvx512);
      if (__builtin_cpu_supports("avx512bf16")) isas.push_back(Isa::kAvx512Bf16);
    }
  }
#endif
  return isas;
}

template <>
const Kernels<float, float>& kernels<float, float>([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16) return avx512::kFloat;
  if (isa == Isa::kAvx2) return avx2::kFloat;
#endif
  return scalar::kFloat;
}

template <>
const Kernels<float, Bf16Pair>& kernels<float, Bf16Pair>([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Bf16) return avx512_bf16::kFloatBf16;
  if (isa == Isa::kAvx512) return avx512::kFloatBf16;
  if (isa == Isa::kAvx2) return avx2::kFloatBf16;
#endif
  return scalar::kFloatBf16;
}

template <>
const Kernels<double, double>& kernels<double, double>([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16) return avx512::kDouble;
  if (isa == Isa::kAvx2) return avx2::kDouble;
#endif
  return scalar::kDouble;
}

namespace {

std::mutex forced_mutex;
Forced forced_settings;

int64_t l2_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE); bytes > 0) return bytes;
#endif
  return 512 * 1024;  // not told (containers, other systems): what most server cores have at least
}

}  // namespace

Forced forced() {
  const std::lock_guard<std::mutex> lock(forced_mutex);
  return forced_settings;
}

void set_forced(const Forced& forced) {
  const std::lock_guard<std::mutex> lock(forced_mutex);
  forced_settings = forced;
}

Isa selected_isa() {
  static const Isa best = available_isas().back();
  return forced().isa.value_or(best);
}

Machine this_machine(int threads) {
  static const int64_t l2_bytes = l2_cache_bytes();
  const Isa isa = selected_isa();
  const int vector_bytes = kernels<float, float>(isa).lanes * static_cast<int>(sizeof(float));
  return {threads, vector_bytes, isa != Isa::kScalar, isa == Isa::kAvx512Bf16, l2_bytes};
}

}  // namespace fastlstm::cpu
