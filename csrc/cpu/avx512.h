// What recurrent.inl asks of an instruction set, for AVX-512. Included by recurrent_avx512{,_bf16}.cpp inside their
// namespaces.
//
// With FASTLSTM_EMULATE_AVX512 the same vectors are computed without the instructions, so that machines that lack them
// can test all code for vectors of this size; `make sanitize` does.

constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 24;  // of 32 registers

#if defined(FASTLSTM_EMULATE_AVX512)

template <class V>
inline V fma_elements(V a, V b, V c) {
  for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
inline __m512 fma(__m512 a, __m512 b, __m512 c) { return fma_elements(a, b, c); }
inline __m512d fma(__m512d a, __m512d b, __m512d c) { return fma_elements(a, b, c); }
inline __m512 larger(__m512 a, __m512 b) { return a > b ? a : b; }
inline __m512d larger(__m512d a, __m512d b) { return a > b ? a : b; }
inline __m512 smaller(__m512 a, __m512 b) { return a < b ? a : b; }
inline __m512d smaller(__m512d a, __m512d b) { return a < b ? a : b; }

#else

inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
inline __m512 larger(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline __m512d larger(__m512d a, __m512d b) { return _mm512_maskz_max_pd(0xff, a, b); }
inline __m512 smaller(__m512 a, __m512 b) { return _mm512_maskz_min_ps(0xffff, a, b); }
inline __m512d smaller(__m512d a, __m512d b) { return _mm512_maskz_min_pd(0xff, a, b); }

#endif
