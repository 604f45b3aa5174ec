// The operators' arguments, checked and measured alike for all backends. Nothing here reads device memory: of the
// values of tensors only batch_sizes are checked, and each backend deals with those of lengths and reset_mask.
#pragma once

#include <cstdint>
#include <vector>

#include "checks.h"
#include "ops.h"
#include "problem.h"

namespace fastlstm {

using at::ScalarType;

constexpr int64_t kLayerNormWeights = 4;  // weight_ln_ih, weight_ln_hh, weight_ln_c, bias_ln_c

struct Arguments {
  Problem problem;               // as the caller's tensors say: T, B and N know nothing of lengths
  std::vector<int64_t> offsets;  // [T + 1], rows of step t are offsets[t] ... offsets[t+1]-1; empty without batch_sizes
  ScalarType type;               // of inputs and outputs
  ScalarType compute_type;       // of sums and the cell state
  int64_t per_direction;         // weights of one direction of one layer
  Sizes rows;                    // leading sizes of x and y: [T, B], packed [N], single step [B]
  Sizes states;                  // leading sizes of the states: [L*D, B], single step [B]

  // Weights of one direction before those of its layer normalisation.
  int64_t plain_weights() const { return per_direction - (problem.layer_norm ? kLayerNormWeights : 0); }
  // The caller's B.
  int64_t batch() const { return states[states.size() - 1]; }
  // Of a tensor with so many blocks of rows of x.
  Sizes rows_of(int64_t blocks, int64_t features) const { return rows.after(blocks).then(features); }

  const char* rows_text;
  int64_t row_count;  // product of `rows`
};

// Throws unless shapes, dtypes and devices fit. All tensors are then on the device of x, and that is the one for which
// the dispatcher chose the backend; only batch_sizes are on the CPU, and lengths may be.
Arguments parse(const Call& call, bool training);

void check_wanted(const Arguments& a, const Wanted& wanted);

// The rest of lstm_backward's arguments, of which `a` are the first. `saved_type`: of what the backend's forward pass
// saves, but for cells and rstd, which are in the compute type. Gates (with layer_norm, norms) without rows are to be
// computed again.
void check_backward(const Arguments& a, const Call& call, const BackwardCall& backward, ScalarType saved_type);

// Contiguous and of the given type; the tensor itself where it already is.
inline Tensor as(const Tensor& tensor, ScalarType type) {
  const Tensor typed = tensor.scalar_type() == type ? tensor : tensor.to(type);
  return typed.is_contiguous() ? typed : typed.contiguous();
}

template <class T>
T* data(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

}  // namespace fastlstm
