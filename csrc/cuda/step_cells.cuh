// The cells of one time step, for the families that launch kernels step by step: what a thread does to V consecutive
// elements of a row of a [B, H] or [B, P] state. Where the recurrent product comes from is a matter of the kernel.
//
// States that are carried from step to step are in the compute type, factors of products in the storage type.
#pragma once

#include "../cell.h"
#include "elements.cuh"
#include "params.h"
#include "sequences.cuh"

namespace fastlstm::cuda {

// Of row b, the elements from i on.
struct Place {
  int b, i;

  __device__ __forceinline__ int64_t in_rows_of(int width) const { return static_cast<int64_t>(b) * width + i; }
};

// V elements that are read and written at once: they begin at a multiple of their size.
template <class T, int V>
struct alignas(sizeof(T) * V) Packed {
  T values[V];
};

template <class E, int V>
__device__ __forceinline__ Packed<typename E::Storage, V> load_packed(const void* from, int64_t at) {
  using Storage = typename E::Storage;
  return *reinterpret_cast<const Packed<Storage, V>*>(static_cast<const Storage*>(from) + at);
}
template <class E, int V>
__device__ __forceinline__ void unpack(const Packed<typename E::Storage, V>& packed, typename E::Compute (&to)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = E::load(packed.values[v]);
}
template <class E, int V>
__device__ __forceinline__ void load(const void* from, int64_t at, typename E::Compute (&to)[V]) {
  unpack<E>(load_packed<E, V>(from, at), to);
}
template <class E, int V>
__device__ __forceinline__ void store(void* to, int64_t at, const typename E::Compute (&from)[V]) {
  using Storage = typename E::Storage;
  Packed<Storage, V> packed;
#pragma unroll
  for (int v = 0; v < V; ++v) packed.values[v] = E::store(from[v]);
  *reinterpret_cast<Packed<Storage, V>*>(static_cast<Storage*>(to) + at) = packed;
}
// The same of states in the compute type.
template <class E, int V>
__device__ __forceinline__ void load_state(const void* from, int64_t at, typename E::Compute (&to)[V]) {
  load<Full<typename E::Compute>>(from, at, to);
}
template <class E, int V>
__device__ __forceinline__ void store_state(void* to, int64_t at, const typename E::Compute (&from)[V]) {
  store<Full<typename E::Compute>>(to, at, from);
}
template <class E, int V>
__device__ __forceinline__ void add_to_state(void* to, int64_t at, const typename E::Compute (&values)[V]) {
  typename E::Compute sums[V];
  load_state<E>(to, at, sums);
#pragma unroll
  for (int v = 0; v < V; ++v) sums[v] += values[v];
  store_state<E>(to, at, sums);
}
template <class T, int V>
__device__ __forceinline__ void clear(T (&values)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = T(0);
}
// Nothing given counts as zeros, and as factors of one.
template <class E, int V>
__device__ __forceinline__ void load_or_clear(const void* given, int64_t at, typename E::Compute (&to)[V]) {
  if (given == nullptr)
    clear(to);
  else
    load<E>(given, at, to);
}
template <class E, int V>
__device__ __forceinline__ void multiply_by(const void* given, int64_t at, typename E::Compute (&values)[V]) {
  if (given == nullptr) return;
  typename E::Compute factors[V];
  load<E>(given, at, factors);
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] *= factors[v];
}

// A state behind a cut.
template <class E, bool kExtras, int V>
__device__ __forceinline__ void restart(const void* reset, int64_t at, typename E::Compute (&state)[V]) {
  if constexpr (kExtras)
    load_or_clear<E>(reset, at, state);
  else
    clear(state);
}

// The part of an element that zoneout keeps.
template <class T>
__device__ __forceinline__ T kept_part(const Zoneout& zoneout, int64_t at) {
  return zoneout.mask != nullptr ? T(zoneout.mask[at]) : T(zoneout.rate);
}

