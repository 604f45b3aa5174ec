// The forward pass: layer after layer the product over all steps and the recurrence as planned.
#include <ATen/DeviceGuard.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cuda_ops.h"
#include "stack.h"

namespace fastlstm::cuda {

namespace {

struct LayerForward {
  int64_t index;
  Tensor below;         // [N, I_l], the outputs of the layer below before dropout, or x
  Tensor y;             // [N, D*P]
  Tensor h_n, c_n;      // [L*D, B, P], [L*D, B, H]
  Tensor gates, cells;  // [L*D, N, 4H], [L*D, N, H]; undefined where they are not saved
  Tensor cell_states;   // [D, N, H], or undefined
  // With layer normalisation, in the place of gates, which follow from them, [L*D, N, 4H] twice and [2*L*D, N, 1]: what
  // normalised products are, and what scaled them; undefined where they are not saved.
  Tensor norm_ih, norm_hh, rstd;
};

// W_ih times rows of a layer's input: where the gates (or it itself, normalised) will be saved, if they are.
Tensor gates_of_input(const Stack& s, const LayerForward& layer, int64_t direction, const Tensor& input,
                      const RowRange& rows) {
  const Tensor& kept = s.p.layer_norm ? layer.norm_ih : layer.gates;
  const Tensor result =
      kept.defined() ? rows.of(kept[layer.index * s.p.directions + direction]) : s.empty({rows.count, kGates * s.p.H});
  multiply(s.element, result, input, s.weights(layer.index, direction).w_ih.t());
  return result;
}

// All steps of a direction. gates_x has these rows.
ForwardRun run_of(const Stack& s, const LayerForward& layer, int64_t direction, const Tensor& gates_x,
                  const RowRange& rows, const Tensor& w_hh, const Tensor& h_0) {
  const int64_t state = layer.index * s.p.directions + direction;
  const Weights& w = s.weights(layer.index, direction);
  const auto part = [&](const Tensor& t) { return pointer(t, state); };
  ForwardRun run = {};
  run.reverse = direction == 1;
  run.end = s.sequences.steps;
  run.gates_x = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(gates_x.data_ptr()) -
                                              rows.first * gates_x.stride(0) * gates_x.element_size());
  run.w_hh = pointer(w_hh);
  run.b_ih = pointer(w.b_ih);
  run.b_hh = pointer(w.b_hh);
  run.h_0 = pointer(h_0);
  run.c_0 = part(s.c_0);
  run.y = s.of_direction(layer.y, direction).data_ptr();
  run.h_n = part(layer.h_n);
  run.c_n = part(layer.c_n);
  run.gates = part(layer.gates);
  run.cells = part(layer.cells);
  return run;
}

// What launches for single steps have in common. The states between steps: h, as factors, and c.
template <class Params>
Params step_params(const Stack& s, const LayerForward& layer, int64_t direction, const Tensor& gates_x,
                   const Tensor& w_hh, const Tensor& h, const Tensor& c) {
  const Weights& w = s.weights(layer.index, direction);
  const Tensor h_0 = s.h_0[layer.index * s.p.directions + direction];
  Params params = {};
  params.sequences = s.sequences;
  params.hidden = static_cast<int>(s.p.H);
  params.outputs = static_cast<int>(s.p.output_size());
  params.y_stride = s.width();
  params.vectors = s.vectors(
      {&gates_x, &w.b_ih, &w.b_hh, &s.h_0, &s.c_0, &layer.y, &layer.h_n, &layer.c_n, &s.reset_h, &s.recurrent_mask});
  params.run = run_of(s, layer, direction, gates_x, {0, s.p.N}, w_hh, h_0);
  params.h = h.data_ptr();
  params.h_stride = static_cast<int>(h.size(1));
  params.c = c.data_ptr();
  return params;
}

void stepwise_forward(const Stack& s, const LayerForward& layer, int64_t direction, const Tensor& input) {
  const Problem& p = s.p;
  const Weights& w = s.weights(layer.index, direction);
  const Tensor product = s.empty({p.B, kGates * p.H}), h = s.empty({p.B, p.output_size()});
  const Tensor c = s.empty_compute({p.B, p.H}), gates_x = gates_of_input(s, layer, direction, input, {0, p.N});
  const int64_t state = layer.index * p.directions + direction;
  Tensor hidden_state, projected, kept_h, between;
  auto params = step_params<NormalizedForwardParams>(s, layer, direction, gates_x, w.w_hh, h, c);
  params.product = product.data_ptr();
  params.has_extras = p.step_extras;
  params.extras = s.extras(state);
  if (params.extras.zoneout_h.active()) kept_h = s.empty_compute({p.B, p.output_size()});
  params.kept_h = pointer(kept_h);
  params.cell_states = pointer(layer.cell_states, direction);
  if (p.layer_norm) {
    s.normalize(gates_x, pointer(layer.rstd, state));
    params.norm = s.norm_weights(w);
    params.norm_hh = pointer(layer.norm_hh, state);
    params.rstd_hh = pointer(layer.rstd, p.layers * p.directions + state);
    between = s.empty_compute({p.B, 2 * p.H});
    params.between = between.data_ptr();
  }
  if (p.P > 0) {
    hidden_state = s.empty({p.B, p.H});
    projected = s.empty({p.B, p.P});
    params.hidden_state = hidden_state.data_ptr();
    params.projected = projected.data_ptr();
  }
  check(launch_states_forward(s.element, params, s.stream), "a forward pass");
  for (int n = 0; n < s.sequences.steps; ++n) {
    params.n = n;
    const int64_t count = s.rows_of_steps(params.run.reverse, n, n + 1).count;
    multiply(s.element, product.narrow(0, 0, count), h.narrow(0, 0, count), w.w_hh.t());
    check(p.layer_norm ? launch_normalized_cells_forward(s.element, params, s.stream)
                       : launch_cells_forward(s.element, params, s.stream),
          "a forward step");
    if (p.P == 0) continue;
    multiply(s.element, projected.narrow(0, 0, count), hidden_state.narrow(0, 0, count), w.w_hr.t());
    check(launch_outputs_forward(s.element, params, s.stream), "a forward step");
  }
}

void streamed_forward(const Stack& s, const LayerForward& layer, int64_t direction, const Tensor& input,
                      const PassPlan& plan) {
  const Problem& p = s.p;
  const int bytes = storage_bytes(s.element),
            stride = forward_blocks(static_cast<int>(p.H), bytes) * kBlockBytes / bytes;
  const Tensor h[2] = {at::zeros({p.B, stride}, s.options), at::zeros({p.B, stride}, s.options)};
  const Tensor c = s.empty_compute({p.B, p.H}), gates_x = gates_of_input(s, layer, direction, input, {0, p.N}),
               w_hh = s.factor_rows(s.weights(layer.index, direction).w_hh);
  auto params = step_params<StreamedForwardParams>(s, layer, direction, gates_x, w_hh, h[0], c);
  params.variant = {plan.team.octets, plan.team.tiles};
  params.row_stride = s.row_stride();
  check(launch_states_forward(s.element, params, s.stream), "a forward pass");
  for (int n = 0; n < s.sequences.steps; ++n) {
    params.n = n;
    params.h_before = h[n % 2].data_ptr();
    params.h = h[(n + 1) % 2].data_ptr();
    check(launch_streamed_forward(s.element, params, s.stream), "a forward step");
  }
}

// By a family that keeps the weights in CTAs: layers from the lowest on, each a run behind the one that it reads.
// Launch `front` computes run front - i of layer i: a diagonal of the runs, none of which reads another.
void fused_forward(const Stack& s, const std::vector<LayerForward>& layers, const PassPlan& plan) {
  const int64_t directions = s.p.directions;
  const int count = static_cast<int>(layers.size()), steps = run_steps(plan, count, s.p.T),
            runs_of_layer = ceil_div(s.sequences.steps, steps);
  struct Direction {
    Tensor w_hh, h_0, carried_h, carried_c;
  };
  std::vector<Direction> all;
  for (const LayerForward& layer : layers)
    for (int64_t d = 0; d < directions; ++d) {
      Direction of = {
          s.factor_rows(s.weights(layer.index, d).w_hh), s.factor_rows(s.h_0[layer.index * directions + d]), {}, {}};
      if (runs_of_layer > 1) of.carried_h = s.carried_factor(), of.carried_c = s.carried_state();
      all.push_back(std::move(of));
    }
  // The others read what is yet to be computed.
  const Tensor lowest_input = s.input_of_layer(layers[0].index, layers[0].below, {0, s.p.N});
  for (int front = 0; front < runs_of_layer + count - 1; ++front) {
    std::vector<ForwardRun> runs;
    std::vector<Tensor> gates_x;
    bool aligned = true;
    for (int i = std::max(0, front - runs_of_layer + 1); i <= std::min(front, count - 1); ++i)
      for (int64_t d = 0; d < directions; ++d) {
        const int begin = (front - i) * steps, end = std::min(begin + steps, s.sequences.steps);
        const RowRange rows = s.rows_of_steps(d == 1, begin, end);
        const Tensor input = i == 0 ? rows.of(lowest_input) : s.input_of_layer(layers[i].index, layers[i].below, rows);
        gates_x.push_back(gates_of_input(s, layers[i], d, input, rows));
        aligned = aligned && s.aligned({&gates_x.back()});
        const Direction& of = all[i * directions + d];
        ForwardRun run = run_of(s, layers[i], d, gates_x.back(), rows, of.w_hh, of.h_0);
        run.begin = begin;
        run.end = end;
        run.carried_h = pointer(of.carried_h);
        run.carried_c = static_cast<float*>(pointer(of.carried_c));
        runs.push_back(run);
      }
    launch_runs(s, plan, runs, aligned, [&](const ForwardParams& params) {
      const auto launch = plan.family == Family::kResident    ? launch_resident_forward
                          : plan.family == Family::kWarpgroup ? launch_warpgroup_forward
                                                              : launch_persistent_forward;
      check(launch(s.element, params, s.stream), "a forward pass");
    });
  }
}

}  // namespace

