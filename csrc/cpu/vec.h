// SIMD vectors and the functions the cell needs, written once for every instruction set.
//
// Included by recurrent.inl inside the namespace of one instruction set, after kVectorBytes, kNativeBf16, fma(),
// larger() and smaller() have been defined there. Vectors are the compiler's own (GCC and Clang vector extensions), so
// the operators + - * / and comparisons work on them and any target the compiler knows (SSE2, AVX2, AVX-512, NEON, ...)
// is served by the same text.

template <class T>
struct VecTraits;

template <>
struct VecTraits<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissaBits = 23;
  static constexpr int kExponentBias = 127;
  // 1.5 * 2^23 + bias: adding it to n leaves the biased exponent of 2^n in the low mantissa bits.
  static constexpr float kRound = 12582912.0f + kExponentBias;
  static constexpr float kLn2High = 0.693359375f;  // ln 2 in two parts; n * kLn2High is exact for |n| < 2^15
  static constexpr float kLn2Low = -2.12194440054690583e-4f;
  static constexpr float kExpMin = -87.0f;  // e^x and 1 / e^x are normal numbers between these
  static constexpr float kExpMax = 87.0f;
  // e^r - 1 = r + r^2 (c_0 + c_1 r + ...), minimax for |r| <= ln 2 / 2: relative error of e^r 3.6e-9, 1/16 ulp.
  static constexpr float kExpm1[] = {0.5f, 0.16666534543f, 0.041667237878f, 0.0083675095811f, 0.0013863757486f};
};

template <>
struct VecTraits<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissaBits = 52;
  static constexpr int kExponentBias = 1023;
  static constexpr double kRound = 6755399441055744.0 + kExponentBias;  // 1.5 * 2^52 + bias
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kExpMin = -708.0;
  static constexpr double kExpMax = 708.0;
  // The Taylor series to the power of 13: (ln 2 / 2)^14 / 14! = 4e-18.
  static constexpr double kExpm1[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                      1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                      1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
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

// Rows a and b of a square after the exchange of its blocks of `kBlock` columns: kFirst: what becomes of a, else of b.
template <int kBlock, bool kFirst, class Row, int... c>
inline Row exchange_blocks(Row a, Row b, std::integer_sequence<int, c...>) {
  constexpr int W = sizeof...(c);
  constexpr auto lane = [](int column) {  // of the 2 W lanes of a and b
    const bool from_b = (column & kBlock) != 0;
    return (from_b ? W : 0) + (kFirst == from_b ? column ^ kBlock : column);
  };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane(c)...);
#else
  return __builtin_shuffle(a, b, Row{lane(c)...});
#endif
}

// Transposes a square, by exchanging blocks of 1, 2, 4, ... rows and columns.
template <int kBlock = 1, class Row, int W>
inline __attribute__((always_inline)) void transpose(Row (&rows)[W]) {
  if constexpr (kBlock < W) {
    constexpr std::make_integer_sequence<int, W> columns;
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      if (r & kBlock) continue;
      const Row a = rows[r], b = rows[r + kBlock];
      rows[r] = exchange_blocks<kBlock, true>(a, b, columns);
      rows[r + kBlock] = exchange_blocks<kBlock, false>(a, b, columns);
    }
    transpose<2 * kBlock>(rows);
  }
}

// ---------------------------------------------------------------------------------------------- operands of products

// float32 to bfloat16, to nearest with ties to even; NaN stays NaN. AVX512_BF16's instruction makes denormals zero, and
// is the same otherwise.
inline uint16_t round_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : bits >> 16 | 0x40);
}

// The same of a vector, in the upper halves of its lanes.
inline auto round_to_upper_half(Vec<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits bits = (Bits)x;
  return x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
}