// The step that is the n-th of a pass.
__device__ __forceinline__ int time_of(const StepForwardParams& p, int n) {
  return Order{p.run.reverse}.time(n, p.sequences.steps);
}
__device__ __forceinline__ int time_of(const StepBackwardParams& p, int n) {
  return Order{p.run.reverse}.time(p.sequences.steps - 1 - n, p.sequences.steps);
}

// The n-th step of V cells, in both passes. They have a constructor and finish(), because the product is yet to be
// computed when the inputs can be loaded: what is loaded is used by the second only, so that nothing waits for it
// before.
template <class Params>
class StepCells {
 public:
  __device__ __forceinline__ bool has_step() const { return has_step_; }
  // A gate's place in rows of gates.
  __device__ __forceinline__ int64_t of_gate(int gate) const { return (row_ * kGates + gate) * p_.hidden + x_.i; }

 protected:
  __device__ __forceinline__ StepCells(const Params& params, const Place& place, bool exists)
      : p_(params),
        x_(place),
        t_(time_of(params, params.n)),
        length_(exists ? length_of(params.sequences, place.b) : 0),
        has_step_(exists && t_ < length_),
        row_(has_step_ ? row_of(params.sequences, t_, place.b) : 0) {}

  __device__ __forceinline__ bool restarts() const {
    return Order{p_.run.reverse}.restarts(p_.sequences, t_, x_.b, length_);
  }

  const Params& p_;
  const Place x_;
  const int t_, length_;
  const bool has_step_;
  const int64_t row_;
};

// ------------------------------------------------------------------------------------------------ forward

// What zoneout makes of V adjacent elements of a state. `at`: in rows of all steps.
template <class T, int V>
__device__ __forceinline__ void zone_out(const Zoneout& zoneout, int64_t at, const T (&before)[V], T (&now)[V]) {
  if (!zoneout.active()) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const T kept = kept_part<T>(zoneout, at + v);
    now[v] = kept * before[v] + (1 - kept) * now[v];
  }
}

// The same of h_t, which a column has at step t.
template <class E, int V>
__device__ __forceinline__ void zone_out_h(const StepForwardParams& p, const Place& x, int t,
                                           typename E::Compute (&h)[V]) {
  if (p.kept_h == nullptr) return;
  const int64_t at = x.in_rows_of(p.outputs);
  typename E::Compute before[V];
  if (Order{p.run.reverse}.restarts(p.sequences, t, x.b, length_of(p.sequences, x.b)))
    load_or_clear<E>(p.extras.reset_h, at, before);
  else
    load_state<E>(p.kept_h, at, before);
  zone_out(p.extras.zoneout_h, row_of(p.sequences, t, x.b) * p.outputs + x.i, before, h);
  store_state<E>(p.kept_h, at, h);
}

// Puts out h_t, which a column has: into y, into what the next product reads, and into h_n after a sequence's last
// step.
template <class E, bool kExtras, int V>
__device__ __forceinline__ void put_out(const StepForwardParams& p, const Place& x, typename E::Compute (&h)[V]) {
  const Order order = {p.run.reverse};
  const int t = time_of(p, p.n), length = length_of(p.sequences, x.b);
  if constexpr (kExtras) zone_out_h<E>(p, x, t, h);
  store<E>(p.run.y, row_of(p.sequences, t, x.b) * p.y_stride + x.i, h);
  const bool last = order.last(t, length);
  if (last) store<E>(p.run.h_n, x.in_rows_of(p.outputs), h);
  if (!last && order.restarts(p.sequences, time_of(p, p.n + 1), x.b, length))
    restart<E, kExtras>(p.extras.reset_h, x.in_rows_of(p.outputs), h);
  if constexpr (kExtras) multiply_by<E>(p.extras.recurrent_mask, x.in_rows_of(p.outputs), h);
  store<E>(p.h, x.in_rows_of(p.h_stride), h);
}

// Puts out h_t, or what is yet to be projected.
template <class E, bool kExtras, int V>
__device__ __forceinline__ void put_unprojected(const StepForwardParams& p, const Place& x,
                                                typename E::Compute (&h)[V]) {
  if (p.hidden_state != nullptr)
    store<E>(p.hidden_state, x.in_rows_of(p.hidden), h);
  else
    put_out<E, kExtras>(p, x, h);
}

