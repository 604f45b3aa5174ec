// The schemas of the operators and the gradient of lstm. Each backend registers its own implementation
// (cpu/cpu_ops.cpp) and begins with the checks of arguments.h; fakes, autocast and the gradient of lstm_backward are
// Python's (fastlstm/_ops.py).
//
// One call computes a whole stack of L layers and D directions.
//   x                 [T, B, I], or [N, I] with batch_sizes (int64 [T] on the CPU, non-increasing, as in a
//                     PackedSequence)
//   weights           per layer, then direction: W_ih [4H, I_l], W_hh [4H, P], [b_ih, b_hh [4H]], [W_hr [P, H]]
//   h_0, c_0          [L*D, B, P], [L*D, B, H]; there is a W_hr exactly where P != H
//   (a single step of one layer may leave out T and L*D: x [B, I], h_0 [B, P], c_0 [B, H], and results likewise)
//   lengths           int64 [B] in [0, T], with x [T, B, I]: the steps of each sequence, in any order. Behind its end y
//                     is zero; the final states are those of its last step, for a sequence of no steps the initial ones
//   reset_mask        bool, the shape of x but for the features: where true, the states are zero *before* that step. It
//                     cuts the sequence there, so the reverse direction begins anew at the step before
//   dropout_mask      [L-1, T, B, D*P] (packed: [L-1, N, D*P]): factors on the outputs of all layers but the last, as
//                     the layer above reads them
//   reduced_products  whether products of float32 tensors may be taken of rounded values (sums stay float32): bfloat16
//                     on the CPU, TF32 on CUDA
//   save              whether to keep what lstm_backward needs
//   reset_h, reset_c  [L*D, B, P], [L*D, B, H]: the states that reset_mask sets in place of zeros; both or neither
//   recurrent_mask    [L*D, B, P]: factors on h_{t-1} as the recurrent product reads it
//   zoneout_h, _c     bool [L*D, *x.shape[:-1], P], [..., H]: where true, an element of the state keeps the value of
//   the
//                     step before
//   zoneout_rate_h, _c  without such a mask: the part of the state that is of the step before, in every element
//   cell_layers       so many layers, the highest of the stack, return their cell states
//   recompute         whether gates are not kept for lstm_backward, which then computes them again
//   layer_norm        whether W_ih x, W_hh h and c are normalised before the gates and the output are made of them.
//                     Behind the weights of each direction come weight_ln_ih and weight_ln_hh [4H], weight_ln_c and
//                     bias_ln_c [H]
// All of them are on the device of x, but for batch_sizes; lengths may be on the CPU too.
//
// Returns y [T, B, D*P] (packed: [N, D*P]), h_n, c_n, then with `save` three tensors: gates [L*D, N, 4H] (activations
// i, f, g, o), cells [L*D, N, H] and layer_outputs [L-1, N, D*P]; N is T * B unless packed, and with `lengths` their
// rows are in an order of the backend's own. With layer_norm there are five: in the place of gates, which follow from
// them, norm_ih [L*D, N, 4H], the normalised W_ih x, and last norm_hh, likewise of W_hh h, and rstd [2*L*D, N, 1], what
// W_ih x and, in the second half, W_hh h have been multiplied by for that. With `recompute`, gates, norm_ih, norm_hh
// and rstd have no rows. On the CPU all of them are in the compute type (float32 below float64), on CUDA only cells and
// rstd are, and the others in the dtype of x. Last come, with cell_layers, the cell states [cell_layers * D,
// *x.shape[:-1], H] in the dtype of x.
//
// lstm_backward returns d_x, d_h_0, d_c_0, one gradient per weight and, with reset_h, those of reset_h and reset_c;
// what `needs` marks with 0 comes back empty. `needs` has an entry for x, one for the states, then one per weight, and
// one for the reset states where there are any. With groups = G > 1, the gradient of a weight is [G, ...]: of B / G
// adjacent rows of the batch each.
#include "ops.h"

#include <ATen/LegacyVmapTransforms.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>

