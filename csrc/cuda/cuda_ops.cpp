// The operators on CUDA: tensors in, checks, layer after layer the products over all steps and the recurrence as
// planned, tensors out.
//
// Products over all steps (x W_ih^T and the gradients of x and of the weights) are cuBLAS's (products.cpp); the
// recurrence is ours. Everything happens on the current stream of x's device, nothing waits for it, and all memory is
// torch's: a call can be captured in a CUDA graph, unless it has batch_sizes or lengths on the CPU, which are copied.
//
// gates_x, activations (or normalised products) and gradients are saved and exchanged in the dtype of x; sums and cell
// states are float32 (float64 for float64).
#include "cuda_ops.h"

#include <ATen/DeviceGuard.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "../cell.h"
#include "runtime.h"

namespace fastlstm::cuda {

namespace {

Element element_of(ScalarType type, bool reduced_products) {
  switch (type) {
    case ScalarType::BFloat16: return Element::kBf16;
    case ScalarType::Half: return Element::kFp16;
    case ScalarType::Double: return Element::kFp64;
    default: return reduced_products ? Element::kTf32 : Element::kFp32;
  }
}

constexpr int kDirections = 2;  // of a layer, at most

// The parameters of one direction of one layer; an absent one is an undefined tensor.
struct Weights {
  Tensor w_ih, w_hh, b_ih, b_hh, w_hr;
  Tensor gain_ih, gain_hh, gain_c, bias_c;  // of layer normalisation
};

struct RowRange {
  int64_t first, count;

  Tensor of(const Tensor& t) const { return t.narrow(0, first, count); }
};

// Of a tensor that may be undefined, or of its i-th part.
void* pointer(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }
void* pointer(const Tensor& t, int64_t i) { return t.defined() ? t.select(0, i).data_ptr() : nullptr; }

// A call on the device, measured, with all it has in contiguous tensors.
class Stack {
 public:
  // groups: of adjacent rows of the batch, each of which has gradients of the weights of its own.
  Stack(const Arguments& arguments, const Call& call, int64_t groups)
      : a(arguments),
        p(arguments.problem),
        groups(groups),
        element(element_of(a.type, call.reduced_products)),
        stream(current_stream(call.x.device())),
        limits(limits_of(call.x.device())),
        constraints(forced()),
        options(call.x.options()),
        x(rows(call.x)),
        h_0(states(call.h_0)),
        c_0(states(call.c_0)),
        reset_h(states(call.reset_h)),
        recurrent_mask(states(call.recurrent_mask)),
        reset_c_(states(call.reset_c)),
        zoneout_h_(marks(call.zoneout_h)),
        zoneout_c_(marks(call.zoneout_c)),
        zoneout_rate_h_(call.zoneout_rate_h),
        zoneout_rate_c_(call.zoneout_rate_c) {
    if (call.dropout_mask) dropout_mask = call.dropout_mask->reshape({p.layers - 1, p.N, width()});
    for (size_t i = 0; i < call.weights.size(); i += a.per_direction) {
      const Tensor* w = call.weights.data() + i;
      Weights weights = {};
      weights.w_ih = w[0].contiguous(), weights.w_hh = w[1].contiguous();
      if (call.has_bias) weights.b_ih = w[2].contiguous(), weights.b_hh = w[3].contiguous();
      const int64_t plain = a.plain_weights();
      if (p.P > 0) weights.w_hr = w[plain - 1].contiguous();
      if (p.layer_norm) {
        weights.gain_ih = w[plain].contiguous(), weights.gain_hh = w[plain + 1].contiguous();
        weights.gain_c = w[plain + 2].contiguous(), weights.bias_c = w[plain + 3].contiguous();
      }
      weights_.push_back(std::move(weights));
    }
    sequences.steps = static_cast<int>(p.T);
    sequences.batch = static_cast<int>(p.B);
    if (!a.offsets.empty()) {
      // A column has the steps that have a row for it.
      std::vector<int64_t> table = a.offsets;
      for (int64_t b = 0, t = p.T; b < p.B; ++b) {
        while (a.offsets[t] - a.offsets[t - 1] <= b) --t;
        table.push_back(t);
      }
      packing_ = on_device(table);
      sequences.offsets = data<int64_t>(packing_);
      sequences.lengths = sequences.offsets + p.T + 1;
    } else if (call.lengths) {
      lengths = call.lengths->contiguous().to(call.x.device());
      sequences.lengths = data<int64_t>(lengths);
    }
    if (call.reset_mask) {
      reset_mask_ = call.reset_mask->contiguous();
      sequences.resets = data<bool>(reset_mask_);
    }
  }

