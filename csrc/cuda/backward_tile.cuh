// The gradients of a few octets of hidden units and one column tile through a run of steps: one warp, or two. The
// counterpart of forward_tile.cuh; "the n-th step" counts in the order of the backward pass, which is that of the
// forward pass turned round.
#pragma once

#include "../cell.h"
#include "elements.cuh"
#include "layout.h"
#include "tile.cuh"
#include "tile_copy.cuh"

namespace fastlstm::cuda {

template <class E, int Octets>
class BackwardTile : Tile<BackwardRun, Octets> {
  using Base = Tile<BackwardRun, Octets>;
  using Base::column, Base::copied_column, Base::run_, Base::first_unit_, Base::has_state, Base::lane_, Base::length_,
      Base::memory_, Base::order_, Base::p_, Base::state_index, Base::unit;

 public:
  using Storage = typename E::Storage;
  using Gates = float[Octets][2][kGates];  // of the unit and the two columns of a thread
  using Products = float[Octets][2];

  // `memory`: Octets * backward_tile_bytes of shared memory for this tile, aligned to 16. has_cells: whether this warp
  // computes them.
  __device__ __forceinline__ BackwardTile(const BackwardParams& params, const BackwardRun& run, int first_unit,
                                          int first_column, int lane, unsigned char* memory, bool has_cells)
      : Base(params, run, first_unit, first_column, lane, memory) {
    if (!has_cells) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      restarts_[e] = restarted_[e] = active_[e] = false;
#pragma unroll
      for (int o = 0; o < Octets; ++o) {
        d_h_[o][e] = run_.begin > 0 ? carried(run_.carried_d_h, o, e) : state(run_.d_h_n, o, e);
        d_c_[o][e] = run_.begin > 0 ? carried(run_.carried_d_c, o, e) : state(run_.d_c_n, o, e);
      }
    }
  }

  // In order, n = begin, begin + 1, ...
  __device__ __forceinline__ void begin(int n) {
    if (p_.sequences.resets == nullptr) return;
    const int t = time(n);
#pragma unroll
    for (int e = 0; e < 2; ++e)
      restarts_[e] = t < length_[e] && order_.restarts(p_.sequences, t, column(e), length_[e]);
  }

  // Takes W_hh^T d_gates of the step before the n-th: from here on, d_h is the gradient of what the n-th step gave to
  // it.
  __device__ __forceinline__ void carry(const Products& product) {
#pragma unroll
    for (int o = 0; o < Octets; ++o)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (active_[e]) d_h_[o][e] = restarted_[e] ? 0.f : product[o][e];
  }

