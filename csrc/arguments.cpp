// A step of streaming inference passes all of these checks, so they allocate nothing while they hold.
#include "arguments.h"

#include "cell.h"

namespace fastlstm {

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

void check_device(const char* name, const Tensor& tensor, const Tensor& x) {
  FASTLSTM_CHECK(tensor.device() == x.device(), name, " must be on the device of x, ", x.device(), ", got ",
                 tensor.device());
}

void check_dtype_and_device(const char* name, const Tensor& tensor, const Tensor& x) {
  FASTLSTM_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have the dtype of x, ",
                 dtype_name(x.scalar_type()), ", got ", dtype_name(tensor.scalar_type()));
  check_device(name, tensor, x);
}

void parse_batch_sizes(Arguments& a, const Tensor& batch_sizes) {
  FASTLSTM_CHECK(batch_sizes.dim() == 1 && batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.is_cpu(),
                 "batch_sizes must be an int64 vector on the CPU, got shape ", shape_text(batch_sizes.sizes()));
  const Tensor contiguous_sizes = as(batch_sizes, ScalarType::Long);
  const auto* sizes = data<int64_t>(contiguous_sizes);
  Problem& p = a.problem;
  p.T = batch_sizes.size(0);
  FASTLSTM_CHECK(p.T == 0 || sizes[0] == p.B, "batch_sizes[0] must be the batch size of h_0, ", p.B, ", got ",
                 p.T ? sizes[0] : 0);
  a.offsets.reserve(p.T + 1);
  a.offsets.push_back(0);
  for (int64_t t = 0; t < p.T; ++t) {
    FASTLSTM_CHECK(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]),
                   "batch_sizes must be positive and non-increasing, got ", sizes[t], " at step ", t);
    a.offsets.push_back(a.offsets.back() + sizes[t]);
  }
  p.N = a.offsets.back();
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

  if (packed) {
    parse_batch_sizes(a, *call.batch_sizes);
    a.rows = {p.N};
  } else {
    p.T = single_step ? 1 : x_sizes[0];
    p.N = p.T * p.B;
    a.rows = single_step ? Sizes{p.B} : Sizes{p.T, p.B};
  }
  a.row_count = p.N;
  check_shape("x", a.rows_text, x, a.rows.then(p.I));
  FASTLSTM_CHECK(p.T > 0, "x must have at least one time step, got ", shape_text(x_sizes));
}

void check_weights(const Arguments& a, const Call& call) {
  const Problem& p = a.problem;
  const at::TensorList weights = call.weights;
  const int64_t states = p.layers * p.directions, out = p.output_size();
  FASTLSTM_CHECK(static_cast<int64_t>(weights.size()) == states * a.per_direction, "weights must be ", states, " * ",
                 a.per_direction, " tensors (L*D times W_ih, W_hh", call.has_bias ? ", b_ih, b_hh" : "",
                 p.P > 0 ? ", W_hr" : "", p.layer_norm ? ", weight_ln_ih, weight_ln_hh, weight_ln_c, bias_ln_c" : "",
                 "), got ", weights.size());
  const int64_t plain = a.plain_weights();
  for (int64_t i = 0; i < states; ++i) {
    const Tensor* w = weights.data() + i * a.per_direction;
    for (int64_t j = 0; j < a.per_direction; ++j) {
      check_dtype_and_device("every weight", w[j], call.x);
      FASTLSTM_CHECK(w[j].numel() == 0 || w[j].const_data_ptr() != nullptr,
                     "every weight must have memory, got one whose storage has been freed");
    }
    check_shape("W_ih", "[4H, I]", w[0], {kGates * p.H, i < p.directions ? p.I : p.directions * out});
    check_shape("W_hh", "[4H, P]", w[1], {kGates * p.H, out});
    if (call.has_bias) check_shape("b_ih", "[4H]", w[2], {kGates * p.H});
    if (call.has_bias) check_shape("b_hh", "[4H]", w[3], {kGates * p.H});
    if (p.P > 0) check_shape("W_hr", "[P, H]", w[plain - 1], {p.P, p.H});
    if (!p.layer_norm) continue;
    check_shape("weight_ln_ih", "[4H]", w[plain], {kGates * p.H});
    check_shape("weight_ln_hh", "[4H]", w[plain + 1], {kGates * p.H});
    check_shape("weight_ln_c", "[H]", w[plain + 2], {p.H});
    check_shape("bias_ln_c", "[H]", w[plain + 3], {p.H});
  }
}

