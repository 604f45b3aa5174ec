// The stepwise family, which takes every legal problem: the recurrent products of a step are a library's, and these
// kernels do what lies between them. Called by the driver for one direction of one layer.
#include "elementwise.cuh"
#include "launchers.h"

namespace fastlstm::cuda {

namespace {

template <class E, int V>
__global__ void __launch_bounds__(kThreads) states_forward(const StepForwardParams p) {
  const Place x = own_place<V>(p.hidden);  // P <= H
  typename E::Compute state[V];
  if (x.i < p.hidden) {
    const int64_t at = x.in_rows_of(p.hidden);
    load<E>(p.run.c_0, at, state);
    store_state<E>(p.c, at, state);
    store<E>(p.run.c_n, at, state);
  }
  if (x.i >= p.outputs) return;
  const int64_t at = x.in_rows_of(p.outputs);
  load<E>(p.run.h_0, at, state);
  store<E>(p.run.h_n, at, state);
  if (p.kept_h != nullptr) store_state<E>(p.kept_h, at, state);
  const int length = length_of(p.sequences, x.b), t = time_of(p, 0);
  if (t < length && Order{p.run.reverse}.restarts(p.sequences, t, x.b, length))
    load_or_clear<E>(p.extras.reset_h, at, state);
  multiply_by<E>(p.extras.recurrent_mask, at, state);
  store<E>(p.h, x.in_rows_of(p.h_stride), state);
}

// Steps with extras need the registers of 2 blocks per SM, at float64 with more blocks they would spill; without, the
// compiler decides.
template <class E, int V, bool kExtras>
__global__ void __launch_bounds__(kThreads, kExtras ? 2 : 0) cells_forward(const StepForwardParams p) {
  const Place x = own_place<V>(p.hidden);
  if (x.i >= p.hidden) return;
  ForwardCells<E, V, kExtras> cells(p, x);
  if (!cells.has_step()) return;
  typename E::Compute product[kGates][V];
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate)
    load<E>(p.product, (static_cast<int64_t>(x.b) * kGates + gate) * p.hidden + x.i, product[gate]);
  cells.finish(product);
}

template <class E, int V, bool kExtras>
__global__ void __launch_bounds__(kThreads) outputs_forward(const StepForwardParams p) {
  const Place x = own_place<V>(p.outputs);
  if (x.i >= p.outputs || time_of(p, p.n) >= length_of(p.sequences, x.b)) return;
  typename E::Compute h[V];
  load<E>(p.projected, x.in_rows_of(p.outputs), h);
  put_out<E, kExtras>(p, x, h);
}

template <class E, int V>
__device__ __forceinline__ void put_state(const void* given, void* to, int64_t at) {
  typename E::Compute state[V];
  load_or_clear<E>(given, at, state);
  store_state<E>(to, at, state);
}
template <class E, int V>
__global__ void __launch_bounds__(kThreads) states_backward(const StepBackwardParams p) {
  const Place x = own_place<V>(p.hidden);
  if (x.i < p.hidden) put_state<E, V>(p.run.d_c_n, p.d_c, x.in_rows_of(p.hidden));
  if (x.i < p.outputs) put_state<E, V>(p.run.d_h_n, p.d_h, x.in_rows_of(p.outputs));
}

template <class E, int V, bool kExtras>
__global__ void __launch_bounds__(kThreads) outputs_backward(const StepBackwardParams p) {
  const Place x = own_place<V>(p.outputs);
  if (x.i >= p.outputs) return;
  typename E::Compute d_h[V];
  carry_product<E, kExtras>(p, x, d_h);
  const int t = time_of(p, p.n);
  if (t >= length_of(p.sequences, x.b)) return;
  add_d_y<E>(p, x, d_h);
  if constexpr (kExtras) put_kept_aside<E>(p, x, d_h);
  store<E>(p.d_outputs, row_of(p.sequences, t, x.b) * p.outputs + x.i, d_h);
}

template <class E, int V, bool kExtras>
__global__ void __launch_bounds__(kThreads) cells_backward(const StepBackwardParams p) {
  using Cells = BackwardCells<E, V, kExtras>;
  const Place x = own_place<V>(p.hidden);
  if (x.i >= p.hidden) return;
  typename E::Compute d_h[V];
  if (p.d_hidden == nullptr) carry_product<E, kExtras>(p, x, d_h);
  Cells cells(p, x);
  if (!cells.has_step()) return;
  complete<E, kExtras>(p, x, d_h);
  typename Cells::Gradients d_gates;
  cells.finish(d_h, d_gates);
}

template <class E, int V>
__global__ void __launch_bounds__(kThreads) finish_backward(const StepBackwardParams p) {
  const Place x = own_place<V>(p.hidden);
  if (x.i < p.outputs) {
    typename E::Compute d_h[V];
    carry_product<E, true>(p, x, d_h);
    put_initial_d_h<E>(p, x, d_h);
  }
  if (x.i < p.hidden) put_initial_d_c<E, V>(p, x);
}

template <class E, int V>
__global__ void __launch_bounds__(kThreads) previous_outputs(const PreviousOutputsParams p) {
  const Sequences& s = p.sequences;
  const Place place = own_place<V>(p.outputs);  // of rows [T, B]
  const int i = place.i, t = place.b / s.batch, b = place.b - t * s.batch;
  if (i >= p.outputs) return;
  const int length = length_of(s, b);
  const bool has_step = t < length;
  if (!has_step && s.offsets != nullptr) return;  // there is no such row
  const Order order = {p.reverse};
  const int64_t at = static_cast<int64_t>(b) * p.outputs + i;
  typename E::Compute h[V];
  if (!has_step)
    clear(h);
  else if (order.restarts(s, t, b, length))
    load_or_clear<E>(p.reset_h, at, h);
  else if (order.first(t, length))
    load<E>(p.h_0, at, h);
  else
    load<E>(p.y, row_of(s, p.reverse ? t + 1 : t - 1, b) * p.y_stride + i, h);
  if (has_step) multiply_by<E>(p.recurrent_mask, at, h);
  store<E>(p.previous, row_of(s, t, b) * p.outputs + i, h);
}

template <class E, int V>
__global__ void __launch_bounds__(kThreads) activate_gates(const ActivateGatesParams p) {
  const Place x = own_place<V>(p.hidden);  // of rows [N]
  if (x.i >= p.hidden) return;
  const int64_t row = x.in_rows_of(kGates * p.hidden);
  typename E::Compute a[kGates][V], unused_c[V] = {};
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) {
    load<E>(p.gates, row + gate * p.hidden, a[gate]);
    for (const void* bias : {p.b_ih, p.b_hh}) {
      typename E::Compute b[V];
      load_or_clear<E>(bias, static_cast<int64_t>(gate) * p.hidden + x.i, b);
#pragma unroll
      for (int v = 0; v < V; ++v) a[gate][v] += b[v];
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) cell_state<typename E::Math>(a[0][v], a[1][v], a[2][v], a[3][v], unused_c[v]);
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) store<E>(p.gates, row + gate * p.hidden, a[gate]);
}

