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
  Tensor gates, cells;  // [L*D, N, 4H], [D, N, H]; undefined where nobody wants them
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

// What the recurrence of a direction multiplies and reads as h, and what it puts out. That is the layer's; or, with the
// projection folded into the recurrent weights, h before it.
struct Recurrence {
  Tensor w_hh, h_0;      // [4H, P], [B, P]
  Tensor h_n;            // [B, P]
  Tensor first_product;  // [B, 4H], what is W_hh h_0 though h_0 is zero; undefined without a folded projection
};

Recurrence recurrence_of(const Stack& s, const LayerForward& layer, int64_t direction, bool folds) {
  const int64_t state = layer.index * s.p.directions + direction;
  const Weights& w = s.weights(layer.index, direction);
  const Tensor h_0 = s.h_0[state];
  if (!folds) return {w.w_hh, h_0, layer.h_n[state], {}};
  const Tensor zeros = at::zeros({s.p.B, s.p.H}, s.options);
  return {s.folded_weights(w), zeros, s.empty({s.p.B, s.p.H}), s.product(h_0, w.w_hh.t())};
}

// Of steps of a direction: what goes into the recurrence, and what comes out.
struct StepsForward {
  RowRange rows;
  Tensor gates_x;  // [rows, 4H]
  Tensor y;        // [rows, P], a part of the layer's, or [rows, H], hidden states
};

StepsForward steps_of(const Stack& s, const LayerForward& layer, int64_t direction, const Tensor& input,
                      const Recurrence& recurrence, int begin, int end) {
  const bool reverse = direction == 1;
  const RowRange rows = s.rows_of_steps(reverse, begin, end);
  StepsForward steps = {rows, gates_of_input(s, layer, direction, input, rows), {}};
  if (!recurrence.first_product.defined()) {
    steps.y = rows.of(s.of_direction(layer.y, direction));
    return steps;
  }
  steps.y = s.empty({rows.count, s.p.H});
  const TimeRange times = s.times_of_steps(reverse, begin, end);
  const FirstProductsParams params = {s.sequences,
                                      reverse,
                                      s.vectors({&steps.gates_x}),
                                      times.begin,
                                      times.end,
                                      static_cast<int>(kGates * s.p.H),
                                      recurrence.first_product.data_ptr(),
                                      as_of_first_row(steps.gates_x, rows)};
  check(launch_add_first_products(s.element, params, s.stream), "a forward pass");
  return steps;
}

// What follows the recurrence of steps.
void project(const Stack& s, const LayerForward& layer, int64_t direction, const Recurrence& recurrence,
             const StepsForward& steps) {
  if (!recurrence.first_product.defined()) return;
  const Tensor y = steps.rows.of(s.of_direction(layer.y, direction));
  multiply(s.element, y, steps.y, s.weights(layer.index, direction).w_hr.t());
  if (s.padded()) y.masked_fill_(steps.rows.of(s.padding()), 0);  // of which there are no hidden states
}

// What follows the last steps.
void put_final_outputs(const Stack& s, const LayerForward& layer, int64_t direction, const Recurrence& recurrence) {
  if (!recurrence.first_product.defined()) return;
  const int64_t state = layer.index * s.p.directions + direction;
  const Tensor y = s.of_direction(layer.y, direction), h_0 = s.h_0[state], h_n = layer.h_n[state];
  const FinalOutputsParams params = {
      s.sequences,    direction == 1, s.vectors({&y, &h_0, &h_n}), static_cast<int>(s.p.P), s.width(), y.data_ptr(),
      h_0.data_ptr(), h_n.data_ptr()};
  check(launch_final_outputs(s.element, params, s.stream), "a forward pass");
}

ForwardRun run_of(const Stack& s, const LayerForward& layer, int64_t direction, const Recurrence& recurrence,
                  const StepsForward& steps) {
  const int64_t state = layer.index * s.p.directions + direction;
  const Weights& w = s.weights(layer.index, direction);
  const auto part = [&](const Tensor& t) { return pointer(t, state); };
  ForwardRun run = {};
  run.reverse = direction == 1;
  run.end = s.sequences.steps;
  run.gates_x = as_of_first_row(steps.gates_x, steps.rows);
  run.w_hh = pointer(recurrence.w_hh);
  run.b_ih = pointer(w.b_ih);
  run.b_hh = pointer(w.b_hh);
  run.h_0 = pointer(recurrence.h_0);
  run.c_0 = part(s.c_0);
  run.y = as_of_first_row(steps.y, steps.rows);
  run.h_n = pointer(recurrence.h_n);
  run.c_n = part(layer.c_n);
  run.gates = part(layer.gates);
  run.cells = pointer(layer.cells, direction);
  return run;
}

