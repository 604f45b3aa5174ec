// Layer-normalised gates (J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, eqs. 20 to 22 of the
// supplement). Included by recurrent.inl.
//
//   a = gain_ih * norm(W_ih x_t) + gain_hh * norm(W_hh h_{t-1}) + bias
//   h_t = o * tanh(gain_c * norm(c_t) + bias_c)
//
// where norm(v) = (v - mean) / sqrt(variance + eps) over all elements of v, 4H or H of them; the cell between the two
// is that of cell.h. A row is normalised by one thread, in one order whatever the others do.

// f(first, n) for the vectors of `size` elements: n is the number of lanes, as a constant, but for the last.
template <class T, class F>
inline __attribute__((always_inline)) void for_each_vector(int64_t size, const F& f) {
  constexpr int64_t W = kLanes<T>;
  int64_t i = 0;
  for (; i + W <= size; i += W) f(i, std::integral_constant<int64_t, W>());
  if (i < size) f(i, size - i);
}

// The sum of f(first, n) over the vectors of `size` elements, and over the lanes. Lanes beyond n must be zero.
template <class T, class F>
inline __attribute__((always_inline)) T sum_vectors(int64_t size, const F& f) {
  constexpr int64_t W = kLanes<T>, kChains = 4;
  Vec<T> sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * W <= size; i += kChains * W)
#pragma GCC unroll 4
    for (int64_t c = 0; c < kChains; ++c) sums[c] = sums[c] + f(i + c * W, std::integral_constant<int64_t, W>());
  for (; i + W <= size; i += W) sums[0] = sums[0] + f(i, std::integral_constant<int64_t, W>());
  if (i < size) sums[1] = sums[1] + f(i, size - i);
  return sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Normalises a row in place and returns 1 / sqrt(variance + eps).
template <class T>
T normalize_row(T* row, int64_t size) {
  const T mean = sum_vectors<T>(size, [&](int64_t i, auto n) { return load_first(row + i, n); }) / static_cast<T>(size);
  T means[kLanes<T>];
  store(means, broadcast<T>(mean));
  const T squares = sum_vectors<T>(size, [&](int64_t i, auto n) {
    const Vec<T> deviation = load_first(row + i, n) - load_first(means, n);
    return deviation * deviation;
  });
  const T rstd = 1 / std::sqrt(squares / static_cast<T>(size) + static_cast<T>(kNormEpsilon));
  for_each_vector<T>(size, [&](int64_t i, auto n) { store_first(row + i, (load_first(row + i, n) - mean) * rstd, n); });
  return rstd;
}

template <class T>
void normalize_rows(T* data, int64_t size, Range rows, T* rstd) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T of_row = normalize_row(data + row * size, size);
    if (rstd) rstd[row] = of_row;
  }
}

// The way back through norm(): from the gradient d of norm = norm(v), elements of that of v are
// rstd * (d - mean(d) - norm * mean(d * norm)).
template <class T>
struct NormGradient {
  T rstd, mean, mean_of_products;

  // From the gradient of gain * norm.
  static inline __attribute__((always_inline)) NormGradient of_row(const T* d, const T* norm, const T* gain, T rstd,
                                                                   int64_t size) {
    constexpr int64_t W = kLanes<T>, kChains = 2;
    Vec<T> sums[kChains] = {}, sums_of_products[kChains] = {};
    const auto add = [&](int64_t i, auto n, int chain) {
      const Vec<T> scaled = load_first(gain + i, n) * load_first(d + i, n);
      sums[chain] = sums[chain] + scaled;
      sums_of_products[chain] = fma(scaled, load_first(norm + i, n), sums_of_products[chain]);
    };
    int64_t i = 0;
    for (; i + kChains * W <= size; i += kChains * W)
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c) add(i + c * W, std::integral_constant<int64_t, W>(), c);
    for (; i < size; i += W) add(i, std::min(W, size - i), 0);
    const T mean = sum_lanes<T>(sums[0] + sums[1]) / static_cast<T>(size);
    return {rstd, mean, sum_lanes<T>(sums_of_products[0] + sums_of_products[1]) / static_cast<T>(size)};
  }

  inline Vec<T> of_elements(Vec<T> d, Vec<T> norm) const { return (d - mean - norm * mean_of_products) * rstd; }
};

// The gradient of a row of products from that of gain * norm.
template <class T>
void denormalize_gradient(const T* d, const T* norm, T rstd, const T* gain, int64_t size, T* out) {
  const NormGradient<T> gradient = NormGradient<T>::of_row(d, norm, gain, rstd, size);
  for_each_vector<T>(size, [&](int64_t i, auto n) {
    const Vec<T> scaled = load_first(gain + i, n) * load_first(d + i, n);
    store_first(out + i, gradient.of_elements(scaled, load_first(norm + i, n)), n);
  });
}

