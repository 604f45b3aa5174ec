// What the recurrent CPU kernels compute, as plain structs of pointers, and the table of kernels of one instruction
// set.
//
// recurrent.inl implements the table once; recurrent_{scalar,avx2,avx512,avx512_bf16}.cpp instantiate it. The callers,
// stack_forward.cpp and stack_backward.cpp, allocate, fill a task per (layer, direction) and distribute rows or hidden
// units over threads.
// Kernels know nothing of torch and of threads: each call works on a range of batch rows and a range of *panels* and
// may run beside any call on another range of the same step.
//
// Types. T (float, double) is what sums and the cell are computed in, A what products are taken of: T itself, or with
// T = float pairs of bfloat16 (Bf16Pair). K values of a row are `terms<A>(K)` elements of A; the second half of the
// last pair is zero where K is odd.
//
// Rows. Inputs and outputs are [N, features]: the N = sum of batch_sizes rows of all steps, the rows of one step
// adjacent (a dense [T, B, .] tensor is the special case where every step has B rows).
//
// Panels. A packed matrix is cut in panels of 2 * lanes output columns: [panel][terms(K)][2][lanes], zero-padded, so
// that a register tile reads it front to back. For gates, panel 2u holds gates i and f and panel 2u+1 gates g and o of
// the hidden units u*lanes ... (u+1)*lanes-1; a pair of panels is a *unit block*.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "blocking.h"

namespace fastlstm::cpu {

// Two values of bfloat16 (the upper halves of float32), adjacent along k.
struct Bf16Pair {
  uint16_t first, second;
};

template <class T, class A>
constexpr bool kFullPrecision = std::is_same_v<T, A>;

template <class A>
constexpr int64_t terms(int64_t K) {
  return std::is_same_v<A, Bf16Pair> ? (K + 1) / 2 : K;
}

// How many batch rows each time step has, and where they start.
struct Schedule {
  std::vector<int64_t> offsets;  // [T + 1]; rows of step t are offsets[t] ... offsets[t+1]-1

  int64_t steps() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t active(int64_t t) const { return t < 0 || t >= steps() ? 0 : offsets[t + 1] - offsets[t]; }
  int64_t rows() const { return offsets.back(); }
};

// Rows that begin anew in mid-sequence: where a row of a step is marked, its h_{t-1} and c_{t-1} count as zero.
struct Restarts {
  std::vector<uint8_t> rows;   // [N]
  std::vector<uint8_t> steps;  // [T]: whether any row of the step is marked
};

// What zoneout keeps of one state: its part that is of the step before.
template <class T>
struct Zoneout {
  const uint8_t* mask;  // [N, features]: 1 for the elements that are kept whole, 0 for the others; or null, then
  T rate;               // this is the part of every element

  bool active() const { return mask || rate != T(0); }
};

// The parameters of the layer normalisation of one direction (or their gradients, with mutable T). Null without.
template <class T>
struct LayerNorm {
  T *gain_ih, *gain_hh;  // [4H]
  T *gain_c, *bias_c;    // [H]

  bool active() const { return gain_ih; }
};

// Rows that steps hand on to the next step: those of adjacent steps, or of two steps in turn.
template <class A>
struct StepRows {
  A* data;         // [rows, stride], or [2, B, stride]
  int64_t stride;  // elements of A from row to row
  int64_t batch;   // B of the second form; 0 for the first, whose
  int64_t first;   // first row is this one of all N

  A* at(const Schedule& schedule, int64_t t) const {
    return data + (batch > 0 ? (t & 1) * batch : schedule.offsets[t] - first) * stride;
  }
};

// One direction of one layer, forward. H: hidden size, P: size of h (H without projection).
template <class T, class A>
struct ForwardTask {
  const Schedule* schedule;
  const Restarts* restarts;  // null: none
  bool reverse;              // steps run from the last to the first
  int64_t I, H, P;

