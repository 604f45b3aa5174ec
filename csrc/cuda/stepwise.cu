// The stepwise family, which takes every legal problem: the recurrent products of a step are a library's, and these
// kernels do what lies between them. Called by the driver for one direction of one layer.
//
// A thread has one element of a [B, H] or [B, P] state. States that are carried from step to step are in the compute
// type, factors of products in the storage type. Elementwise kernels have no order to keep but that of the stream.
#include <algorithm>

#include "../cell.h"
#include "dispatch.cuh"
#include "elements.cuh"
#include "launchers.h"
#include "sequences.cuh"

namespace fastlstm::cuda {

namespace {

constexpr int kThreads = 256;  // of a block at most

// A block has a part of one row, so that nobody divides 64-bit numbers.
int threads_for(int width) { return std::min(kThreads, ceil_div(width, kWarpThreads) * kWarpThreads); }
LaunchShape shape_for(int64_t rows, int width) {
  return {static_cast<int>(rows * ceil_div(width, threads_for(width))), threads_for(width), 0, false};
}
// What this thread has of rows of `width` elements.
struct Place {
  int row, i;
};
__device__ __forceinline__ Place own_place(int width) {
  const int blocks_of_row = ceil_div(width, block_threads()), row = block_index() / blocks_of_row;
  return {row, (block_index() - row * blocks_of_row) * block_threads() + thread_index()};
}

// The element of a [B, width] state that this thread has; `exists` is false behind the row's end.
struct Element2d {
  int64_t at;
  int b, i;
  bool exists;
};
// `width` may be less than that of the rows by which the kernel was launched.
__device__ __forceinline__ Element2d own_element(int launched_width, int width) {
  const Place place = own_place(launched_width);
  return {static_cast<int64_t>(place.row) * width + place.i, place.row, place.i, place.i < width};
}

template <class E>
__device__ __forceinline__ typename E::Compute load(const void* from, int64_t at) {
  return E::load(static_cast<const typename E::Storage*>(from)[at]);
}
template <class E>
__device__ __forceinline__ void store(void* to, int64_t at, typename E::Compute value) {
  static_cast<typename E::Storage*>(to)[at] = E::store(value);
}
template <class E>
__device__ __forceinline__ typename E::Compute& state(void* states, int64_t at) {
  return static_cast<typename E::Compute*>(states)[at];
}

// ------------------------------------------------------------------------------------------------ forward

__device__ __forceinline__ int time_of(const StepForwardParams& p, int n) {
  return Order{p.run.reverse}.time(n, p.sequences.steps);
}

// Puts out h_t of column b: into y, into what the next product reads, and into h_n after a sequence's last step.
template <class E>
__device__ __forceinline__ void put_out(const StepForwardParams& p, const Element2d& x, typename E::Compute h) {
  const Order order = {p.run.reverse};
  const int t = time_of(p, p.n), length = length_of(p.sequences, x.b);
  store<E>(p.run.y, row_of(p.sequences, t, x.b) * p.y_stride + x.i, h);
  const bool last = order.last(t, length);
  if (last) store<E>(p.run.h_n, x.at, h);
  const bool restarts = !last && order.restarts(p.sequences, time_of(p, p.n + 1), x.b, length);
  store<E>(p.h, x.at, restarts ? typename E::Compute(0) : h);
}

template <class E>
__global__ void __launch_bounds__(kThreads) states_forward(const StepForwardParams p) {
  const Element2d c = own_element(p.hidden, p.hidden);
  if (c.exists) {
    state<E>(p.c, c.at) = load<E>(p.run.c_0, c.at);
    store<E>(p.run.c_n, c.at, load<E>(p.run.c_0, c.at));
  }
  const Element2d h = own_element(p.hidden, p.outputs);
  if (!h.exists) return;
  const int length = length_of(p.sequences, h.b), t = time_of(p, 0);
  const bool restarts = t < length && Order{p.run.reverse}.restarts(p.sequences, t, h.b, length);
  const typename E::Compute h_0 = load<E>(p.run.h_0, h.at);
  store<E>(p.run.h_n, h.at, h_0);
  store<E>(p.h, h.at, restarts ? typename E::Compute(0) : h_0);
}

template <class E>
__global__ void __launch_bounds__(kThreads) cells_forward(const StepForwardParams p) {
  using Compute = typename E::Compute;
  const Element2d x = own_element(p.hidden, p.hidden);
  if (!x.exists) return;
  const Order order = {p.run.reverse};
  const int t = time_of(p, p.n), length = length_of(p.sequences, x.b);
  if (t >= length) return;
  const ForwardRun& d = p.run;
  const int64_t row = row_of(p.sequences, t, x.b), gates = row * kGates * p.hidden + x.i;
  Compute a[kGates];
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) {
    const int64_t offset = static_cast<int64_t>(gate) * p.hidden;
    a[gate] = load<E>(d.gates_x, gates + offset) +
              load<E>(p.product, static_cast<int64_t>(x.b) * kGates * p.hidden + offset + x.i);
    if (d.b_ih != nullptr) a[gate] += load<E>(d.b_ih, offset + x.i) + load<E>(d.b_hh, offset + x.i);
  }
  Compute& kept = state<E>(p.c, x.at);
  Compute c = order.restarts(p.sequences, t, x.b, length) ? Compute(0) : kept;
  cell_state<typename E::Math>(a[0], a[1], a[2], a[3], c);
  const Compute h = cell_output<typename E::Math>(a[3], c);
  kept = c;
  if (order.last(t, length)) store<E>(d.c_n, x.at, c);
  if (d.gates != nullptr) {
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) store<E>(d.gates, gates + static_cast<int64_t>(gate) * p.hidden, a[gate]);
    state<E>(d.cells, row * p.hidden + x.i) = c;
  }
  if (p.hidden_state != nullptr)
    store<E>(p.hidden_state, x.at, h);
  else
    put_out<E>(p, x, h);
}