namespace fastlstm {

namespace {

// lstm as a function of (x, h_0, c_0, weights..., reset_h, reset_c), whose gradient is lstm_backward. Written in C++
// because Python's autograd.Function takes longer than a training step of a small cell.
struct LstmFunction : torch::autograd::Function<LstmFunction> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;
  // What is kept for backward: these tensors, then the weights, then what the operator saved.
  enum Kept : size_t {
    kX,
    kH0,
    kC0,
    kY,
    kBatchSizes,
    kLengths,
    kResetMask,
    kDropoutMask,
    kResetH,
    kResetC,
    kRecurrentMask,
    kZoneoutH,
    kZoneoutC,
    kWeights
  };
  // And these numbers, as vectors of these names.
  enum Structure : size_t { kNumLayers, kBidirectional, kHasBias, kReducedProducts, kLayerNorm, kWeightCount };
  static constexpr const char *kStructure = "structure", *kZoneoutRates = "zoneout_rates";
  static constexpr size_t kInputs = 3;   // x, h_0 and c_0; of the inputs the weights come behind them
  static constexpr size_t kOutputs = 3;  // y, h_n and c_n; then the cell states, if they are returned

  // `saved`: where to put what the operator saved; nobody differentiates that. The arguments are those of which
  // autograd looks for variables, then those that it leaves alone.
  static Tensors forward(Context* context, const Tensor& x, const Tensor& h_0, const Tensor& c_0,
                         at::TensorList weights, const OptionalTensor& reset_h, const OptionalTensor& reset_c,
                         const Call& call, const Wanted& wanted, std::vector<Tensor>& saved) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensors outputs(kOutputs);
    std::vector<Tensor> cell_states;
    std::tie(outputs[0], outputs[1], outputs[2], saved, cell_states) = lstm_operator(call, wanted);
    Tensors kept = {x, h_0, c_0, outputs[0]};
    for (const OptionalTensor* option : {&call.batch_sizes, &call.lengths, &call.reset_mask, &call.dropout_mask,
                                         &reset_h, &reset_c, &call.recurrent_mask, &call.zoneout_h, &call.zoneout_c})
      kept.push_back(option->value_or(Tensor()));
    kept.insert(kept.end(), weights.begin(), weights.end());
    kept.insert(kept.end(), saved.begin(), saved.end());
    context->save_for_backward(std::move(kept));
    context->saved_data[kStructure] =
        std::vector<int64_t>{call.num_layers,       call.bidirectional, call.has_bias,
                             call.reduced_products, call.layer_norm,    static_cast<int64_t>(weights.size())};
    if (call.zoneout_rate_h != 0 || call.zoneout_rate_c != 0)
      context->saved_data[kZoneoutRates] = std::vector<double>{call.zoneout_rate_h, call.zoneout_rate_c};
    context->set_materialize_grads(false);
    outputs.insert(outputs.end(), cell_states.begin(), cell_states.end());
    return outputs;
  }

