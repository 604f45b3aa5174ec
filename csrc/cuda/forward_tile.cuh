// The cells of a few octets of hidden units and one column tile through a run of steps: one warp, or two of which one
// computes and the other moves data. For the families that keep weights in CTAs; they supply the sums of the recurrent
// product.
//
// The inputs of a step, gates_x, come by asynchronous copies through a ring of stages in shared memory, in which each
// lane copies the 8 units of one gate and one column. States stay in registers.
#pragma once

#include "../cell.h"
#include "elements.cuh"
#include "layout.h"
#include "tile.cuh"
#include "tile_copy.cuh"

namespace fastlstm::cuda {

template <class E, int Octets>
class ForwardTile : Tile<ForwardRun, Octets> {
  using Base = Tile<ForwardRun, Octets>;
  using Base::column, Base::copied_column, Base::run_, Base::first_unit_, Base::has_state, Base::lane_, Base::length_,
      Base::memory_, Base::order_, Base::p_, Base::state_index, Base::unit;

 public:
  using Storage = typename E::Storage;
  using Gates = float[Octets][2][kGates];  // of the unit and the two columns of a thread
  using States = float[Octets][2];

  // `memory`: Octets * forward_tile_bytes of shared memory for this tile, aligned to 16. has_cells: whether this warp
  // computes them.
  __device__ __forceinline__ ForwardTile(const ForwardParams& params, const ForwardRun& run, int first_unit,
                                         int first_column, int lane, unsigned char* memory, bool has_cells)
      : Base(params, run, first_unit, first_column, lane, memory) {
    if (!has_cells) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) restart_[e] = restarts(run_.begin, e);
#pragma unroll
    for (int o = 0; o < Octets; ++o) {
      biases(o)[lane_] = bias(lane_ / kOctet, first_unit_ + o * kOctet + lane_ % kOctet);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool exists = has_state(o, e);
        h_[o][e] =
            exists ? E::load(static_cast<const Storage*>(initial_h(run_))[state_index(o, e, p_.row_stride)]) : 0.f;
        c_[o][e] = !exists          ? 0.f
                   : run_.begin > 0 ? run_.carried_c[state_index(o, e, p_.hidden)]
                                    : E::load(static_cast<const Storage*>(run_.c_0)[state_index(o, e, p_.hidden)]);
      }
    }
  }

  // What the product of the next step reads: h_t, unless the sequence is cut there.
  __device__ __forceinline__ void outputs(States& h) const {
#pragma unroll
    for (int o = 0; o < Octets; ++o)
#pragma unroll
      for (int e = 0; e < 2; ++e) h[o][e] = restart_[e] ? 0.f : h_[o][e];
  }

  // Pre-activations of the n-th step, whose inputs are there, but for the recurrent product. In order, n = begin,
  // begin + 1, ...
  __device__ __forceinline__ void begin(int n, Gates& a) {
#pragma unroll
    for (int o = 0; o < Octets; ++o)
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const float b = biases(o)[gate * kOctet + lane_ / 4];
#pragma unroll
        for (int e = 0; e < 2; ++e)
          a[o][e][gate] = E::load(stage(o, n)[(gate * kColumns + 2 * (lane_ % 4) + e) * kOctet + lane_ / 4]) + b;
      }
    if (p_.sequences.resets == nullptr) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int o = 0; o < Octets; ++o)
        if (restart_[e]) c_[o][e] = 0.f;
      restart_[e] = n + 1 < run_.end && restarts(n + 1, e);
    }
  }

  // The cells of the n-th step: h_t and c_t. a: whole pre-activations on entry, activations on exit.
  __device__ __forceinline__ void compute(int n, Gates& a) {
    const int t = order_.time(n, p_.sequences.steps);
#pragma unroll
    for (int o = 0; o < Octets; ++o)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float (&g)[kGates] = a[o][e];
        float c = c_[o][e];
        cell_state<typename E::Math>(g[0], g[1], g[2], g[3], c);
        const float h = cell_output<typename E::Math>(g[3], c);
        const bool has_step = t < length_[e];
        c_[o][e] = has_step ? c : c_[o][e];
        h_[o][e] = has_step ? h : h_[o][e];
      }
  }

  __device__ __forceinline__ const States& h() const { return h_; }
  __device__ __forceinline__ const States& c() const { return c_; }
  __device__ __forceinline__ bool saves_gates() const { return run_.gates != nullptr; }

  // Stores what the n-th step made. a: activations.
  __device__ __forceinline__ void store(int n, const Gates& a, const States& h, const States& c) const {
    store_rows(n, a, h, c, [&](int t, int o) { return typename Base::Rows(*this, t, o); });
  }
  // The same where octets are whole and rows aligned. stored_length: what that function tells, of which the caller
  // keeps the value; so of copied_length.
  __device__ __forceinline__ void store_aligned(int n, const Gates& a, const States& h, const States& c,
                                                int stored_length) const {
    store_rows(n, a, h, c, [&](int t, int o) { return typename Base::AlignedRows(*this, t, o, stored_length); });
  }
  using Base::copied_length, Base::stored_length;

 private:
  template <class RowsOf>
  __device__ __forceinline__ void store_rows(int n, const Gates& a, const States& h, const States& c,
                                             const RowsOf& rows_of) const {
    const int t = order_.time(n, p_.sequences.steps);
#pragma unroll
    for (int o = 0; o < Octets; ++o) {
      const auto rows = rows_of(t, o);
      rows.template store<E>(rows.template tensor<Storage>(run_.y) + first_unit_, static_cast<uint32_t>(p_.y_stride),
                             h[o]);
      if (run_.cells == nullptr) continue;
      rows.store_floats(rows.template tensor<float>(run_.cells) + first_unit_, p_.hidden, c[o]);
      if (!saves_gates()) continue;
      auto* const gates = rows.template tensor<Storage>(run_.gates) + first_unit_;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const float values[2] = {a[o][0][gate], a[o][1][gate]};
        rows.template store<E>(gates + gate * p_.hidden, kGates * p_.hidden, values);
      }
    }
  }

 public:
  // Starts to copy the inputs of the n-th step, a group of asynchronous copies, into the stage of step
  // n - kForwardStages.
  __device__ __forceinline__ void copy_inputs(int n) {
    const int gate = lane_ / kColumns, t = order_.time(n, p_.sequences.steps);
    const bool exists = n < run_.end && t < Base::copied_length();
    // Where there is no row, any address that exists.
    const Storage* from = static_cast<const Storage*>(run_.w_hh);
    if (exists)
      from = static_cast<const Storage*>(run_.gates_x) + gate * p_.hidden + first_unit_ +
             static_cast<uint64_t>(row_of_few(p_.sequences, t, copied_column())) * (kGates * p_.hidden);
#pragma unroll
    for (int o = 0; o < Octets; ++o) {
      const int count = exists ? p_.hidden - first_unit_ - o * kOctet : 0;
      copy_octet(stage(o, n) + lane_ * kOctet, count > 0 ? from + o * kOctet : from, count, p_.aligned);
    }
    copy_async_commit();
  }

  // The same where octets are whole and rows aligned.
  __device__ __forceinline__ void copy_aligned_inputs(int n, int copied_length) {
    const int t = order_.time(n, p_.sequences.steps);
    const bool exists = n < run_.end && t < copied_length;
    const Storage* from = static_cast<const Storage*>(run_.w_hh);
    if (exists)
      from = static_cast<const Storage*>(run_.gates_x) + lane_ / kColumns * p_.hidden + first_unit_ +
             static_cast<uint64_t>(row_of_few(p_.sequences, t, copied_column())) * (kGates * p_.hidden);
#pragma unroll
    for (int o = 0; o < Octets; ++o) {
      const bool has_octet = exists && first_unit_ + o * kOctet < p_.hidden;
      copy_whole_octet(stage(o, n) + lane_ * kOctet, has_octet ? from + o * kOctet : from, has_octet);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void finish() const {
    const bool last_run = run_.end == p_.sequences.steps;
    void* const h = last_run ? run_.h_n : run_.carried_h;
    const int stride = last_run ? p_.hidden : p_.row_stride;
#pragma unroll
    for (int o = 0; o < Octets; ++o)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!has_state(o, e)) continue;
        static_cast<Storage*>(h)[state_index(o, e, stride)] = E::store(h_[o][e]);
        const int64_t at = state_index(o, e, p_.hidden);
        if (last_run)
          static_cast<Storage*>(run_.c_n)[at] = E::store(c_[o][e]);
        else
          run_.carried_c[at] = c_[o][e];
      }
  }

 private:
  // Of each octet, a ring of gates_x [stage][gate][column][unit], then the biases [gate][unit]: registers are scarce.
  __device__ __forceinline__ Storage* stage(int o, int n) const {
    return reinterpret_cast<Storage*>(memory_ + o * forward_tile_bytes(sizeof(Storage))) +
           n % kForwardStages * kCellsOfTile * kGates;
  }
  __device__ __forceinline__ float* biases(int o) const {
    return reinterpret_cast<float*>(stage(o, 0) + kForwardStages * kCellsOfTile * kGates);
  }
  __device__ __forceinline__ float bias(int gate, int unit) const {
    if (run_.b_ih == nullptr || unit >= p_.hidden) return 0.f;
    const int at = gate * p_.hidden + unit;
    return E::load(static_cast<const Storage*>(run_.b_ih)[at]) + E::load(static_cast<const Storage*>(run_.b_hh)[at]);
  }
  __device__ __forceinline__ bool restarts(int n, int e) const {
    const int t = order_.time(n, p_.sequences.steps);
    return t < length_[e] && order_.restarts(p_.sequences, t, column(e), length_[e]);
  }
  States c_, h_;
  bool restart_[2];  // the states are zero before the next step
};

}  // namespace fastlstm::cuda
