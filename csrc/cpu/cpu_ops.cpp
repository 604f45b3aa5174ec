// The operators on the CPU: tensors in, conversion to the compute type, one call of the driver, tensors out.
//
// float32 and float64 run as they are. bfloat16 and float16 are widened to float32 on entry and rounded on exit; in
// between, only a plan with bfloat16 products rounds, and only their factors. (In backward, the gradient of the last
// layer's W_hh reads h from the rounded y.)
//
// The driver knows sequences of different lengths only as packed rows. With `lengths`, rows are gathered into that form
// on entry and scattered back on exit, which costs one copy of x and y.
#include "../ops.h"

#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "../cell.h"
#include "runtime.h"
#include "stack.h"

namespace fastlstm::cpu {

namespace {

// ------------------------------------------------------------------------------------------------ arguments

// With `lengths`: where the driver's packed rows lie in the caller's padded tensors.
struct Packing {
  std::vector<int64_t> sequences;  // [problem.B]: the caller's batch rows that have any step, the longest first
  std::vector<int64_t> rows;       // [problem.N]: t * B + batch row
};

// A call as the driver computes it: with `lengths`, T, B and N of the problem are those of the packed rows.
struct DriverArguments : Arguments {
  Schedule schedule = {};
  std::optional<Packing> packing = {};
  std::optional<Restarts> restarts[2] = {};  // per direction
};

// Sorts the sequences by length and rewrites problem and schedule for the packed rows.
void pack_by_lengths(DriverArguments& a, const Tensor& tensor) {
  Problem& p = a.problem;
  const Tensor contiguous_lengths = as(tensor, ScalarType::Long);
  const auto* lengths = data<int64_t>(contiguous_lengths);
  Packing packing;
  for (int64_t b = 0; b < p.B; ++b) {
    FASTLSTM_CHECK(lengths[b] >= 0 && lengths[b] <= p.T, "lengths must lie in [0, T] = [0, ", p.T, "], got ",
                   lengths[b], " at ", b);
    if (lengths[b] > 0) packing.sequences.push_back(b);
  }
  std::stable_sort(packing.sequences.begin(), packing.sequences.end(),
                   [&](int64_t left, int64_t right) { return lengths[left] > lengths[right]; });
  const int64_t steps = packing.sequences.empty() ? 0 : lengths[packing.sequences.front()];
  packing.rows.reserve(std::accumulate(lengths, lengths + p.B, int64_t{0}));
  a.schedule.offsets = {0};
  for (int64_t t = 0; t < steps; ++t) {
    for (const int64_t b : packing.sequences) {
      if (lengths[b] <= t) break;  // nor do the shorter ones after it run any more
      packing.rows.push_back(t * p.B + b);
    }
    a.schedule.offsets.push_back(static_cast<int64_t>(packing.rows.size()));
  }
  p.T = steps;
  p.B = static_cast<int64_t>(packing.sequences.size());
  p.N = a.schedule.rows();
  a.packing = std::move(packing);
}

// The mask cuts each sequence before the steps it marks, and each direction starts anew at the beginning of its pieces:
// forward in time at the marked step, in reverse at the step before it.
void find_restarts(DriverArguments& a, const Tensor& reset_mask) {
  const Tensor contiguous_mask = as(reset_mask, ScalarType::Bool);
  const auto* mask = data<bool>(contiguous_mask);
  const Schedule& schedule = a.schedule;
  const auto marked = [&](int64_t row) { return mask[a.packing ? a.packing->rows[row] : row]; };
  for (int64_t d = 0; d < a.problem.directions; ++d) {
    Restarts restarts = {std::vector<uint8_t>(a.problem.N), std::vector<uint8_t>(a.problem.T)};
    bool any = false;
    for (int64_t t = 0; t < a.problem.T; ++t) {
      const int64_t cut = d == 0 ? t : t + 1;
      for (int64_t b = 0; b < schedule.active(cut); ++b)
        if (marked(schedule.offsets[cut] + b)) restarts.rows[schedule.offsets[t] + b] = restarts.steps[t] = any = true;
    }
    if (any) a.restarts[d] = std::move(restarts);
  }
}

DriverArguments parse_for_driver(const Call& call, bool training) {
  DriverArguments a = {parse(call, training)};
  Problem& p = a.problem;
  p.bf16_allowed = a.type == ScalarType::BFloat16 || (a.type == ScalarType::Float && call.reduced_products);
  if (call.batch_sizes)
    a.schedule.offsets = std::move(a.offsets);
  else if (call.lengths)
    pack_by_lengths(a, *call.lengths);
  else
    for (int64_t t = 0; t <= p.T; ++t) a.schedule.offsets.push_back(t * p.B);
  if (call.reset_mask) find_restarts(a, *call.reset_mask);
  return a;
}

// ------------------------------------------------------------------------------------------------ packed rows

// The rows that the driver packs out of a tensor of the caller: `index`, in each of `blocks` sets of `caller_rows`
// rows.
struct RowMap {
  const std::vector<int64_t>& index;
  int64_t caller_rows, blocks, features;

