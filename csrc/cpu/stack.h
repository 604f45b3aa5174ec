// The driver of the CPU kernels: runs a whole stack (layers x directions), forward or backward, as a plan says.
//
// Called by cpu_ops.cpp with plain pointers. All tensors are contiguous; T is the compute type (float or double).
// Weights come per layer, then per direction, in nn.LSTM's order.
#pragma once

#include <vector>

#include "../plan.h"
#include "isa.h"
#include "kernels.h"

namespace fastlstm::cpu {

// Parameters (or their gradients, with mutable T) of one direction of one layer. Null where absent.
template <class T>
struct Weights {
  T* w_ih;  // [4H, I_l], I_l = I in layer 0, D * P above
  T* w_hh;  // [4H, P]
  T* b_ih;  // [4H]
  T* b_hh;  // [4H]
  T* w_hr;  // [P, H]
  LayerNorm<T> norm;
};

// What both passes read.
template <class T>
struct StackInputs {
  const Problem* problem;
  const Schedule* schedule;
  const Restarts* restarts[2];            // per direction, null: none
  const T* x;                             // [N, I]
  std::vector<Weights<const T>> weights;  // [L * D]
  const T* h_0;                           // [L*D, B, P]
  const T* c_0;                           // [L*D, B, H]
  const T* dropout_mask;                  // [L-1, N, D*P], factors on the input of layer l+1; or null
  const T* recurrent_mask;                // [L*D, B, P], factors on h_{t-1} as it is multiplied; or null
  const T *reset_h, *reset_c;             // [L*D, B, P], [L*D, B, H], states of a restart; or null: zero
  Zoneout<T> zoneout_h, zoneout_c;        // of [L*D, N, P] and [L*D, N, H]

  int64_t input_size(int64_t layer) const {
    return layer == 0 ? problem->I : problem->directions * problem->output_size();
  }
};

template <class T>
struct StackForward : StackInputs<T> {
  T* y;    // [N, D*P]
  T* h_n;  // [L*D, B, P]
  T* c_n;  // [L*D, B, H]
  // What of it is saved for backward; null in inference. Of gates or norms one is, or neither: they are computed again.
  T* gates;              // [L*D, N, 4H], without layer_norm
  T *norm_ih, *norm_hh;  // [L*D, N, 4H], normalised products, with it
  T *rstd_ih, *rstd_hh;  // [L*D, N], what they have been multiplied by for that
  T* cells;              // [L*D, N, H]
  T* layer_outputs;      // [L-1, N, D*P], undropped outputs of the lower layers, likewise
  T* cell_states;        // [cell_layers * D, N, H], c_t of the highest layers; null if there are none
  int64_t cell_layers;
};

template <class T>
struct StackBackward : StackInputs<T> {
  const T* y;                                      // as the forward pass made them
  const T* gates;                                  // null with layer_norm, or: computed again
  const T *norm_ih, *norm_hh, *rstd_ih, *rstd_hh;  // null without layer_norm, or: computed again
  const T* cells;
  const T* layer_outputs;
  const T* d_cell_states;  // [cell_layers * D, N, H], or null: zero
  int64_t cell_layers;
  const T* d_y;  // [N, D*P], or null: zero
  T* d_x;        // [N, I], or null: not needed
  T* d_h;        // [L*D, B, P]: d_h_n on entry, d_h_0 on exit
  T* d_c;        // [L*D, B, H]: d_c_n on entry, d_c_0 on exit
  bool needs_d_h_0;
  T *d_reset_h, *d_reset_c;           // [L*D, B, P], [L*D, B, H], where gradients are added; or null: not needed
  std::vector<Weights<T>> d_weights;  // [L * D], each [groups, ...], null where not needed
  int64_t groups;                     // of sequences: each has weight gradients of its own
  std::vector<int64_t> group_of;      // [B], in ascending rows of a step; may be empty if there is one
};

// A forward or backward pass. A: what products are taken of, as plan.products says; see kernels.h.
template <class T, class A>
void run_pass(const StackForward<T>& stack, const Kernels<T, A>& kernels, const PassPlan& plan);

template <class T, class A>
void run_pass(const StackBackward<T>& stack, const Kernels<T, A>& kernels, const PassPlan& plan);

}  // namespace fastlstm::cpu
