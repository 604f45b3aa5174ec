// A layer in the backward pass, and what surrounds its recurrence.
#pragma once

#include "stack.h"

namespace fastlstm::cuda {

struct LayerBackward {
  int64_t index;
  Tensor below;                       // [N, I_l], as in LayerForward
  Tensor y;                           // [N, D*P], of this layer
  Tensor d_y;                         // [N, D*P], or undefined
  Tensor d_cell_states;               // [D, N, H], or undefined
  Tensor gates[kDirections];          // [N, 4H]
  Tensor cells;                       // [L*D, N, H]
  Tensor d_h_n, d_c_n;                // [L*D, B, P], [L*D, B, H], or undefined
  Tensor d_h_0, d_c_0;                // likewise
  Tensor d_reset_h, d_reset_c;        // likewise, in the compute type: sums over restarts
  Tensor read_h[kDirections];         // [N, P], what steps read as h; undefined until it is asked for
  Tensor d_gates[kDirections];        // [N, 4H]
  Tensor d_outputs[kDirections];      // [N, P] and
  Tensor hidden_states[kDirections];  // [N, H], the factors of the gradient of W_hr
  Tensor w_hh[kDirections];           // [4H, P], or with the projection folded into them [4H, H], and then
  Tensor d_hidden[kDirections];       // [N, H], of hidden states, through their projections; otherwise undefined
  // With layer normalisation: [N, 4H] and [N], as in LayerForward; [N, H], of cell states, and the gradients of what
  // tanh is taken of; [N, 4H], the gradients of W_hh h.
  Tensor norm_ih[kDirections], norm_hh[kDirections], rstd_ih[kDirections], rstd_hh[kDirections];
  Tensor norm_c[kDirections], d_norm_c[kDirections], d_products_hh[kDirections];

  // What W_hh^T is multiplied by.
  const Tensor& d_recurrent(int64_t direction) const {
    return d_products_hh[direction].defined() ? d_products_hh[direction] : d_gates[direction];
  }
};

// Finds what a backward pass reads of a layer's gates: kept, or computed again.
void find_gates(const Stack& s, LayerBackward& layer, at::TensorList saved);

// With the projection folded into the recurrent weights: before the recurrence of the steps begin <= n < end, d_hidden;
// after that of all, d_h_0, and the whole d_outputs and hidden_states if W_hr needs a gradient.
void gradients_of_hidden_states(const Stack& s, const LayerBackward& layer, int64_t direction, int begin, int end);
void gradients_of_outputs(const Stack& s, LayerBackward& layer, at::IntArrayRef needs);

// Gradients of weights go into their places in d_weights, if they are needed: those of all but W_ih.
void gradients_of_recurrence(const Stack& s, const LayerBackward& layer, bool has_bias, at::IntArrayRef needs,
                             std::vector<Tensor>& d_weights);
// With layer normalisation, makes gradients of W_ih x of those of the pre-activations, in place, and so what the
// gradients of W_ih and of the layer's input are made of.
void denormalize_products_of_input(const Stack& s, const LayerBackward& layer);
void gradients_of_w_ih(const Stack& s, const LayerBackward& layer, at::IntArrayRef needs,
                       std::vector<Tensor>& d_weights);

}  // namespace fastlstm::cuda