  Sizes packed_sizes() const { return {blocks, static_cast<int64_t>(index.size()), features}; }

  // copy(offset in the packed form, offset in the caller's)
  template <class Copy>
  void for_each_row(const Copy& copy) const {
    const auto rows = static_cast<int64_t>(index.size());
    parallel(blocks * rows, kElementwiseGrain / features + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) copy(i * features, (i / rows * caller_rows + index[i % rows]) * features);
    });
  }
  template <class T>
  void pack(const T* from, T* packed) const {
    for_each_row(
        [&](int64_t in_packed, int64_t in_from) { std::copy_n(from + in_from, features, packed + in_packed); });
  }
  template <class T>
  void unpack(const T* packed, T* to) const {
    for_each_row([&](int64_t in_packed, int64_t in_to) { std::copy_n(packed + in_packed, features, to + in_to); });
  }
};

// Of [blocks, *x.shape[:-1], features], and of [L*D, caller's B, features].
RowMap map_rows(const DriverArguments& a, int64_t blocks, int64_t features) {
  return {a.packing->rows, a.row_count, blocks, features};
}
RowMap map_states(const DriverArguments& a, int64_t features) {
  return {a.packing->sequences, a.states[1], a.states[0], features};
}

// The caller's tensors as the driver reads them: in the compute type, contiguous and, with `lengths`, packed. Keeps the
// converted tensors alive.
template <class T>
class Inputs {
 public:
  Inputs(const DriverArguments& a, size_t expected) : a_(a) { kept_.reserve(expected); }

  const T* plain(const Tensor& tensor) {
    kept_.push_back(as(tensor, a_.compute_type));
    return data<T>(kept_.back());
  }
  // [blocks, *x.shape[:-1], features] as [blocks, N, features]
  const T* rows(const Tensor& tensor, int64_t blocks, int64_t features) {
    return a_.packing ? packed(tensor, map_rows(a_, blocks, features)) : plain(tensor);
  }
  // [L*D, caller's B, features] as [L*D, B, features]
  const T* states(const Tensor& tensor, int64_t features) {
    return a_.packing ? packed(tensor, map_states(a_, features)) : plain(tensor);
  }
  const T* states(const OptionalTensor& tensor, int64_t features) {
    return tensor ? states(*tensor, features) : nullptr;
  }
  // bool [blocks, *x.shape[:-1], features] as bytes [blocks, N, features]
  const uint8_t* marks(const Tensor& tensor, int64_t blocks, int64_t features) {
    kept_.push_back(as(tensor, ScalarType::Bool));
    const auto* from = data<uint8_t>(kept_.back());
    return a_.packing ? pack(from, map_rows(a_, blocks, features), ScalarType::Bool) : from;
  }

 private:
  const T* packed(const Tensor& tensor, const RowMap& map) { return pack(plain(tensor), map, a_.compute_type); }

  template <class Element>
  const Element* pack(const Element* from, const RowMap& map, ScalarType type) {
    kept_.push_back(empty(map.packed_sizes(), type));
    auto* to = data<Element>(kept_.back());
    map.pack(from, to);
    return to;
  }

  const DriverArguments& a_;
  std::vector<Tensor> kept_;
};

// Tensors that the driver writes. With `lengths` it writes packed rows, and finish() puts them where they belong.
template <class T>
class Outputs {
 public:
  explicit Outputs(const DriverArguments& a) : a_(a) {}