// f.operator()<E, V, kExtras>(), of the parameters of a step: where it has extras, elements are taken one by one.
template <class Params, class F>
cudaError_t with_step(Element element, const Params& p, const F& f) {
  if (p.has_extras) return with_element(element, [&]<class E>(E) { return f.template operator()<E, 1, true>(); });
  return with_vectors(element, p.vectors, [&]<class E, int V>() { return f.template operator()<E, V, false>(); });
}

}  // namespace

cudaError_t launch_states_forward(Element element, const StepForwardParams& p, cudaStream_t stream) {
  return with_vectors(element, p.vectors, [&]<class E, int V>() {
    return launch_rows<V>(&states_forward<E, V>, p, p.sequences.batch, p.hidden, stream);
  });
}
cudaError_t launch_cells_forward(Element element, const StepForwardParams& p, cudaStream_t stream) {
  return with_step(element, p, [&]<class E, int V, bool kExtras>() {
    return launch_rows<V>(&cells_forward<E, V, kExtras>, p, p.sequences.batch, p.hidden, stream);
  });
}
cudaError_t launch_outputs_forward(Element element, const StepForwardParams& p, cudaStream_t stream) {
  return with_step(element, p, [&]<class E, int V, bool kExtras>() {
    return launch_rows<V>(&outputs_forward<E, V, kExtras>, p, p.sequences.batch, p.outputs, stream);
  });
}
cudaError_t launch_states_backward(Element element, const StepBackwardParams& p, cudaStream_t stream) {
  return with_vectors(element, p.vectors, [&]<class E, int V>() {
    return launch_rows<V>(&states_backward<E, V>, p, p.sequences.batch, p.hidden, stream);
  });
}
cudaError_t launch_outputs_backward(Element element, const StepBackwardParams& p, cudaStream_t stream) {
  return with_step(element, p, [&]<class E, int V, bool kExtras>() {
    return launch_rows<V>(&outputs_backward<E, V, kExtras>, p, p.sequences.batch, p.outputs, stream);
  });
}
cudaError_t launch_cells_backward(Element element, const StepBackwardParams& p, cudaStream_t stream) {
  return with_step(element, p, [&]<class E, int V, bool kExtras>() {
    return launch_rows<V>(&cells_backward<E, V, kExtras>, p, p.sequences.batch, p.hidden, stream);
  });
}
cudaError_t launch_finish_backward(Element element, const StepBackwardParams& p, cudaStream_t stream) {
  return with_vectors(element, p.vectors, [&]<class E, int V>() {
    return launch_rows<V>(&finish_backward<E, V>, p, p.sequences.batch, p.hidden, stream);
  });
}
cudaError_t launch_activate_gates(Element element, const ActivateGatesParams& p, cudaStream_t stream) {
  return with_vectors(element, p.vectors, [&]<class E, int V>() {
    return launch_rows<V>(&activate_gates<E, V>, p, p.rows, p.hidden, stream);
  });
}
cudaError_t launch_previous_outputs(Element element, const PreviousOutputsParams& p, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(p.sequences.steps) * p.sequences.batch;
  return with_vectors(element, p.vectors, [&]<class E, int V>() {
    return launch_rows<V>(&previous_outputs<E, V>, p, rows, p.outputs, stream);
  });
}

}  // namespace fastlstm::cuda