  const A* x;       // [N, terms(I)], contiguous
  T* gates_x;       // [., 4H] = x W_ih^T, or null: the kernel multiplies itself; may alias gates. Its first row is ...
  int64_t first;    // ... this one of all N
  const T* w_ih;    // [4H, I] as stored
  const T* w_hh;    // [4H, P] as stored
  const A* packed;  // gate panels of W_hh, where gates_x is null behind those of W_ih; only in the packed family
                    // (with normalised gates: column panels of W_hh^T, K = P)
  const A* packed_hr;  // column panels of W_hr^T, K = H; null without projection
  const T* bias;       // [unit blocks][4][lanes], b_ih + b_hh, zero-padded
  const A* h_0;        // [B, terms(P)], as the first step multiplies it
  const A* reset_h;    // [B, terms(P)], likewise after a restart; null: zero
  const T* reset_c;    // [B, H], c_{t-1} of a restart; null: zero
  A* restarted_h;      // [B, terms(P)], h_{t-1} of a step with restarts; null without restarts
  T* c;                // [B, H], running cell state: c_0 on entry, c_n when all steps are done
  A* hidden;           // [B, terms(H)], o * tanh(c) of the current step before projection; null without projection
  T* y;                // [N, y_stride], this direction's P columns
  int64_t y_stride;
  StepRows<A> h;  // h_t as the next step multiplies it: y itself, or two steps in turn where it is rounded or masked
  const T* recurrent_mask;                 // [B, P], factors on h_{t-1} as it is multiplied; null without
  Zoneout<T> zoneout_h;                    // of h_t [N, P], ...
  Zoneout<T> zoneout_c;                    // ... and of c_t [N, H]
  const T *initial_h, *kept_h_of_restart;  // h_{t-1} that zoneout keeps, in a first step [B, P] and after a restart:
  int64_t kept_h_stride;                   // with this stride, 0 for one row of zeros
  T* gates;                                // [N, 4H], activations saved for backward; null where nobody wants them
  T* cells;                                // [N, H], c_t, likewise

  // With normalised gates, gates_x holds normalised products.
  LayerNorm<const T> norm;
  StepRows<T> products_hh;  // h_{t-1} W_hh^T [., 4H], which are normalised in place
  T* rstd_hh;               // [N], what they are multiplied by, saved for backward; or null
  T* new_states;            // [B, 2, H], o and c_t of the current step

  int64_t previous(int64_t t) const { return reverse ? t + 1 : t - 1; }
  bool restarts_at(int64_t t) const { return restarts && restarts->steps[t]; }
};

// One direction of one layer, backward: the part that runs step by step, for a chunk of adjacent steps. d_x and the
// weight gradients are bulk products of their d_gates afterwards.
template <class T, class A>
struct BackwardTask {
  const Schedule* schedule;
  const Restarts* restarts;  // as in the forward pass
  bool reverse;              // of the forward pass; backward runs the other way
  int64_t H, P;

  const T* gates;              // [., 4H], activations; null with normalised gates. The first row is ...
  int64_t gates_first;         // ... this one of all N
  const T* cells;              // [N, H]
  const T* c_0;                // [B, H]
  const T *reset_h, *reset_c;  // h_{t-1} and c_{t-1} of a restart: [B, P] and [B, H], or one row of zeros each, ...
  bool resets_to_zero;         // ... as this says; null without restarts
  const T* w_hh;               // [4H, P] as stored, in the unpacked family; null in others
  const A* packed_hh;          // column panels of W_hh, K = 4H, P columns, in the packed family; null in others
  const A* packed_hr;  // column panels of W_hr, K = P, H columns; null without projection or in the stepwise family
  const T* d_y;        // [N, d_y_stride] this direction's P columns, or null: zero
  int64_t d_y_stride;
  const T* d_cells;         // [N, H], gradient of the cell states that are returned; null: zero
  const T* recurrent_mask;  // [B, P]; null without
  Zoneout<T> zoneout_h, zoneout_c;
  T* kept_d_h;               // [B, P], gradient that zoneout hands on from h_t to h_{t-1}; null without
  T *d_reset_h, *d_reset_c;  // [B, P], [B, H]: gradients of reset states are added here; null where not needed
  T* d_h;                    // [B, P], gradient of h_t through step t+1: d_h_n on entry, d_h_0 on exit
  T* d_c;                    // [B, H], d_c_n on entry, d_c_0 on exit
  T* d_hidden;               // [B, H], gradient of o * tanh(c); null without projection
  int64_t first;             // the chunk's first row of all N
  T* d_projected;            // [rows of the chunk, P], whole gradient of h_t; null without projection
  T* hidden;   // [rows of the chunk, H], o * tanh(c) rebuilt for the gradient of W_hr; null without projection
  T* d_gates;  // [rows of the chunk, 4H], out
  // d_gates (with normalised gates: d_products_hh) and d_projected as they are multiplied: themselves in full
  // precision.
  StepRows<A> d_gates_terms, d_projected_terms;