  // [blocks, *x.shape[:-1], features]; zero beyond the end of a sequence
  T* rows(const Tensor& tensor, int64_t blocks, int64_t features) {
    if (!a_.packing) return data<T>(tensor);
    tensor.zero_();
    return packed(tensor, map_rows(a_, blocks, features));
  }
  // [L*D, caller's B, features]; keeps what it holds for sequences of no steps. `read`: the driver reads it too.
  T* states(const Tensor& tensor, int64_t features, bool read) {
    if (!a_.packing) return data<T>(tensor);
    const RowMap map = map_states(a_, features);
    T* to = packed(tensor, map);
    if (read) map.pack(data<T>(tensor), to);
    return to;
  }
  void finish() {
    for (const Packed& p : packed_) p.map.unpack(data<T>(p.rows), data<T>(p.tensor));
  }

 private:
  struct Packed {
    Tensor rows, tensor;
    RowMap map;
  };

  T* packed(const Tensor& tensor, const RowMap& map) {
    packed_.push_back({empty(map.packed_sizes(), a_.compute_type), tensor, map});
    return data<T>(packed_.back().rows);
  }

  const DriverArguments& a_;
  std::vector<Packed> packed_;
};

// ------------------------------------------------------------------------------------------------ forward

template <class T>
void fill_inputs(StackInputs<T>& stack, const DriverArguments& a, const Call& call, Inputs<T>& inputs) {
  const Problem& p = a.problem;
  stack.problem = &p;
  stack.schedule = &a.schedule;
  for (int d = 0; d < 2; ++d) stack.restarts[d] = a.restarts[d] ? &*a.restarts[d] : nullptr;
  stack.x = inputs.rows(call.x, 1, p.I);
  stack.h_0 = inputs.states(call.h_0, p.output_size());
  stack.c_0 = inputs.states(call.c_0, p.H);
  stack.dropout_mask =
      call.dropout_mask ? inputs.rows(*call.dropout_mask, p.layers - 1, p.directions * p.output_size()) : nullptr;
  stack.recurrent_mask = inputs.states(call.recurrent_mask, p.output_size());
  stack.reset_h = inputs.states(call.reset_h, p.output_size());
  stack.reset_c = inputs.states(call.reset_c, p.H);
  const auto zoneout = [&](const OptionalTensor& mask, double rate, int64_t features) -> Zoneout<T> {
    return {mask ? inputs.marks(*mask, p.layers * p.directions, features) : nullptr, static_cast<T>(rate)};
  };
  stack.zoneout_h = zoneout(call.zoneout_h, call.zoneout_rate_h, p.output_size());
  stack.zoneout_c = zoneout(call.zoneout_c, call.zoneout_rate_c, p.H);
  stack.weights.reserve(p.layers * p.directions);
  for (size_t i = 0; i < call.weights.size(); i += a.per_direction) {
    const Tensor* w = call.weights.data() + i;
    Weights<const T> pointers = {};
    pointers.w_ih = inputs.plain(w[0]), pointers.w_hh = inputs.plain(w[1]);
    if (call.has_bias) pointers.b_ih = inputs.plain(w[2]), pointers.b_hh = inputs.plain(w[3]);
    w += a.plain_weights();
    if (p.P > 0) pointers.w_hr = inputs.plain(w[-1]);
    if (p.layer_norm) pointers.norm = {inputs.plain(w[0]), inputs.plain(w[1]), inputs.plain(w[2]), inputs.plain(w[3])};
    stack.weights.push_back(pointers);
  }
}

// The driver's forward or backward pass, with kernels that take products as planned.
template <class Stack>
void run(const Stack& stack, const PassPlan& plan) {
  using T = std::remove_cvref_t<decltype(*stack.y)>;
  const Isa isa = selected_isa();
  if constexpr (std::is_same_v<T, float>)
    if (plan.products == Products::kBf16) return run_pass(stack, kernels<T, Bf16Pair>(isa), plan);
  run_pass(stack, kernels<T, T>(isa), plan);
}

