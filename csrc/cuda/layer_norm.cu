// Layer-normalised gates, whose equations stand in ../cpu/layer_norm.inl, for the stepwise family: the products are a
// library's, and these kernels do what lies between them.
//
// A block has a row of the batch: a norm takes all of it, in one order whatever the size of the batch. Of a row of
// units, a thread has every block_threads()-th one, with all four gates: what it leaves in memory for its next turn,
// behind a sum over the row, nobody else reads. (Kernels may have other numbers of threads: norms that are made again
// can differ in their last bits.)
#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.cuh"
#include "launchers.h"
#include "step_cells.cuh"

namespace fastlstm::cuda {

namespace {

constexpr int kThreads = 512;  // of a block at most
constexpr int kMostSums = 6;   // values that a block sums: in normalized_cells_backward, three times two

// The sums over a block of what its threads have. Each call has its own place in shared memory, so that one barrier
// is enough.
template <class T>
class BlockSums {
 public:
  __device__ __forceinline__ BlockSums() : place_(reinterpret_cast<T*>(shared_memory())) {}

  // All threads get the sums, of the same bits.
  template <int Count>
  __device__ __forceinline__ void operator()(T (&values)[Count]) {
    const int lane = thread_index() % kWarpThreads, warps = block_threads() / kWarpThreads;
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < Count; ++i) values[i] += warp_shuffle(values[i], lane ^ distance);
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < Count; ++i) place_[thread_index() / kWarpThreads * Count + i] = values[i];
    }
    block_barrier();
    clear(values);
    for (int warp = 0; warp < warps; ++warp)
#pragma unroll
      for (int i = 0; i < Count; ++i) values[i] += place_[warp * Count + i];
    place_ += warps * Count;
  }

 private:
  T* place_;
};

// f(i) for this thread's elements of a row.
template <class F>
__device__ __forceinline__ void for_own(int width, const F& f) {
  for (int i = thread_index(); i < width; i += block_threads()) f(i);
}

// How a row is normalised.
template <class T>
struct Norm {
  T mean, rstd;

  __device__ __forceinline__ T of(T x) const { return (x - mean) * rstd; }
};
template <class T, class F>
__device__ __forceinline__ Norm<T> norm_of(BlockSums<T>& sums, int width, const F& element) {
  T sum[1] = {}, squares[1] = {};
  for_own(width, [&](int i) { sum[0] += element(i); });
  sums(sum);
  const T mean = sum[0] / T(width);
  for_own(width, [&](int i) {
    const T deviation = element(i) - mean;
    squares[0] += deviation * deviation;
  });
  sums(squares);
  return {mean, T(1) / std::sqrt(squares[0] / T(width) + T(kNormEpsilon))};
}

// The way back: from the gradient d of a normalised row, the gradients of its elements.
template <class T>
struct NormGradient {
  T rstd, mean, mean_of_products;  // of d, and of d times the normalised elements

  __device__ __forceinline__ T of(T d, T norm) const { return (d - mean - norm * mean_of_products) * rstd; }
};

template <class E>
__device__ __forceinline__ typename E::Compute load_one(const void* from, int64_t at) {
  typename E::Compute value[1];
  load<E>(from, at, value);
  return value[0];
}
template <class E>
__device__ __forceinline__ void store_one(void* to, int64_t at, typename E::Compute value) {
  const typename E::Compute values[1] = {value};
  store<E>(to, at, values);
}

// A row of gradients of gain * norm, of all gates, becomes one of gradients of the products that were normalised.
// `first`: of the row's elements.
template <class E>
__device__ __forceinline__ void through_norm(BlockSums<typename E::Compute>& sums, int width, int64_t first,
                                             const void* d, const void* gain, const void* norm,
                                             typename E::Compute rstd, void* to) {
  using T = typename E::Compute;
  const auto scaled = [&](int i) { return load_one<E>(gain, i) * load_one<E>(d, first + i); };
  T sum[2] = {};
  for_own(width, [&](int i) {
    const T d_norm = scaled(i);
    sum[0] += d_norm;
    sum[1] += d_norm * load_one<E>(norm, first + i);
  });
  sums(sum);
  const NormGradient<T> gradient = {rstd, sum[0] / T(width), sum[1] / T(width)};
  for_own(width, [&](int i) { store_one<E>(to, first + i, gradient.of(scaled(i), load_one<E>(norm, first + i))); });
}