  const Weights& weights(int64_t layer, int64_t direction) const { return weights_[layer * p.directions + direction]; }
  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, options); }
  Tensor empty_compute(at::IntArrayRef sizes) const { return at::empty(sizes, options.dtype(a.compute_type)); }
  Tensor product(const Tensor& left, const Tensor& right) const {
    Tensor result = empty({left.size(0), right.size(1)});
    multiply(element, result, left, right);
    return result;
  }
  // The sum of all rows of left^T right; with groups, [G, ...]: of the rows of each.
  Tensor gradient(const Tensor& left, const Tensor& right) const {
    return groups == 1 ? product(left.t(), right) : multiply_batches(grouped(left).transpose(1, 2), grouped(right));
  }
  // The sum of all rows, likewise. As a product, with sums in float32: torch's reduction of so few columns takes twice
  // the memory of its input.
  Tensor sum_of_rows(const Tensor& t) const {
    const Tensor ones = at::ones({1, t.size(0) / groups}, options);
    if (groups > 1) return multiply_batches(ones.expand({groups, 1, ones.size(1)}), grouped(t)).squeeze(1);
    const Tensor sum = empty({1, t.size(1)});
    multiply(element == Element::kTf32 ? Element::kFp32 : element, sum, ones, t);
    return sum.squeeze(0);
  }
  // What steps of a direction of a layer have beyond the cell.
  StepExtras extras(int64_t state) const {
    const auto zoneout = [&](const Tensor& mask, double rate) -> Zoneout {
      return {static_cast<const bool*>(pointer(mask, state)), rate};
    };
    return {pointer(reset_h, state), pointer(reset_c_, state), pointer(recurrent_mask, state),
            zoneout(zoneout_h_, zoneout_rate_h_), zoneout(zoneout_c_, zoneout_rate_c_)};
  }
  // Of a direction of a layer, with layer normalisation.
  NormWeights norm_weights(const Weights& w) const {
    return {pointer(w.gain_ih), pointer(w.gain_hh), pointer(w.b_ih),
            pointer(w.b_hh),    pointer(w.gain_c),  pointer(w.bias_c)};
  }
  int64_t width() const { return p.directions * p.output_size(); }
  // Rows of x, y and what is saved that belong to no step: columns are of different lengths and nothing is packed.
  bool padded() const { return sequences.lengths != nullptr && sequences.offsets == nullptr; }
  // Of the steps begin <= n < end of a pass, the first row and how many there are. A pass goes back in time if it is
  // one of the two, a backward pass or one of the reverse direction.
  RowRange rows_of_steps(bool back_in_time, int64_t begin, int64_t end) const {
    const int64_t first = back_in_time ? p.T - end : begin, last = back_in_time ? p.T - begin : end;
    if (a.offsets.empty()) return {first * p.B, (last - first) * p.B};
    return {a.offsets[first], a.offsets[last] - a.offsets[first]};
  }
  // Whether rows of H elements begin at multiples of 16 bytes: kernels then load them in such pieces.
  bool aligned(std::initializer_list<const Tensor*> tensors) const {
    return p.H % (16 / storage_bytes(element)) == 0 && begin_aligned(tensors);
  }
  // Whether kernels for single steps may load a few elements at once: 16 bytes of the compute type.
  bool vectors(std::initializer_list<const Tensor*> tensors) const {
    const int64_t elements = element == Element::kFp64 ? 2 : 4;
    return p.H % elements == 0 && p.P % elements == 0 && begin_aligned(tensors);
  }
  // What the teams of a launch exchange their states through, with all tags as no first step has them.
  Tensor exchange_buffer(const PassPlan& plan, int runs) const {
    const auto bytes = static_cast<int64_t>(plan.exchange_bytes) * runs * plan.groups;
    Tensor buffer = at::empty({bytes}, options.dtype(ScalarType::Byte));
    check(cudaMemsetAsync(buffer.data_ptr(), 0xff, bytes, stream), "clearing an exchange buffer");
    return buffer;
  }
  // Room for a state between two runs: in the compute type, or as a factor.
  Tensor carried_state() const { return empty_compute({p.B, p.H}); }
  Tensor carried_factor() const { return at::zeros({p.B, row_stride()}, options); }
  // Rows of factors as kernels load them: of a multiple of 8 elements, aligned to 16 bytes, zero behind H.
  Tensor factor_rows(const Tensor& t) const {
    if (row_stride() == p.H && aligned({&t})) return t;
    Tensor padded = at::zeros({t.size(0), row_stride()}, options);
    padded.narrow(1, 0, p.H).copy_(t);
    return padded;
  }
  int row_stride() const { return ceil_div(static_cast<int>(p.H), kOctet) * kOctet; }
  // [*x.shape[:-1], features] as [N, features], contiguous.
  Tensor rows(const Tensor& t) const { return as(t, a.type).reshape({p.N, t.size(-1)}); }
  // [L*D, B, features], or of a single step [B, features], as [L*D, B, features].
  Tensor states(const Tensor& t) const { return as(t, a.type).reshape({p.layers * p.directions, p.B, t.size(-1)}); }
  Tensor states(const OptionalTensor& t) const { return t ? states(*t) : Tensor(); }
  // [blocks, *x.shape[:-1], features] as [blocks, N, features], contiguous.
  Tensor blocks_of_rows(const Tensor& t) const { return t.contiguous().reshape({t.size(0), p.N, t.size(-1)}); }

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
  Tensor grouped(const Tensor& t) const {
    const int64_t features = t.size(1), rows = p.B / groups;
    return t.view({p.T, groups, rows, features}).transpose(0, 1).reshape({groups, p.T * rows, features});
  }
  // Of those that are defined: whether they begin at multiples of 16 bytes.
  static bool begin_aligned(std::initializer_list<const Tensor*> tensors) {
    return std::ranges::all_of(
        tensors, [](const Tensor* t) { return !t->defined() || reinterpret_cast<uintptr_t>(t->data_ptr()) % 16 == 0; });
  }
  Tensor on_device(const std::vector<int64_t>& values) const {
    const Tensor on_host = at::from_blob(const_cast<int64_t*>(values.data()), {static_cast<int64_t>(values.size())},
                                         at::dtype(ScalarType::Long));
    return on_host.clone().to(options.device());
  }

