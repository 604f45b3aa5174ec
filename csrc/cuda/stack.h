// What the passes of a call on the device have in common: the call, measured, and what is taken of it again and again.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "../arguments.h"
#include "../cell.h"
#include "runtime.h"

namespace fastlstm::cuda {

constexpr int kDirections = 2;  // of a layer, at most

// The parameters of one direction of one layer; an absent one is an undefined tensor.
struct Weights {
  Tensor w_ih, w_hh, b_ih, b_hh, w_hr;
  Tensor gain_ih, gain_hh, gain_c, bias_c;  // of layer normalisation
};

// Steps begin <= t < end, counted in time.
struct TimeRange {
  int begin, end;
};

struct RowRange {
  int64_t first, count;

  Tensor of(const Tensor& t) const { return t.narrow(0, first, count); }
};

// Of a tensor that has only these rows of [N, features], where the first of all would be.
inline void* as_of_first_row(const Tensor& t, const RowRange& rows) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(t.data_ptr()) -
                                 rows.first * t.stride(0) * t.element_size());
}

// Of a tensor that may be undefined, or of its i-th part.
inline void* pointer(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }
inline void* pointer(const Tensor& t, int64_t i) { return t.defined() ? t.select(0, i).data_ptr() : nullptr; }

// A call on the device, measured, with all it has in contiguous tensors.
class Stack {
 public:
  // groups: of adjacent rows of the batch, each of which has gradients of the weights of its own.
  Stack(const Arguments& arguments, const Call& call, int64_t groups);

  const Weights& weights(int64_t layer, int64_t direction) const { return weights_[layer * p.directions + direction]; }
  // Where these begin among all weights.
  size_t first_weight(int64_t layer, int64_t direction) const {
    return (layer * p.directions + direction) * a.per_direction;
  }
  int64_t width() const { return p.directions * p.output_size(); }
  // Columns of a direction in rows of y and of its gradient.
  Tensor of_direction(const Tensor& y, int64_t direction) const {
    return y.narrow(1, direction * p.output_size(), p.output_size());
  }
  // W_hh W_hr, [4H, H]: what a recurrence multiplies that has h before its projection.
  Tensor folded_weights(const Weights& w) const;
  // What steps of a direction of a layer have beyond the cell.
  StepExtras extras(int64_t state) const;
  // Of a direction of a layer, with layer normalisation.
  static NormWeights norm_weights(const Weights& w);