template <class T>
ForwardResult forward(const DriverArguments& a, const Call& call, const Wanted& wanted) {
  const Problem& p = a.problem;
  const int64_t states = p.layers * p.directions, out = p.output_size(), width = p.directions * out;
  const Tensor y = empty(a.rows.then(width), a.compute_type);
  const auto state = [&](const Tensor& initial, int64_t features) {
    Tensor t = empty(a.states.then(features), a.compute_type);
    if (a.packing) t.copy_(initial);  // what a sequence of no steps ends with
    return t;
  };
  const Tensor h_n = state(call.h_0, out), c_n = state(call.c_0, p.H);
  // Packed rows fill the front of what is saved; the rest is zeroed, so that no result holds what memory held before.
  const auto save = [&](int64_t blocks, int64_t features) {
    Tensor t = empty({blocks, a.row_count, features}, a.compute_type);
    std::fill(data<T>(t) + blocks * p.N * features, data<T>(t) + t.numel(), T(0));
    return t;
  };
  // What lstm_backward can compute again.
  const auto save_gates = [&](int64_t blocks, int64_t features) {
    return wanted.recompute ? empty({blocks, 0, features}, a.compute_type) : save(blocks, features);
  };
  std::vector<Tensor> saved;
  if (p.training) saved = {save_gates(states, kGates * p.H), save(states, p.H), save(p.layers - 1, width)};
  if (p.training && p.layer_norm)
    saved.insert(saved.end(), {save_gates(states, kGates * p.H), save_gates(2 * states, 1)});
  std::vector<Tensor> cell_states;
  const int64_t returned = wanted.cell_layers * p.directions;
  if (returned > 0) cell_states = {empty(a.rows_of(returned, p.H), a.compute_type)};
  Inputs<T> inputs(a, call.weights.size() + 18);
  Outputs<T> outputs(a);
  T* const y_data = outputs.rows(y, 1, width);
  T* const cell_data = returned > 0 ? outputs.rows(cell_states[0], returned, p.H) : nullptr;
  if (p.B > 0) {
    StackForward<T> stack = {};
    fill_inputs(stack, a, call, inputs);
    stack.y = y_data;
    stack.h_n = outputs.states(h_n, out, false);
    stack.c_n = outputs.states(c_n, p.H, false);
    stack.cell_states = cell_data;
    stack.cell_layers = wanted.cell_layers;
    T* const gates = p.training && !wanted.recompute ? data<T>(saved[kSavedGates]) : nullptr;
    (p.layer_norm ? stack.norm_ih : stack.gates) = gates;
    stack.cells = p.training ? data<T>(saved[kSavedCells]) : nullptr;
    stack.layer_outputs = p.training ? data<T>(saved[kSavedOutputs]) : nullptr;
    if (stack.norm_ih) {
      stack.norm_hh = data<T>(saved[kSavedNormHh]);
      stack.rstd_ih = data<T>(saved[kSavedRstd]);
      stack.rstd_hh = stack.rstd_ih + states * p.N;
    }
    run(stack, plan_forward(p, this_machine(thread_count()), forced().plan));
    outputs.finish();
  }
  for (Tensor& t : cell_states) t = as(t, a.type);
  return {as(y, a.type), as(h_n, a.type), as(c_n, a.type), std::move(saved), std::move(cell_states)};
}

ForwardResult lstm(const Call& call, const Wanted& wanted) {
  const DriverArguments a = parse_for_driver(call, wanted.save);
  check_wanted(a, wanted);
  return a.compute_type == ScalarType::Double ? forward<double>(a, call, wanted) : forward<float>(a, call, wanted);
}

// ------------------------------------------------------------------------------------------------ backward