  const Tensor reset_c_, zoneout_h_, zoneout_c_;  // [L*D, B, H], [L*D, N, P], [L*D, N, H], or undefined
  const double zoneout_rate_h_, zoneout_rate_c_;
  std::vector<Weights> weights_;
  Tensor packing_, reset_mask_;
};

// Launches runs of a family that keeps weights in CTAs: at the same time, unless the plan says that both directions do
// not fit; as many columns of the batch at a time as do.
template <class Run, class Launch>
void launch_runs(const Stack& s, const PassPlan& plan, const std::vector<Run>& runs, bool aligned,
                 const Launch& launch) {
  LaunchParams<Run> params = {};
  params.sequences = s.sequences;
  params.hidden = static_cast<int>(s.p.H);
  params.row_stride = s.row_stride();
  params.y_stride = s.width();
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
      launch(params);
    }
}

// ------------------------------------------------------------------------------------------------ forward

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

// Rows of what layer l reads: of the outputs of the layer below, with dropout.
Tensor input_of_layer(const Stack& s, int64_t layer, const Tensor& below, const RowRange& rows) {
  const Tensor input = rows.of(below);
  return layer > 0 && s.dropout_mask.defined() ? input.mul(rows.of(s.dropout_mask[layer - 1])) : input;
}

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
  run.y = layer.y.narrow(1, direction * s.p.output_size(), s.p.output_size()).data_ptr();
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