// The pre-activations of a unit. norm_ih, norm_hh: of the products of its gates.
template <class E>
__device__ __forceinline__ void pre_activations(const NormWeights& weights, int hidden, int unit,
                                                const typename E::Compute (&norm_ih)[kGates],
                                                const typename E::Compute (&norm_hh)[kGates],
                                                typename E::Compute (&a)[kGates][1]) {
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) {
    const int64_t at = static_cast<int64_t>(gate) * hidden + unit;
    a[gate][0] = load_one<E>(weights.gain_ih, at) * norm_ih[gate] + load_one<E>(weights.gain_hh, at) * norm_hh[gate];
    if (weights.b_ih != nullptr) a[gate][0] += load_one<E>(weights.b_ih, at) + load_one<E>(weights.b_hh, at);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) normalize_rows(const NormalizeRowsParams p) {
  using T = typename E::Compute;
  const int64_t row = block_index(), first = row * p.width;
  BlockSums<T> sums;
  const Norm<T> norm = norm_of(sums, p.width, [&](int i) { return load_one<E>(p.rows, first + i); });
  for_own(p.width, [&](int i) { store_one<E>(p.rows, first + i, norm.of(load_one<E>(p.rows, first + i))); });
  if (p.rstd != nullptr && thread_index() == 0) store_one<Full<T>>(p.rstd, row, norm.rstd);
}

template <class E>
__global__ void __launch_bounds__(kThreads, 1) normalized_cells_forward(const NormalizedForwardParams p) {
  using T = typename E::Compute;
  const int b = block_index(), H = p.hidden;
  if (time_of(p, p.n) >= length_of(p.sequences, b)) return;
  BlockSums<T> sums;
  const int64_t first = static_cast<int64_t>(b) * kGates * H;
  const auto product = [&](int i) { return load_one<E>(p.product, first + i); };
  const Norm<T> norm_hh = norm_of(sums, kGates * H, product);
  const int64_t row = row_of(p.sequences, time_of(p, p.n), b);
  if (p.rstd_hh != nullptr && thread_index() == 0) store_one<Full<T>>(p.rstd_hh, row, norm_hh.rstd);

  T* const c = static_cast<T*>(p.between) + static_cast<int64_t>(b) * 2 * H;
  T* const o = c + H;
  for_own(H, [&](int unit) {
    ForwardCells<E, 1, true> cells(p, {b, unit});
    T of_x[kGates], of_h[kGates], a[kGates][1], made[1];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      of_x[gate] = load_one<E>(p.run.gates_x, cells.of_gate(gate));
      of_h[gate] = norm_hh.of(product(gate * H + unit));
      if (p.norm_hh != nullptr) store_one<E>(p.norm_hh, cells.of_gate(gate), of_h[gate]);
    }
    pre_activations<E>(p.norm, H, unit, of_x, of_h, a);
    cells.advance(a, made);
    c[unit] = made[0];
    o[unit] = a[3][0];
  });
  const Norm<T> norm_c = norm_of(sums, H, [&](int unit) { return c[unit]; });
  for_own(H, [&](int unit) {
    const T m = load_one<E>(p.norm.gain_c, unit) * norm_c.of(c[unit]) + load_one<E>(p.norm.bias_c, unit);
    T h[1] = {cell_output<typename E::Math>(o[unit], m)};
    put_unprojected<E, true>(p, {b, unit}, h);
  });
}

template <class E>
__global__ void __launch_bounds__(kThreads, 1) normalized_cells_backward(const NormalizedBackwardParams p) {
  using T = typename E::Compute;
  using Cells = BackwardCells<E, 1, true>;
  const int b = block_index(), H = p.hidden, t = time_of(p, p.n);
  const bool has_step = t < length_of(p.sequences, b);
  BlockSums<T> sums;
  // First c_t and the gradient of h_t, then what becomes of them: normalised c_t, and its gradient.
  T* const c = static_cast<T*>(p.between) + static_cast<int64_t>(b) * 2 * H;
  T* const d = c + H;
  for_own(H, [&](int unit) {
    const Place place = {b, unit};
    T d_h[1];
    if (p.d_hidden == nullptr) carry_product<E, true>(p, place, d_h);
    if (!has_step) return;
    complete<E, true>(p, place, d_h);
    Cells cells(p, place);
    typename Cells::Gradients activations;
    cells.begin(activations);
    c[unit] = cells.c()[0];
    d[unit] = d_h[0];
  });
  if (!has_step) return;

  const int64_t row = row_of(p.sequences, t, b), of_gates = row * kGates * H, of_output_gates = of_gates + 3 * H;
  const Norm<T> norm_c = norm_of(sums, H, [&](int unit) { return c[unit]; });
  T sum[2] = {};
  for_own(H, [&](int unit) {
    const T gain = load_one<E>(p.norm.gain_c, unit), norm = norm_c.of(c[unit]);
    const T m = gain * norm + load_one<E>(p.norm.bias_c, unit);
    T o = load_one<E>(p.run.gates, of_output_gates + unit);
    if (p.hidden_states != nullptr) store_one<E>(p.hidden_states, row * H + unit, cell_output<typename E::Math>(o, m));
    const T d_m = cell_output_backward<typename E::Math>(o, m, d[unit]);
    store_one<E>(p.run.d_gates, of_output_gates + unit, o);
    store_one<E>(p.norm_c, row * H + unit, norm);
    store_one<E>(p.d_norm_c, row * H + unit, d_m);
    c[unit] = norm;
    d[unit] = gain * d_m;
    sum[0] += d[unit];
    sum[1] += d[unit] * norm;
  });
  sums(sum);
  const NormGradient<T> of_c = {norm_c.rstd, sum[0] / T(H), sum[1] / T(H)};
  for_own(H, [&](int unit) {
    Cells cells(p, {b, unit});
    typename Cells::Gradients g;
    cells.begin(g);
    const T d_c[1] = {of_c.of(d[unit], c[unit])};
    cells.to_state(d_c, g);
    load<E>(p.run.d_gates, of_output_gates + unit, g[3]);
    cells.put(g);
  });
  block_barrier();  // from here on, elements of rows are divided without regard to units
  through_norm<E>(sums, kGates * H, of_gates, p.run.d_gates, p.norm.gain_hh, p.norm_hh,
                  load_one<Full<T>>(p.rstd_hh, row), p.d_products_hh);
}

