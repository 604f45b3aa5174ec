// The operators on the CPU: tensors in, checks, conversion to the compute type, one call of the driver, tensors out.
//
// float32 and float64 run as they are. bfloat16 and float16 are widened to float32 on entry and rounded on exit, so
// results are closer to exact than a step-by-step 16-bit LSTM's. (In backward, the gradient of the last layer's W_hh
// reads h from the rounded y.)
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../cell.h"
#include "../checks.h"
#include "runtime.h"
#include "stack.h"

namespace fastlstm::cpu {

namespace {

using Sizes = std::vector<int64_t>;

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
  const Tensor typed = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

template <class T>
T* data(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

// The arguments that both operators share, checked and measured.
struct Arguments {
  Problem problem;
  Schedule schedule;
  ScalarType type;          // of inputs and outputs
  ScalarType compute_type;  // of everything in between
  int64_t per_direction;    // weights of one direction of one layer
  Sizes rows;               // leading sizes of x and y: [T, B], packed [N], single step [B]
  const char* rows_text;
  Sizes states;  // leading sizes of the states: [L*D, B], single step [B]
};

Sizes with(Sizes leading, int64_t last) {
  leading.push_back(last);
  return leading;
}

void parse_sizes(Arguments& a, const Tensor& x, const Tensor& h_0, const Tensor& c_0,
                 const std::optional<Tensor>& batch_sizes) {
  Problem& p = a.problem;
  const bool single_step = !batch_sizes && h_0.dim() == 2;
  const int64_t dims = single_step ? 2 : 3;
  const char* state_text = single_step ? "[B, P or H]" : "[L*D, B, P or H]";
  a.rows_text = single_step ? "[B, I]" : batch_sizes ? "[sum(batch_sizes), I]" : "[T, B, I]";
  FASTLSTM_CHECK(h_0.dim() == dims, "h_0 must be ", state_text, ", got ", shape_text(h_0.sizes()));
  FASTLSTM_CHECK(c_0.dim() == dims, "c_0 must be ", state_text, ", got ", shape_text(c_0.sizes()));
  FASTLSTM_CHECK(x.dim() == (batch_sizes ? 2 : dims), "x must be ", a.rows_text, ", got ", shape_text(x.sizes()));
  FASTLSTM_CHECK(!single_step || (p.layers == 1 && p.directions == 1),
                 "a single step has one layer and one direction, got num_layers = ", p.layers,
                 ", bidirectional = ", p.directions == 2);
  const int64_t out = h_0.size(-1);
  p.B = h_0.size(-2);
  p.H = c_0.size(-1);
  p.P = out == p.H ? 0 : out;
  p.I = x.size(-1);
  FASTLSTM_CHECK(out >= 1 && out <= p.H, "h_0 must have at least 1 and at most as many features as c_0, got ", out,
                 " and ", p.H);
  a.states = single_step ? Sizes{p.B} : Sizes{p.layers * p.directions, p.B};
  check_shape("h_0", state_text, h_0, with(a.states, out));
  check_shape("c_0", state_text, c_0, with(a.states, p.H));

  a.schedule.offsets = {0};
  if (batch_sizes) {
    FASTLSTM_CHECK(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->is_cpu(),
                   "batch_sizes must be an int64 vector on the CPU, got shape ", shape_text(batch_sizes->sizes()));
    const Tensor contiguous_sizes = as(*batch_sizes, ScalarType::Long);
    const auto* sizes = static_cast<const int64_t*>(contiguous_sizes.data_ptr());
    p.T = batch_sizes->size(0);
    FASTLSTM_CHECK(p.T == 0 || sizes[0] == p.B, "batch_sizes[0] must be the batch size of h_0, ", p.B, ", got ",
                   p.T ? sizes[0] : 0);
    for (int64_t t = 0; t < p.T; ++t) {
      FASTLSTM_CHECK(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]),
                     "batch_sizes must be positive and non-increasing, got ", sizes[t], " at step ", t);
      a.schedule.offsets.push_back(a.schedule.offsets.back() + sizes[t]);
    }
    a.rows = {a.schedule.rows()};
  } else {
    p.T = single_step ? 1 : x.size(0);
    a.rows = single_step ? Sizes{p.B} : Sizes{p.T, p.B};
    for (int64_t t = 1; t <= p.T; ++t) a.schedule.offsets.push_back(t * p.B);
  }
  p.N = a.schedule.rows();
  check_shape("x", a.rows_text, x, with(a.rows, p.I));
  FASTLSTM_CHECK(p.T > 0, "x must have at least one time step, got ", shape_text(x.sizes()));
}

Arguments parse(const Tensor& x, const std::vector<Tensor>& weights, const Tensor& h_0, const Tensor& c_0,
                const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& dropout_mask, int64_t num_layers,
                bool bidirectional, bool has_bias, bool training) {
  Arguments a;
  Problem& p = a.problem;
  FASTLSTM_CHECK(num_layers > 0, "num_layers must be positive, got ", num_layers);
  p.layers = num_layers;
  p.directions = bidirectional ? 2 : 1;
  p.training = training;
  parse_sizes(a, x, h_0, c_0, batch_sizes);
  const int64_t states = p.layers * p.directions, out = p.output_size();

  a.type = x.scalar_type();
  FASTLSTM_CHECK(a.type == ScalarType::Float || a.type == ScalarType::Double || a.type == ScalarType::BFloat16 ||
                     a.type == ScalarType::Half,
                 "x must be float32, float64, bfloat16 or float16, got ", dtype_name(a.type));
  a.compute_type = a.type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  p.compute_bytes = a.compute_type == ScalarType::Double ? 8 : 4;
  const auto check_type = [&](const char* name, const Tensor& t) {
    FASTLSTM_CHECK(t.scalar_type() == a.type, name, " must have the dtype of x, ", dtype_name(a.type), ", got ",
                   dtype_name(t.scalar_type()));
  };
  check_type("h_0", h_0);
  check_type("c_0", c_0);

  a.per_direction = 2 + (has_bias ? 2 : 0) + (p.P > 0 ? 1 : 0);
  FASTLSTM_CHECK(static_cast<int64_t>(weights.size()) == states * a.per_direction, "weights must be ", states, " * ",
                 a.per_direction, " tensors (L*D times W_ih, W_hh", has_bias ? ", b_ih, b_hh" : "",
                 p.P > 0 ? ", W_hr" : "", "), got ", weights.size());
  for (int64_t i = 0; i < states; ++i) {
    const Tensor* w = weights.data() + i * a.per_direction;
    for (int64_t j = 0; j < a.per_direction; ++j) check_type("every weight", w[j]);
    check_shape("W_ih", "[4H, I]", w[0], {kGates * p.H, i < p.directions ? p.I : p.directions * out});
    check_shape("W_hh", "[4H, P]", w[1], {kGates * p.H, out});
    if (has_bias) check_shape("b_ih", "[4H]", w[2], {kGates * p.H});
    if (has_bias) check_shape("b_hh", "[4H]", w[3], {kGates * p.H});
    if (p.P > 0) check_shape("W_hr", "[P, H]", w[a.per_direction - 1], {p.P, p.H});
  }
  if (dropout_mask) {
    check_type("dropout_mask", *dropout_mask);
    FASTLSTM_CHECK(p.layers > 1, "dropout_mask needs num_layers > 1, got ", p.layers);
    Sizes expected = {p.layers - 1};
    expected.insert(expected.end(), a.rows.begin(), a.rows.end());
    check_shape("dropout_mask", "[L-1, *x.shape[:-1], D*P]", *dropout_mask, with(expected, p.directions * out));
  }
  return a;
}

// Fills the pointers of a stack. `kept` holds the converted tensors alive.
template <class T>
void fill_inputs(StackInputs<T>& stack, const Arguments& a, const Tensor& x, const std::vector<Tensor>& weights,
                 const Tensor& h_0, const Tensor& c_0, const std::optional<Tensor>& dropout_mask, bool has_bias,
                 std::vector<Tensor>& kept) {
  kept.reserve(weights.size() + 8);
  const auto pointer = [&](const Tensor& tensor) -> const T* {
    kept.push_back(as(tensor, a.compute_type));
    return data<T>(kept.back());
  };
  stack.problem = &a.problem;
  stack.schedule = &a.schedule;
  stack.kernels = &kernels<T>(selected_isa());
  stack.x = pointer(x);
  stack.h_0 = pointer(h_0);
  stack.c_0 = pointer(c_0);
  stack.dropout_mask = dropout_mask ? pointer(*dropout_mask) : nullptr;
  for (size_t i = 0; i < weights.size(); i += a.per_direction) {
    Weights<const T> w = {pointer(weights[i]), pointer(weights[i + 1]), nullptr, nullptr, nullptr};
    if (has_bias) w.b_ih = pointer(weights[i + 2]), w.b_hh = pointer(weights[i + 3]);
    if (a.problem.P > 0) w.w_hr = pointer(weights[i + a.per_direction - 1]);
    stack.weights.push_back(w);
  }
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
ForwardResult forward(const Arguments& a, const Tensor& x, const std::vector<Tensor>& weights, const Tensor& h_0,
                      const Tensor& c_0, const std::optional<Tensor>& dropout_mask, bool has_bias) {
  const Problem& p = a.problem;
  const int64_t states = p.layers * p.directions, out = p.output_size();
  const auto saved = [&](const Sizes& sizes) { return empty(p.training ? sizes : Sizes{0}, a.compute_type); };
  const Tensor y = empty(with(a.rows, p.directions * out), a.compute_type);
  const Tensor h_n = empty(with(a.states, out), a.compute_type), c_n = empty(with(a.states, p.H), a.compute_type);
  const Tensor gates = saved({states, p.N, kGates * p.H}), cells = saved({states, p.N, p.H});
  const Tensor layer_outputs = saved({p.layers - 1, p.N, p.directions * out});
  if (p.B > 0) {
    std::vector<Tensor> kept;
    StackForward<T> stack;
    fill_inputs(stack, a, x, weights, h_0, c_0, dropout_mask, has_bias, kept);
    stack.y = data<T>(y);
    stack.h_n = data<T>(h_n);
    stack.c_n = data<T>(c_n);
    stack.gates = data<T>(gates);
    stack.cells = data<T>(cells);
    stack.layer_outputs = data<T>(layer_outputs);
    run_forward(stack, plan_forward(p, this_machine(thread_count()), forced().plan));
  }
  return {as(y, a.type), as(h_n, a.type), as(c_n, a.type), gates, cells, layer_outputs};
}

ForwardResult lstm(const Tensor x, const std::vector<Tensor> weights, const Tensor h_0, const Tensor c_0,
                   const std::optional<Tensor> batch_sizes, const std::optional<Tensor> dropout_mask,
                   int64_t num_layers, bool bidirectional, bool has_bias, bool save) {
  const Arguments a = parse(x, weights, h_0, c_0, batch_sizes, dropout_mask, num_layers, bidirectional, has_bias, save);
  const auto run = a.compute_type == ScalarType::Double ? forward<double> : forward<float>;
  return run(a, x, weights, h_0, c_0, dropout_mask, has_bias);
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

struct SavedForBackward {
  const Tensor &y, &gates, &cells, &layer_outputs;
};
struct OutputGradients {
  const std::optional<Tensor>&y, &h_n, &c_n;
};

template <class T>
BackwardResult backward(const Arguments& a, const OutputGradients& d, const Tensor& x,
                        const std::vector<Tensor>& weights, const Tensor& h_0, const Tensor& c_0,
                        const SavedForBackward& saved, const std::optional<Tensor>& dropout_mask, bool has_bias,
                        const std::vector<int64_t>& needs) {
  const Problem& p = a.problem;
  const int64_t states = p.layers * p.directions, out = p.output_size();
  // Gradients start as the incoming one where the driver updates in place (states), else uninitialised.
  const auto carry = [&](const std::optional<Tensor>& incoming, int64_t features) {
    Tensor t = empty(with(a.states, features), a.compute_type);
    if (incoming)
      torch::stable::copy_(t, *incoming);
    else
      torch::stable::zero_(t);
    return t;
  };
  const Tensor d_h = carry(d.h_n, out), d_c = carry(d.c_n, p.H);
  const auto like = [&](const Tensor& t, bool needed) {
    const auto sizes = t.sizes();
    return empty(needed ? Sizes(sizes.begin(), sizes.end()) : Sizes{0}, a.compute_type);
  };
  Tensor d_x = like(x, needs[0]);
  std::vector<Tensor> d_weights;
  for (size_t i = 0; i < weights.size(); ++i) d_weights.push_back(like(weights[i], needs[2 + i]));
  if (p.B > 0) {
    std::vector<Tensor> kept;
    StackBackward<T> stack;
    fill_inputs(stack, a, x, weights, h_0, c_0, dropout_mask, has_bias, kept);
    const auto pointer = [&](const Tensor& tensor) -> const T* {
      kept.push_back(as(tensor, a.compute_type));
      return data<T>(kept.back());
    };
    stack.y = pointer(saved.y);
    stack.gates = data<T>(saved.gates);
    stack.cells = data<T>(saved.cells);
    stack.layer_outputs = data<T>(saved.layer_outputs);
    stack.d_y = d.y ? pointer(*d.y) : nullptr;
    stack.d_x = data<T>(d_x);
    stack.d_h = data<T>(d_h);
    stack.d_c = data<T>(d_c);
    stack.needs_d_h_0 = needs[1];
    for (size_t i = 0; i < weights.size(); i += a.per_direction) {
      Weights<T> w = {data<T>(d_weights[i]), data<T>(d_weights[i + 1]), nullptr, nullptr, nullptr};
      if (has_bias) w.b_ih = data<T>(d_weights[i + 2]), w.b_hh = data<T>(d_weights[i + 3]);
      if (p.P > 0) w.w_hr = data<T>(d_weights[i + a.per_direction - 1]);
      stack.d_weights.push_back(w);
    }
    run_backward(stack, plan_backward(p, this_machine(thread_count()), forced().plan));
  } else {
    for (Tensor& t : d_weights) torch::stable::zero_(t);  // a sum over no rows
  }
  for (Tensor& t : d_weights) t = as(t, a.type);
  const auto state = [&](const Tensor& t) { return needs[1] ? as(t, a.type) : empty({0}, a.type); };
  return {as(d_x, a.type), state(d_h), state(d_c), d_weights};
}

BackwardResult lstm_backward(const std::optional<Tensor> d_y, const std::optional<Tensor> d_h_n,
                             const std::optional<Tensor> d_c_n, const Tensor x, const std::vector<Tensor> weights,
                             const Tensor h_0, const Tensor c_0, const Tensor y, const Tensor gates, const Tensor cells,
                             const Tensor layer_outputs, const std::optional<Tensor> batch_sizes,
                             const std::optional<Tensor> dropout_mask, int64_t num_layers, bool bidirectional,
                             bool has_bias, const std::vector<int64_t> needs) {
  const Arguments a = parse(x, weights, h_0, c_0, batch_sizes, dropout_mask, num_layers, bidirectional, has_bias, true);
  const Problem& p = a.problem;
  const int64_t states = p.layers * p.directions, width = p.directions * p.output_size();
  FASTLSTM_CHECK(needs.size() == weights.size() + 2, "needs must have 2 + ", weights.size(), " entries, got ",
                 needs.size());
  check_shape("gates", "[L*D, N, 4H] (was the forward pass run with save=True?)", gates, {states, p.N, kGates * p.H});
  check_shape("cells", "[L*D, N, H]", cells, {states, p.N, p.H});
  check_shape("layer_outputs", "[L-1, N, D*P]", layer_outputs, {p.layers - 1, p.N, width});
  for (const Tensor* t : {&gates, &cells, &layer_outputs})
    FASTLSTM_CHECK(t->scalar_type() == a.compute_type && t->is_contiguous(),
                   "gates, cells and layer_outputs must be passed as the forward pass returned them");
  check_shape("y", "[*x.shape[:-1], D*P]", y, with(a.rows, width));
  if (d_y) check_shape("d_y", "[*x.shape[:-1], D*P]", *d_y, with(a.rows, width));
  if (d_h_n) check_shape("d_h_n", "the shape of h_0", *d_h_n, with(a.states, p.output_size()));
  if (d_c_n) check_shape("d_c_n", "the shape of c_0", *d_c_n, with(a.states, p.H));
  const auto run = a.compute_type == ScalarType::Double ? backward<double> : backward<float>;
  return run(a, {d_y, d_h_n, d_c_n}, x, weights, h_0, c_0, {y, gates, cells, layer_outputs}, dropout_mask, has_bias,
             needs);
}

}  // namespace

}  // namespace fastlstm::cpu

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("lstm", TORCH_BOX(&fastlstm::cpu::lstm));
  m.impl("lstm_backward", TORCH_BOX(&fastlstm::cpu::lstm_backward));
}