// What launches for single steps have in common. The states between steps: h, as factors, and c.
template <class Params>
Params step_params(const Stack& s, const LayerForward& layer, int64_t direction, const Recurrence& recurrence,
                   const StepsForward& steps, const Tensor& h, const Tensor& c) {
  const Weights& w = s.weights(layer.index, direction);
  Params params = {};
  params.sequences = s.sequences;
  params.hidden = static_cast<int>(s.p.H);
  params.outputs = static_cast<int>(steps.y.size(1));
  params.y_stride = steps.y.stride(0);
  params.vectors = s.vectors({&steps.gates_x, &w.b_ih, &w.b_hh, &recurrence.h_0, &s.c_0, &steps.y, &recurrence.h_n,
                              &layer.c_n, &s.reset_h, &s.recurrent_mask});
  params.run = run_of(s, layer, direction, recurrence, steps);
  params.h = h.data_ptr();
  params.h_stride = static_cast<int>(h.size(1));
  params.c = c.data_ptr();
  return params;
}

void stepwise_forward(const Stack& s, const LayerForward& layer, int64_t direction, const Tensor& input) {
  const Problem& p = s.p;
  const Weights& w = s.weights(layer.index, direction);
  const Tensor product = s.empty({p.B, kGates * p.H}), h = s.empty({p.B, p.output_size()});
  const Tensor c = s.empty_compute({p.B, p.H});
  const Recurrence recurrence = recurrence_of(s, layer, direction, false);
  const StepsForward steps = steps_of(s, layer, direction, input, recurrence, 0, s.sequences.steps);
  const int64_t state = layer.index * p.directions + direction;
  Tensor hidden_state, projected, kept_h, between;
  auto params = step_params<NormalizedForwardParams>(s, layer, direction, recurrence, steps, h, c);
  params.product = product.data_ptr();
  params.has_extras = p.step_extras;
  params.extras = s.extras(state);
  if (params.extras.zoneout_h.active()) kept_h = s.empty_compute({p.B, p.output_size()});
  params.kept_h = pointer(kept_h);
  if (p.layer_norm) {
    s.normalize(steps.gates_x, pointer(layer.rstd, state));
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
  const Tensor c = s.empty_compute({p.B, p.H});
  Recurrence recurrence = recurrence_of(s, layer, direction, folds_projection(p, plan));
  recurrence.w_hh = s.factor_rows(recurrence.w_hh);
  const StepsForward steps = steps_of(s, layer, direction, input, recurrence, 0, s.sequences.steps);
  auto params = step_params<StreamedForwardParams>(s, layer, direction, recurrence, steps, h[0], c);
  params.variant = {plan.team.octets, plan.team.tiles};
  params.row_stride = s.row_stride();
  check(launch_states_forward(s.element, params, s.stream), "a forward pass");
  for (int n = 0; n < s.sequences.steps; ++n) {
    params.n = n;
    params.h_before = h[n % 2].data_ptr();
    params.h = h[(n + 1) % 2].data_ptr();
    check(launch_streamed_forward(s.element, params, s.stream), "a forward step");
  }
  project(s, layer, direction, recurrence, steps);
  put_final_outputs(s, layer, direction, recurrence);
}

// By a family that keeps the weights in CTAs: layers from the lowest on, each a run behind the one that it reads.
// Launch `front` computes run front - i of layer i: a diagonal of the runs, none of which reads another.
void fused_forward(const Stack& s, const std::vector<LayerForward>& layers, const PassPlan& plan) {
  const int64_t directions = s.p.directions;
  const int count = static_cast<int>(layers.size()), steps = run_steps(plan, count, s.p.T),
            runs_of_layer = ceil_div(s.sequences.steps, steps);
  struct Direction {
    const LayerForward& layer;
    int64_t direction;
    Recurrence recurrence;
    Tensor carried_h, carried_c;
  };
  std::vector<Direction> all;
  for (const LayerForward& layer : layers)
    for (int64_t d = 0; d < directions; ++d) {
      Direction of = {layer, d, recurrence_of(s, layer, d, folds_projection(s.p, plan)), {}, {}};
      of.recurrence.w_hh = s.factor_rows(of.recurrence.w_hh);
      of.recurrence.h_0 = s.factor_rows(of.recurrence.h_0);
      if (runs_of_layer > 1) of.carried_h = s.carried_factor(), of.carried_c = s.carried_state();
      all.push_back(std::move(of));
    }
  const Launchers<ForwardRun> launchers = {launch_resident_forward, launch_persistent_forward,
                                           launch_warpgroup_forward};
  // The others read what is yet to be computed.
  const Tensor lowest_input = s.input_of_layer(layers[0].index, layers[0].below, {0, s.p.N});
  for (int front = 0; front < runs_of_layer + count - 1; ++front) {
    const int first = std::max(0, front - runs_of_layer + 1), last = std::min(front, count - 1);
    std::vector<ForwardRun> runs;
    std::vector<StepsForward> steps_of_runs;
    bool aligned = true;
    for (int i = first; i <= last; ++i)
      for (int64_t d = 0; d < directions; ++d) {
        const int begin = (front - i) * steps, end = std::min(begin + steps, s.sequences.steps);
        const RowRange rows = s.rows_of_steps(d == 1, begin, end);
        const Tensor input = i == 0 ? rows.of(lowest_input) : s.input_of_layer(layers[i].index, layers[i].below, rows);
        const Direction& of = all[i * directions + d];
        steps_of_runs.push_back(steps_of(s, layers[i], d, input, of.recurrence, begin, end));
        aligned = aligned && s.aligned({&steps_of_runs.back().gates_x});
        ForwardRun run = run_of(s, layers[i], d, of.recurrence, steps_of_runs.back());
        run.begin = begin;
        run.end = end;
        run.carried_h = pointer(of.carried_h);
        run.carried_c = static_cast<float*>(pointer(of.carried_c));
        runs.push_back(run);
      }
    launch_runs(s, plan, runs, aligned, launchers, "a forward pass");
    for (size_t i = 0; i < runs.size(); ++i) {
      const Direction& of = all[first * directions + i];
      project(s, of.layer, of.direction, of.recurrence, steps_of_runs[i]);
    }
  }
  for (const Direction& of : all) put_final_outputs(s, of.layer, of.direction, of.recurrence);
}

}  // namespace