template <class E, int V, bool kExtras = false>
class ForwardCells : public StepCells<StepForwardParams> {
  using Compute = typename E::Compute;

 public:
  __device__ __forceinline__ ForwardCells(const StepForwardParams& params, const Place& place, bool exists = true)
      : StepCells(params, place, exists) {
    if (!has_step()) return;
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) gates_x_[gate] = load_packed<E, V>(p_.run.gates_x, of_gate(gate));
    if (p_.run.b_ih != nullptr) {
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const int64_t at = static_cast<int64_t>(gate) * p_.hidden + x_.i;
        biases_[0][gate] = load_packed<E, V>(p_.run.b_ih, at);
        biases_[1][gate] = load_packed<E, V>(p_.run.b_hh, at);
      }
    }
    load_state<E>(p_.c, x_.in_rows_of(p_.hidden), c_);
    restarts_ = restarts();
  }

  // For cells that have the step. product: W_hh h.
  __device__ __forceinline__ void finish(const Compute (&product)[kGates][V]) {
    Compute a[kGates][V], h[V], c[V];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      unpack<E>(gates_x_[gate], a[gate]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        a[gate][v] += product[gate][v];
        if (p_.run.b_ih != nullptr)
          a[gate][v] += E::load(biases_[0][gate].values[v]) + E::load(biases_[1][gate].values[v]);
      }
    }
    advance(a, c);
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = cell_output<typename E::Math>(a[3][v], c[v]);
    put_unprojected<E, kExtras>(p_, x_, h);
  }

  // Of that, what makes and puts out the cell state. a: pre-activations on entry, activations on exit. c: as the cell
  // has made it, for h_t comes from that whatever zoneout makes of it.
  __device__ __forceinline__ void advance(Compute (&a)[kGates][V], Compute (&c)[V]) {
    const int64_t at = x_.in_rows_of(p_.hidden), at_row = row_ * p_.hidden + x_.i;
    if (restarts_) restart<E, kExtras>(p_.extras.reset_c, at, c_);
    Compute c_before[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      c_before[v] = c_[v];
      cell_state<typename E::Math>(a[0][v], a[1][v], a[2][v], a[3][v], c_[v]);
      c[v] = c_[v];
    }
    if constexpr (kExtras) zone_out(p_.extras.zoneout_c, at_row, c_before, c_);
    store_state<E>(p_.c, at, c_);
    if (Order{p_.run.reverse}.last(t_, length_)) store<E>(p_.run.c_n, at, c_);
    if (p_.run.cells != nullptr) store_state<E>(p_.run.cells, at_row, c_);
    if (p_.run.gates != nullptr) {
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) store<E>(p_.run.gates, of_gate(gate), a[gate]);
    }
  }

 private:
  bool restarts_ = false;
  Packed<typename E::Storage, V> gates_x_[kGates], biases_[2][kGates];
  Compute c_[V];
};

// ------------------------------------------------------------------------------------------------ backward

// d_h: the gradient of what step n gave to the steps that the forward pass computed after it. From step 1 on, it is the
// product with the gradients of the step before, unless the column did not have that step.
template <class E, bool kExtras, int V>
__device__ __forceinline__ void carry(const StepBackwardParams& p, const Place& x,
                                      const typename E::Compute (&product)[V], typename E::Compute (&d_h)[V]) {
  const int64_t at = x.in_rows_of(p.outputs);
  const int before = p.n > 0 ? time_of(p, p.n - 1) : p.sequences.steps, length = length_of(p.sequences, x.b);
  if (before >= length) {
    load_state<E>(p.d_h, at, d_h);
    return;
  }
  const bool restarts = Order{p.run.reverse}.restarts(p.sequences, before, x.b, length);
#pragma unroll
  for (int v = 0; v < V; ++v) d_h[v] = product[v];
  if constexpr (kExtras) {
    multiply_by<E>(p.extras.recurrent_mask, at, d_h);
    if (p.kept_d_h != nullptr) {
      typename E::Compute kept[V];
      load_state<E>(p.kept_d_h, at, kept);
#pragma unroll
      for (int v = 0; v < V; ++v) d_h[v] += kept[v];
    }
    if (restarts && p.d_reset_h != nullptr) add_to_state<E>(p.d_reset_h, at, d_h);
  }
  if (restarts) clear(d_h);
  store_state<E>(p.d_h, at, d_h);
}