  // Of normalised gates:
  LayerNorm<const T> norm;
  const T* bias;                     // [unit blocks][4][lanes], b_ih + b_hh, zero-padded
  const T *norm_ih, *norm_hh;        // [., 4H], normalised products, whose first row is gates_first
  const T *rstd_ih, *rstd_hh;        // [.], what they have been multiplied by for that
  T *d_products_ih, *d_products_hh;  // [rows of the chunk, 4H], gradients of x_t W_ih^T and h_{t-1} W_hh^T, out
  T *norm_c, *d_norm_c;  // [rows of the chunk, H], normalised c_t and the gradient of gain_c norm_c + bias_c, out

  int64_t previous(int64_t t) const { return reverse ? t + 1 : t - 1; }  // the step that made h_{t-1}
  int64_t next(int64_t t) const { return reverse ? t - 1 : t + 1; }
  bool restarts_row(int64_t row) const { return restarts && restarts->rows[row]; }
  const T* reset_h_of(int64_t b) const { return reset_h + (resets_to_zero ? 0 : b * P); }
  const T* reset_c_of(int64_t b) const { return reset_c + (resets_to_zero ? 0 : b * H); }
};

struct Range {
  int64_t begin, end;
};

// The gradient of a matrix: the sum over rows of left^T right.
template <class T, class A>
struct Gradient {
  const A* packed;  // column panels of the right operand
  int64_t columns;
  T* out;  // [columns of left, columns]
};

constexpr int kMostColumnSums = 3;

// The sums of a matrix's columns, each element multiplied by one of another matrix.
template <class T>
struct ColumnSums {
  const T* right;  // null: elements by themselves
  T* out;          // [columns]
};

enum class GateProduct {
  kPacked,    // register tiles over packed weights
  kUnpacked,  // dot products over the weights as they are stored; full precision only
  kDone,      // gates_x already holds the whole pre-activation but for the bias
};

// The functions that the cell is made of, one by one, so that their error can be measured.
enum class Function { kExp, kSigmoid, kTanh };

template <class T, class A>
struct Kernels {
  int lanes;

  // values[0 ... n-1] = function(values)
  void (*apply)(Function function, T* values, int64_t n);
  // The two roofs of the roofline. Multiply-adds on registers alone, n rounds of them with the factor sink[0] and the
  // result in sink[1]: returns how many they were. The sum of n values, a multiple of 8 vectors.
  int64_t (*multiply_add)(int64_t n, T* sink);
  T (*sum)(const T* values, int64_t n);

  // out [rows, terms(K)] = rounded rows [rows, K]; null in full precision.
  void (*round_rows)(const T* from, int64_t rows, int64_t K, A* out);

  // Packing. Ranges are panels (gate panels: unit blocks), so that threads share the work.
  // w [4H, K] as terms of panels that have `depth` of them.
  void (*pack_gates)(const T* w, int64_t H, int64_t K, A* packed, int64_t depth, Range blocks);
  void (*pack_columns)(const T* const* rows, int64_t K, int64_t columns, A* packed, Range panels);  // K rows
  void (*pack_transposed)(const T* w, int64_t K, int64_t columns, A* packed, Range panels);         // w [columns, K]
  void (*pack_bias)(const T* b_ih, const T* b_hh, int64_t H, T* packed);  // either may be null

  // Rows are packed, too, before they are multiplied with packed weights. Elements of the buffer for that, of which
  // each thread has one: for a product of at most so many rows and terms; for forward_cells (I = 0: x is not
  // multiplied).
  int64_t (*block_buffer)(int64_t rows, int64_t depth);
  int64_t (*forward_workspace)(int64_t rows, int64_t I, int64_t P);