// Gradients of pre-activations become those of the products with x. A block has a row of [T, B].
template <class E>
__global__ void __launch_bounds__(kThreads) denormalize_rows(const DenormalizeRowsParams p) {
  using T = typename E::Compute;
  const Sequences& s = p.sequences;
  const int t = block_index() / s.batch, b = block_index() - t * s.batch;
  if (t >= length_of(s, b)) return;
  const int64_t row = row_of(s, t, b);
  BlockSums<T> sums;
  through_norm<E>(sums, p.width, row * p.width, p.rows, p.gain, p.norm, load_one<Full<T>>(p.rstd, row), p.rows);
}

template <class E>
__global__ void __launch_bounds__(kThreads) activate_normalized(const ActivateNormalizedParams p) {
  using T = typename E::Compute;
  const int64_t first = static_cast<int64_t>(block_index()) * kGates * p.hidden;
  for_own(p.hidden, [&](int unit) {
    T of_x[kGates], of_h[kGates], a[kGates][1], unused_c = 0;
    const auto at = [&](int gate) { return first + static_cast<int64_t>(gate) * p.hidden + unit; };
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      of_x[gate] = load_one<E>(p.norm_ih, at(gate));
      of_h[gate] = load_one<E>(p.norm_hh, at(gate));
    }
    pre_activations<E>(p.norm, p.hidden, unit, of_x, of_h, a);
    cell_state<typename E::Math>(a[0][0], a[1][0], a[2][0], a[3][0], unused_c);
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) store<E>(p.activations, at(gate), a[gate]);
  });
}

// A block for each row, with a thread for each of `width` elements if there can be so many.
template <class E, class Params>
cudaError_t launch_row_blocks(void (*kernel)(Params), const Params& params, int64_t rows, int width,
                              cudaStream_t stream) {
  if (rows > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  const int threads = std::min(kThreads, ceil_div(width, kWarpThreads) * kWarpThreads);
  const size_t shared_bytes = kMostSums * (threads / kWarpThreads) * sizeof(typename E::Compute);
  return launch(kernel, {static_cast<int>(rows), threads, shared_bytes, false}, stream, params);
}

}  // namespace

cudaError_t launch_normalize_rows(Element element, const NormalizeRowsParams& p, cudaStream_t stream) {
  return with_element(
      element, [&]<class E>(E) { return launch_row_blocks<E>(&normalize_rows<E>, p, p.count, p.width, stream); });
}
cudaError_t launch_normalized_cells_forward(Element element, const NormalizedForwardParams& p, cudaStream_t stream) {
  return with_element(element, [&]<class E>(E) {
    return launch_row_blocks<E>(&normalized_cells_forward<E>, p, p.sequences.batch, p.hidden, stream);
  });
}
cudaError_t launch_normalized_cells_backward(Element element, const NormalizedBackwardParams& p, cudaStream_t stream) {
  return with_element(element, [&]<class E>(E) {
    return launch_row_blocks<E>(&normalized_cells_backward<E>, p, p.sequences.batch, p.hidden, stream);
  });
}
cudaError_t launch_denormalize_rows(Element element, const DenormalizeRowsParams& p, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(p.sequences.steps) * p.sequences.batch;
  return with_element(element,
                      [&]<class E>(E) { return launch_row_blocks<E>(&denormalize_rows<E>, p, rows, p.width, stream); });
}
cudaError_t launch_activate_normalized(Element element, const ActivateNormalizedParams& p, cudaStream_t stream) {
  return with_element(
      element, [&]<class E>(E) { return launch_row_blocks<E>(&activate_normalized<E>, p, p.rows, p.hidden, stream); });
}

}  // namespace fastlstm::cuda