// The same with the product that a library has computed.
template <class E, bool kExtras, int V>
__device__ __forceinline__ void carry_product(const StepBackwardParams& p, const Place& x,
                                              typename E::Compute (&d_h)[V]) {
  typename E::Compute product[V];
  if (p.n > 0)
    load<E>(p.product, x.in_rows_of(p.outputs), product);
  else
    clear(product);
  carry<E, kExtras>(p, x, product, d_h);
}

// Adds what a column that has step n was given from outside.
template <class E, int V>
__device__ __forceinline__ void add_d_y(const StepBackwardParams& p, const Place& x, typename E::Compute (&d_h)[V]) {
  if (p.run.d_y == nullptr) return;
  typename E::Compute d_y[V];
  load<E>(p.run.d_y, row_of(p.sequences, time_of(p, p.n), x.b) * p.y_stride + x.i, d_y);
#pragma unroll
  for (int v = 0; v < V; ++v) d_h[v] += d_y[v];
}

// Of the whole gradient of h_t, which a column has, leaves that of what the cell has made: the rest goes past it.
template <class E, int V>
__device__ __forceinline__ void put_kept_aside(const StepBackwardParams& p, const Place& x,
                                               typename E::Compute (&d_h)[V]) {
  if (p.kept_d_h == nullptr) return;
  const int64_t at = row_of(p.sequences, time_of(p, p.n), x.b) * p.outputs + x.i;
  typename E::Compute kept[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    kept[v] = kept_part<typename E::Compute>(p.extras.zoneout_h, at + v) * d_h[v];
    d_h[v] -= kept[v];
  }
  store_state<E>(p.kept_d_h, x.in_rows_of(p.outputs), kept);
}

// The whole gradient of h_t before its projection, which a column has. d_h: what carry_product() has made, without one.
template <class E, bool kExtras, int V>
__device__ __forceinline__ void complete(const StepBackwardParams& p, const Place& x, typename E::Compute (&d_h)[V]) {
  if (p.d_hidden != nullptr) {
    load<E>(p.d_hidden, x.in_rows_of(p.hidden), d_h);
  } else {
    add_d_y<E>(p, x, d_h);
    if constexpr (kExtras) put_kept_aside<E>(p, x, d_h);
  }
}

// After the last step, what is needed.
template <class E, int V>
__device__ __forceinline__ void put_initial_d_h(const StepBackwardParams& p, const Place& x,
                                                const typename E::Compute (&d_h)[V]) {
  if (p.run.d_h_0 == nullptr) return;
  store<E>(p.run.d_h_0, x.in_rows_of(p.outputs), d_h);
}
template <class E, int V>
__device__ __forceinline__ void put_initial_d_c(const StepBackwardParams& p, const Place& x) {
  if (p.run.d_c_0 == nullptr) return;
  typename E::Compute d_c[V];
  load_state<E>(p.d_c, x.in_rows_of(p.hidden), d_c);
  store<E>(p.run.d_c_0, x.in_rows_of(p.hidden), d_c);
}

template <class E, int V, bool kExtras = false>
class BackwardCells : public StepCells<StepBackwardParams> {
  using Compute = typename E::Compute;

 public:
  using Gradients = Compute[kGates][V];

