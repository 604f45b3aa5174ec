// The operators on the CPU: tensors in, checks, conversion to the compute type, one call of the driver, tensors out.
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

#include "../cell.h"
#include "../checks.h"
#include "runtime.h"
#include "stack.h"

namespace fastlstm::cpu {

namespace {

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return "a type other than float32, float64, bfloat16 or float16";
  }
}

// Contiguous and of the given type; the tensor itself where it already is.
Tensor as(const Tensor& tensor, ScalarType type) {
  const Tensor typed = tensor.scalar_type() == type ? tensor : tensor.to(type);
  return typed.is_contiguous() ? typed : typed.contiguous();
}

template <class T>
T* data(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

// ------------------------------------------------------------------------------------------------ arguments

// What both operators are called with; see ops.cpp.
struct Call {
  const Tensor& x;
  const at::TensorList weights;
  const Tensor &h_0, &c_0;
  const OptionalTensor &batch_sizes, &lengths, &reset_mask, &dropout_mask;
  int64_t num_layers;
  bool bidirectional, has_bias, allow_bf16;
};

// With `lengths`: where the driver's packed rows lie in the caller's padded tensors.
struct Packing {
  std::vector<int64_t> sequences;  // [problem.B]: the caller's batch rows that have any step, the longest first
  std::vector<int64_t> rows;       // [problem.N]: t * B + batch row
};

// A call, checked and measured. `problem` and `schedule` are the driver's: with `lengths`, of the packed rows.
struct Arguments {
  Problem problem;
  Schedule schedule;
  std::optional<Packing> packing;
  std::optional<Restarts> restarts[2];  // per direction
  ScalarType type;                      // of inputs and outputs
  ScalarType compute_type;              // of everything in between
  int64_t per_direction;                // weights of one direction of one layer
  Sizes rows;                           // leading sizes of x and y: [T, B], packed [N], single step [B]
  Sizes states;                         // leading sizes of the states: [L*D, B], single step [B]
  const char* rows_text;
  int64_t row_count;  // product of `rows`
};

void parse_batch_sizes(Arguments& a, const Tensor& batch_sizes) {
  FASTLSTM_CHECK(batch_sizes.dim() == 1 && batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.is_cpu(),
                 "batch_sizes must be an int64 vector on the CPU, got shape ", shape_text(batch_sizes.sizes()));
  const Tensor contiguous_sizes = as(batch_sizes, ScalarType::Long);
  const auto* sizes = data<int64_t>(contiguous_sizes);
  Problem& p = a.problem;
  p.T = batch_sizes.size(0);
  FASTLSTM_CHECK(p.T == 0 || sizes[0] == p.B, "batch_sizes[0] must be the batch size of h_0, ", p.B, ", got ",
                 p.T ? sizes[0] : 0);
  for (int64_t t = 0; t < p.T; ++t) {
    FASTLSTM_CHECK(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]),
                   "batch_sizes must be positive and non-increasing, got ", sizes[t], " at step ", t);
    a.schedule.offsets.push_back(a.schedule.offsets.back() + sizes[t]);
  }
}