// In place. rstd: what rows are scaled by, or null.
void normalize(const Stack& s, const Tensor& rows, void* rstd) {
  const NormalizeRowsParams params = {rows.size(0), static_cast<int>(rows.size(1)), rows.data_ptr(), rstd};
  check(launch_normalize_rows(s.element, params, s.stream), "normalising products");
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
    normalize(s, gates_x, pointer(layer.rstd, state));
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
  const Tensor lowest_input = input_of_layer(s, layers[0].index, layers[0].below, {0, s.p.N});
  for (int front = 0; front < runs_of_layer + count - 1; ++front) {
    std::vector<ForwardRun> runs;
    std::vector<Tensor> gates_x;
    bool aligned = true;
    for (int i = std::max(0, front - runs_of_layer + 1); i <= std::min(front, count - 1); ++i)
      for (int64_t d = 0; d < directions; ++d) {
        const int begin = (front - i) * steps, end = std::min(begin + steps, s.sequences.steps);
        const RowRange rows = s.rows_of_steps(d == 1, begin, end);
        const Tensor input = i == 0 ? rows.of(lowest_input) : input_of_layer(s, layers[i].index, layers[i].below, rows);
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

// ------------------------------------------------------------------------------------------------ backward

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
  // With layer normalisation: [N, 4H] and [N], as in LayerForward; [N, H], of cell states, and the gradients of what
  // tanh is taken of; [N, 4H], the gradients of W_hh h.
  Tensor norm_ih[kDirections], norm_hh[kDirections], rstd_ih[kDirections], rstd_hh[kDirections];
  Tensor norm_c[kDirections], d_norm_c[kDirections], d_products_hh[kDirections];

  // What W_hh^T is multiplied by.
  const Tensor& d_recurrent(int64_t direction) const {
    return d_products_hh[direction].defined() ? d_products_hh[direction] : d_gates[direction];
  }
};

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
  if (layer.d_y.defined()) run.d_y = layer.d_y.narrow(1, direction * s.p.output_size(), s.p.output_size()).data_ptr();
  run.d_h_n = part(layer.d_h_n);
  run.d_c_n = part(layer.d_c_n);
  run.d_gates = pointer(layer.d_gates[direction]);
  run.d_h_0 = part(layer.d_h_0);
  run.d_c_0 = part(layer.d_c_0);
  return run;
}

// What launches for single steps have in common. Between steps: d_h and d_c.
template <class Params>
Params step_params(const Stack& s, const LayerBackward& layer, int64_t direction, const Tensor& w_hh, const Tensor& d_h,
                   const Tensor& d_c) {
  Params params = {};
  params.sequences = s.sequences;
  params.hidden = static_cast<int>(s.p.H);
  params.outputs = static_cast<int>(s.p.output_size());
  params.y_stride = s.width();
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
  transposed.narrow(1, 0, p.H).copy_(
      s.weights(layer.index, direction).w_hh.view({kGates, p.H, p.H}).permute({2, 1, 0}));
  const Tensor gradients[2] = {at::zeros({p.B, s.row_stride() * kGates}, s.options),
                               at::zeros({p.B, s.row_stride() * kGates}, s.options)};
  auto params = step_params<StreamedBackwardParams>(s, layer, direction, Tensor(), d_h, d_c);
  params.variant = {plan.team.octets, plan.team.tiles};
  params.row_stride = s.row_stride() * kGates;
  params.transposed_w_hh = transposed.data_ptr();
  check(launch_states_backward(s.element, params, s.stream), "a backward pass");
  // After the last step, its product gives d_h_0.
  const int steps = s.sequences.steps, launches = layer.d_h_0.defined() ? steps + 1 : steps;
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
      aligned = aligned && s.aligned({&layer.gates[d], &layer.cells, &layer.d_y});
      Direction of = {s.factor_rows(s.weights(layer.index, d).w_hh), {}, {}};
      if (runs_of_layer > 1) of.carried_d_h = s.carried_state(), of.carried_d_c = s.carried_state();
      all.push_back(std::move(of));
    }
  }
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
        const Direction& of = all[i * directions + d];
        BackwardRun run = run_of(s, layers[i], d, of.w_hh);
        run.begin = begin;
        run.end = end;
        run.carried_d_h = static_cast<float*>(pointer(of.carried_d_h));
        run.carried_d_c = static_cast<float*>(pointer(of.carried_d_c));
        runs.push_back(run);
      }
    launch_runs(s, plan, runs, aligned, [&](const BackwardParams& params) {
      const auto launch = plan.family == Family::kResident    ? launch_resident_backward
                          : plan.family == Family::kWarpgroup ? launch_warpgroup_backward
                                                              : launch_persistent_backward;
      check(launch(s.element, params, s.stream), "a backward pass");
    });
  }
}

