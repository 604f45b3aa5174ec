// SIMD vectors and the functions the cell needs, written once for every instruction set.
//
// Included by recurrent.inl inside the namespace of one instruction set, after kVectorBytes, kNativeBf16 and fma() have
// been defined there. Vectors are the compiler's own (GCC and Clang vector extensions), so the operators + - * / and
// comparisons work on them and any target the compiler knows (SSE2, AVX2, AVX-512, NEON, ...) is served by the same
// text.

template <class T>
struct VecTraits;

template <>
struct VecTraits<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissaBits = 23;
  static constexpr int kExponentBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  static constexpr float kLn2High = 0.693359375f;  // ln 2 in two parts; n * kLn2High is exact for |n| < 2^15
  static constexpr float kLn2Low = -2.12194440054690583e-4f;
  static constexpr float kExpMin = -87.0f;  // e^x and 1 / e^x are normal numbers between these
  static constexpr float kExpMax = 87.0f;
  static constexpr int kTaylorDegree = 7;  // (ln 2 / 2)^8 / 8! = 5e-9, a tenth of an ulp
};

template <>
struct VecTraits<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissaBits = 52;
  static constexpr int kExponentBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kExpMin = -708.0;
  static constexpr double kExpMax = 708.0;
  static constexpr int kTaylorDegree = 13;  // (ln 2 / 2)^14 / 14! = 4e-18
};

template <class T>
using Vec = typename VecTraits<T>::Vec;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The first n lanes; the others read as zero and are never touched in memory.
template <class T>
inline Vec<T> load_first(const T* p, int64_t n) {
  Vec<T> v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
  return v;
}

template <class T>
inline void store_first(T* p, Vec<T> v, int64_t n) {
  __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// Sum of the lanes, always in the same order: halves are added until one lane is left.
template <class T>
inline T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

template <class T>
struct Quad {
  typedef T Vec __attribute__((vector_size(4 * sizeof(T))));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index __attribute__((vector_size(4 * sizeof(T))));
};

// Four lanes out of the eight of a and b.
template <class T, int i, int j, int k, int l>
inline typename Quad<T>::Vec pick(typename Quad<T>::Vec a, typename Quad<T>::Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i, j, k, l);
#else
  return __builtin_shuffle(a, b, typename Quad<T>::Index{i, j, k, l});
#endif
}

// Two pairs of sums: lanes l and l + 2 of a, then of b.
template <class T>
inline typename Quad<T>::Vec add_halves(typename Quad<T>::Vec a, typename Quad<T>::Vec b) {
  return pick<T, 0, 1, 4, 5>(a, b) + pick<T, 2, 3, 6, 7>(a, b);
}

// out[i] = sum_lanes(v[i]), in the same order; four vectors at once with a quarter of the additions.
template <class T, int N>
inline void sum_lanes(const Vec<T> (&v)[N], T* out) {
  if constexpr (N != 4) {
    for (int i = 0; i < N; ++i) out[i] = sum_lanes<T>(v[i]);
  } else {
    typename Quad<T>::Vec quads[4];
    for (int i = 0; i < 4; ++i) {
      typename Quad<T>::Vec parts[kLanes<T> / 4];
      __builtin_memcpy(parts, &v[i], sizeof(parts));
      for (int width = kLanes<T> / 8; width > 0; width /= 2)
        for (int q = 0; q < width; ++q) parts[q] += parts[q + width];
      quads[i] = parts[0];
    }
    const typename Quad<T>::Vec low = add_halves<T>(quads[0], quads[1]), high = add_halves<T>(quads[2], quads[3]);
    const typename Quad<T>::Vec sums = pick<T, 0, 2, 4, 6>(low, high) + pick<T, 1, 3, 5, 7>(low, high);
    __builtin_memcpy(out, &sums, sizeof(sums));
  }
}

// ---------------------------------------------------------------------------------------------- operands of products

// float32 to bfloat16, to nearest with ties to even; NaN stays NaN.
inline uint16_t round_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : bits >> 16 | 0x40);
}

// sum + first * first + second * second of each pair of bfloat16.
template <class V, class Pairs>
inline V multiply_pairs(V sum, Pairs a, Pairs b) {
  if constexpr (kNativeBf16) {
    return native_multiply_pairs(sum, a, b);
  } else {
    const int32_t upper_half = -65536;
    sum = fma((V)(a & upper_half), (V)(b & upper_half), sum);
    return fma((V)(a << 16), (V)(b << 16), sum);
  }
}

// How a register tile reads and multiplies operands A: a row's element broadcast, a vector of a panel.
template <class T, class A>
struct Operand;