void check_lengths(const Arguments& a, const Tensor& lengths, const Tensor& x) {
  FASTLSTM_CHECK(a.rows.size() == 2, "lengths needs x as [T, B, I], got ", a.rows_text);
  FASTLSTM_CHECK(lengths.scalar_type() == ScalarType::Long && (lengths.is_cpu() || lengths.device() == x.device()),
                 "lengths must be an int64 vector on the CPU", x.is_cpu() ? "" : " or on the device of x",
                 ", got another dtype or device");
  check_shape("lengths", "[B]", lengths, {a.problem.B});
}

void check_reset_mask(const Arguments& a, const Tensor& reset_mask, const Tensor& x) {
  FASTLSTM_CHECK(reset_mask.scalar_type() == ScalarType::Bool, "reset_mask must be bool, got ",
                 dtype_name(reset_mask.scalar_type()));
  check_shape("reset_mask", "x.shape[:-1]", reset_mask, a.rows);
  check_device("reset_mask", reset_mask, x);
}

void check_dropout_mask(const Arguments& a, const Tensor& dropout_mask, const Tensor& x) {
  const Problem& p = a.problem;
  check_dtype_and_device("dropout_mask", dropout_mask, x);
  FASTLSTM_CHECK(p.layers > 1, "dropout_mask needs num_layers > 1, got ", p.layers);
  check_shape("dropout_mask", "[L-1, *x.shape[:-1], D*P]", dropout_mask,
              a.rows_of(p.layers - 1, p.directions * p.output_size()));
}

void check_reset_states(const Arguments& a, const Call& call) {
  FASTLSTM_CHECK(call.reset_h && call.reset_c && call.reset_mask,
                 "reset_h and reset_c must be given together and with reset_mask");
  check_dtype_and_device("reset_h", *call.reset_h, call.x);
  check_dtype_and_device("reset_c", *call.reset_c, call.x);
  check_shape("reset_h", "the shape of h_0", *call.reset_h, a.states.then(a.problem.output_size()));
  check_shape("reset_c", "the shape of c_0", *call.reset_c, a.states.then(a.problem.H));
}

void check_zoneout(const Arguments& a, const char* name, const OptionalTensor& mask, double rate, int64_t features,
                   const Tensor& x) {
  FASTLSTM_CHECK(rate >= 0 && rate <= 1, "the rate of ", name, " must be in [0, 1], got ", rate);
  if (!mask) return;
  FASTLSTM_CHECK(rate == 0, name, " must be given as a mask or as a rate, got both");
  FASTLSTM_CHECK(mask->scalar_type() == ScalarType::Bool, name, " must be bool, got ", dtype_name(mask->scalar_type()));
  check_shape(name, "[L*D, *x.shape[:-1], features]", *mask,
              a.rows_of(a.problem.layers * a.problem.directions, features));
  check_device(name, *mask, x);
}

}  // namespace

Arguments parse(const Call& call, bool training) {
  Arguments a = {};
  Problem& p = a.problem;
  FASTLSTM_CHECK(call.num_layers > 0, "num_layers must be positive, got ", call.num_layers);
  p.layers = call.num_layers;
  p.directions = call.bidirectional ? 2 : 1;
  p.training = training;
  p.layer_norm = call.layer_norm;
  parse_sizes(a, call);
  if (call.lengths) check_lengths(a, *call.lengths, call.x);
  if (call.reset_mask) check_reset_mask(a, *call.reset_mask, call.x);

  a.type = call.x.scalar_type();
  FASTLSTM_CHECK(a.type == ScalarType::Float || a.type == ScalarType::Double || a.type == ScalarType::BFloat16 ||
                     a.type == ScalarType::Half,
                 "x must be float32, float64, bfloat16 or float16, got ", dtype_name(a.type));
  a.compute_type = a.type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  p.compute_bytes = a.compute_type == ScalarType::Double ? 8 : 4;
  check_dtype_and_device("h_0", call.h_0, call.x);
  check_dtype_and_device("c_0", call.c_0, call.x);
  a.per_direction = 2 + (call.has_bias ? 2 : 0) + (p.P > 0 ? 1 : 0) + (p.layer_norm ? kLayerNormWeights : 0);
  check_weights(a, call);
  if (call.dropout_mask) check_dropout_mask(a, *call.dropout_mask, call.x);
  if (call.reset_h || call.reset_c) check_reset_states(a, call);
  if (call.recurrent_mask) {
    check_dtype_and_device("recurrent_mask", *call.recurrent_mask, call.x);
    check_shape("recurrent_mask", "the shape of h_0", *call.recurrent_mask, a.states.then(p.output_size()));
  }
  check_zoneout(a, "zoneout_h", call.zoneout_h, call.zoneout_rate_h, p.output_size(), call.x);
  check_zoneout(a, "zoneout_c", call.zoneout_c, call.zoneout_rate_c, p.H, call.x);
  p.step_extras = call.reset_h || call.recurrent_mask || call.zoneout_h || call.zoneout_c || call.zoneout_rate_h != 0 ||
                  call.zoneout_rate_c != 0;
  return a;
}

