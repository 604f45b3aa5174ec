// What is asked of the operator, reduced to the numbers that decide how it is computed.
#pragma once

#include <cstdint>

namespace fastlstm {

struct Problem {
  int64_t T;              // time steps
  int64_t B;              // rows of the widest step
  int64_t N;              // rows of all steps: T * B, less for packed sequences
  int64_t I, H;           // input and hidden size of the first layer
  int64_t P;              // projection size, 0 without
  int64_t layers;         // L
  int64_t directions;     // D
  int64_t compute_bytes;  // 4 (float32, bfloat16, float16) or 8 (float64): what sums are carried in
  bool training;          // activations are saved and a backward pass follows
  bool bf16_allowed;  // products may be taken of values rounded to bfloat16: the tensors are, or the user permits it
  bool step_extras;   // a step is more than the cell: reset states, a recurrent mask, zoneout, or gradients of returned
                      // cell states. On the CPU every plan takes them
  bool layer_norm;    // the gates' products and the cell state are normalised

  int64_t output_size() const { return P > 0 ? P : H; }
  bool operator==(const Problem&) const = default;
};

}  // namespace fastlstm
