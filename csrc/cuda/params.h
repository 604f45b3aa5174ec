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

// A run: of one direction of one layer, the steps begin <= n < end, counted in the order in which a pass takes them. A
// pass of many steps may be several runs: then its states are carried from one to the next, in full precision. S: the
// storage type of the element.
struct ForwardRun {
  bool reverse;  // the layer's direction goes back in time
  int begin, end;
  const void* gates_x;  // S [N, 4H], W_ih x without biases, of which only rows of these steps exist; may be `gates`
  const void* w_hh;     // S [4H, row_stride]
  const void* b_ih;     // S [4H], or null
  const void* b_hh;     // S [4H], or null, as b_ih
  const void* h_0;      // S [B, row_stride]
  const void* c_0;      // S [B, H]
  void* y;              // S [N, y_stride], of which this direction fills H columns from here on
  void* h_n;            // S [B, H]
  void* c_n;            // S [B, H]
  void* cells;          // [N, H] in the compute type, c_t for backward or for the caller; or null
  void* gates;          // S [N, 4H], activations i, f, g, o for backward; or null, as it is without cells
  void* carried_h;   // S [B, row_stride], zero behind H: states between this run and others; null if it is the only one
  float* carried_c;  // [B, H]
};

struct BackwardRun {
  bool reverse;
  int begin, end;
  const void* w_hh;    // S [4H, row_stride]
  const void* gates;   // S [N, 4H], activations: as forward saved them, or made again
  const void* cells;   // [N, H] in the compute type
  const void* c_0;     // S [B, H]
  const void* d_y;     // S [N, y_stride], or null: zero
  const void* d_h_n;   // S [B, H], or null: zero
  const void* d_c_n;   // S [B, H], or null: zero
  void* d_gates;       // S [N, 4H], gradients of the pre-activations
  void* d_h_0;         // S [B, H], or null: not needed
  void* d_c_0;         // S [B, H], or null: not needed
  float* carried_d_h;  // [B, H], between runs
  float* carried_d_c;  // [B, H]
};

// A launch of a family that keeps weights in CTAs: a few runs at the same time, of directions or of layers.
template <class Run>
struct LaunchParams {
  Sequences sequences;
  int hidden;      // H
  int row_stride;  // of rows that are factors: H up to a multiple of 8; they are zero behind H and aligned to 16 bytes
  int64_t y_stride;  // of y and d_y
  bool aligned;      // rows that are copied to shared memory begin at multiples of 16 bytes
  TeamShape team;
  int first_column, groups;  // columns of the batch first_column ... + groups * tiles * kColumns
  void* exchange;            // [runs * groups][2] buffers, filled with 0xff bytes; of the persistent family
  int runs;
  Run run[kMaxRuns];
};
using ForwardParams = LaunchParams<ForwardRun>;
using BackwardParams = LaunchParams<BackwardRun>;

// What zoneout keeps of a state: its part that is of the step before.
struct Zoneout {
  const bool* mask;  // [N, features]: whether an element is kept, or null; then
  double rate;       // this part of every element is

  constexpr bool active() const { return mask != nullptr || rate != 0; }
};

// What a step has beyond the cell; see Problem::step_extras.
struct StepExtras {
  const void *reset_h, *reset_c;  // S [B, P], [B, H]: the states behind a cut, or null: zero
  const void* recurrent_mask;     // S [B, P]: factors on h as the product reads it, or null
  Zoneout zoneout_h, zoneout_c;   // of [N, P] and [N, H]
};

// One step of one direction by the stepwise family, between the products, which are a library's. P: the size of what a
// layer puts out, H without a projection.
template <class Run>
struct StepParams {
  Sequences sequences;
  int hidden, outputs;
  int64_t y_stride;
  bool vectors;       // all rows of states, of y and of what is saved begin at multiples of the size of 4 (float64: 2)
                      // elements
  int n;              // the n-th step of the pass; T after the last of a backward pass
  Run run;            // all steps of a direction: nothing is carried to other runs
  bool has_extras;    // if not, the kernels of steps look neither at these
  StepExtras extras;  // nor at what is marked as one below
};

struct StepForwardParams : StepParams<ForwardRun> {
  const void* product;    // S [B, 4H]: W_hh h
  const void* projected;  // S [B, P]: W_hr hidden_state; null without a projection
  void* hidden_state;     // S [B, H]: h_t before its projection; null without one
  void* h;                // S [B, h_stride]: what the product of the next step reads
  int h_stride;
  void* c;  // [B, H] in the compute type: the cell states
  // Extras:
  void* kept_h;  // [B, P] in the compute type: h, neither masked nor reset; null without zoneout of h
};

struct StepBackwardParams : StepParams<BackwardRun> {
  const void* product;   // S [B, P]: W_hh^T d_gates of the step before
  void* d_h;             // [B, P] in the compute type: the gradient carried from step to step
  void* d_c;             // [B, H], likewise
  void* d_outputs;       // S [N, P]: with a projection, the whole gradient of what a step put out; else null
  const void* d_hidden;  // S [B, H]: with a projection, W_hr^T d_outputs; else null
  void* hidden_states;   // S [N, H]: with a projection, h_t before it, computed anew; else null
  // Extras:
  const void* d_cell_states;    // S [N, H], or null: zero
  void* kept_d_h;               // [B, P] in the compute type: the gradient that zoneout hands on; null without it
  void *d_reset_h, *d_reset_c;  // [B, P], [B, H] in the compute type, where gradients are added; or null
};