template <class T>
BackwardResult backward(const DriverArguments& a, const Call& call, const BackwardCall& b) {
  const Problem& p = a.problem;
  const at::IntArrayRef needs = b.needs;
  const int64_t out = p.output_size();
  // The driver updates the gradients of the states in place, from those of h_n and c_n to those of h_0 and c_0.
  const auto carry = [&](const OptionalTensor& incoming, int64_t features) {
    Tensor t = empty(a.states.then(features), a.compute_type);
    if (incoming)
      t.copy_(*incoming);
    else
      t.zero_();
    return t;
  };
  const Tensor d_h = carry(b.d_h_n, out), d_c = carry(b.d_c_n, p.H);
  const Tensor d_x = empty(needs[0] ? a.rows.then(p.I) : Sizes{0}, a.compute_type);
  std::vector<Tensor> d_weights;
  d_weights.reserve(call.weights.size());
  for (size_t i = 0; i < call.weights.size(); ++i) {
    const auto sizes = call.weights[i].sizes();
    Sizes needed = sizes.size() == 2 ? Sizes{sizes[0], sizes[1]} : Sizes{sizes[0]};
    if (b.groups > 1) needed = needed.after(b.groups);
    d_weights.push_back(empty(needs[2 + i] ? needed : Sizes{0}, a.compute_type));
  }
  // Sums over restarts, of which there may be none.
  std::vector<Tensor> d_resets;
  const bool needs_resets = call.reset_h && needs.back() != 0;
  if (call.reset_h)
    for (const int64_t features : {out, p.H}) {
      d_resets.push_back(empty(needs_resets ? a.states.then(features) : Sizes{0}, a.compute_type));
      d_resets.back().zero_();
    }
  Inputs<T> inputs(a, call.weights.size() + 22);
  Outputs<T> outputs(a);
  T* const d_x_data = needs[0] ? outputs.rows(d_x, 1, p.I) : nullptr;
  if (p.B > 0) {
    StackBackward<T> stack = {};
    fill_inputs(stack, a, call, inputs);
    stack.y = inputs.rows(b.y, 1, p.directions * out);
    (p.layer_norm ? stack.norm_ih : stack.gates) = data<T>(b.saved[kSavedGates]);  // null if it has no rows
    stack.cells = data<T>(b.saved[kSavedCells]);
    stack.layer_outputs = data<T>(b.saved[kSavedOutputs]);
    if (stack.norm_ih) {
      stack.norm_hh = data<T>(b.saved[kSavedNormHh]);
      stack.rstd_ih = data<T>(b.saved[kSavedRstd]);
      stack.rstd_hh = stack.rstd_ih + p.layers * p.directions * p.N;
    }
    stack.d_y = b.d_y ? inputs.rows(*b.d_y, 1, p.directions * out) : nullptr;
    stack.d_x = d_x_data;
    stack.d_h = outputs.states(d_h, out, true);
    stack.d_c = outputs.states(d_c, p.H, true);
    stack.needs_d_h_0 = needs[1] || needs_resets;
    if (b.d_cell_states) {
      const int64_t blocks = b.d_cell_states->size(0);
      stack.d_cell_states = inputs.rows(*b.d_cell_states, blocks, p.H);
      stack.cell_layers = blocks / p.directions;
    }
    if (needs_resets) {
      stack.d_reset_h = outputs.states(d_resets[0], out, true);
      stack.d_reset_c = outputs.states(d_resets[1], p.H, true);
    }
    stack.groups = b.groups;
    for (int64_t i = 0; b.groups > 1 && i < p.B; ++i)
      stack.group_of.push_back((a.packing ? a.packing->sequences[i] : i) / (a.batch() / b.groups));
    for (size_t i = 0; i < d_weights.size(); i += a.per_direction) {
      const Tensor* w = d_weights.data() + i;
      Weights<T> pointers = {};
      pointers.w_ih = data<T>(w[0]), pointers.w_hh = data<T>(w[1]);
      if (call.has_bias) pointers.b_ih = data<T>(w[2]), pointers.b_hh = data<T>(w[3]);
      w += a.plain_weights();
      if (p.P > 0) pointers.w_hr = data<T>(w[-1]);
      if (p.layer_norm) pointers.norm = {data<T>(w[0]), data<T>(w[1]), data<T>(w[2]), data<T>(w[3])};
      stack.d_weights.push_back(pointers);
    }
    run(stack, plan_backward(p, this_machine(thread_count()), forced().plan));
    outputs.finish();
  } else {
    for (const Tensor& t : d_weights) t.zero_();  // a sum over no rows
  }
  for (Tensor& t : d_weights) t = as(t, a.type);
  const auto state = [&](const Tensor& t) { return needs[1] ? as(t, a.type) : empty({0}, a.type); };
  for (Tensor& t : d_resets) t = as(t, a.type);
  return {as(d_x, a.type), state(d_h), state(d_c), std::move(d_weights), std::move(d_resets)};
}

BackwardResult lstm_backward(const Call& call, const BackwardCall& backward_call) {
  const DriverArguments a = parse_for_driver(call, true);
  check_backward(a, call, backward_call, a.compute_type);
  return a.compute_type == ScalarType::Double ? backward<double>(a, call, backward_call)
                                              : backward<float>(a, call, backward_call);
}

}  // namespace

}  // namespace fastlstm::cpu

TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("lstm", fastlstm::forward_kernel<fastlstm::cpu::lstm>);
  m.impl("lstm_backward", fastlstm::backward_kernel<fastlstm::cpu::lstm_backward>);
}