template <class E>
__global__ void __launch_bounds__(kThreads) outputs_forward(const StepForwardParams p) {
  const Element2d x = own_element(p.outputs, p.outputs);
  if (x.exists && time_of(p, p.n) < length_of(p.sequences, x.b)) put_out<E>(p, x, load<E>(p.projected, x.at));
}

// ------------------------------------------------------------------------------------------------ backward

__device__ __forceinline__ int time_of(const StepBackwardParams& p, int n) {
  return Order{p.run.reverse}.time(p.sequences.steps - 1 - n, p.sequences.steps);
}

// The gradient of what step n gave to the steps that the forward pass computed after it. It arrives as the product of
// the step before, unless column b did not have that step.
template <class E>
__device__ __forceinline__ typename E::Compute carried(const StepBackwardParams& p, const Element2d& x) {
  typename E::Compute& d_h = state<E>(p.d_h, x.at);
  if (p.n > 0) {
    const int before = time_of(p, p.n - 1), length = length_of(p.sequences, x.b);
    if (before < length)
      d_h = Order{p.run.reverse}.restarts(p.sequences, before, x.b, length) ? typename E::Compute(0)
                                                                            : load<E>(p.product, x.at);
  }
  return d_h;
}

// The whole gradient of what step n put out, for a column that has this step.
template <class E>
__device__ __forceinline__ typename E::Compute d_output(const StepBackwardParams& p, const Element2d& x,
                                                        typename E::Compute carried_d_h) {
  if (p.run.d_y == nullptr) return carried_d_h;
  return carried_d_h + load<E>(p.run.d_y, row_of(p.sequences, time_of(p, p.n), x.b) * p.y_stride + x.i);
}

template <class E>
__global__ void __launch_bounds__(kThreads) states_backward(const StepBackwardParams p) {
  using Compute = typename E::Compute;
  const Element2d c = own_element(p.hidden, p.hidden), h = own_element(p.hidden, p.outputs);
  if (c.exists) state<E>(p.d_c, c.at) = p.run.d_c_n == nullptr ? Compute(0) : load<E>(p.run.d_c_n, c.at);
  if (h.exists) state<E>(p.d_h, h.at) = p.run.d_h_n == nullptr ? Compute(0) : load<E>(p.run.d_h_n, h.at);
}

template <class E>
__global__ void __launch_bounds__(kThreads) outputs_backward(const StepBackwardParams p) {
  const Element2d x = own_element(p.outputs, p.outputs);
  if (!x.exists) return;
  const typename E::Compute d_h = carried<E>(p, x);
  const int t = time_of(p, p.n);
  if (t < length_of(p.sequences, x.b))
    store<E>(p.d_outputs, row_of(p.sequences, t, x.b) * p.outputs + x.i, d_output<E>(p, x, d_h));
}

