// What joins a recurrence that has folded the projection W_hr into its recurrent weights with what the layer reads and
// puts out. It multiplies W_hh W_hr and has h_t before the projection ("hidden states"), so all that it knows of the
// layer's outputs y_t = W_hr h_t are these kernels and products over all steps.
#include <type_traits>

#include "elementwise.cuh"
#include "launchers.h"

namespace fastlstm::cuda {

namespace {

// An element of a step of a column.
struct StepPlace {
  int t, b, i, length;
  int64_t row;

  __device__ __forceinline__ bool has_step() const { return t < length; }
  // Padding has rows without steps.
  __device__ __forceinline__ bool has_row(const Sequences& s) const { return has_step() || s.offsets == nullptr; }
};

// This thread's, of rows of `width` elements: of steps begin, begin + 1, ... in time, all columns of the batch.
template <int V>
__device__ __forceinline__ StepPlace own_step(const Sequences& s, int begin, int width) {
  const Place place = own_place<V>(width);
  const int step = place.b / s.batch, b = place.b - step * s.batch, t = begin + step, length = length_of(s, b);
  return {t, b, place.i, length, t < length || s.offsets == nullptr ? row_of(s, t, b) : 0};
}

template <class E, int V>
__global__ void __launch_bounds__(kThreads) add_first_products(const FirstProductsParams p) {
  const Place x = own_place<V>(p.width);
  const Order order = {p.reverse};
  const int length = length_of(p.sequences, x.b), t = p.reverse ? length - 1 : 0;
  if (x.i >= p.width || length == 0 || t < p.begin || t >= p.end || order.restarts(p.sequences, t, x.b, length)) return;
  const int64_t at = row_of(p.sequences, t, x.b) * p.width + x.i;
  typename E::Compute sum[V], product[V];
  load<E>(p.gates_x, at, sum);
  load<E>(p.products, x.in_rows_of(p.width), product);
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] += product[v];
  store<E>(p.gates_x, at, sum);
}

template <class E, int V>
__global__ void __launch_bounds__(kThreads) final_outputs(const FinalOutputsParams p) {
  const Place x = own_place<V>(p.outputs);
  if (x.i >= p.outputs) return;
  const int length = length_of(p.sequences, x.b);
  typename E::Compute h[V];
  if (length == 0)
    load<E>(p.h_0, x.in_rows_of(p.outputs), h);
  else
    load<E>(p.y, row_of(p.sequences, p.reverse ? 0 : length - 1, x.b) * p.y_stride + x.i, h);
  store<E>(p.h_n, x.in_rows_of(p.outputs), h);
}

template <class E, int V>
__global__ void __launch_bounds__(kThreads) given_gradients(const GivenGradientsParams p) {
  const StepPlace x = own_step<V>(p.sequences, p.begin, p.outputs);
  if (x.i >= p.outputs || !x.has_step()) return;
  typename E::Compute d_h[V], d_h_n[V];
  load_or_clear<E>(p.d_y, p.d_y != nullptr ? x.row * p.y_stride + x.i : 0, d_h);
  if (Order{p.reverse}.last(x.t, x.length)) {
    load_or_clear<E>(p.d_h_n, static_cast<int64_t>(x.b) * p.outputs + x.i, d_h_n);
#pragma unroll
    for (int v = 0; v < V; ++v) d_h[v] += d_h_n[v];
  }
  store<E>(p.d_outputs, x.row * p.outputs + x.i, d_h);
}

template <class E, int V>
__global__ void __launch_bounds__(kThreads) carried_gradients(const CarriedGradientsParams p) {
  const Sequences& s = p.sequences;
  const StepPlace x = own_step<V>(s, 0, p.outputs);
  if (x.i >= p.outputs) return;
  const Order order = {p.reverse};
  const int64_t initial = static_cast<int64_t>(x.b) * p.outputs + x.i;
  typename E::Compute d_h[V], product[V];
  if (x.has_step() && !order.last(x.t, x.length)) {
    const int next = p.reverse ? x.t - 1 : x.t + 1;
    if (!order.restarts(s, next, x.b, x.length)) {
      load<E>(p.d_outputs, x.row * p.outputs + x.i, d_h);
      load<E>(p.products, row_of(s, next, x.b) * p.outputs + x.i, product);
#pragma unroll
      for (int v = 0; v < V; ++v) d_h[v] += product[v];
      store<E>(p.d_outputs, x.row * p.outputs + x.i, d_h);
    }
  }
  if (p.d_h_0 == nullptr) return;
  if (x.length == 0 && x.t == 0) {  // what it was is what it is
    load_or_clear<E>(p.d_h_n, initial, d_h);
    store<E>(p.d_h_0, initial, d_h);
  } else if (x.has_step() && order.first(x.t, x.length)) {
    if (order.restarts(s, x.t, x.b, x.length))
      clear(product);
    else
      load<E>(p.products, x.row * p.outputs + x.i, product);
    store<E>(p.d_h_0, initial, product);
  }
}

template <class E, int V>
__global__ void __launch_bounds__(kThreads) hidden_states(const HiddenStatesParams p) {
  const StepPlace x = own_step<V>(p.sequences, 0, p.hidden);
  if (x.i >= p.hidden || !x.has_row(p.sequences)) return;
  typename E::Compute o[V], c[V], h[V];
  if (x.has_step()) {
    load<E>(p.gates, (x.row * kGates + 3) * p.hidden + x.i, o);
    load_state<E>(p.cells, x.row * p.hidden + x.i, c);
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = cell_output<typename E::Math>(o[v], c[v]);
  } else {
    clear(h);
  }
  store<E>(p.hidden_states, x.row * p.hidden + x.i, h);
}

// f.operator()<E, V>(), of the elements that such a recurrence multiplies.
template <class F>
cudaError_t with_multiplied(Element element, bool vectors, const F& f) {
  return with_mma_element(element, [&]<class Factor>(Factor) {
    using E = std::conditional_t<sizeof(typename Factor::Storage) == 4, Full<float>, Factor>;
    return vectors ? f.template operator()<E, 4>() : f.template operator()<E, 1>();
  });
}

}  // namespace

