// The schemas of the operators. Each backend registers its own implementation (cpu/cpu_ops.cpp); fakes, autograd and
// autocast are Python's (fastlstm/_ops.py).
//
// One call computes a whole stack of L layers and D directions.
//   x            [T, B, I], or [N, I] with batch_sizes (int64 [T] on the CPU, non-increasing, as in a PackedSequence)
//   weights      per layer, then direction: W_ih [4H, I_l], W_hh [4H, P], [b_ih, b_hh [4H]], [W_hr [P, H]]
//   h_0, c_0     [L*D, B, P], [L*D, B, H]; there is a W_hr exactly where P != H
//   (a single step of one layer may leave out T and L*D: x [B, I], h_0 [B, P], c_0 [B, H], and results likewise)
//   lengths      int64 [B] in [0, T], with x [T, B, I]: the steps of each sequence, in any order. Behind its end y is
//                zero; the final states are those of its last step, for a sequence of no steps the initial ones
//   reset_mask   bool, the shape of x but for the features: where true, the states are zero *before* that step. It cuts
//                the sequence there, so the reverse direction begins anew at the step before
//   dropout_mask [L-1, T, B, D*P] (packed: [L-1, N, D*P]): factors on the outputs of all layers but the last, as the
//                layer above reads them
//   allow_bf16   whether products of float32 tensors may be taken of values rounded to bfloat16 (sums stay float32)
//   save         whether to keep what lstm_backward needs
//
// Returns y [T, B, D*P] (packed: [N, D*P]), h_n, c_n, and with `save` three tensors in the compute type (float32 below
// float64): gates [L*D, N, 4H] (activations i, f, g, o), cells [L*D, N, H] and layer_outputs [L-1, N, D*P]; N is T * B
// unless packed, and with `lengths` their rows are in an order of the backend's own.
//
// lstm_backward returns d_x, d_h_0, d_c_0 and one gradient per weight; what `needs` marks with 0 comes back empty.
// `needs` has an entry for x, one for the states, then one per weight.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastlstm, m) {
  m.def(
      "lstm(Tensor x, Tensor[] weights, Tensor h_0, Tensor c_0, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? reset_mask, Tensor? dropout_mask, int num_layers, bool bidirectional, bool has_bias, bool allow_bf16, "
      "bool save) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor[] saved)");
  m.def(
      "lstm_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor[] weights, Tensor h_0, Tensor c_0, "
      "Tensor y, Tensor[] saved, Tensor? batch_sizes, Tensor? lengths, Tensor? reset_mask, Tensor? dropout_mask, "
      "int num_layers, bool bidirectional, bool has_bias, bool allow_bf16, int[] needs) -> "
      "(Tensor d_x, Tensor d_h_0, Tensor d_c_0, Tensor[] d_weights)");
}
