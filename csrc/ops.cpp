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
// All of them are on the device of x, but for batch_sizes; lengths may be on the CPU too.
//
// Returns y [T, B, D*P] (packed: [N, D*P]), h_n, c_n, and with `save` three tensors: gates [L*D, N, 4H] (activations i,
// f, g, o), cells [L*D, N, H] and layer_outputs [L-1, N, D*P]; N is T * B unless packed, and with `lengths` their rows
// are in an order of the backend's own. On the CPU all three are in the compute type (float32 below float64), on CUDA
// only cells are, and the others in the dtype of x.
//
// lstm_backward returns d_x, d_h_0, d_c_0 and one gradient per weight; what `needs` marks with 0 comes back empty.
// `needs` has an entry for x, one for the states, then one per weight.
#include "ops.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

namespace fastlstm {

namespace {

// What lstm takes beside x, weights, h_0 and c_0.
struct Options {
  const OptionalTensor &batch_sizes, &lengths, &reset_mask, &dropout_mask;
  int64_t num_layers;
  bool bidirectional, has_bias, reduced_products, save;
};

// lstm as a function of (x, h_0, c_0, weights...), whose gradient is lstm_backward. Written in C++ because Python's
// autograd.Function takes longer than a training step of a small cell.
struct LstmFunction : torch::autograd::Function<LstmFunction> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;
  // What is kept for backward: these tensors, then the weights, then what the operator saved.
  enum Kept : size_t { kX, kH0, kC0, kY, kBatchSizes, kLengths, kResetMask, kDropoutMask, kWeights };
  // And these numbers, as a vector of this name.
  enum Structure : size_t { kNumLayers, kBidirectional, kHasBias, kReducedProducts, kWeightCount };
  static constexpr const char* kStructure = "structure";
  static constexpr size_t kInputs = 3;  // x, h_0 and c_0; of the inputs the weights come behind them

  // `saved`: where to put what the operator saved; nobody differentiates that.
  static Tensors forward(Context* context, const Tensor& x, const Tensor& h_0, const Tensor& c_0,
                         at::TensorList weights, const Options& o, std::vector<Tensor>& saved) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor y, h_n, c_n;
    std::tie(y, h_n, c_n, saved) =
        lstm_operator().call(x, weights, h_0, c_0, o.batch_sizes, o.lengths, o.reset_mask, o.dropout_mask, o.num_layers,
                             o.bidirectional, o.has_bias, o.reduced_products, o.save);
    Tensors kept = {x, h_0, c_0, y};
    for (const OptionalTensor* option : {&o.batch_sizes, &o.lengths, &o.reset_mask, &o.dropout_mask})
      kept.push_back(option->value_or(Tensor()));
    kept.insert(kept.end(), weights.begin(), weights.end());
    kept.insert(kept.end(), saved.begin(), saved.end());
    context->save_for_backward(std::move(kept));
    context->saved_data[kStructure] = std::vector<int64_t>{o.num_layers, o.bidirectional, o.has_bias,
                                                           o.reduced_products, static_cast<int64_t>(weights.size())};
    context->set_materialize_grads(false);
    return {y, h_n, c_n};
  }