  static Tensors backward(Context* context, const Tensors& d_outputs) {
    const std::vector<int64_t> structure = context->saved_data[kStructure].toIntVector();
    const auto weight_count = static_cast<size_t>(structure[kWeightCount]);
    Tensors gradients(kInputs + weight_count + 5);  // the last three: forward's other arguments, which have none
    const auto given = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    if (std::none_of(d_outputs.begin(), d_outputs.end(), [](const Tensor& d) { return d.defined(); })) return gradients;

    const Tensors kept = context->get_saved_variables();
    const at::TensorList weights = at::TensorList(kept).slice(kWeights, weight_count),
                         saved = at::TensorList(kept).slice(kWeights + weight_count);
    TORCH_CHECK(!saved.empty(), "fastlstm::lstm ran with save=False and kept nothing for backward; pass save=True");
    const auto needed = [&](size_t input) { return context->needs_input_grad(input); };
    const size_t reset = kInputs + weight_count;  // the index of reset_h, which reset_c follows
    const bool has_resets = kept[kResetH].defined(), needs_resets = has_resets && (needed(reset) || needed(reset + 1));
    std::vector<int64_t> needs = {needed(0), needed(1) || needed(2)};
    for (size_t i = 0; i < weight_count; ++i) needs.push_back(needed(kInputs + i));
    if (has_resets) needs.push_back(needs_resets);
    std::vector<double> rates = {0, 0};
    if (const auto found = context->saved_data.find(kZoneoutRates); found != context->saved_data.end())
      rates = found->second.toDoubleVector();
    OptionalTensor options[kWeights - kBatchSizes], d_options[kOutputs + 1];
    std::transform(kept.begin() + kBatchSizes, kept.begin() + kWeights, options, given);
    std::transform(d_outputs.begin(), d_outputs.end(), d_options, given);
    const auto option = [&](Kept which) -> const OptionalTensor& { return options[which - kBatchSizes]; };
    // With create_graph=True the gradients are functions that autograd can differentiate again: those of lstm_backward.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!c10::GradMode::is_enabled()) below_autograd.emplace();
    auto [d_x, d_h_0, d_c_0, d_weights, d_resets] =
        lstm_backward_operator({kept[kX],
                                weights,
                                kept[kH0],
                                kept[kC0],
                                option(kBatchSizes),
                                option(kLengths),
                                option(kResetMask),
                                option(kDropoutMask),
                                structure[kNumLayers],
                                structure[kBidirectional] != 0,
                                structure[kHasBias] != 0,
                                structure[kReducedProducts] != 0,
                                option(kResetH),
                                option(kResetC),
                                option(kRecurrentMask),
                                option(kZoneoutH),
                                option(kZoneoutC),
                                rates[0],
                                rates[1],
                                structure[kLayerNorm] != 0},
                               {d_options[0], d_options[1], d_options[2], d_options[3], kept[kY], saved, needs, 1});
    const auto put = [&](size_t input, Tensor& gradient) {
      if (needed(input)) gradients[input] = std::move(gradient);
    };
    put(0, d_x);
    put(1, d_h_0);
    put(2, d_c_0);
    for (size_t i = 0; i < weight_count; ++i) put(kInputs + i, d_weights[i]);
    if (needs_resets)
      for (size_t i = 0; i < d_resets.size(); ++i) put(reset + i, d_resets[i]);
    return gradients;
  }
};

ForwardResult lstm_autograd(const Call& call, const Wanted& wanted) {
  if (!needs_gradient(call)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return lstm_operator(call, wanted);
  }
  std::vector<Tensor> saved;
  auto outputs =
      LstmFunction::apply(call.x, call.h_0, call.c_0, call.weights, call.reset_h, call.reset_c, call, wanted, saved);
  std::vector<Tensor> cell_states(outputs.begin() + LstmFunction::kOutputs, outputs.end());
  return {std::move(outputs[0]), std::move(outputs[1]), std::move(outputs[2]), std::move(saved),
          std::move(cell_states)};
}

// For a batch of gradients of one forward pass, which autograd.grad(is_grads_batched=True) and vectorized Jacobians ask
// for: a call for each of them.
BackwardResult lstm_backward_batched(const Call& call, const BackwardCall& backward) {
  const OptionalTensor* const given[] = {&backward.d_y, &backward.d_h_n, &backward.d_c_n, &backward.d_cell_states};
  std::vector<Tensor> logical;
  for (const OptionalTensor* gradient : given)
    if (*gradient) logical.push_back(**gradient);
  const auto views = at::MultiBatchVmapTransform::logicalToPhysical(logical);
  TORCH_CHECK_NOT_IMPLEMENTED(!views.empty() && views[0].numBatchDims() == 1,
                              "batches of batches of gradients; use torch.func.vmap");
  std::vector<std::vector<Tensor>> results;  // by result, of each call
  for (int64_t i = 0; i < views[0].tensor().size(0); ++i) {
    OptionalTensor own[std::size(given)];
    for (size_t g = 0, view = 0; g < std::size(given); ++g)
      if (*given[g]) own[g] = views[view++].tensor()[i];
    auto [d_x, d_h_0, d_c_0, d_weights, d_resets] = lstm_backward_operator(
        call, {own[0], own[1], own[2], own[3], backward.y, backward.saved, backward.needs, backward.groups});
    std::vector<Tensor> of_call = {std::move(d_x), std::move(d_h_0), std::move(d_c_0)};
    of_call.insert(of_call.end(), d_weights.begin(), d_weights.end());
    of_call.insert(of_call.end(), d_resets.begin(), d_resets.end());
    results.resize(of_call.size());
    for (size_t r = 0; r < of_call.size(); ++r) results[r].push_back(std::move(of_call[r]));
  }
  const auto logical_map = views[0].getPhysicalToLogicalMap();
  std::vector<Tensor> stacked;
  for (const std::vector<Tensor>& of_calls : results) stacked.push_back(logical_map.apply(at::stack(of_calls)));
  const auto weights = stacked.begin() + 3, resets = weights + static_cast<int64_t>(call.weights.size());
  return {stacked[0], stacked[1], stacked[2], {weights, resets}, {resets, stacked.end()}};
}