void check_wanted(const Arguments& a, const Wanted& wanted) {
  FASTLSTM_CHECK(wanted.cell_layers >= 0 && wanted.cell_layers <= a.problem.layers,
                 "cell_layers must be in [0, num_layers] = [0, ", a.problem.layers, "], got ", wanted.cell_layers);
}

void check_backward(const Arguments& a, const Call& call, const BackwardCall& backward, ScalarType saved_type) {
  const Problem& p = a.problem;
  const at::TensorList saved = backward.saved;
  const int64_t states = p.layers * p.directions, width = p.directions * p.output_size();
  const size_t inputs = call.weights.size() + (call.reset_h ? 3 : 2);
  FASTLSTM_CHECK(backward.needs.size() == inputs, "needs must have ", inputs, " entries, got ", backward.needs.size());
  FASTLSTM_CHECK(
      backward.groups >= 1 && a.batch() % backward.groups == 0 && (backward.groups == 1 || !call.batch_sizes),
      "groups must be positive and divide B = ", a.batch(), ", of rows that are not packed, got ", backward.groups);
  FASTLSTM_CHECK(saved.size() == (p.layer_norm ? 5 : 3), "saved must hold ",
                 p.layer_norm ? "norm_ih, cells, layer_outputs, norm_hh and rstd" : "gates, cells and layer_outputs",
                 ", got ", saved.size(), " tensors (was the forward pass run with save=True?)");
  const bool recompute = saved[kSavedGates].dim() == 3 && saved[kSavedGates].size(1) == 0;
  const int64_t kept_rows = recompute ? 0 : a.row_count;
  check_shape(p.layer_norm ? "norm_ih" : "gates", "[L*D, N, 4H]", saved[kSavedGates],
              {states, kept_rows, kGates * p.H});
  check_shape("cells", "[L*D, N, H]", saved[kSavedCells], {states, a.row_count, p.H});
  check_shape("layer_outputs", "[L-1, N, D*P]", saved[kSavedOutputs], {p.layers - 1, a.row_count, width});
  if (p.layer_norm) {
    check_shape("norm_hh", "[L*D, N, 4H]", saved[kSavedNormHh], {states, kept_rows, kGates * p.H});
    check_shape("rstd", "[2*L*D, N, 1]", saved[kSavedRstd], {2 * states, kept_rows, 1});
  }
  const ScalarType saved_types[] = {saved_type, a.compute_type, saved_type, saved_type, a.compute_type};
  for (size_t i = 0; i < saved.size(); ++i)
    FASTLSTM_CHECK(
        saved[i].scalar_type() == saved_types[i] && saved[i].is_contiguous() && saved[i].device() == call.x.device(),
        "saved must be passed as the forward pass returned it");
  const auto check = [&](const char* name, const char* symbols, const Tensor& tensor, const Sizes& sizes) {
    check_shape(name, symbols, tensor, sizes);
    check_device(name, tensor, call.x);
  };
  check("y", "[*x.shape[:-1], D*P]", backward.y, a.rows.then(width));
  if (backward.d_y) check("d_y", "[*x.shape[:-1], D*P]", *backward.d_y, a.rows.then(width));
  if (backward.d_h_n) check("d_h_n", "the shape of h_0", *backward.d_h_n, a.states.then(p.output_size()));
  if (backward.d_c_n) check("d_c_n", "the shape of c_0", *backward.d_c_n, a.states.then(p.H));
  if (backward.d_cell_states) {
    const Tensor& d_cells = *backward.d_cell_states;
    const int64_t blocks = d_cells.dim() > 0 ? d_cells.size(0) : 0;
    FASTLSTM_CHECK(blocks % p.directions == 0 && blocks <= states, "d_cell_states must be of whole layers, got shape ",
                   shape_text(d_cells.sizes()));
    check("d_cell_states", "[cell_layers * D, *x.shape[:-1], H]", d_cells, a.rows_of(blocks, p.H));
  }
}

}  // namespace fastlstm
