// What the operators are called with and return, for the backends that implement them and for ops.cpp, which defines
// them. The schemas stand in ops.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fastlstm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// y, h_n, c_n, saved, cell_states
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>>;
// d_x, d_h_0, d_c_0, d_weights, d_resets
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>>;

// What stands where in `saved`. The first are gates, or with layer_norm the normalised x W_ih^T, which gates follow
// from with the last two.
enum Saved : size_t { kSavedGates, kSavedCells, kSavedOutputs, kSavedNormHh, kSavedRstd };

// The arguments that lstm and lstm_backward share.
struct Call {
  const Tensor& x;
  const at::TensorList weights;
  const Tensor &h_0, &c_0;
  const OptionalTensor &batch_sizes, &lengths, &reset_mask, &dropout_mask;
  int64_t num_layers;
  bool bidirectional, has_bias, reduced_products;
  const OptionalTensor &reset_h, &reset_c, &recurrent_mask, &zoneout_h, &zoneout_c;
  double zoneout_rate_h, zoneout_rate_c;
  bool layer_norm;
};

// What lstm is asked for beside y, h_n and c_n.
struct Wanted {
  int64_t cell_layers;
  bool save, recompute;
};

// The other arguments of lstm_backward.
struct BackwardCall {
  const OptionalTensor &d_y, &d_h_n, &d_c_n, &d_cell_states;
  const Tensor& y;
  const at::TensorList saved;
  const at::IntArrayRef needs;
  int64_t groups;
};

// What is registered for a backend that implements the operators as functions of the structs above.
template <ForwardResult (*kImplementation)(const Call&, const Wanted&)>
ForwardResult forward_kernel(const Tensor& x, at::TensorList weights, const Tensor& h_0, const Tensor& c_0,
                             const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                             const OptionalTensor& reset_mask, const OptionalTensor& dropout_mask, int64_t num_layers,
                             bool bidirectional, bool has_bias, bool reduced_products, bool save,
                             const OptionalTensor& reset_h, const OptionalTensor& reset_c,
                             const OptionalTensor& recurrent_mask, const OptionalTensor& zoneout_h,
                             const OptionalTensor& zoneout_c, double zoneout_rate_h, double zoneout_rate_c,
                             int64_t cell_layers, bool recompute, bool layer_norm) {
  return kImplementation({x,
                          weights,
                          h_0,
                          c_0,
                          batch_sizes,
                          lengths,
                          reset_mask,
                          dropout_mask,
                          num_layers,
                          bidirectional,
                          has_bias,
                          reduced_products,
                          reset_h,
                          reset_c,
                          recurrent_mask,
                          zoneout_h,
                          zoneout_c,
                          zoneout_rate_h,
                          zoneout_rate_c,
                          layer_norm},
                         {cell_layers, save, recompute});
}
template <BackwardResult (*kImplementation)(const Call&, const BackwardCall&)>
BackwardResult backward_kernel(const OptionalTensor& d_y, const OptionalTensor& d_h_n, const OptionalTensor& d_c_n,
                               const Tensor& x, at::TensorList weights, const Tensor& h_0, const Tensor& c_0,
                               const Tensor& y, at::TensorList saved, const OptionalTensor& batch_sizes,
                               const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                               const OptionalTensor& dropout_mask, int64_t num_layers, bool bidirectional,
                               bool has_bias, bool reduced_products, at::IntArrayRef needs,
                               const OptionalTensor& d_cell_states, const OptionalTensor& reset_h,
                               const OptionalTensor& reset_c, const OptionalTensor& recurrent_mask,
                               const OptionalTensor& zoneout_h, const OptionalTensor& zoneout_c, double zoneout_rate_h,
                               double zoneout_rate_c, int64_t groups, bool layer_norm) {
  return kImplementation({x,
                          weights,
                          h_0,
                          c_0,
                          batch_sizes,
                          lengths,
                          reset_mask,
                          dropout_mask,
                          num_layers,
                          bidirectional,
                          has_bias,
                          reduced_products,
                          reset_h,
                          reset_c,
                          recurrent_mask,
                          zoneout_h,
                          zoneout_c,
                          zoneout_rate_h,
                          zoneout_rate_c,
                          layer_norm},
                         {d_y, d_h_n, d_c_n, d_cell_states, y, saved, needs, groups});
}

// The operators as the dispatcher calls them: the schemas, in C++.
using Forward = decltype(forward_kernel<nullptr>);
using Backward = decltype(backward_kernel<nullptr>);

// The operators as their users call them: with autocast, autograd and what else applies.
ForwardResult lstm_operator(const Call& call, const Wanted& wanted);
BackwardResult lstm_backward_operator(const Call& call, const BackwardCall& backward);

// Whether autograd will ask for a gradient of these, so that lstm has to save what it takes.
bool needs_gradient(const Call& call);

}  // namespace fastlstm