// Sorts the sequences by length and rewrites problem and schedule for the packed rows.
void parse_lengths(Arguments& a, const Tensor& tensor) {
  Problem& p = a.problem;
  FASTLSTM_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.is_cpu(),
                 "lengths must be an int64 vector on the CPU, got another dtype or device");
  check_shape("lengths", "[B]", tensor, {p.B});
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
void parse_reset_mask(Arguments& a, const Tensor& tensor) {
  FASTLSTM_CHECK(tensor.scalar_type() == ScalarType::Bool, "reset_mask must be bool, got ",
                 dtype_name(tensor.scalar_type()));
  check_shape("reset_mask", "x.shape[:-1]", tensor, a.rows);
  const Tensor contiguous_mask = as(tensor, ScalarType::Bool);
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

void parse_sizes(Arguments& a, const Call& call) {
  Problem& p = a.problem;
  const Tensor &x = call.x, &h_0 = call.h_0, &c_0 = call.c_0;
  const bool packed = call.batch_sizes.has_value(), single_step = !packed && h_0.dim() == 2;
  const int64_t dims = single_step ? 2 : 3;
  const char* state_text = single_step ? "[B, P or H]" : "[L*D, B, P or H]";
  a.rows_text = single_step ? "[B, I]" : packed ? "[sum(batch_sizes), I]" : "[T, B, I]";
  FASTLSTM_CHECK(h_0.dim() == dims, "h_0 must be ", state_text, ", got ", shape_text(h_0.sizes()));
  FASTLSTM_CHECK(c_0.dim() == dims, "c_0 must be ", state_text, ", got ", shape_text(c_0.sizes()));
  FASTLSTM_CHECK(x.dim() == (packed ? 2 : dims), "x must be ", a.rows_text, ", got ", shape_text(x.sizes()));
  FASTLSTM_CHECK(!single_step || (p.layers == 1 && p.directions == 1),
                 "a single step has one layer and one direction, got num_layers = ", p.layers,
                 ", bidirectional = ", p.directions == 2);
  const auto h_sizes = h_0.sizes();
  const int64_t out = h_sizes[dims - 1];
  p.B = h_sizes[dims - 2];
  p.H = c_0.sizes()[dims - 1];
  p.P = out == p.H ? 0 : out;
  const auto x_sizes = x.sizes();
  p.I = x_sizes[x_sizes.size() - 1];
  FASTLSTM_CHECK(p.I >= 1, "x must have at least one feature, got ", shape_text(x_sizes));
  FASTLSTM_CHECK(out >= 1 && out <= p.H, "h_0 must have at least 1 and at most as many features as c_0, got ", out,
                 " and ", p.H);
  a.states = single_step ? Sizes{p.B} : Sizes{p.layers * p.directions, p.B};
  check_shape("h_0", state_text, h_0, a.states.then(out));
  check_shape("c_0", state_text, c_0, a.states.then(p.H));

  a.schedule.offsets = {0};
  if (packed) {
    parse_batch_sizes(a, *call.batch_sizes);
    a.rows = {a.schedule.rows()};
  } else {
    p.T = single_step ? 1 : x_sizes[0];
    a.rows = single_step ? Sizes{p.B} : Sizes{p.T, p.B};
    for (int64_t t = 1; t <= p.T; ++t) a.schedule.offsets.push_back(t * p.B);
  }
  a.row_count = p.N = a.schedule.rows();
  check_shape("x", a.rows_text, x, a.rows.then(p.I));
  FASTLSTM_CHECK(p.T > 0, "x must have at least one time step, got ", shape_text(x_sizes));
  if (call.lengths) {
    FASTLSTM_CHECK(a.rows.size() == 2, "lengths needs x as [T, B, I], got ", a.rows_text);
    parse_lengths(a, *call.lengths);
  }
  if (call.reset_mask) parse_reset_mask(a, *call.reset_mask);
}

Arguments parse(const Call& call, bool training) {
  Arguments a = {};
  Problem& p = a.problem;
  FASTLSTM_CHECK(call.num_layers > 0, "num_layers must be positive, got ", call.num_layers);
  p.layers = call.num_layers;
  p.directions = call.bidirectional ? 2 : 1;
  p.training = training;
  parse_sizes(a, call);
  const int64_t states = p.layers * p.directions, out = p.output_size();

  a.type = call.x.scalar_type();
  FASTLSTM_CHECK(a.type == ScalarType::Float || a.type == ScalarType::Double || a.type == ScalarType::BFloat16 ||
                     a.type == ScalarType::Half,
                 "x must be float32, float64, bfloat16 or float16, got ", dtype_name(a.type));
  a.compute_type = a.type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  p.compute_bytes = a.compute_type == ScalarType::Double ? 8 : 4;
  p.bf16_allowed = a.type == ScalarType::BFloat16 || (a.type == ScalarType::Float && call.allow_bf16);
  const auto check_type = [&](const char* name, const Tensor& t) {
    FASTLSTM_CHECK(t.scalar_type() == a.type, name, " must have the dtype of x, ", dtype_name(a.type), ", got ",
                   dtype_name(t.scalar_type()));
  };
  check_type("h_0", call.h_0);
  check_type("c_0", call.c_0);

  const at::TensorList weights = call.weights;
  a.per_direction = 2 + (call.has_bias ? 2 : 0) + (p.P > 0 ? 1 : 0);
  FASTLSTM_CHECK(static_cast<int64_t>(weights.size()) == states * a.per_direction, "weights must be ", states, " * ",
                 a.per_direction, " tensors (L*D times W_ih, W_hh", call.has_bias ? ", b_ih, b_hh" : "",
                 p.P > 0 ? ", W_hr" : "", "), got ", weights.size());
  for (int64_t i = 0; i < states; ++i) {
    const Tensor* w = weights.data() + i * a.per_direction;
    for (int64_t j = 0; j < a.per_direction; ++j) check_type("every weight", w[j]);
    check_shape("W_ih", "[4H, I]", w[0], {kGates * p.H, i < p.directions ? p.I : p.directions * out});
    check_shape("W_hh", "[4H, P]", w[1], {kGates * p.H, out});
    if (call.has_bias) check_shape("b_ih", "[4H]", w[2], {kGates * p.H});
    if (call.has_bias) check_shape("b_hh", "[4H]", w[3], {kGates * p.H});
    if (p.P > 0) check_shape("W_hr", "[P, H]", w[a.per_direction - 1], {p.P, p.H});
  }
  if (call.dropout_mask) {
    check_type("dropout_mask", *call.dropout_mask);
    FASTLSTM_CHECK(p.layers > 1, "dropout_mask needs num_layers > 1, got ", p.layers);
    check_shape("dropout_mask", "[L-1, *x.shape[:-1], D*P]", *call.dropout_mask,
                a.rows.after(p.layers - 1).then(p.directions * out));
  }
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
RowMap map_rows(const Arguments& a, int64_t blocks, int64_t features) {
  return {a.packing->rows, a.row_count, blocks, features};
}
RowMap map_states(const Arguments& a, int64_t features) {
  return {a.packing->sequences, a.states[1], a.states[0], features};
}

// The caller's tensors as the driver reads them: in the compute type, contiguous and, with `lengths`, packed. Keeps the
// converted tensors alive.
template <class T>
class Inputs {
 public:
  Inputs(const Arguments& a, size_t expected) : a_(a) { kept_.reserve(expected); }

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

 private:
  const T* packed(const Tensor& tensor, const RowMap& map) {
    const T* from = plain(tensor);
    kept_.push_back(empty(map.packed_sizes(), a_.compute_type));
    T* to = data<T>(kept_.back());
    map.pack(from, to);
    return to;
  }

  const Arguments& a_;
  std::vector<Tensor> kept_;
};

// Tensors that the driver writes. With `lengths` it writes packed rows, and finish() puts them where they belong.
template <class T>
class Outputs {
 public:
  explicit Outputs(const Arguments& a) : a_(a) {}

  // [*x.shape[:-1], features]; zero beyond the end of a sequence
  T* rows(const Tensor& tensor, int64_t features) {
    if (!a_.packing) return data<T>(tensor);
    tensor.zero_();
    return packed(tensor, map_rows(a_, 1, features));
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

  const Arguments& a_;
  std::vector<Packed> packed_;
};

// ------------------------------------------------------------------------------------------------ forward

template <class T>
void fill_inputs(StackInputs<T>& stack, const Arguments& a, const Call& call, Inputs<T>& inputs) {
  const Problem& p = a.problem;
  stack.problem = &p;
  stack.schedule = &a.schedule;
  for (int d = 0; d < 2; ++d) stack.restarts[d] = a.restarts[d] ? &*a.restarts[d] : nullptr;
  stack.x = inputs.rows(call.x, 1, p.I);
  stack.h_0 = inputs.states(call.h_0, p.output_size());
  stack.c_0 = inputs.states(call.c_0, p.H);
  stack.dropout_mask =
      call.dropout_mask ? inputs.rows(*call.dropout_mask, p.layers - 1, p.directions * p.output_size()) : nullptr;
  stack.weights.reserve(p.layers * p.directions);
  for (size_t i = 0; i < call.weights.size(); i += a.per_direction) {
    const Tensor* w = call.weights.data() + i;
    Weights<const T> pointers = {inputs.plain(w[0]), inputs.plain(w[1]), nullptr, nullptr, nullptr};
    if (call.has_bias) pointers.b_ih = inputs.plain(w[2]), pointers.b_hh = inputs.plain(w[3]);
    if (p.P > 0) pointers.w_hr = inputs.plain(w[a.per_direction - 1]);
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
ForwardResult forward(const Arguments& a, const Call& call) {
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
  std::vector<Tensor> saved;
  if (p.training) saved = {save(states, kGates * p.H), save(states, p.H), save(p.layers - 1, width)};
  Inputs<T> inputs(a, call.weights.size() + 8);
  Outputs<T> outputs(a);
  T* const y_data = outputs.rows(y, width);
  if (p.B > 0) {
    StackForward<T> stack;
    fill_inputs(stack, a, call, inputs);
    stack.y = y_data;
    stack.h_n = outputs.states(h_n, out, false);
    stack.c_n = outputs.states(c_n, p.H, false);
    stack.gates = p.training ? data<T>(saved[0]) : nullptr;
    stack.cells = p.training ? data<T>(saved[1]) : nullptr;
    stack.layer_outputs = p.training ? data<T>(saved[2]) : nullptr;
    run(stack, plan_forward(p, this_machine(thread_count()), forced().plan));
    outputs.finish();
  }
  return {as(y, a.type), as(h_n, a.type), as(c_n, a.type), std::move(saved)};
}

ForwardResult lstm(const Tensor& x, at::TensorList weights, const Tensor& h_0, const Tensor& c_0,
                   const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                   const OptionalTensor& dropout_mask, int64_t num_layers, bool bidirectional, bool has_bias,
                   bool allow_bf16, bool save) {
  const Call call = {x,          weights,      h_0,        c_0,           batch_sizes, lengths,
                     reset_mask, dropout_mask, num_layers, bidirectional, has_bias,    allow_bf16};
  const Arguments a = parse(call, save);
  return a.compute_type == ScalarType::Double ? forward<double>(a, call) : forward<float>(a, call);
}

// ------------------------------------------------------------------------------------------------ backward

struct OutputGradients {
  const OptionalTensor &y, &h_n, &c_n;
};

template <class T>
BackwardResult backward(const Arguments& a, const Call& call, const OutputGradients& d, const Tensor& y,
                        at::TensorList saved, at::IntArrayRef needs) {
  const Problem& p = a.problem;
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
  const Tensor d_h = carry(d.h_n, out), d_c = carry(d.c_n, p.H);
  const Tensor d_x = empty(needs[0] ? a.rows.then(p.I) : Sizes{0}, a.compute_type);
  std::vector<Tensor> d_weights;
  d_weights.reserve(call.weights.size());
  for (size_t i = 0; i < call.weights.size(); ++i) {
    const auto sizes = call.weights[i].sizes();
    const Sizes needed = sizes.size() == 2 ? Sizes{sizes[0], sizes[1]} : Sizes{sizes[0]};
    d_weights.push_back(empty(needs[2 + i] ? needed : Sizes{0}, a.compute_type));
  }
  Inputs<T> inputs(a, call.weights.size() + 12);
  Outputs<T> outputs(a);
  T* const d_x_data = needs[0] ? outputs.rows(d_x, p.I) : nullptr;
  if (p.B > 0) {
    StackBackward<T> stack;
    fill_inputs(stack, a, call, inputs);
    stack.y = inputs.rows(y, 1, p.directions * out);
    stack.gates = data<T>(saved[0]);
    stack.cells = data<T>(saved[1]);
    stack.layer_outputs = data<T>(saved[2]);
    stack.d_y = d.y ? inputs.rows(*d.y, 1, p.directions * out) : nullptr;
    stack.d_x = d_x_data;
    stack.d_h = outputs.states(d_h, out, true);
    stack.d_c = outputs.states(d_c, p.H, true);
    stack.needs_d_h_0 = needs[1];
    for (size_t i = 0; i < d_weights.size(); i += a.per_direction) {
      const Tensor* w = d_weights.data() + i;
      Weights<T> pointers = {data<T>(w[0]), data<T>(w[1]), nullptr, nullptr, nullptr};
      if (call.has_bias) pointers.b_ih = data<T>(w[2]), pointers.b_hh = data<T>(w[3]);
      if (p.P > 0) pointers.w_hr = data<T>(w[a.per_direction - 1]);
      stack.d_weights.push_back(pointers);
    }
    run(stack, plan_backward(p, this_machine(thread_count()), forced().plan));
    outputs.finish();
  } else {
    for (const Tensor& t : d_weights) t.zero_();  // a sum over no rows
  }
  for (Tensor& t : d_weights) t = as(t, a.type);
  const auto state = [&](const Tensor& t) { return needs[1] ? as(t, a.type) : empty({0}, a.type); };
  return {as(d_x, a.type), state(d_h), state(d_c), std::move(d_weights)};
}

BackwardResult lstm_backward(const OptionalTensor& d_y, const OptionalTensor& d_h_n, const OptionalTensor& d_c_n,
                             const Tensor& x, at::TensorList weights, const Tensor& h_0, const Tensor& c_0,
                             const Tensor& y, at::TensorList saved, const OptionalTensor& batch_sizes,
                             const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                             const OptionalTensor& dropout_mask, int64_t num_layers, bool bidirectional, bool has_bias,
                             bool allow_bf16, at::IntArrayRef needs) {
  const Call call = {x,          weights,      h_0,        c_0,           batch_sizes, lengths,
                     reset_mask, dropout_mask, num_layers, bidirectional, has_bias,    allow_bf16};
  const Arguments a = parse(call, true);
  const Problem& p = a.problem;
  const int64_t states = p.layers * p.directions, width = p.directions * p.output_size();
  FASTLSTM_CHECK(needs.size() == weights.size() + 2, "needs must have 2 + ", weights.size(), " entries, got ",
                 needs.size());
  FASTLSTM_CHECK(saved.size() == 3, "saved must hold gates, cells and layer_outputs, got ", saved.size(),
                 " tensors (was the forward pass run with save=True?)");
  check_shape("gates", "[L*D, N, 4H]", saved[0], {states, a.row_count, kGates * p.H});
  check_shape("cells", "[L*D, N, H]", saved[1], {states, a.row_count, p.H});
  check_shape("layer_outputs", "[L-1, N, D*P]", saved[2], {p.layers - 1, a.row_count, width});
  for (const Tensor& t : saved)
    FASTLSTM_CHECK(t.scalar_type() == a.compute_type && t.is_contiguous(),
                   "saved must be passed as the forward pass returned it");
  check_shape("y", "[*x.shape[:-1], D*P]", y, a.rows.then(width));
  if (d_y) check_shape("d_y", "[*x.shape[:-1], D*P]", *d_y, a.rows.then(width));
  if (d_h_n) check_shape("d_h_n", "the shape of h_0", *d_h_n, a.states.then(p.output_size()));
  if (d_c_n) check_shape("d_c_n", "the shape of c_0", *d_c_n, a.states.then(p.H));
  const OutputGradients d = {d_y, d_h_n, d_c_n};
  return a.compute_type == ScalarType::Double ? backward<double>(a, call, d, y, saved, needs)
                                              : backward<float>(a, call, d, y, saved, needs);
}

}  // namespace

}  // namespace fastlstm::cpu

TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("lstm", fastlstm::cpu::lstm);
  m.impl("lstm_backward", fastlstm::cpu::lstm_backward);
}