template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

bool needs_gradient(const Call& c) {
  const auto requires_grad = [](const Tensor& t) { return t.requires_grad(); };
  return c10::GradMode::is_enabled() &&
         (c.x.requires_grad() || c.h_0.requires_grad() || c.c_0.requires_grad() ||
          std::any_of(c.weights.begin(), c.weights.end(), requires_grad) || (c.reset_h && c.reset_h->requires_grad()) ||
          (c.reset_c && c.reset_c->requires_grad()));
}

ForwardResult lstm_operator(const Call& c, const Wanted& wanted) {
  static const auto found = find<Forward>("fastlstm::lstm");
  return found.call(c.x, c.weights, c.h_0, c.c_0, c.batch_sizes, c.lengths, c.reset_mask, c.dropout_mask, c.num_layers,
                    c.bidirectional, c.has_bias, c.reduced_products, wanted.save, c.reset_h, c.reset_c,
                    c.recurrent_mask, c.zoneout_h, c.zoneout_c, c.zoneout_rate_h, c.zoneout_rate_c, wanted.cell_layers,
                    wanted.recompute, c.layer_norm);
}

BackwardResult lstm_backward_operator(const Call& c, const BackwardCall& b) {
  static const auto found = find<Backward>("fastlstm::lstm_backward");
  return found.call(b.d_y, b.d_h_n, b.d_c_n, c.x, c.weights, c.h_0, c.c_0, b.y, b.saved, c.batch_sizes, c.lengths,
                    c.reset_mask, c.dropout_mask, c.num_layers, c.bidirectional, c.has_bias, c.reduced_products,
                    b.needs, b.d_cell_states, c.reset_h, c.reset_c, c.recurrent_mask, c.zoneout_h, c.zoneout_c,
                    c.zoneout_rate_h, c.zoneout_rate_c, b.groups, c.layer_norm);
}

}  // namespace fastlstm

TORCH_LIBRARY(fastlstm, m) {
  m.def(
      "lstm(Tensor x, Tensor[] weights, Tensor h_0, Tensor c_0, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? reset_mask, Tensor? dropout_mask, int num_layers, bool bidirectional, bool has_bias, "
      "bool reduced_products, bool save, Tensor? reset_h=None, Tensor? reset_c=None, Tensor? recurrent_mask=None, "
      "Tensor? zoneout_h=None, Tensor? zoneout_c=None, float zoneout_rate_h=0, float zoneout_rate_c=0, "
      "int cell_layers=0, bool recompute=False, bool layer_norm=False) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor[] saved, Tensor[] cell_states)");
  m.def(
      "lstm_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor[] weights, Tensor h_0, Tensor c_0, "
      "Tensor y, Tensor[] saved, Tensor? batch_sizes, Tensor? lengths, Tensor? reset_mask, Tensor? dropout_mask, "
      "int num_layers, bool bidirectional, bool has_bias, bool reduced_products, int[] needs, "
      "Tensor? d_cell_states=None, Tensor? reset_h=None, Tensor? reset_c=None, Tensor? recurrent_mask=None, "
      "Tensor? zoneout_h=None, Tensor? zoneout_c=None, float zoneout_rate_h=0, float zoneout_rate_c=0, int groups=1, "
      "bool layer_norm=False) -> (Tensor d_x, Tensor d_h_0, Tensor d_c_0, Tensor[] d_weights, Tensor[] d_resets)");
}

TORCH_LIBRARY_IMPL(fastlstm, Autograd, m) { m.impl("lstm", fastlstm::forward_kernel<fastlstm::lstm_autograd>); }
TORCH_LIBRARY_IMPL(fastlstm, Batched, m) {
  m.impl("lstm_backward", fastlstm::backward_kernel<fastlstm::lstm_backward_batched>);
}