cudaError_t launch_add_first_products(Element element, const FirstProductsParams& p, cudaStream_t stream) {
  return with_multiplied(element, p.vectors, [&]<class E, int V>() {
    return launch_rows<V>(&add_first_products<E, V>, p, p.sequences.batch, p.width, stream);
  });
}
cudaError_t launch_final_outputs(Element element, const FinalOutputsParams& p, cudaStream_t stream) {
  return with_multiplied(element, p.vectors, [&]<class E, int V>() {
    return launch_rows<V>(&final_outputs<E, V>, p, p.sequences.batch, p.outputs, stream);
  });
}
cudaError_t launch_given_gradients(Element element, const GivenGradientsParams& p, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(p.end - p.begin) * p.sequences.batch;
  return with_multiplied(element, p.vectors, [&]<class E, int V>() {
    return launch_rows<V>(&given_gradients<E, V>, p, rows, p.outputs, stream);
  });
}
cudaError_t launch_carried_gradients(Element element, const CarriedGradientsParams& p, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(p.sequences.steps) * p.sequences.batch;
  return with_multiplied(element, p.vectors, [&]<class E, int V>() {
    return launch_rows<V>(&carried_gradients<E, V>, p, rows, p.outputs, stream);
  });
}
cudaError_t launch_hidden_states(Element element, const HiddenStatesParams& p, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(p.sequences.steps) * p.sequences.batch;
  return with_multiplied(element, p.vectors, [&]<class E, int V>() {
    return launch_rows<V>(&hidden_states<E, V>, p, rows, p.hidden, stream);
  });
}

}  // namespace fastlstm::cuda