template <class E>
__global__ void __launch_bounds__(kThreads) cells_backward(const StepBackwardParams p) {
  using Compute = typename E::Compute;
  const Element2d x = own_element(p.hidden, p.hidden);
  if (!x.exists) return;
  const bool projects = p.d_hidden != nullptr;
  const Compute d_h_after = projects ? Compute(0) : carried<E>(p, x);
  const Order order = {p.run.reverse};
  const int t = time_of(p, p.n), length = length_of(p.sequences, x.b);
  if (t >= length) return;
  const BackwardRun& d = p.run;
  const Compute d_h = projects ? load<E>(p.d_hidden, x.at) : d_output<E>(p, x, d_h_after);
  const int64_t row = row_of(p.sequences, t, x.b), gates = row * kGates * p.hidden + x.i;
  Compute g[kGates];
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) g[gate] = load<E>(d.gates, gates + static_cast<int64_t>(gate) * p.hidden);
  const auto cell = [&](int64_t of_row) { return static_cast<const Compute*>(d.cells)[of_row * p.hidden + x.i]; };
  const Compute c = cell(row);
  Compute c_before = 0;
  const bool restarts = order.restarts(p.sequences, t, x.b, length);
  if (!restarts)
    c_before =
        order.first(t, length) ? load<E>(d.c_0, x.at) : cell(row_of(p.sequences, p.run.reverse ? t + 1 : t - 1, x.b));
  if (p.hidden_states != nullptr)
    store<E>(p.hidden_states, row * p.hidden + x.i, cell_output<typename E::Math>(g[3], c));
  Compute& kept = state<E>(p.d_c, x.at);
  Compute d_c = kept;
  cell_backward<typename E::Math>(g[0], g[1], g[2], g[3], c, c_before, d_h, d_c);
  kept = restarts ? Compute(0) : d_c;
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) store<E>(d.d_gates, gates + static_cast<int64_t>(gate) * p.hidden, g[gate]);
}

template <class E>
__global__ void __launch_bounds__(kThreads) finish_backward(const StepBackwardParams p) {
  const Element2d h = own_element(p.hidden, p.outputs), c = own_element(p.hidden, p.hidden);
  if (h.exists) store<E>(p.run.d_h_0, h.at, carried<E>(p, h));
  if (c.exists) store<E>(p.run.d_c_0, c.at, state<E>(p.d_c, c.at));
}

template <class E>
__global__ void __launch_bounds__(kThreads) previous_outputs(const PreviousOutputsParams p) {
  const Sequences& s = p.sequences;
  const Place place = own_place(p.outputs);  // of rows [T, B]
  const int i = place.i, t = place.row / s.batch, b = place.row - t * s.batch;
  if (i >= p.outputs) return;
  const int length = length_of(s, b);
  const bool has_step = t < length;
  if (!has_step && s.offsets != nullptr) return;  // there is no such row
  const Order order = {p.reverse};
  typename E::Compute h = 0;
  if (has_step && !order.restarts(s, t, b, length))
    h = order.first(t, length) ? load<E>(p.h_0, static_cast<int64_t>(b) * p.outputs + i)
                               : load<E>(p.y, row_of(s, p.reverse ? t + 1 : t - 1, b) * p.y_stride + i);
  store<E>(p.previous, row_of(s, t, b) * p.outputs + i, h);
}

// One thread for each element of [B, width].
template <class Params>
cudaError_t launch_elements(void (*kernel)(Params), const Params& params, int width, cudaStream_t stream) {
  return launch(kernel, shape_for(params.sequences.batch, width), stream, params);
}

}  // namespace

cudaError_t launch_states_forward(Element element, const StepForwardParams& params, cudaStream_t stream) {
  return with_element(element, [&]<class E>(E) {
    return launch_elements(&states_forward<E>, params, params.hidden, stream);  // P <= H
  });
}
cudaError_t launch_cells_forward(Element element, const StepForwardParams& params, cudaStream_t stream) {
  return with_element(element,
                      [&]<class E>(E) { return launch_elements(&cells_forward<E>, params, params.hidden, stream); });
}
cudaError_t launch_outputs_forward(Element element, const StepForwardParams& params, cudaStream_t stream) {
  return with_element(element,
                      [&]<class E>(E) { return launch_elements(&outputs_forward<E>, params, params.outputs, stream); });
}
cudaError_t launch_states_backward(Element element, const StepBackwardParams& params, cudaStream_t stream) {
  return with_element(element,
                      [&]<class E>(E) { return launch_elements(&states_backward<E>, params, params.hidden, stream); });
}
cudaError_t launch_outputs_backward(Element element, const StepBackwardParams& params, cudaStream_t stream) {
  return with_element(
      element, [&]<class E>(E) { return launch_elements(&outputs_backward<E>, params, params.outputs, stream); });
}
cudaError_t launch_cells_backward(Element element, const StepBackwardParams& params, cudaStream_t stream) {
  return with_element(element,
                      [&]<class E>(E) { return launch_elements(&cells_backward<E>, params, params.hidden, stream); });
}
cudaError_t launch_finish_backward(Element element, const StepBackwardParams& params, cudaStream_t stream) {
  return with_element(element,
                      [&]<class E>(E) { return launch_elements(&finish_backward<E>, params, params.hidden, stream); });
}
cudaError_t launch_previous_outputs(Element element, const PreviousOutputsParams& params, cudaStream_t stream) {
  return with_element(element, [&]<class E>(E) {
    const int64_t rows = static_cast<int64_t>(params.sequences.steps) * params.sequences.batch;
    return launch(&previous_outputs<E>, shape_for(rows, params.outputs), stream, params);
  });
}

}  // namespace fastlstm::cuda