template <class T>
void add_column_sums(const T* left, int64_t stride, const int64_t* rows, int64_t K, Range columns,
                     const std::vector<ColumnSums<T>>& sums, bool accumulate) {
  constexpr int64_t kAtOnce = 1024;  // columns whose sums and whose part of a row of `left` stay in the nearest cache
  constexpr int64_t kRows = 4;       // that a pass over the sums adds, one after the other
  for (int64_t first = columns.begin; first < columns.end; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, columns.end - first);
    const auto offset = [&](int64_t k) { return (rows ? rows[k] : k) * stride + first; };
    for (int64_t begin = 0; begin < std::max<int64_t>(K, 1); begin += kDepth) {
      T chains[kMostColumnSums][kAtOnce] = {};
      const int64_t end = std::min(begin + kDepth, K);
      const auto add_rows = [&](int64_t k, auto added) {
        int64_t at[kRows];
        for (int64_t r = 0; r < added; ++r) at[r] = offset(k + r);
        // No more than the next row is brought closer, bit by bit: parts of rows that lie a power of two apart share
        // the sets of a cache.
        const int64_t next = offset(std::min(k + added, K - 1));
        for (size_t s = 0; s < sums.size(); ++s) {
          T* const chain = chains[s];
          const T* const right = sums[s].right;
          const T* const upcoming = (right ? right : left) + next;
          for_each_vector<T>(count, [&](int64_t i, auto n) {
            __builtin_prefetch(upcoming + i);
            Vec<T> sum = load_first(chain + i, n);
            for (int64_t r = 0; r < added; ++r) {
              const Vec<T> one = load_first(left + at[r] + i, n);
              sum = right ? fma(one, load_first(right + at[r] + i, n), sum) : sum + one;
            }
            store_first(chain + i, sum, n);
          });
        }
      };
      int64_t k = begin;
      for (; k + kRows <= end; k += kRows) add_rows(k, std::integral_constant<int64_t, kRows>());
      for (; k < end; ++k) add_rows(k, std::integral_constant<int64_t, 1>());
      for (size_t s = 0; s < sums.size(); ++s) {
        if (accumulate || begin > 0)
          add_row(chains[s], count, sums[s].out + first);
        else
          std::copy_n(chains[s], count, sums[s].out + first);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- forward

// The pre-activations of n adjacent units of one row, of its normalised products. `bias` is packed.
template <class T>
inline __attribute__((always_inline)) void normalized_gates(const T* bias, const LayerNorm<const T>& norm,
                                                            const T* norm_ih, const T* norm_hh, int64_t H, int64_t unit,
                                                            int64_t n, Vec<T> (&gate)[kGates]) {
  constexpr int W = kLanes<T>;
  for (int g = 0; g < kGates; ++g) {
    const int64_t at = g * H + unit;
    gate[g] = load(bias + (unit / W * kGates + g) * W);
    gate[g] = fma(load_first(norm.gain_ih + at, n), load_first(norm_ih + at, n), gate[g]);
    gate[g] = fma(load_first(norm.gain_hh + at, n), load_first(norm_hh + at, n), gate[g]);
  }
}

template <class T, class A>
void forward_recurrent(const ForwardTask<T, A>& task, GateProduct product, int64_t t, Range rows, Range panels,
                       A* buffer) {
  const int64_t columns = kGates * task.H;
  T* const products = task.products_hh.at(*task.schedule, t);
  for_each_segment(task, t, rows, [&](Range segment, const A* h, int64_t h_stride) {
    const int64_t count = segment.end - segment.begin;
    T* const out = products + segment.begin * columns;
    if constexpr (kFullPrecision<T, A>)
      if (product == GateProduct::kUnpacked) {
        const Range range = {panels.begin * 2 * kLanes<T>, std::min(panels.end * 2 * kLanes<T>, columns)};
        multiply_dots(h, h_stride, count, task.w_hh, task.P, range, out, columns);
        return;
      }
    multiply_rows(h, h_stride, {0, count}, task.packed, terms<A>(task.P), columns, panels, out, columns, false, buffer);
  });
}

template <class T, class A>
void forward_normalized(const ForwardTask<T, A>& task, int64_t t, Range rows) {
  const int64_t H = task.H, columns = kGates * H, offset = task.schedule->offsets[t];
  rows.end = std::min(rows.end, task.schedule->active(t));
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const int64_t row = offset + b;
    const T* const norm_ih = task.gates_x + (row - task.first) * columns;
    T* const norm_hh = task.products_hh.at(*task.schedule, t) + b * columns;
    const T rstd = normalize_row(norm_hh, columns);
    if (task.rstd_hh) task.rstd_hh[row] = rstd;
    T* const o = task.new_states + b * 2 * H;
    T* const c = o + H;
    for_each_vector<T>(H, [&](int64_t unit, auto n) {
      Vec<T> gate[kGates];
      normalized_gates(task.bias, task.norm, norm_ih, norm_hh, H, unit, n, gate);
      store_first(c + unit, advance_cell(task, row, b, unit, n, gate), n);
      store_first(o + unit, gate[3], n);
    });
    normalize_row(c, H);
    for_each_vector<T>(H, [&](int64_t unit, auto n) {
      const Vec<T> m =
          fma(load_first(task.norm.gain_c + unit, n), load_first(c + unit, n), load_first(task.norm.bias_c + unit, n));
      put_unprojected(task, t, b, unit, n, cell_output<VecMath<T>>(load_first(o + unit, n), m));
    });
  }
}

// ---------------------------------------------------------------------------------------------- backward

template <class T, class A>
void backward_normalized(const BackwardTask<T, A>& task, int64_t t, Range rows) {
  const int64_t H = task.H, columns = kGates * H, offset = task.schedule->offsets[t];
  const LayerNorm<const T>& norm = task.norm;
  rows.end = std::min(rows.end, task.schedule->active(t));
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const int64_t row = offset + b, saved_row = row - task.gates_first, own_row = row - task.first;
    const T* const norm_ih = task.norm_ih + saved_row * columns;
    const T* const norm_hh = task.norm_hh + saved_row * columns;
    const T* const c_prev = previous_cells(task, t, b);
    T* const d_gates = task.d_gates + own_row * columns;  // activations, until they become gradients
    T* const norm_c = task.norm_c + own_row * H;
    T* const d_norm_c = task.d_norm_c + own_row * H;

    for_each_vector<T>(H, [&](int64_t unit, auto n) {
      Vec<T> gate[kGates], c = load_first(c_prev + unit, n);
      normalized_gates(task.bias, norm, norm_ih, norm_hh, H, unit, n, gate);
      cell_state<VecMath<T>>(gate[0], gate[1], gate[2], gate[3], c);
      for (int g = 0; g < kGates; ++g) store_first(d_gates + g * H + unit, gate[g], n);
      store_first(norm_c + unit, c, n);
    });
    const T rstd_c = normalize_row(norm_c, H);
    for_each_vector<T>(H, [&](int64_t unit, auto n) {
      const Vec<T> m =
          fma(load_first(norm.gain_c + unit, n), load_first(norm_c + unit, n), load_first(norm.bias_c + unit, n));
      Vec<T> o = load_first(d_gates + 3 * H + unit, n);
      if (task.hidden) store_first(task.hidden + own_row * H + unit, cell_output<VecMath<T>>(o, m), n);
      const Vec<T> d_m = cell_output_backward<VecMath<T>>(o, m, output_gradient(task, row, b, unit, n));
      store_first(d_norm_c + unit, d_m, n);
      store_first(d_gates + 3 * H + unit, o, n);
    });
    const NormGradient<T> of_c = NormGradient<T>::of_row(d_norm_c, norm_c, norm.gain_c, rstd_c, H);
    for_each_vector<T>(H, [&](int64_t unit, auto n) {
      Vec<T> gate[3], kept_d_c, d_c = state_gradient(task, row, b, unit, n, kept_d_c);
      for (int g = 0; g < 3; ++g) gate[g] = load_first(d_gates + g * H + unit, n);
      const Vec<T> scaled = load_first(norm.gain_c + unit, n) * load_first(d_norm_c + unit, n);
      d_c = d_c + of_c.of_elements(scaled, load_first(norm_c + unit, n));
      cell_state_backward(gate[0], gate[1], gate[2], load_first(c_prev + unit, n), d_c);
      for (int g = 0; g < 3; ++g) store_first(d_gates + g * H + unit, gate[g], n);
      store_first(task.d_c + b * H + unit, d_c + kept_d_c, n);
    });
    T* const d_products = task.d_products_hh + own_row * columns;
    denormalize_gradient<T>(d_gates, norm_ih, task.rstd_ih[saved_row], norm.gain_ih, columns,
                            task.d_products_ih + own_row * columns);
    denormalize_gradient<T>(d_gates, norm_hh, task.rstd_hh[saved_row], norm.gain_hh, columns, d_products);
    if constexpr (!kFullPrecision<T, A>) {
      const StepRows<A>& rounded = task.d_gates_terms;
      round_rows(d_products, 1, columns, rounded.at(*task.schedule, t) + b * rounded.stride);
    }
    cut_state_gradient(task, t, b, {0, H});
  }
}