  // Memory.
  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, options); }
  Tensor empty_compute(at::IntArrayRef sizes) const { return at::empty(sizes, options.dtype(a.compute_type)); }
  // What the teams of a launch exchange their states through, with all tags as no first step has them.
  Tensor exchange_buffer(const PassPlan& plan, int runs) const;
  // Room for a state between two runs: in the compute type, or as a factor.
  Tensor carried_state() const { return empty_compute({p.B, p.H}); }
  Tensor carried_factor() const { return at::zeros({p.B, row_stride()}, options); }

  // Rows of x, y and what is saved, [N, features].
  // There are some that belong to no step: columns are of different lengths and nothing is packed.
  bool padded() const { return sequences.lengths != nullptr && sequences.offsets == nullptr; }
  Tensor padding() const;  // [N, 1]: these
  // A tensor without them: what they hold must not reach a gradient, NaN included.
  Tensor without_padding(const Tensor& rows) const;
  // The steps begin <= n < end of a pass in time, and of their rows the first and how many there are. A pass goes back
  // in time if it is one of the two, a backward pass or one of the reverse direction.
  TimeRange times_of_steps(bool back_in_time, int begin, int end) const {
    return back_in_time ? TimeRange{sequences.steps - end, sequences.steps - begin} : TimeRange{begin, end};
  }
  RowRange rows_of_steps(bool back_in_time, int begin, int end) const;
  // Rows of what layer l reads: of the outputs of the layer below, with dropout.
  Tensor input_of_layer(int64_t layer, const Tensor& below, const RowRange& rows) const;
  // [*x.shape[:-1], features] as [N, features], contiguous.
  Tensor rows(const Tensor& t) const { return as(t, a.type).reshape({p.N, t.size(-1)}); }
  // [blocks, *x.shape[:-1], features] as [blocks, N, features], contiguous.
  Tensor blocks_of_rows(const Tensor& t) const { return t.contiguous().reshape({t.size(0), p.N, t.size(-1)}); }
  // [L*D, B, features], or of a single step [B, features], as [L*D, B, features].
  Tensor states(const Tensor& t) const { return as(t, a.type).reshape({p.layers * p.directions, p.B, t.size(-1)}); }
  Tensor states(const OptionalTensor& t) const { return t ? states(*t) : Tensor(); }

  // Rows as kernels load them.
  // Whether rows of H elements begin at multiples of 16 bytes: kernels then load them in such pieces.
  bool aligned(std::initializer_list<const Tensor*> tensors) const;
  // Whether kernels for single steps may load a few elements at once: as many as 16 bytes of the compute type hold.
  bool vectors(std::initializer_list<const Tensor*> tensors) const;
  // Factors: of a multiple of 8 elements, aligned to 16 bytes, zero behind H.
  Tensor factor_rows(const Tensor& t) const;
  int row_stride() const { return ceil_div(static_cast<int>(p.H), kOctet) * kOctet; }

  // Products and sums over all rows.
  Tensor product(const Tensor& left, const Tensor& right) const;
  // The sum of all rows of left^T right; with groups, [G, ...]: of the rows of each.
  Tensor gradient(const Tensor& left, const Tensor& right) const;
  // The sum of all rows, likewise. As a product, with sums in float32: torch's reduction of so few columns takes twice
  // the memory of its input.
  Tensor sum_of_rows(const Tensor& t) const;
  // In place. rstd: what rows are scaled by, or null.
  void normalize(const Tensor& rows, void* rstd) const;

  const Arguments& a;
  const Problem& p;
  const int64_t groups;
  const Element element;
  const cudaStream_t stream;
  const Device& limits;
  const Constraints constraints;
  const at::TensorOptions options;
  const Tensor x, h_0, c_0;              // [N, I]; [L*D, B, P]; [L*D, B, H]
  const Tensor reset_h, recurrent_mask;  // [L*D, B, P], or undefined
  Tensor dropout_mask;                   // [L-1, N, D*P], or undefined
  Tensor lengths;                        // [B] on the device, of padded sequences; or undefined
  Sequences sequences = {};

 private:
  Tensor marks(const OptionalTensor& t) const { return t ? blocks_of_rows(*t) : Tensor(); }
  // [N, features] as [groups, rows of a group, features].
  Tensor grouped(const Tensor& t) const;
  Tensor on_device(const std::vector<int64_t>& values) const;

  const Tensor reset_c_, zoneout_h_, zoneout_c_;  // [L*D, B, H], [L*D, N, P], [L*D, N, H], or undefined
  const double zoneout_rate_h_, zoneout_rate_c_;
  std::vector<Weights> weights_;
  Tensor packing_, reset_mask_;
};

// The launchers of a pass of the families that keep weights in CTAs.
template <class Run>
struct Launchers {
  using Launch = cudaError_t (*)(Element, const LaunchParams<Run>&, cudaStream_t);
  Launch resident, persistent, warpgroup;

  Launch of(Family family) const {
    return family == Family::kResident ? resident : family == Family::kWarpgroup ? warpgroup : persistent;
  }
};

// Launches runs of such a family: at the same time, unless the plan says that both directions do not fit; as many
// columns of the batch at a time as do. `pass`: its name in errors.
template <class Run>
void launch_runs(const Stack& s, const PassPlan& plan, const std::vector<Run>& runs, bool aligned,
                 const Launchers<Run>& launchers, const char* pass) {
  LaunchParams<Run> params = {};
  params.sequences = s.sequences;
  params.hidden = static_cast<int>(s.p.H);
  params.row_stride = s.row_stride();
  params.y_stride = folds_projection(s.p, plan) ? s.p.H : s.width();
  params.aligned = aligned;
  params.team = plan.team;
  params.groups = plan.groups;
  params.runs = s.p.directions == 2 && !plan.both_directions ? 1 : static_cast<int>(runs.size());
  for (size_t first = 0; first < runs.size(); first += params.runs)
    for (int wave = 0; wave < plan.waves; ++wave) {
      params.first_column = wave * plan.groups * plan.team.tiles * kColumns;
      std::copy_n(runs.begin() + first, params.runs, params.run);
      Tensor buffer;
      if (has_teams(plan.family)) {
        buffer = s.exchange_buffer(plan, params.runs);
        params.exchange = buffer.data_ptr();
      }
      check(launchers.of(plan.family)(s.element, params, s.stream), pass);
    }
}

}  // namespace fastlstm::cuda
