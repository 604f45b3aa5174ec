// What the operators are called with and return, for the backends that implement them and for ops.cpp, which defines
// them. The schemas stand in ops.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fastlstm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;   // y, h_n, c_n, saved
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // d_x, d_h_0, d_c_0, d_weights

// lstm; a backend implements it as a function of this type.
using Forward = ForwardResult(const Tensor& x, at::TensorList weights, const Tensor& h_0, const Tensor& c_0,
                              const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                              const OptionalTensor& reset_mask, const OptionalTensor& dropout_mask, int64_t num_layers,
                              bool bidirectional, bool has_bias, bool reduced_products, bool save);

// lstm_backward, likewise.
using Backward = BackwardResult(const OptionalTensor& d_y, const OptionalTensor& d_h_n, const OptionalTensor& d_c_n,
                                const Tensor& x, at::TensorList weights, const Tensor& h_0, const Tensor& c_0,
                                const Tensor& y, at::TensorList saved, const OptionalTensor& batch_sizes,
                                const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                                const OptionalTensor& dropout_mask, int64_t num_layers, bool bidirectional,
                                bool has_bias, bool reduced_products, at::IntArrayRef needs);

// The operators as their users call them: with autocast, autograd and what else applies.
const c10::TypedOperatorHandle<Forward>& lstm_operator();
const c10::TypedOperatorHandle<Backward>& lstm_backward_operator();

// Whether autograd will ask for a gradient of these, so that lstm has to save what it takes.
bool needs_gradient(const Tensor& x, at::TensorList weights, const Tensor& h_0, const Tensor& c_0);

}  // namespace fastlstm
