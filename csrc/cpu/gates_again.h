// Gates that the forward pass has not kept.
#pragma once

#include "bulk.h"

namespace fastlstm::cpu {

// The gates of a layer, computed again for a chunk of steps. All h_{t-1} are known by then, so that these are products
// of all rows at once.
template <class T, class A>
class GatesAgain {
 public:
  GatesAgain(const Kernels<T, A>& k, const Problem& p, int64_t chunk_rows, int64_t widest_input)
      : k_(k),
        H_(p.H),
        P_(p.output_size()),
        rows_(chunk_rows),
        ih_size_(packed_columns_size(k, widest_input, kGates * p.H)),
        hh_size_(packed_columns_size(k, P_, kGates * p.H)),
        bias_size_(unit_blocks(k, p.H) * kGates * k.lanes),
        packs_(p.directions * (ih_size_ + hh_size_)),
        biases_(p.layer_norm ? 0 : p.directions * bias_size_),
        gates_(p.layer_norm ? 0 : p.directions * chunk_rows * kGates * p.H),
        norms_(p.layer_norm ? p.directions * chunk_rows * 2 * kGates * p.H : 0),
        rstds_(p.layer_norm ? p.directions * chunk_rows * 2 : 0),
        factors_(k) {}

  void pack(int64_t direction, const Weights<const T>& w, int64_t I) {
    A* const ih = packs_.data() + direction * (ih_size_ + hh_size_);
    const int64_t columns = kGates * H_, panels = column_panels(k_, columns);
    pack_panels(panels, columns * I, [&](Range r) { k_.pack_transposed(w.w_ih, I, columns, ih, r); });
    pack_panels(panels, columns * P_, [&](Range r) { k_.pack_transposed(w.w_hh, P_, columns, ih + ih_size_, r); });
    if (!w.norm.active()) k_.pack_bias(w.b_ih, w.b_hh, H_, biases_.data() + direction * bias_size_);
  }

  // Gates [rows, 4H] for the task, or the normalised products that they are made of, of x [rows, I] and h_before
  // [rows, P].
  void compute(int64_t direction, const T* x, int64_t I, const T* h_before, int64_t rows, BackwardTask<T, A>& task) {
    const A* const ih = packs_.data() + direction * (ih_size_ + hh_size_);
    const int64_t columns = kGates * H_;
    const A* const hh = ih + ih_size_;
    if (task.norm.active()) {
      T* const norm_ih = norms_.data() + direction * rows_ * 2 * columns;
      T* const norm_hh = norm_ih + rows_ * columns;
      T* const rstd_ih = rstds_.data() + direction * rows_ * 2;
      T* const rstd_hh = rstd_ih + rows_;
      const auto normalize_ih = [&](Range r) { k_.normalize_rows(norm_ih, columns, r, rstd_ih); };
      const auto normalize_hh = [&](Range r) { k_.normalize_rows(norm_hh, columns, r, rstd_hh); };
      multiply_bulk(k_, factors_.of(x, rows, I), rows, terms<A>(I), ih, columns, norm_ih, false, normalize_ih);
      multiply_bulk(k_, factors_.of(h_before, rows, P_), rows, terms<A>(P_), hh, columns, norm_hh, false, normalize_hh);
      task.norm_ih = norm_ih, task.norm_hh = norm_hh;
      task.rstd_ih = rstd_ih, task.rstd_hh = rstd_hh;
    } else {
      T* const gates = gates_.data() + direction * rows_ * columns;
      const T* const bias = biases_.data() + direction * bias_size_;
      const auto finish = [&](Range r) { k_.activate_gates(bias, H_, r, gates); };
      multiply_bulk(k_, factors_.of(x, rows, I), rows, terms<A>(I), ih, columns, gates, false);
      multiply_bulk(k_, factors_.of(h_before, rows, P_), rows, terms<A>(P_), hh, columns, gates, true, finish);
      task.gates = gates;
    }
  }

 private:
  const Kernels<T, A>& k_;
  const int64_t H_, P_, rows_, ih_size_, hh_size_, bias_size_;
  const Buffer<A> packs_;
  const Buffer<T> biases_, gates_;
  const Buffer<T> norms_, rstds_;  // per direction of W_ih x, then of W_hh h
  Factors<T, A> factors_;
};

}  // namespace fastlstm::cpu