  static Tensors backward(Context* context, const Tensors& d_outputs) {
    const std::vector<int64_t> structure = context->saved_data[kStructure].toIntVector();
    const auto weight_count = static_cast<size_t>(structure[kWeightCount]);
    Tensors gradients(kInputs + weight_count + 2);  // the last two: forward's other arguments, which have none
    const auto given = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    if (std::none_of(d_outputs.begin(), d_outputs.end(), [](const Tensor& d) { return d.defined(); })) return gradients;

    const Tensors kept = context->get_saved_variables();
    const at::TensorList weights = at::TensorList(kept).slice(kWeights, weight_count),
                         saved = at::TensorList(kept).slice(kWeights + weight_count);
    TORCH_CHECK(!saved.empty(), "fastlstm::lstm ran with save=False and kept nothing for backward; pass save=True");
    const auto needed = [&](size_t input) { return context->needs_input_grad(input); };
    std::vector<int64_t> needs = {needed(0), needed(1) || needed(2)};
    for (size_t i = 0; i < weight_count; ++i) needs.push_back(needed(kInputs + i));
    // With create_graph=True the gradients are functions that autograd can differentiate again: those of lstm_backward.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!c10::GradMode::is_enabled()) below_autograd.emplace();
    auto [d_x, d_h_0, d_c_0, d_weights] = lstm_backward_operator().call(
        given(d_outputs[0]), given(d_outputs[1]), given(d_outputs[2]), kept[kX], weights, kept[kH0], kept[kC0],
        kept[kY], saved, given(kept[kBatchSizes]), given(kept[kLengths]), given(kept[kResetMask]),
        given(kept[kDropoutMask]), structure[kNumLayers], structure[kBidirectional] != 0, structure[kHasBias] != 0,
        structure[kReducedProducts] != 0, needs);
    const auto put = [&](size_t input, Tensor& gradient) {
      if (needed(input)) gradients[input] = std::move(gradient);
    };
    put(0, d_x);
    put(1, d_h_0);
    put(2, d_c_0);
    for (size_t i = 0; i < weight_count; ++i) put(kInputs + i, d_weights[i]);
    return gradients;
  }
};

ForwardResult lstm_autograd(const Tensor& x, at::TensorList weights, const Tensor& h_0, const Tensor& c_0,
                            const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                            const OptionalTensor& reset_mask, const OptionalTensor& dropout_mask, int64_t num_layers,
                            bool bidirectional, bool has_bias, bool reduced_products, bool save) {
  if (!needs_gradient(x, weights, h_0, c_0)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return lstm_operator().call(x, weights, h_0, c_0, batch_sizes, lengths, reset_mask, dropout_mask, num_layers,
                                bidirectional, has_bias, reduced_products, save);
  }
  const Options options = {batch_sizes,   lengths,  reset_mask,       dropout_mask, num_layers,
                           bidirectional, has_bias, reduced_products, save};
  std::vector<Tensor> saved;
  auto outputs = LstmFunction::apply(x, h_0, c_0, weights, options, saved);
  return {std::move(outputs[0]), std::move(outputs[1]), std::move(outputs[2]), std::move(saved)};
}

}  // namespace

bool needs_gradient(const Tensor& x, at::TensorList weights, const Tensor& h_0, const Tensor& c_0) {
  return c10::GradMode::is_enabled() &&
         (x.requires_grad() || h_0.requires_grad() || c_0.requires_grad() ||
          std::any_of(weights.begin(), weights.end(), [](const Tensor& w) { return w.requires_grad(); }));
}

const c10::TypedOperatorHandle<Forward>& lstm_operator() {
  static const auto found = c10::Dispatcher::singleton().findSchemaOrThrow("fastlstm::lstm", "").typed<Forward>();
  return found;
}

const c10::TypedOperatorHandle<Backward>& lstm_backward_operator() {
  static const auto found =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastlstm::lstm_backward", "").typed<Backward>();
  return found;
}

}  // namespace fastlstm

TORCH_LIBRARY(fastlstm, m) {
  m.def(
      "lstm(Tensor x, Tensor[] weights, Tensor h_0, Tensor c_0, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? reset_mask, Tensor? dropout_mask, int num_layers, bool bidirectional, bool has_bias, "
      "bool reduced_products, bool save) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor[] saved)");
  m.def(
      "lstm_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor[] weights, Tensor h_0, Tensor c_0, "
      "Tensor y, Tensor[] saved, Tensor? batch_sizes, Tensor? lengths, Tensor? reset_mask, Tensor? dropout_mask, "
      "int num_layers, bool bidirectional, bool has_bias, bool reduced_products, int[] needs) -> "
      "(Tensor d_x, Tensor d_h_0, Tensor d_c_0, Tensor[] d_weights)");
}

TORCH_LIBRARY_IMPL(fastlstm, Autograd, m) { m.impl("lstm", fastlstm::lstm_autograd); }