  // The n-th step, whose inputs are there and the next step's: its c_t is the c_{t-1} of this one. d_gates, zero where
  // a column has no step.
  __device__ __forceinline__ void compute(int n, Gates& d_gates) {
    const int t = time(n);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      active_[e] = t < length_[e];
      restarted_[e] = restarts_[e];
      const bool first = order_.first(t, length_[e]);
#pragma unroll
      for (int o = 0; o < Octets; ++o) {
        const Storage* const gates = stage(o, n);
        const int cell = (2 * (lane_ % 4) + e) * kOctet + lane_ / 4;
        float (&g)[kGates] = d_gates[o][e];
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) g[gate] = E::load(gates[gate * kCellsOfTile + cell]);
        float d_h = d_h_[o][e], d_c = d_c_[o][e];
        if (run_.d_y != nullptr) d_h += E::load(gates[kGates * kCellsOfTile + cell]);
        float c_before = cells(o, n + 1)[cell];
        if (first) c_before = state(run_.c_0, o, e);
        if (restarts_[e]) c_before = 0.f;
        cell_backward<typename E::Math>(g[0], g[1], g[2], g[3], cells(o, n)[cell], c_before, d_h, d_c);
        if (active_[e]) d_c_[o][e] = restarts_[e] ? 0.f : d_c;
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) g[gate] = active_[e] ? g[gate] : 0.f;
      }
    }
  }

  // Stores what the n-th step made.
  __device__ __forceinline__ void store(int n, const Gates& d_gates) const {
    store_rows(n, d_gates, [&](int t, int o) { return typename Base::Rows(*this, t, o); });
  }
  // The same where octets are whole and rows aligned. stored_length: what that function tells, of which the caller
  // keeps the value; so of copied_length.
  __device__ __forceinline__ void store_aligned(int n, const Gates& d_gates, int stored_length) const {
    store_rows(n, d_gates, [&](int t, int o) { return typename Base::AlignedRows(*this, t, o, stored_length); });
  }
  using Base::copied_length, Base::stored_length;

 private:
  template <class RowsOf>
  __device__ __forceinline__ void store_rows(int n, const Gates& d_gates, const RowsOf& rows_of) const {
#pragma unroll
    for (int o = 0; o < Octets; ++o) {
      const auto rows = rows_of(time(n), o);
      auto* const d_gates_of_run = rows.template tensor<Storage>(run_.d_gates);
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const float values[2] = {d_gates[o][0][gate], d_gates[o][1][gate]};
        rows.template store<E>(d_gates_of_run + gate * p_.hidden + first_unit_, kGates * p_.hidden, values);
      }
    }
  }

 public:
  // Starts to copy the inputs of the n-th step, a group of asynchronous copies, into the stage of step
  // n - kBackwardStages. Each lane copies the 8 units of one column of one gate, and eight lanes each those of d_y and
  // of the cell state. The cell states go one step further than the run: c_{t-1} of its last step.
  __device__ __forceinline__ void copy_inputs(int n) {
    const int part = lane_ / kColumns, column = lane_ % kColumns;
    const bool exists = n <= run_.end && n < p_.sequences.steps && time(n) < Base::copied_length();
    const uint64_t row = exists ? row_of_few(p_.sequences, time(n), copied_column()) : 0;
#pragma unroll
    for (int o = 0; o < Octets; ++o) {
      const int units = exists ? p_.hidden - first_unit_ - o * kOctet : 0, count = n < run_.end ? units : 0,
                unit = units > 0 ? first_unit_ + o * kOctet : 0;
      copy_octet(stage(o, n) + lane_ * kOctet,
                 static_cast<const Storage*>(run_.gates) + row * (kGates * p_.hidden) + part * p_.hidden + unit, count,
                 p_.aligned);
      if (part == 0 && run_.d_y != nullptr)
        copy_octet(stage(o, n) + kGates * kCellsOfTile + column * kOctet,
                   static_cast<const Storage*>(run_.d_y) + row * p_.y_stride + unit, count, p_.aligned);
      if (part == 1)
        copy_octet(cells(o, n) + column * kOctet, static_cast<const float*>(run_.cells) + row * p_.hidden + unit, units,
                   p_.aligned);
    }
    copy_async_commit();
  }

  // The same where octets are whole and rows aligned.
  __device__ __forceinline__ void copy_aligned_inputs(int n, int copied_length) {
    const int part = lane_ / kColumns, column = lane_ % kColumns;
    const bool exists = n <= run_.end && n < p_.sequences.steps && time(n) < copied_length;
    const uint32_t row = exists ? row_of_few(p_.sequences, time(n), copied_column()) : 0;
    const auto* const gates = opaque(static_cast<const Storage*>(run_.gates)) +
                              static_cast<uint64_t>(row) * (kGates * p_.hidden) + part * p_.hidden;
#pragma unroll
    for (int o = 0; o < Octets; ++o) {
      const int unit = first_unit_ + o * kOctet;
      const bool has_cells = exists && unit < p_.hidden, has_step = has_cells && n < run_.end;
      const int from = has_cells ? unit : 0;
      copy_whole_octet(stage(o, n) + lane_ * kOctet, gates + from, has_step);
      if (part == 0 && run_.d_y != nullptr)
        copy_whole_octet(stage(o, n) + kGates * kCellsOfTile + column * kOctet,
                         static_cast<const Storage*>(run_.d_y) + static_cast<uint64_t>(row) * p_.y_stride + from,
                         has_step);
      if (part == 1)
        copy_whole_octet(cells(o, n) + column * kOctet,
                         static_cast<const float*>(run_.cells) + static_cast<uint64_t>(row) * p_.hidden + from,
                         has_cells);
    }
    copy_async_commit();
  }

  // After the last step, and after carry() of its product where d_h_0 or another run needs it.
  __device__ __forceinline__ void finish() const {
#pragma unroll
    for (int o = 0; o < Octets; ++o)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!has_state(o, e)) continue;
        const int64_t at = state_index(o, e, p_.hidden);
        if (run_.end < p_.sequences.steps) {
          run_.carried_d_h[at] = d_h_[o][e];
          run_.carried_d_c[at] = d_c_[o][e];
          continue;
        }
        if (run_.d_h_0 != nullptr) static_cast<Storage*>(run_.d_h_0)[at] = E::store(d_h_[o][e]);
        if (run_.d_c_0 != nullptr) static_cast<Storage*>(run_.d_c_0)[at] = E::store(d_c_[o][e]);
      }
  }

 private:
  __device__ __forceinline__ int time(int n) const {
    return order_.time(p_.sequences.steps - 1 - n, p_.sequences.steps);
  }
  // This thread's element of a state [B, H], zero where there is none.
  __device__ __forceinline__ float state(const void* states, int o, int e) const {
    if (states == nullptr || !has_state(o, e)) return 0.f;
    return E::load(static_cast<const Storage*>(states)[state_index(o, e, p_.hidden)]);
  }
  __device__ __forceinline__ float carried(const float* states, int o, int e) const {
    return has_state(o, e) ? states[state_index(o, e, p_.hidden)] : 0.f;
  }

  // Of each octet, a ring of stages: gates [4][column][unit], d_y [column][unit]. Behind it, the ring of the cell
  // states [column][unit].
  static constexpr int kStageElements = (kGates + 1) * kCellsOfTile;
  __device__ __forceinline__ Storage* stage(int o, int n) const {
    return reinterpret_cast<Storage*>(memory_ + o * backward_tile_bytes(sizeof(Storage))) +
           n % kBackwardStages * kStageElements;
  }
  __device__ __forceinline__ float* cells(int o, int n) const {
    return reinterpret_cast<float*>(stage(o, 0) + kBackwardStages * kStageElements) +
           n % kBackwardStages * kCellsOfTile;
  }

  float d_h_[Octets][2], d_c_[Octets][2];
  bool restarts_[2];               // the states before the step were zero
  bool active_[2], restarted_[2];  // of the step before: whether the column had it, and restarts_
};

}  // namespace fastlstm::cuda