// What gates are made of where products are normalised: a = gain_ih * norm(W_ih x) + gain_hh * norm(W_hh h) + b_ih +
// b_hh and h = o * tanh(gain_c * norm(c) + bias_c); rows of norm(W x) are of [4H].
struct NormWeights {
  const void *gain_ih, *gain_hh;  // S [4H]
  const void *b_ih, *b_hh;        // S [4H], or both null
  const void *gain_c, *bias_c;    // S [H]
};

// Steps of the stepwise family with such gates. Extras are looked at in any case.
struct NormalizedForwardParams : StepForwardParams {  // run.gates_x: norm(W_ih x)
  NormWeights norm;
  void* norm_hh;  // S [N, 4H]: norm(W_hh h), or null: not needed
  void* rstd_hh;  // [N] in the compute type: what it is scaled by, or null as norm_hh
  void* between;  // [B, 2H] in the compute type: memory for a step
};

struct NormalizedBackwardParams : StepBackwardParams {  // product: W_hh^T times d_products_hh of the step before
  NormWeights norm;
  const void* norm_hh;      // S [N, 4H]
  const void* rstd_hh;      // [N] in the compute type
  void* d_products_hh;      // S [N, 4H]: gradients of W_hh h
  void *norm_c, *d_norm_c;  // S [N, H]: norm(c), and the gradient of gain_c * norm(c) + bias_c
  void* between;            // [B, 2H] in the compute type: memory for a step
};

// Normalises rows in place.
struct NormalizeRowsParams {
  int64_t count;
  int width;
  void* rows;  // S [count, width]
  void* rstd;  // [count] in the compute type: what they are scaled by, or null: not needed
};

// Makes gradients of W x, in place, of those of gain * norm(W x).
struct DenormalizeRowsParams {
  Sequences sequences;
  int width;         // 4H
  void* rows;        // S [N, 4H]
  const void* gain;  // S [4H]
  const void* norm;  // S [N, 4H]
  const void* rstd;  // [N] in the compute type
};

// Makes activations of normalised products.
struct ActivateNormalizedParams {
  int64_t rows;  // N
  int hidden;
  NormWeights norm;
  const void *norm_ih, *norm_hh;  // S [N, 4H]
  void* activations;              // S [N, 4H]
};

// Makes the second factor of the gradient of W_hh: what each step read as h.
struct PreviousOutputsParams {
  Sequences sequences;
  bool reverse, vectors;
  int outputs;
  int64_t y_stride;
  const void* y;                         // S [N, y_stride], from the direction's first column on
  const void* h_0;                       // S [B, P]
  const void *reset_h, *recurrent_mask;  // as in StepExtras
  void* previous;                        // S [N, P]; zero where the column does not have the step
};

// Makes activations of products with x and h, as the forward pass makes them.
struct ActivateGatesParams {
  int64_t rows;  // N
  int hidden;
  bool vectors;
  const void *b_ih, *b_hh;  // S [4H], or null
  void* gates;              // S [N, 4H]
};

// Around a recurrence that multiplies W_hh W_hr, where W_hr is the layer's projection, and has h before it: `hidden`
// states, of which y are the projections. Of one direction of a layer; begin and end are steps in time.
// W_hh h_0, which is no such product, into the gates of the step that reads h_0.
struct FirstProductsParams {
  Sequences sequences;
  bool reverse, vectors;
  int begin, end;        // gates_x has rows of these steps only
  int width;             // 4H
  const void* products;  // S [B, 4H]
  void* gates_x;         // S [N, 4H]
};

// h_n: what the last step put out, or h_0 if there was none.
struct FinalOutputsParams {
  Sequences sequences;
  bool reverse, vectors;
  int outputs;  // P
  int64_t y_stride;
  const void* y;    // S [N, y_stride], from the direction's first column on
  const void* h_0;  // S [B, P]
  void* h_n;        // S [B, P]
};

// Of gradients of outputs, what comes from outside: d_y and d_h_n.
struct GivenGradientsParams {
  Sequences sequences;
  bool reverse, vectors;
  int begin, end;
  int outputs;
  int64_t y_stride;
  const void* d_y;    // S [N, y_stride], or null: zero
  const void* d_h_n;  // S [B, P], or null: zero
  void* d_outputs;    // S [N, P]
};

// Adds what comes from the steps that read the outputs, and makes d_h_0.
struct CarriedGradientsParams {
  Sequences sequences;
  bool reverse, vectors;
  int outputs;
  const void* products;  // S [N, P]: W_hh^T d_gates
  const void* d_h_n;     // S [B, P], or null: zero
  void* d_outputs;       // S [N, P]
  void* d_h_0;           // S [B, P], or null: not needed
};

// Hidden states of what forward saved.
struct HiddenStatesParams {
  Sequences sequences;
  bool vectors;
  int hidden;
  const void* gates;    // S [N, 4H]: activations
  const void* cells;    // [N, H] in the compute type
  void* hidden_states;  // S [N, H]; zero where the column does not have the step
};

// One step by the streamed family, which takes the product itself, and no projection. Rows that are factors are zero
// behind what they hold and aligned to 16 bytes.
struct StreamedForwardParams : StepForwardParams {
  StreamedVariant variant;
  int row_stride;        // of W_hh
  const void* h_before;  // as h, whose rows are whole blocks of K: what this step's product reads
};

struct StreamedBackwardParams : StepBackwardParams {
  StreamedVariant variant;
  int row_stride;                // whole blocks of K: gate g of unit i is element 4 i + g
  const void* transposed_w_hh;   // S [H, row_stride]
  const void* gradients_before;  // S [B, row_stride]: of the gates, by the step before
  void* gradients;               // likewise, by this step
};

}  // namespace fastlstm::cuda