ForwardResult lstm(const Call& call, const Wanted& wanted) {
  const Tensor& x = call.x;
  const bool save = wanted.save, save_gates = save && !wanted.recompute;
  Arguments a = parse(call, save);
  check_wanted(a, wanted);
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
    const int64_t kept_rows = saved[kSavedGates].size(1);
    saved.push_back(at::empty({states, kept_rows, kGates * p.H}, x.options()));
    saved.push_back(at::empty({2 * states, kept_rows, 1}, compute));
  }
  Tensor y = at::empty({p.N, width}, x.options());
  std::vector<Tensor> cell_states;
  const int64_t returned = wanted.cell_layers * p.directions;
  if (returned > 0) cell_states = {at::empty({returned, p.N, p.H}, x.options())};
  if (p.B > 0) {
    const Stack s(a, call, 1);
    const PassPlan plan = plan_forward(p, s.element, s.limits, s.constraints);
    Tensor below = s.x;
    for (int64_t first = 0; first < p.layers; first += plan.layers) {
      std::vector<LayerForward> layers;
      for (int64_t l = first; l < std::min(first + plan.layers, p.layers); ++l) {
        const Tensor out = l == p.layers - 1 ? y
                           : save            ? saved[kSavedOutputs][l]
                                             : at::empty({p.N, width}, x.options());
        if (s.padded()) out.zero_();
        LayerForward layer = {};
        layer.index = l;
        layer.below = below;
        layer.y = out;
        layer.h_n = h_n, layer.c_n = c_n;
        if (save)
          layer.cells = saved[kSavedCells].narrow(0, l * p.directions, p.directions);
        else if (l >= p.layers - wanted.cell_layers)
          layer.cells = s.empty_compute({p.directions, p.N, p.H});
        if (save_gates && p.layer_norm)
          layer.norm_ih = saved[kSavedGates], layer.norm_hh = saved[kSavedNormHh], layer.rstd = saved[kSavedRstd];
        else if (save_gates)
          layer.gates = saved[kSavedGates];
        layers.push_back(std::move(layer));
        below = out;
      }
      if (keeps_weights(plan.family)) {
        fused_forward(s, layers, plan);
      } else {
        const Tensor input = s.input_of_layer(first, layers[0].below, {0, p.N});
        for (int64_t d = 0; d < p.directions; ++d)
          if (plan.family == Family::kStreamed)
            streamed_forward(s, layers[0], d, input, plan);
          else
            stepwise_forward(s, layers[0], d, input);
      }
      for (const LayerForward& layer : layers) {
        const int64_t of_layer = layer.index * p.directions - states + returned;  // among the states of those returned
        if (of_layer >= 0) cell_states[0].narrow(0, of_layer, p.directions).copy_(layer.cells);
      }
    }
    if (returned > 0 && s.padded()) cell_states[0].masked_fill_(s.padding(), 0);
  }
  const auto as_states = [&](const Tensor& t) { return t.reshape(a.states.then(t.size(-1))); };
  for (Tensor& t : cell_states) t = t.reshape(a.rows_of(returned, p.H));
  return {y.reshape(a.rows.then(width)), as_states(h_n), as_states(c_n), std::move(saved), std::move(cell_states)};
}

}  // namespace fastlstm::cuda
