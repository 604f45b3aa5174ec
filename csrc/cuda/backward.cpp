// The backward pass: layer after layer the recurrence as planned, and the gradients over all steps.
#include "backward.h"

#include <ATen/DeviceGuard.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cuda_ops.h"

namespace fastlstm::cuda {

namespace {

BackwardRun run_of(const Stack& s, const LayerBackward& layer, int64_t direction, const Tensor& w_hh) {
  const int64_t state = layer.index * s.p.directions + direction;
  const auto part = [&](const Tensor& t) { return pointer(t, state); };
  BackwardRun run = {};
  run.reverse = direction == 1;
  run.end = s.sequences.steps;
  run.w_hh = pointer(w_hh);
  run.gates = pointer(layer.gates[direction]);
  run.cells = part(layer.cells);
  run.c_0 = part(s.c_0);
  run.d_c_n = part(layer.d_c_n);
  run.d_gates = pointer(layer.d_gates[direction]);
  run.d_c_0 = part(layer.d_c_0);
  if (layer.d_hidden[direction].defined()) {
    run.d_y = layer.d_hidden[direction].data_ptr();
    return run;
  }
  if (layer.d_y.defined()) run.d_y = s.of_direction(layer.d_y, direction).data_ptr();
  run.d_h_n = part(layer.d_h_n);
  run.d_h_0 = part(layer.d_h_0);
  return run;
}

// What launches for single steps have in common. Between steps: d_h and d_c.
template <class Params>
Params step_params(const Stack& s, const LayerBackward& layer, int64_t direction, const Tensor& w_hh, const Tensor& d_h,
                   const Tensor& d_c) {
  Params params = {};
  params.sequences = s.sequences;
  params.hidden = static_cast<int>(s.p.H);
  const bool folded = layer.d_hidden[direction].defined();
  params.outputs = static_cast<int>(folded ? s.p.H : s.p.output_size());
  params.y_stride = folded ? s.p.H : s.width();
  params.vectors = s.vectors(
      {&layer.gates[direction], &layer.cells, &s.c_0, &layer.d_y, &layer.d_h_n, &layer.d_c_n, &s.recurrent_mask});
  params.run = run_of(s, layer, direction, w_hh);
  params.d_h = d_h.data_ptr();
  params.d_c = d_c.data_ptr();
  return params;
}

void stepwise_backward(const Stack& s, const LayerBackward& layer, int64_t direction) {
  const Problem& p = s.p;
  const Weights& w = s.weights(layer.index, direction);
  const Tensor product = s.empty({p.B, p.output_size()}), d_h = s.empty_compute({p.B, p.output_size()});
  const Tensor d_c = s.empty_compute({p.B, p.H});
  const int64_t state = layer.index * p.directions + direction;
  Tensor d_hidden, kept_d_h, between;
  auto params = step_params<NormalizedBackwardParams>(s, layer, direction, w.w_hh, d_h, d_c);
  params.product = product.data_ptr();
  params.has_extras = p.step_extras;
  params.extras = s.extras(state);
  if (params.extras.zoneout_h.active()) kept_d_h = s.empty_compute({p.B, p.output_size()});
  params.kept_d_h = pointer(kept_d_h);
  params.d_cell_states = pointer(layer.d_cell_states, direction);
  params.d_reset_h = pointer(layer.d_reset_h, state);
  params.d_reset_c = pointer(layer.d_reset_c, state);
  if (p.layer_norm) {
    params.norm = s.norm_weights(w);
    params.norm_hh = pointer(layer.norm_hh[direction]);
    params.rstd_hh = pointer(layer.rstd_hh[direction]);
    params.d_products_hh = pointer(layer.d_products_hh[direction]);
    params.norm_c = pointer(layer.norm_c[direction]);
    params.d_norm_c = pointer(layer.d_norm_c[direction]);
    between = s.empty_compute({p.B, 2 * p.H});
    params.between = between.data_ptr();
  }
  if (p.P > 0) {
    d_hidden = s.empty({p.B, p.H});
    params.d_outputs = layer.d_outputs[direction].data_ptr();
    params.d_hidden = d_hidden.data_ptr();
    params.hidden_states = layer.hidden_states[direction].data_ptr();
  }
  check(launch_states_backward(s.element, params, s.stream), "a backward pass");
  for (int n = 0; n < s.sequences.steps; ++n) {
    params.n = n;
    const RowRange rows = s.rows_of_steps(!params.run.reverse, n, n + 1);
    if (p.P > 0) {
      check(launch_outputs_backward(s.element, params, s.stream), "a backward step");
      multiply(s.element, d_hidden.narrow(0, 0, rows.count), rows.of(layer.d_outputs[direction]), w.w_hr);
    }
    check(p.layer_norm ? launch_normalized_cells_backward(s.element, params, s.stream)
                       : launch_cells_backward(s.element, params, s.stream),
          "a backward step");
    multiply(s.element, product.narrow(0, 0, rows.count), rows.of(layer.d_recurrent(direction)), w.w_hh);
  }
  params.n = s.sequences.steps;
  if (layer.d_h_0.defined() || layer.d_reset_h.defined())
    check(launch_finish_backward(s.element, params, s.stream), "a backward pass");
}

void streamed_backward(const Stack& s, const LayerBackward& layer, int64_t direction, const PassPlan& plan) {
  const Problem& p = s.p;
  const Tensor d_h = s.empty_compute({p.B, p.H}), d_c = s.empty_compute({p.B, p.H});
  const Tensor transposed = at::zeros({p.H, s.row_stride(), kGates}, s.options);
  transposed.narrow(1, 0, p.H).copy_(layer.w_hh[direction].view({kGates, p.H, p.H}).permute({2, 1, 0}));
  const Tensor gradients[2] = {at::zeros({p.B, s.row_stride() * kGates}, s.options),
                               at::zeros({p.B, s.row_stride() * kGates}, s.options)};
  auto params = step_params<StreamedBackwardParams>(s, layer, direction, Tensor(), d_h, d_c);
  params.variant = {plan.team.octets, plan.team.tiles};
  params.row_stride = s.row_stride() * kGates;
  params.transposed_w_hh = transposed.data_ptr();
  if (p.P > 0) gradients_of_hidden_states(s, layer, direction, 0, s.sequences.steps);
  check(launch_states_backward(s.element, params, s.stream), "a backward pass");
  // After the last step, its product gives d_h_0, with d_c_0.
  const int steps = s.sequences.steps, launches = layer.d_c_0.defined() ? steps + 1 : steps;
  for (int n = 0; n < launches; ++n) {
    params.n = n;
    params.gradients_before = gradients[(n + 1) % 2].data_ptr();
    params.gradients = gradients[n % 2].data_ptr();
    check(launch_streamed_backward(s.element, params, s.stream), "a backward step");
  }
}

// Layers from the highest on, each a run behind the one that it gets its d_y from.
void fused_backward(const Stack& s, const std::vector<LayerBackward>& layers, const PassPlan& plan) {
  const int64_t directions = s.p.directions;
  const int count = static_cast<int>(layers.size()), steps = run_steps(plan, count, s.p.T),
            runs_of_layer = ceil_div(s.sequences.steps, steps);
  struct Direction {
    Tensor w_hh, carried_d_h, carried_d_c;
  };
  std::vector<Direction> all;
  bool aligned = true;
  for (const LayerBackward& layer : layers) {
    for (int64_t d = 0; d < directions; ++d) {
      const Tensor& d_y = s.p.P > 0 ? layer.d_hidden[d] : layer.d_y;
      aligned = aligned && s.aligned({&layer.gates[d], &layer.cells, &d_y});
      Direction of = {s.factor_rows(layer.w_hh[d]), {}, {}};
      if (runs_of_layer > 1) of.carried_d_h = s.carried_state(), of.carried_d_c = s.carried_state();
      all.push_back(std::move(of));
    }
  }
  const Launchers<BackwardRun> launchers = {launch_resident_backward, launch_persistent_backward,
                                            launch_warpgroup_backward};
  for (int front = 0; front < runs_of_layer + count - 1; ++front) {
    std::vector<BackwardRun> runs;
    for (int i = std::max(0, front - runs_of_layer + 1); i <= std::min(front, count - 1); ++i)
      for (int64_t d = 0; d < directions; ++d) {
        const int begin = (front - i) * steps, end = std::min(begin + steps, s.sequences.steps);
        if (i > 0) {
          const RowRange rows = s.rows_of_steps(true, begin, end);
          const LayerBackward& above = layers[i - 1];
          const Tensor d_y = rows.of(layers[i].d_y);
          multiply(s.element, d_y, rows.of(above.d_gates[0]), s.weights(above.index, 0).w_ih);
          if (s.dropout_mask.defined()) d_y.mul_(rows.of(s.dropout_mask[layers[i].index]));
        }
        if (s.p.P > 0) gradients_of_hidden_states(s, layers[i], d, begin, end);
        const Direction& of = all[i * directions + d];
        BackwardRun run = run_of(s, layers[i], d, of.w_hh);
        run.begin = begin;
        run.end = end;
        run.carried_d_h = static_cast<float*>(pointer(of.carried_d_h));
        run.carried_d_c = static_cast<float*>(pointer(of.carried_d_c));
        runs.push_back(run);
      }
    launch_runs(s, plan, runs, aligned, launchers, "a backward pass");
  }
}

}  // namespace

BackwardResult lstm_backward(const Call& call, const BackwardCall& backward) {
  const Tensor& x = call.x;
  const at::TensorList weights = call.weights, saved = backward.saved;
  const at::IntArrayRef needs = backward.needs;
  Arguments a = parse(call, true);
  check_backward(a, call, backward, a.type);
  a.problem.step_extras |= backward.d_cell_states.has_value();
  const at::OptionalDeviceGuard guard(x.device());
  const Problem& p = a.problem;
  const Tensor nothing = at::empty({0}, x.options());
  std::vector<Tensor> d_weights(weights.size(), nothing), d_resets;
  const bool needs_resets = call.reset_h && needs.back() != 0;
  if (p.B == 0) {  // sums over no rows
    for (size_t i = 0; i < weights.size(); ++i) {
      if (needs[2 + i] == 0) continue;
      at::DimVector sizes(weights[i].sizes());
      if (backward.groups > 1) sizes.insert(sizes.begin(), backward.groups);
      d_weights[i] = weights[i].new_zeros(sizes);
    }
    const auto like = [&](const Tensor& t, bool needed) { return needed ? t.new_empty(t.sizes()) : nothing; };
    if (call.reset_h) d_resets = {like(*call.reset_h, needs_resets), like(*call.reset_c, needs_resets)};
    return {like(x, needs[0]), like(call.h_0, needs[1]), like(call.c_0, needs[1]), std::move(d_weights),
            std::move(d_resets)};
  }
  const Stack s(a, call, backward.groups);
  const PassPlan plan = plan_backward(p, s.element, s.limits, s.constraints);
  const bool folds = folds_projection(p, plan);
  const Tensor d_h_0 = needs[1] ? s.empty({p.layers * p.directions, p.B, p.output_size()}) : Tensor(),
               d_c_0 = needs[1] ? s.empty({p.layers * p.directions, p.B, p.H}) : Tensor();
  const Tensor initial_d_h = s.states(backward.d_h_n), initial_d_c = s.states(backward.d_c_n);
  const auto zeros = [&](int64_t features) {
    return needs_resets ? s.empty_compute({p.layers * p.directions, p.B, features}).zero_() : Tensor();
  };
  const Tensor d_reset_h = zeros(p.output_size()), d_reset_c = zeros(p.H);
  const Tensor d_cell_states =
      backward.d_cell_states ? s.blocks_of_rows(as(*backward.d_cell_states, a.type)) : Tensor();
  const int64_t cell_layers = d_cell_states.defined() ? d_cell_states.size(0) / p.directions : 0;
  Tensor d_x = nothing;
  Tensor d_y_of_layer = backward.d_y ? s.rows(*backward.d_y) : Tensor();
  // This family has no other way to load; what else it reads is our own.
  if (plan.family == Family::kWarpgroup && !folds && !s.aligned({&d_y_of_layer})) d_y_of_layer = d_y_of_layer.clone();
  for (int64_t first = p.layers - 1; first >= 0; first -= plan.layers) {
    std::vector<LayerBackward> layers;
    for (int64_t l = first; l > std::max<int64_t>(first - plan.layers, -1); --l) {
      LayerBackward layer = {};
      layer.index = l;
      layer.below = l == 0 ? s.x : saved[kSavedOutputs][l - 1];
      layer.y = l == p.layers - 1 ? s.rows(backward.y) : saved[kSavedOutputs][l];
      layer.d_y = l == first ? d_y_of_layer : s.empty({p.N, s.width()});
      const int64_t first_returned = (l - p.layers + cell_layers) * p.directions;  // of the layer
      if (first_returned >= 0) layer.d_cell_states = d_cell_states.narrow(0, first_returned, p.directions);
      layer.cells = saved[kSavedCells];
      layer.d_h_n = initial_d_h;
      layer.d_c_n = initial_d_c;
      layer.d_h_0 = d_h_0;
      layer.d_c_0 = d_c_0;
      layer.d_reset_h = d_reset_h;
      layer.d_reset_c = d_reset_c;
      find_gates(s, layer, saved);
      for (int64_t d = 0; d < p.directions; ++d) {
        layer.d_gates[d] = s.empty({p.N, kGates * p.H});
        layer.w_hh[d] = folds ? s.folded_weights(s.weights(l, d)) : s.weights(l, d).w_hh;
        if (p.P > 0) {
          layer.d_outputs[d] = s.empty({p.N, p.P});
          (folds ? layer.d_hidden : layer.hidden_states)[d] = s.empty({p.N, p.H});
        }
        if (p.layer_norm) {
          layer.d_products_hh[d] = s.empty({p.N, kGates * p.H});
          layer.norm_c[d] = s.empty({p.N, p.H}), layer.d_norm_c[d] = s.empty({p.N, p.H});
        }
        if (!s.padded()) continue;
        for (const Tensor* t : {&layer.d_gates[d], &layer.d_outputs[d], &layer.hidden_states[d],
                                &layer.d_products_hh[d], &layer.norm_c[d], &layer.d_norm_c[d]})
          if (t->defined()) t->zero_();
      }
      layers.push_back(std::move(layer));
    }
    if (keeps_weights(plan.family)) fused_backward(s, layers, plan);
    for (int64_t d = 0; d < p.directions; ++d) {
      if (plan.family == Family::kStreamed) streamed_backward(s, layers[0], d, plan);
      if (plan.family == Family::kStepwise) stepwise_backward(s, layers[0], d);
    }
    for (LayerBackward& layer : layers) {
      if (folds) gradients_of_outputs(s, layer, needs);
      gradients_of_recurrence(s, layer, call.has_bias, needs, d_weights);
      if (p.layer_norm) denormalize_products_of_input(s, layer);
      gradients_of_w_ih(s, layer, needs, d_weights);
    }

    const LayerBackward& lowest = layers.back();
    if (lowest.index == 0 && !needs[0]) continue;
    const Tensor d_input = s.empty({p.N, lowest.below.size(1)});
    for (int64_t d = 0; d < p.directions; ++d)
      multiply(s.element, d_input, lowest.d_gates[d], s.weights(lowest.index, d).w_ih, d > 0);
    if (lowest.index == 0)
      d_x = d_input.reshape(x.sizes());
    else
      d_y_of_layer = s.input_of_layer(lowest.index, d_input, {0, p.N});  // through the same dropout
  }
  const auto as_states = [&](const Tensor& t) {
    return t.defined() ? as(t, a.type).reshape(a.states.then(t.size(-1))) : nothing;
  };
  if (call.reset_h) d_resets = {as_states(d_reset_h), as_states(d_reset_c)};
  return {d_x, as_states(d_h_0), as_states(d_c_0), std::move(d_weights), std::move(d_resets)};
}

}  // namespace fastlstm::cuda
