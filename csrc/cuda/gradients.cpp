// What the backward pass computes for all steps at once: gates that were not kept, what surrounds a recurrence with the
// projection in its weights, and the gradients of the weights.
#include "backward.h"

namespace fastlstm::cuda {

namespace {

// What the steps of a direction read as h.
Tensor read_h(const Stack& s, const LayerBackward& layer, int64_t direction) {
  const Problem& p = s.p;
  const int64_t state = layer.index * p.directions + direction;
  const Tensor h_0 = s.h_0[state], y = s.of_direction(layer.y, direction);
  const Tensor previous = s.empty({p.N, p.output_size()});
  PreviousOutputsParams params = {};
  params.sequences = s.sequences;
  params.reverse = direction == 1;
  params.vectors = s.vectors({&y, &h_0, &s.reset_h, &s.recurrent_mask});
  params.outputs = static_cast<int>(p.output_size());
  params.y_stride = s.width();
  params.y = y.data_ptr();
  params.h_0 = h_0.data_ptr();
  params.reset_h = pointer(s.reset_h, state);
  params.recurrent_mask = pointer(s.recurrent_mask, state);
  params.previous = previous.data_ptr();
  check(launch_previous_outputs(s.element, params, s.stream), "a backward pass");
  return previous;
}

// Gates that the forward pass has not kept, or the normalised products that they follow from: products of all rows at
// once, because all h are known.
void compute_gates_again(const Stack& s, LayerBackward& layer) {
  const Problem& p = s.p;
  const Tensor input = s.input_of_layer(layer.index, layer.below, {0, p.N});
  for (int64_t d = 0; d < p.directions; ++d) {
    const Weights& w = s.weights(layer.index, d);
    layer.read_h[d] = read_h(s, layer, d);
    const Tensor products = s.product(input, w.w_ih.t());
    if (p.layer_norm) {
      layer.norm_ih[d] = products, layer.rstd_ih[d] = s.empty_compute({p.N});
      s.normalize(layer.norm_ih[d], layer.rstd_ih[d].data_ptr());
      layer.norm_hh[d] = s.product(layer.read_h[d], w.w_hh.t()), layer.rstd_hh[d] = s.empty_compute({p.N});
      s.normalize(layer.norm_hh[d], layer.rstd_hh[d].data_ptr());
      continue;
    }
    layer.gates[d] = products;
    multiply(s.element, products, layer.read_h[d], w.w_hh.t(), true);
    const ActivateGatesParams params = {p.N,
                                        static_cast<int>(p.H),
                                        s.vectors({&products, &w.b_ih, &w.b_hh}),
                                        pointer(w.b_ih),
                                        pointer(w.b_hh),
                                        products.data_ptr()};
    check(launch_activate_gates(s.element, params, s.stream), "a backward pass");
  }
}

// What W_hh^T is multiplied by, transposed, times what each step read as h.
Tensor gradient_of_w_hh(const Stack& s, const LayerBackward& layer, int64_t direction) {
  const Problem& p = s.p;
  const bool reverse = direction == 1;
  const Tensor &d_gates = layer.d_recurrent(direction), &read = layer.read_h[direction];
  const bool rows_of_y = !s.sequences.lengths && !s.sequences.resets && !s.recurrent_mask.defined();
  if (!read.defined() && rows_of_y && s.groups == 1) {
    const Tensor h_0 = s.h_0[layer.index * p.directions + direction];
    const Tensor y = s.of_direction(layer.y, direction);
    // Row n of y is what step n + 1 (in reverse, n - 1) read.
    const int64_t others = p.N - p.B;
    const Tensor of_first = d_gates.narrow(0, reverse ? others : 0, p.B).t(),
                 of_others = d_gates.narrow(0, reverse ? 0 : p.B, others).t();
    const Tensor gradient = s.product(of_first, h_0);
    if (others > 0) multiply(s.element, gradient, of_others, y.narrow(0, reverse ? p.B : 0, others), true);
    return gradient;
  }
  return s.gradient(d_gates, read.defined() ? read : read_h(s, layer, direction));
}

}  // namespace

void find_gates(const Stack& s, LayerBackward& layer, at::TensorList saved) {
  const Problem& p = s.p;
  const bool kept = saved[kSavedGates].size(1) > 0;
  if (!kept) compute_gates_again(s, layer);
  for (int64_t d = 0; d < p.directions; ++d) {
    const int64_t state = layer.index * p.directions + d;
    if (!p.layer_norm) {
      if (kept) layer.gates[d] = saved[kSavedGates][state];
      continue;
    }
    if (kept) {
      layer.norm_ih[d] = saved[kSavedGates][state], layer.rstd_ih[d] = saved[kSavedRstd][state];
      layer.norm_hh[d] = saved[kSavedNormHh][state],
      layer.rstd_hh[d] = saved[kSavedRstd][p.layers * p.directions + state];
    }
    layer.gates[d] = s.empty({p.N, kGates * p.H});
    const ActivateNormalizedParams params = {p.N,
                                             static_cast<int>(p.H),
                                             s.norm_weights(s.weights(layer.index, d)),
                                             layer.norm_ih[d].data_ptr(),
                                             layer.norm_hh[d].data_ptr(),
                                             layer.gates[d].data_ptr()};
    check(launch_activate_normalized(s.element, params, s.stream), "a backward pass");
  }
}

void gradients_of_hidden_states(const Stack& s, const LayerBackward& layer, int64_t direction, int begin, int end) {
  const bool reverse = direction == 1;
  const int64_t state = layer.index * s.p.directions + direction;
  const Tensor d_y = layer.d_y.defined() ? s.of_direction(layer.d_y, direction) : Tensor();
  const Tensor& d_outputs = layer.d_outputs[direction];
  const TimeRange times = s.times_of_steps(!reverse, begin, end);
  GivenGradientsParams params = {};
  params.sequences = s.sequences;
  params.reverse = reverse;
  params.vectors = s.vectors({&d_y, &layer.d_h_n});
  params.begin = times.begin;
  params.end = times.end;
  params.outputs = static_cast<int>(s.p.P);
  params.y_stride = s.width();
  params.d_y = pointer(d_y);
  params.d_h_n = pointer(layer.d_h_n, state);
  params.d_outputs = d_outputs.data_ptr();
  check(launch_given_gradients(s.element, params, s.stream), "a backward pass");
  const RowRange rows = s.rows_of_steps(!reverse, begin, end);
  multiply(s.element, rows.of(layer.d_hidden[direction]), rows.of(d_outputs), s.weights(layer.index, direction).w_hr);
}

void gradients_of_outputs(const Stack& s, LayerBackward& layer, at::IntArrayRef needs) {
  for (int64_t d = 0; d < s.p.directions; ++d) {
    const bool needs_w_hr = needs[2 + s.first_weight(layer.index, d) + s.a.plain_weights() - 1] != 0;
    if (!needs_w_hr && !layer.d_h_0.defined()) continue;
    const int64_t state = layer.index * s.p.directions + d;
    const Tensor products = s.product(layer.d_gates[d], s.weights(layer.index, d).w_hh);
    CarriedGradientsParams carried = {};
    carried.sequences = s.sequences;
    carried.reverse = d == 1;
    carried.vectors = s.vectors({&layer.d_h_n, &layer.d_h_0});
    carried.outputs = static_cast<int>(s.p.P);
    carried.products = products.data_ptr();
    carried.d_h_n = pointer(layer.d_h_n, state);
    carried.d_outputs = layer.d_outputs[d].data_ptr();
    carried.d_h_0 = pointer(layer.d_h_0, state);
    check(launch_carried_gradients(s.element, carried, s.stream), "a backward pass");
    if (!needs_w_hr) continue;
    layer.hidden_states[d] = layer.d_hidden[d];  // which the recurrence has read
    const HiddenStatesParams hidden = {s.sequences,
                                       s.vectors({&layer.gates[d], &layer.cells}),
                                       static_cast<int>(s.p.H),
                                       layer.gates[d].data_ptr(),
                                       pointer(layer.cells, state),
                                       layer.hidden_states[d].data_ptr()};
    check(launch_hidden_states(s.element, hidden, s.stream), "a backward pass");
  }
}

void gradients_of_recurrence(const Stack& s, const LayerBackward& layer, bool has_bias, at::IntArrayRef needs,
                             std::vector<Tensor>& d_weights) {
  for (int64_t d = 0; d < s.p.directions; ++d) {
    const size_t first = s.first_weight(layer.index, d);
    const auto needed = [&](int64_t which) { return needs[2 + first + which] != 0; };
    const int64_t plain = s.a.plain_weights();
    const Tensor& d_gates = layer.d_gates[d];
    if (needed(1)) d_weights[first + 1] = gradient_of_w_hh(s, layer, d);
    if (has_bias && (needed(2) || needed(3))) {
      const Tensor d_bias = s.sum_of_rows(d_gates);
      if (needed(2)) d_weights[first + 2] = d_bias;
      if (needed(3)) d_weights[first + 3] = needed(2) ? d_bias.clone() : d_bias;
    }
    if (s.p.P > 0 && needed(plain - 1))
      d_weights[first + plain - 1] = s.gradient(layer.d_outputs[d], layer.hidden_states[d]);
    if (!s.p.layer_norm) continue;
    // The sum over all rows of an element times a factor.
    const auto gradient_of_gain = [&](const Tensor& gradient, const Tensor& norm) {
      return s.sum_of_rows(s.padded() ? s.without_padding(norm).mul_(gradient) : norm.mul(gradient));
    };
    if (needed(plain)) d_weights[first + plain] = gradient_of_gain(d_gates, layer.norm_ih[d]);
    if (needed(plain + 1)) d_weights[first + plain + 1] = gradient_of_gain(d_gates, layer.norm_hh[d]);
    if (needed(plain + 2)) d_weights[first + plain + 2] = gradient_of_gain(layer.d_norm_c[d], layer.norm_c[d]);
    if (needed(plain + 3)) d_weights[first + plain + 3] = s.sum_of_rows(layer.d_norm_c[d]);
  }
}

void denormalize_products_of_input(const Stack& s, const LayerBackward& layer) {
  for (int64_t d = 0; d < s.p.directions; ++d) {
    const Tensor& d_gates = layer.d_gates[d];
    const DenormalizeRowsParams params = {s.sequences,
                                          static_cast<int>(d_gates.size(1)),
                                          d_gates.data_ptr(),
                                          pointer(s.weights(layer.index, d).gain_ih),
                                          pointer(layer.norm_ih[d]),
                                          pointer(layer.rstd_ih[d])};
    check(launch_denormalize_rows(s.element, params, s.stream), "a backward pass");
  }
}

void gradients_of_w_ih(const Stack& s, const LayerBackward& layer, at::IntArrayRef needs,
                       std::vector<Tensor>& d_weights) {
  Tensor input;  // made again only if a gradient asks for it
  for (int64_t d = 0; d < s.p.directions; ++d) {
    const size_t w_ih = s.first_weight(layer.index, d);
    if (needs[2 + w_ih] == 0) continue;
    if (!input.defined()) {
      input = s.input_of_layer(layer.index, layer.below, {0, s.p.N});
      if (s.padded() && layer.index == 0) input = s.without_padding(input);
    }
    d_weights[w_ih] = s.gradient(layer.d_gates[d], input);
  }
}

}  // namespace fastlstm::cuda