// Pairs of bfloat16.
template <class V>
inline auto round_to_pairs(V first, V second) {
  using Pairs = typename VecTraits<float>::Int;
  if constexpr (kNativeBf16)
    return (Pairs)native_round_to_pairs(first, second);
  else
    return (Pairs)(round_to_upper_half(first) >> 16 | (round_to_upper_half(second) & 0xffff0000));
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

// Values of a row in one term of a product.
template <class A>
constexpr int64_t kValuesPerTerm = std::is_same_v<A, Bf16Pair> ? 2 : 1;

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
  // Terms k ... k + lanes - 1 of a row, as bits.
  static inline typename VecTraits<T>::Int load_terms(const T* row, int64_t k) {
    return (typename VecTraits<T>::Int)load(row + k);
  }
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
  static inline Vector load_terms(const float* row, int64_t k) {
    Bf16Pair pairs[kLanes<float>];
    for (int half = 0; half < 2; ++half)
      store_values(pairs, half * kLanes<float>, load(row + 2 * k + half * kLanes<float>), kLanes<float>);
    return load_from(pairs);
  }
  // Pairs of the values of two rows, n of them; those of a second row that is null are zero.
  static inline void pair_rows(const float* first, const float* second, int64_t n, Bf16Pair* out) {
    constexpr int W = kLanes<float>;
    const auto put = [&](int64_t i, auto count) {
      const Vector pairs =
          round_to_pairs(load_first(first + i, count), second ? load_first(second + i, count) : Vec<float>{});
      __builtin_memcpy(out + i, &pairs, static_cast<size_t>(count) * sizeof(Bf16Pair));
    };
    int64_t i = 0;
    for (; i + W <= n; i += W) put(i, std::integral_constant<int64_t, W>());
    if (i < n) put(i, n - i);
  }
  // Values first ... first + n - 1 of a row.
  static inline void store_values(Bf16Pair* row, int64_t first, Vec<float> x, int64_t n) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const Halves halves = __builtin_convertvector(round_to_upper_half(x) >> 16, Halves);
    __builtin_memcpy(reinterpret_cast<uint16_t*>(row) + first, &halves, static_cast<size_t>(n) * sizeof(uint16_t));
  }
};

// ---------------------------------------------------------------------------------------------- functions

// exp(x) = scale * (1 + p), |p| < 0.42, for kExpMin <= x <= kExpMax: x = n ln 2 + r, scale = 2^n, p = e^r - 1 by a
// polynomial. Keeping p apart lets tanh form expm1 without cancellation. NaN passes through p.
template <class T>
inline void exp_parts(Vec<T> x, Vec<T>& scale, Vec<T>& p) {
  using Traits = VecTraits<T>;
  using Int = typename Traits::Int;
  constexpr int kTerms = sizeof(Traits::kExpm1) / sizeof(T);
  const Vec<T> shifted = fma(x, broadcast<T>(static_cast<T>(1.4426950408889634074)), broadcast<T>(Traits::kRound));
  const Vec<T> n = shifted - Traits::kRound;
  Vec<T> r = fma(n, broadcast<T>(-Traits::kLn2High), x);
  r = fma(n, broadcast<T>(-Traits::kLn2Low), r);
  p = broadcast<T>(Traits::kExpm1[kTerms - 1]);
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) p = fma(p, r, broadcast<T>(Traits::kExpm1[k]));
  p = fma(p * r, r, r);
  scale = (Vec<T>)((Int)shifted << Traits::kMantissaBits);
}

// x within the limits of exp_parts; NaN stays.
template <class T>
inline Vec<T> clamp_exponent(Vec<T> x) {
  return smaller(broadcast<T>(VecTraits<T>::kExpMax), larger(broadcast<T>(VecTraits<T>::kExpMin), x));
}

template <class T>
struct VecMath {
  // Between e^kExpMin and e^kExpMax.
  static inline Vec<T> exp(Vec<T> x) {
    Vec<T> scale, p;
    exp_parts<T>(clamp_exponent<T>(x), scale, p);
    return fma(scale, p, scale);
  }

  static inline Vec<T> sigmoid(Vec<T> x) {
    const Vec<T> e = exp(x);
    return e / (1 + e);
  }

  // e / (e + 2) with e = expm1(2 x): full relative accuracy near zero.
  static inline Vec<T> tanh(Vec<T> x) {
    Vec<T> scale, p;
    exp_parts<T>(clamp_exponent<T>(x + x), scale, p);
    const Vec<T> e = fma(scale, p, scale - 1);
    return e / (e + 2);
  }
};