template <class T>
struct Operand<T, T> {
  using Vector = Vec<T>;
  static inline Vector broadcast_from(const T* p) { return broadcast<T>(*p); }
  static inline Vector load_from(const T* p) { return load(p); }
  static inline Vec<T> multiply_add(Vector a, Vector b, Vec<T> sum) { return fma(a, b, sum); }

  static inline T make(const T* values, int64_t stride, int64_t k, int64_t) { return values[k * stride]; }
  static inline void store_values(T* row, int64_t first, Vec<T> x, int64_t n) { store_first(row + first, x, n); }
};

template <>
struct Operand<float, Bf16Pair> {
  using Vector = VecTraits<float>::Int;
  static inline Vector broadcast_from(const Bf16Pair* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return bits - Vector{};
  }
  static inline Vector load_from(const Bf16Pair* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static inline Vec<float> multiply_add(Vector a, Vector b, Vec<float> sum) { return multiply_pairs(sum, a, b); }

  // The k-th pair of K values that lie `stride` apart.
  static inline Bf16Pair make(const float* values, int64_t stride, int64_t k, int64_t K) {
    const float second = 2 * k + 1 < K ? values[(2 * k + 1) * stride] : 0.0f;
    return {round_to_bf16(values[2 * k * stride]), round_to_bf16(second)};
  }
  // Values first ... first + n - 1 of a row.
  static inline void store_values(Bf16Pair* row, int64_t first, Vec<float> x, int64_t n) {
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const Bits bits = (Bits)x;
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Halves halves = __builtin_convertvector(x == x ? rounded : bits >> 16 | 0x40, Halves);
    __builtin_memcpy(reinterpret_cast<uint16_t*>(row) + first, &halves, static_cast<size_t>(n) * sizeof(uint16_t));
  }
};

// ---------------------------------------------------------------------------------------------- functions

template <class T>
constexpr T inverse_factorial(int k) {
  T product = 1;
  for (int j = 2; j <= k; ++j) product *= static_cast<T>(j);
  return 1 / product;
}

// exp(x) = scale * (1 + p), |p| < 0.42, for kExpMin <= x <= kExpMax: x = n ln 2 + r, scale = 2^n, p = e^r - 1 by its
// Taylor series. Keeping p apart lets tanh form expm1 without cancellation. NaN passes through p.
template <class T>
inline void exp_parts(Vec<T> x, Vec<T>& scale, Vec<T>& p) {
  using Traits = VecTraits<T>;
  using Int = typename Traits::Int;
  const Vec<T> shifted = fma(x, broadcast<T>(static_cast<T>(1.4426950408889634074)), broadcast<T>(Traits::kRound));
  const Vec<T> n = shifted - Traits::kRound;
  Vec<T> r = fma(n, broadcast<T>(-Traits::kLn2High), x);
  r = fma(n, broadcast<T>(-Traits::kLn2Low), r);
  p = broadcast<T>(inverse_factorial<T>(Traits::kTaylorDegree));
#pragma GCC unroll 16
  for (int k = Traits::kTaylorDegree - 1; k >= 1; --k) p = fma(p, r, broadcast<T>(inverse_factorial<T>(k)));
  p = p * r;
  const Int exponent = ((Int)shifted + Traits::kExponentBias) << Traits::kMantissaBits;
  scale = (Vec<T>)exponent;
}

// Comparisons are written so that NaN takes the branch that keeps it.
template <class T>
inline Vec<T> clamp_exponent(Vec<T> x) {
  const Vec<T> low = broadcast<T>(VecTraits<T>::kExpMin), high = broadcast<T>(VecTraits<T>::kExpMax);
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <class T>
struct VecMath {
  static inline Vec<T> sigmoid(Vec<T> x) {
    Vec<T> scale, p;
    exp_parts<T>(clamp_exponent<T>(-x), scale, p);
    return 1 / (1 + fma(scale, p, scale));
  }

  // tanh |x| = -e / (e + 2) with e = expm1(-2 |x|): no overflow, full relative accuracy near zero.
  static inline Vec<T> tanh(Vec<T> x) {
    using Int = typename VecTraits<T>::Int;
    const Int sign = (Int)broadcast<T>(static_cast<T>(-0.0));
    const Vec<T> magnitude = (Vec<T>)((Int)x & ~sign);
    Vec<T> scale, p;
    exp_parts<T>(clamp_exponent<T>(-2 * magnitude), scale, p);
    const Vec<T> e = fma(scale, p, scale - 1);
    return (Vec<T>)((Int)(-e / (e + 2)) | ((Int)x & sign));
  }
};