  // Step t, forward: gates, c_t and h_t (into y, or into `hidden` with projection) of the given rows and unit blocks.
  void (*forward_cells)(const ForwardTask<T, A>& task, GateProduct product, int64_t t, Range rows, Range blocks,
                        A* workspace);
  // With normalised gates in two parts, all columns of a row of the first before the second. products_hh of the given
  // rows and column panels of 4H; and gates, c_t and h_t as above.
  void (*forward_recurrent)(const ForwardTask<T, A>& task, GateProduct product, int64_t t, Range rows, Range panels,
                            A* buffer);
  void (*forward_normalized)(const ForwardTask<T, A>& task, int64_t t, Range rows);
  // Step t, forward: y = hidden W_hr^T, after all unit blocks of these rows are done; and what makes h_t of that, for
  // who has multiplied already.
  void (*forward_project)(const ForwardTask<T, A>& task, int64_t t, Range rows, Range panels, A* buffer);
  void (*finish_projection)(const ForwardTask<T, A>& task, int64_t t, Range rows, Range panels);

  // d_h, the gradient of h_{t-1} through step t, for the rows active at step t (which consumed these h): d_gates[t]
  // W_hh; and what makes d_h of that product, for who has multiplied already.
  void (*backward_recurrent)(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels, A* buffer);
  void (*finish_recurrent)(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels);
  // d_projected[t] = d_h + d_y[t]
  void (*backward_output)(const BackwardTask<T, A>& task, int64_t t, Range rows);
  // d_hidden = d_projected[t] W_hr
  void (*backward_project)(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels, A* buffer);
  // d_gates[t] and d_c from d_h + d_y[t] (d_hidden with projection). Panels are columns of H.
  void (*backward_cells)(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels);
  // The same with normalised gates, whose rows cannot be divided; also d_products_ih and _hh, norm_c and d_norm_c.
  void (*backward_normalized)(const BackwardTask<T, A>& task, int64_t t, Range rows);

  // gates = activations of (gates + bias), which is packed.
  void (*activate_gates)(const T* bias, int64_t H, Range rows, T* gates);

  // Rows of n elements become (row - mean) * rstd, rstd = 1 / sqrt(variance + 1e-5). `rstd` may be null.
  void (*normalize_rows)(T* data, int64_t n, Range rows, T* rstd);
  // For each of `sums`: out[c] (+)= sum of left[k][c] * right[k][c] over K rows of [., stride], for the given columns.
  // Row k is rows[k]; `rows` may be null: row k itself.
  void (*add_column_sums)(const T* left, int64_t stride, const int64_t* rows, int64_t K, Range columns,
                          const std::vector<ColumnSums<T>>& sums, bool accumulate);

  // Bulk products over the rows of all steps.
  // out[rows] (+)= a[rows] * packed matrix, for the columns of the given panels.
  void (*multiply_rows)(const A* a, int64_t a_stride, Range rows, const A* packed, int64_t depth, int64_t columns,
                        Range panels, T* out, int64_t out_stride, bool accumulate, A* buffer);
  // out = a w^T for few rows and the given rows of w [., K] as stored.
  void (*multiply_dots)(const T* a, int64_t a_stride, int64_t rows, const T* w, int64_t K, Range columns, T* out,
                        int64_t out_stride);
  // out (+)= a w for few rows and w [K, w_columns] as stored.
  void (*multiply_stored)(const T* a, int64_t a_stride, int64_t rows, const T* w, int64_t K, int64_t w_columns,
                          Range columns, T* out, int64_t out_stride, bool accumulate);
  // Rows `columns` of the gradients (+)= sum of left[k]^T right[k] over K rows of [., left_stride], and of `sums` (may
  // be null) the sum of left[k].
  void (*add_gradients)(const T* left, int64_t left_stride, int64_t K, Range columns, A* buffer,
                        const std::vector<Gradient<T, A>>& gradients, T* sums, bool accumulate);
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Column panels of a matrix with this many columns; unit blocks of H hidden units; elements of the packed forms.
template <class T, class A>
int64_t column_panels(const Kernels<T, A>& k, int64_t columns) {
  return ceil_div(columns, 2 * k.lanes);
}
template <class T, class A>
int64_t unit_blocks(const Kernels<T, A>& k, int64_t H) {
  return ceil_div(H, k.lanes);
}
template <class T, class A>
int64_t packed_columns_size(const Kernels<T, A>& k, int64_t K, int64_t columns) {
  return column_panels(k, columns) * terms<A>(K) * 2 * k.lanes;
}
template <class T, class A>
int64_t packed_gates_size(const Kernels<T, A>& k, int64_t H, int64_t depth) {
  return unit_blocks(k, H) * depth * 4 * k.lanes;
}

}  // namespace fastlstm::cpu