  __device__ __forceinline__ BackwardCells(const StepBackwardParams& params, const Place& place, bool exists = true)
      : StepCells(params, place, exists) {
    if (!has_step()) return;
    const int64_t at = x_.in_rows_of(p_.hidden);
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) gates_[gate] = load_packed<E, V>(p_.run.gates, of_gate(gate));
    load_state<E>(p_.run.cells, row_ * p_.hidden + x_.i, c_);
    load_state<E>(p_.d_c, at, d_c_);
    restarts_ = restarts();
    if (restarts_)
      restart<E, kExtras>(p_.extras.reset_c, at, c_before_);
    else if (Order{p_.run.reverse}.first(t_, length_))
      load<E>(p_.run.c_0, at, c_before_);
    else
      load_state<E>(p_.run.cells, row_of(p_.sequences, p_.run.reverse ? t_ + 1 : t_ - 1, x_.b) * p_.hidden + x_.i,
                    c_before_);
  }

  // For cells that have the step. d_h: the whole gradient of h_t. g: the gradients of the gates.
  __device__ __forceinline__ void finish(const Compute (&d_h)[V], Gradients& g) {
    begin(g);
    if (p_.hidden_states != nullptr) {
      Compute h[V];
#pragma unroll
      for (int v = 0; v < V; ++v) h[v] = cell_output<typename E::Math>(g[3][v], c_[v]);
      store<E>(p_.hidden_states, row_ * p_.hidden + x_.i, h);
    }
#pragma unroll
    for (int v = 0; v < V; ++v)
      cell_backward<typename E::Math>(g[0][v], g[1][v], g[2][v], g[3][v], c_[v], c_before_[v], d_h[v], d_c_[v]);
    put(g);
  }

  // Of that, what comes before the cell: g gets the activations, c() is c_t as the cell made it, and what zoneout hands
  // on of the gradient of c_t has been put aside.
  __device__ __forceinline__ void begin(Gradients& g) {
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) unpack<E>(gates_[gate], g[gate]);
    if constexpr (kExtras) put_kept_aside_of_c(g);
  }
  __device__ __forceinline__ const Compute (&c() const)[V] { return c_; }
  // The way back through the cell state. d_c: the gradient that reaches it from h_t. g: of i, f, g, activations on
  // entry, gradients on exit.
  __device__ __forceinline__ void to_state(const Compute (&d_c)[V], Gradients& g) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      d_c_[v] += d_c[v];
      cell_state_backward(g[0][v], g[1][v], g[2][v], c_before_[v], d_c_[v]);
    }
  }
  // What comes behind the cell.
  __device__ __forceinline__ void put(const Gradients& g) {
    const int64_t at = x_.in_rows_of(p_.hidden);
    if constexpr (kExtras) {
#pragma unroll
      for (int v = 0; v < V; ++v) d_c_[v] += kept_d_c_[v];
      if (restarts_ && p_.d_reset_c != nullptr) add_to_state<E>(p_.d_reset_c, at, d_c_);
    }
    if (restarts_) clear(d_c_);
    store_state<E>(p_.d_c, at, d_c_);
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) store<E>(p_.run.d_gates, of_gate(gate), g[gate]);
  }

 private:
  // The same as put_kept_aside for d_c, and c_t as the cell has made it. g: activations.
  __device__ __forceinline__ void put_kept_aside_of_c(const Gradients& g) {
    const int64_t at = row_ * p_.hidden + x_.i;
    const Zoneout& zoneout = p_.extras.zoneout_c;
    Compute d_cells[V];
    load_or_clear<E>(p_.d_cell_states, at, d_cells);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      d_c_[v] += d_cells[v];
      kept_d_c_[v] = 0;
      if (!zoneout.active()) continue;
      kept_d_c_[v] = kept_part<Compute>(zoneout, at + v) * d_c_[v];
      d_c_[v] -= kept_d_c_[v];
      c_[v] = g[1][v] * c_before_[v] + g[0][v] * g[2][v];  // what was saved is what zoneout has made of it
    }
  }

  bool restarts_ = false;
  Packed<typename E::Storage, V> gates_[kGates];
  Compute c_[V], c_before_[V], d_c_[V], kept_d_c_[V];
};

}  // namespace fastlstm::cuda