// What the steps of a direction read as h.
Tensor read_h(const Stack& s, const LayerBackward& layer, int64_t direction) {
  const Problem& p = s.p;
  const int64_t state = layer.index * p.directions + direction;
  const Tensor h_0 = s.h_0[state], y = layer.y.narrow(1, direction * p.output_size(), p.output_size());
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
  const Tensor input = input_of_layer(s, layer.index, layer.below, {0, p.N});
  for (int64_t d = 0; d < p.directions; ++d) {
    const Weights& w = s.weights(layer.index, d);
    layer.read_h[d] = read_h(s, layer, d);
    const Tensor products = s.product(input, w.w_ih.t());
    if (p.layer_norm) {
      layer.norm_ih[d] = products, layer.rstd_ih[d] = s.empty_compute({p.N});
      normalize(s, layer.norm_ih[d], layer.rstd_ih[d].data_ptr());
      layer.norm_hh[d] = s.product(layer.read_h[d], w.w_hh.t()), layer.rstd_hh[d] = s.empty_compute({p.N});
      normalize(s, layer.norm_hh[d], layer.rstd_hh[d].data_ptr());
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

// What a backward pass reads of a layer's gates: kept, or computed again.
void find_gates(const Stack& s, LayerBackward& layer, at::TensorList saved) {
  const Problem& p = s.p;
  const bool kept = saved[0].size(1) > 0;
  if (!kept) compute_gates_again(s, layer);
  for (int64_t d = 0; d < p.directions; ++d) {
    const int64_t state = layer.index * p.directions + d;
    if (!p.layer_norm) {
      if (kept) layer.gates[d] = saved[0][state];
      continue;
    }
    if (kept) {
      layer.norm_ih[d] = saved[0][state], layer.rstd_ih[d] = saved[4][state];
      layer.norm_hh[d] = saved[3][state], layer.rstd_hh[d] = saved[4][p.layers * p.directions + state];
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

// What W_hh^T is multiplied by, transposed, times what each step read as h.
Tensor gradient_of_w_hh(const Stack& s, const LayerBackward& layer, int64_t direction) {
  const Problem& p = s.p;
  const bool reverse = direction == 1;
  const Tensor &d_gates = layer.d_recurrent(direction), &read = layer.read_h[direction];
  const bool rows_of_y = !s.sequences.lengths && !s.sequences.resets && !s.recurrent_mask.defined();
  if (!read.defined() && rows_of_y && s.groups == 1) {
    const Tensor h_0 = s.h_0[layer.index * p.directions + direction];
    const Tensor y = layer.y.narrow(1, direction * p.output_size(), p.output_size());
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

// A tensor of rows without those that belong to no step: what they hold must not reach a gradient, NaN included.
Tensor without_padding(const Stack& s, const Tensor& rows) {
  const Tensor& lengths = s.lengths;
  const Tensor steps = at::arange(s.p.T, lengths.options()).unsqueeze(1);
  const Tensor behind_end = steps.ge(lengths.unsqueeze(0)).reshape({s.p.N, 1});
  return rows.masked_fill(behind_end, 0);
}

// Into their places in d_weights, those that are needed. With layer normalisation, leaves the gradients of W_ih x in
// d_gates, for that of x.
void gradients_of_weights(const Stack& s, const LayerBackward& layer, bool has_bias, at::IntArrayRef needs,
                          std::vector<Tensor>& d_weights) {
  Tensor input;  // made again only if a gradient asks for it
  // The sum over all rows of an element times a factor.
  const auto gradient_of_gain = [&](const Tensor& d, const Tensor& norm) {
    return s.sum_of_rows(s.padded() ? without_padding(s, norm).mul_(d) : norm.mul(d));
  };
  for (int64_t d = 0; d < s.p.directions; ++d) {
    const size_t first = (layer.index * s.p.directions + d) * s.a.per_direction;
    const auto needed = [&](int64_t which) { return needs[2 + first + which] != 0; };
    const Tensor& d_gates = layer.d_gates[d];
    const int64_t plain = s.a.plain_weights();
    const bool needs_input = layer.index > 0 || needs[0] != 0;
    if (has_bias && (needed(2) || needed(3))) {
      const Tensor d_bias = s.sum_of_rows(d_gates);
      if (needed(2)) d_weights[first + 2] = d_bias;
      if (needed(3)) d_weights[first + 3] = needed(2) ? d_bias.clone() : d_bias;
    }
    if (s.p.layer_norm) {
      if (needed(plain)) d_weights[first + plain] = gradient_of_gain(d_gates, layer.norm_ih[d]);
      if (needed(plain + 1)) d_weights[first + plain + 1] = gradient_of_gain(d_gates, layer.norm_hh[d]);
      if (needed(plain + 2)) d_weights[first + plain + 2] = gradient_of_gain(layer.d_norm_c[d], layer.norm_c[d]);
      if (needed(plain + 3)) d_weights[first + plain + 3] = s.sum_of_rows(layer.d_norm_c[d]);
      if (needed(0) || needs_input) {
        const DenormalizeRowsParams params = {s.sequences,
                                              static_cast<int>(d_gates.size(1)),
                                              d_gates.data_ptr(),
                                              pointer(s.weights(layer.index, d).gain_ih),
                                              pointer(layer.norm_ih[d]),
                                              pointer(layer.rstd_ih[d])};
        check(launch_denormalize_rows(s.element, params, s.stream), "a backward pass");
      }
    }
    if (needed(0)) {
      if (!input.defined()) {
        input = input_of_layer(s, layer.index, layer.below, {0, s.p.N});
        if (s.padded() && layer.index == 0) input = without_padding(s, input);
      }
      d_weights[first] = s.gradient(d_gates, input);
    }
    if (needed(1)) d_weights[first + 1] = gradient_of_w_hh(s, layer, d);
    if (s.p.P > 0 && needed(plain - 1))
      d_weights[first + plain - 1] = s.gradient(layer.d_outputs[d], layer.hidden_states[d]);
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
      const Tensor input = input_of_layer(s, first, layers[0].below, {0, p.N});
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
  if (plan.family == Family::kWarpgroup && !s.aligned({&d_y_of_layer})) d_y_of_layer = d_y_of_layer.clone();
  for (int64_t first = p.layers - 1; first >= 0; first -= plan.layers) {
    std::vector<LayerBackward> layers;
    for (int64_t l = first; l > std::max<int64_t>(first - plan.layers, -1); --l) {
      LayerBackward layer = {};
      layer.index = l;
      layer.below = l == 0 ? s.x : saved[2][l - 1];
      layer.y = l == p.layers - 1 ? s.rows(backward.y) : saved[2][l];
      layer.d_y = l == first ? d_y_of_layer : s.empty({p.N, s.width()});
      const int64_t first_returned = (l - p.layers + cell_layers) * p.directions;  // of the layer
      if (first_returned >= 0) layer.d_cell_states = d_cell_states.narrow(0, first_returned, p.directions);
      layer.cells = saved[1];
      layer.d_h_n = initial_d_h;
      layer.d_c_n = initial_d_c;
      layer.d_h_0 = d_h_0;
      layer.d_c_0 = d_c_0;
      layer.d_reset_h = d_reset_h;
      layer.d_reset_c = d_reset_c;
      find_gates(s, layer, saved);
      for (int64_t d = 0; d < p.directions; ++d) {
        layer.d_gates[d] = s.empty({p.N, kGates * p.H});
        if (p.P > 0) layer.d_outputs[d] = s.empty({p.N, p.P}), layer.hidden_states[d] = s.empty({p.N, p.H});
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
    for (const LayerBackward& layer : layers) gradients_of_weights(s, layer, call.has_bias, needs, d_weights);

    const LayerBackward& lowest = layers.back();
    if (lowest.index == 0 && !needs[0]) continue;
    const Tensor d_input = s.empty({p.N, lowest.below.size(1)});
    for (int64_t d = 0; d < p.directions; ++d)
      multiply(s.element, d_input, lowest.d_gates[d], s.weights(lowest.index, d).w_ih, d > 0);
    if (lowest.index == 0)
      d_x = d_input.reshape(x.sizes());
    else
      d_y_of_layer = input_of_layer(s, lowest.index, d_input, {0, p.N});  // through the same dropout
  }
  const auto as_states = [&](const Tensor& t) {
    return t.defined() ? as(t, a.type).reshape(a.states.then(t.size(-1))) : nothing;
  };
  if (call.reset_h) d_resets = {as_states(d_reset_h), as_states(d_reset_c)};
  return {d_x, as_states(d_h_0), as_states(d_c_0), std::move(d_weights), std::move(d_resets)};
}

}  // namespace fastlstm::cuda

#ifndef FASTLSTM_EMULATE_CUDA  // the tests of the emulation register the operators for themselves
TORCH_LIBRARY_IMPL(fastlstm, CUDA, m) {
  m.impl("lstm", fastlstm::forward_kernel<fastlstm::cuda::lstm>);
  m.impl("lstm_backward", fastlstm::backward_kernel<fastlstm::cuda::lstm_backward>);
}
#endif