ForwardResult lstm(const Call& call, const Wanted& wanted) {
  const Tensor& x = call.x;
  const bool save = wanted.save, save_gates = save && !wanted.recompute;
  Arguments a = parse(call, save);
  check_wanted(a, wanted);
  a.problem.step_extras |= wanted.cell_layers > 0;
  const at::OptionalDeviceGuard guard(x.device());
  const Problem& p = a.problem;
  const int64_t states = p.layers * p.directions, width = p.directions * p.output_size();
  const Tensor h_n = at::empty({states, p.B, p.output_size()}, x.options()),
               c_n = at::empty({states, p.B, p.H}, x.options());
  const auto compute = x.options().dtype(a.compute_type);
  std::vector<Tensor> saved;
  if (save)
    saved = {at::empty({states, save_gates ? p.N : 0, kGates * p.H}, x.options()),
             at::empty({states, p.N, p.H}, compute), at::empty({p.layers - 1, p.N, width}, x.options())};
  if (save && p.layer_norm) {
    const int64_t kept_rows = saved[0].size(1);
    saved.push_back(at::empty({states, kept_rows, kGates * p.H}, x.options()));
    saved.push_back(at::empty({2 * states, kept_rows, 1}, compute));
  }
  Tensor y = at::empty({p.N, width}, x.options());
  std::vector<Tensor> cell_states;
  const int64_t returned = wanted.cell_layers * p.directions;
  if (returned > 0) cell_states = {at::empty({returned, p.N, p.H}, x.options())};
  if (p.B > 0) {
    const Stack s(a, call, 1);
    if (s.padded())
      for (Tensor& t : cell_states) t.zero_();
    const PassPlan plan = plan_forward(p, s.element, s.limits, s.constraints);
    Tensor below = s.x;
    for (int64_t first = 0; first < p.layers; first += plan.layers) {
      std::vector<LayerForward> layers;
      for (int64_t l = first; l < std::min(first + plan.layers, p.layers); ++l) {
        const Tensor out = l == p.layers - 1 ? y : save ? saved[2][l] : at::empty({p.N, width}, x.options());
        if (s.padded()) out.zero_();
        const int64_t first_returned = (l - p.layers + wanted.cell_layers) * p.directions;  // of the layer
        LayerForward layer = {};
        layer.index = l;
        layer.below = below;
        layer.y = out;
        layer.h_n = h_n, layer.c_n = c_n;
        if (save) layer.cells = saved[1];
        if (first_returned >= 0) layer.cell_states = cell_states[0].narrow(0, first_returned, p.directions);
        if (save_gates && p.layer_norm)
          layer.norm_ih = saved[0], layer.norm_hh = saved[3], layer.rstd = saved[4];
        else if (save_gates)
          layer.gates = saved[0];
        layers.push_back(std::move(layer));
        below = out;
      }
      if (keeps_weights(plan.family)) {
        fused_forward(s, layers, plan);
        continue;
      }
      const Tensor input = s.input_of_layer(first, layers[0].below, {0, p.N});
      for (int64_t d = 0; d < p.directions; ++d)
        if (plan.family == Family::kStreamed)
          streamed_forward(s, layers[0], d, input, plan);
        else
          stepwise_forward(s, layers[0], d, input);
    }
  }
  const auto as_states = [&](const Tensor& t) { return t.reshape(a.states.then(t.size(-1))); };
  for (Tensor& t : cell_states) t = t.reshape(a.rows_of(returned, p.H));
  return {y.reshape(a.rows.then(width)), as_states(h_n), as_states(c_n), std::move(saved), std::move(cell_states)};
}

}  // namespace fastlstm::cuda
