// What the launchers of the kernels are called with: plain pointers into device memory. Launchers return what the CUDA
// runtime returned; they check nothing that the planner has promised.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fastlstm::cuda {

// How the steps of a batch of sequences lie in rows: row b of step t is row t * B + b of x, y and what is saved; of
// packed sequences, row offsets[t] + b. A column b has the steps t < lengths[b]: at others its states stay as they are,
// and nothing is read or written.
struct Sequences {
  int steps, batch;        // T, B
  const int64_t* offsets;  // [T + 1], or null: t * B
  const int64_t* lengths;  // [B]; or null: T. What lies outside [0, T] counts as the nearer end
  const bool* resets;      // [N]: the sequence is cut before the step of this row; or null
};

// One direction of one layer, forward. S: the storage type of the element.
struct ForwardDirection {
  const void* gates_x;  // S [N, 4H], W_ih x without biases
  const void* w_hh;     // S [4H, row_stride]
  const void* b_ih;     // S [4H], or null
  const void* b_hh;     // S [4H], or null, as b_ih
  const void* h_0;      // S [B, row_stride]
  const void* c_0;      // S [B, H]
  void* y;              // S [N, y_stride], of which this direction fills H columns from here on
  void* h_n;            // S [B, H]
  void* c_n;            // S [B, H]
  void* gates;          // S [N, 4H], activations i, f, g, o for backward; or null
  void* cells;          // [N, H] in the compute type, c_t for backward; or null
};

struct ForwardParams {
  Sequences sequences;
  int hidden;      // H
  int row_stride;  // of rows that are factors: H up to a multiple of 8; they are zero behind H and aligned to 16 bytes
  int64_t y_stride;                            // D * H
  int directions;                              // computed at the same time
  ForwardDirection direction[kMaxDirections];  // the first goes forward in time, unless it is the only one
  bool reverse;                                // ... and this is set
  bool aligned;                                // all rows of S begin at multiples of 16 bytes
  // Of the families that keep weights in CTAs:
  TeamShape team;
  int first_column, groups;  // columns of the batch first_column ... + groups * tiles * kColumns
  void* exchange;            // [D * groups][2] buffers, filled with 0xff bytes
};

// One direction of one layer, backward.
struct BackwardDirection {
  const void* w_hh;   // S [4H, row_stride]
  const void* gates;  // S [N, 4H], as forward saved them
  const void* cells;  // [N, H] in the compute type
  const void* c_0;    // S [B, H]
  const void* d_y;    // S [N, y_stride], or null: zero
  const void* d_h_n;  // S [B, H], or null: zero
  const void* d_c_n;  // S [B, H], or null: zero
  void* d_gates;      // S [N, 4H], gradients of the pre-activations
  void* d_h_0;        // S [B, H], or null: not needed
  void* d_c_0;        // S [B, H], or null: not needed
};

struct BackwardParams {
  Sequences sequences;
  int hidden, row_stride;
  int64_t y_stride;
  int directions;
  BackwardDirection direction[kMaxDirections];
  bool reverse;
  bool aligned;
  TeamShape team;
  int first_column, groups;
  void* exchange;
};

// One step of one direction by the stepwise family, between the products, which are a library's. P: the size of what a
// layer puts out, H without a projection.
struct StepForwardParams {
  Sequences sequences;
  bool reverse;
  int n;  // the n-th step of the forward pass
  int hidden, outputs;
  int64_t y_stride;
  ForwardDirection direction;
  const void* product;    // S [B, 4H]: W_hh h
  const void* projected;  // S [B, P]: W_hr hidden_state; null without a projection
  void* hidden_state;     // S [B, H]: h_t before its projection; null without one
  void* h;                // S [B, P]: what the product of the next step reads
  void* c;                // [B, H] in the compute type: the cell states
};

// Makes the second factor of the gradient of W_hh: what each step read as h.
struct PreviousOutputsParams {
  Sequences sequences;
  bool reverse;
  int outputs;
  int64_t y_stride;
  const void* y;    // S [N, y_stride], from the direction's first column on
  const void* h_0;  // S [B, P]
  void* previous;   // S [N, P]; zero where the column does not have the step
};

struct StepBackwardParams {
  Sequences sequences;
  bool reverse;
  int n;  // the n-th step of the backward pass, T after the last
  int hidden, outputs;
  int64_t y_stride;
  BackwardDirection direction;
  const void* product;   // S [B, P]: W_hh^T d_gates of the step before
  void* d_h;             // [B, P] in the compute type: the gradient carried from step to step
  void* d_c;             // [B, H], likewise
  void* d_outputs;       // S [N, P]: with a projection, the whole gradient of what a step put out; else null
  const void* d_hidden;  // S [B, H]: with a projection, W_hr^T d_outputs; else null
  void* hidden_states;   // S [N, H]: with a projection, h_t before it, computed anew; else null
};

}  // namespace fastlstm::cuda
