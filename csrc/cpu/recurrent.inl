// The recurrent CPU kernels, written once. Included by recurrent_{scalar,avx2,avx512,avx512_bf16}.cpp inside the
// namespace of the instruction set, which has set kVectorBytes, kAccumulators (vector registers a tile may use for
// sums), fma(), larger() and smaller() (of two; the second operand where one is NaN), and kNativeBf16 with
// native_multiply_pairs() and native_round_to_pairs() where it has instructions for that.

#include "vec.h"

#include "products.inl"

// ---------------------------------------------------------------------------------------------- forward

// The part that zoneout keeps of n adjacent elements.
template <class T>
inline Vec<T> kept_part(const Zoneout<T>& zoneout, int64_t first, int64_t n) {
  if (!zoneout.mask) return broadcast<T>(zoneout.rate);
  using Bytes __attribute__((vector_size(kLanes<T>))) = uint8_t;
  Bytes bytes = {};
  __builtin_memcpy(&bytes, zoneout.mask + first, static_cast<size_t>(n));
  return __builtin_convertvector(bytes, Vec<T>);
}

template <class T>
inline Vec<T> zone_out(const Zoneout<T>& zoneout, int64_t first, int64_t n, Vec<T> before, Vec<T> now) {
  const Vec<T> kept = kept_part(zoneout, first, n);
  return kept * before + (1 - kept) * now;
}

// Columns `first` ... of h_t, n of them, of which `h` is what the cell makes: into y and into what the next step
// multiplies.
template <class T, class A>
inline void put_output(const ForwardTask<T, A>& task, int64_t t, int64_t batch, int64_t first, int64_t n, Vec<T> h) {
  const Schedule& schedule = *task.schedule;
  const int64_t row = schedule.offsets[t] + batch, previous = task.previous(t);
  if (task.zoneout_h.active()) {
    const T* const before =
        task.restarts && task.restarts->rows[row] ? task.kept_h_of_restart + batch * task.kept_h_stride
        : batch < schedule.active(previous)       ? task.y + (schedule.offsets[previous] + batch) * task.y_stride
                                                  : task.initial_h + batch * task.P;
    h = zone_out(task.zoneout_h, row * task.P + first, n, load_first(before + first, n), h);
  }
  T* const y = task.y + row * task.y_stride + first;
  n == kLanes<T> ? store(y, h) : store_first(y, h, n);
  if (task.h.batch == 0) return;
  if (task.recurrent_mask) h = h * load_first(task.recurrent_mask + batch * task.P + first, n);
  Operand<T, A>::store_values(task.h.at(schedule, t) + batch * task.h.stride, first, h, n);
}

// n adjacent units of one row: their pre-activations become activations, and c moves on from the step before. Returns
// c_t, before zoneout.
template <class T, class A>
inline __attribute__((always_inline)) Vec<T> advance_cell(const ForwardTask<T, A>& task, int64_t row, int64_t batch,
                                                          int64_t unit, int64_t n, Vec<T> (&gate)[kGates]) {
  T* const c_row = task.c + batch * task.H + unit;
  const Vec<T> before = load_first(c_row, n);
  Vec<T> c = before;
  cell_state<VecMath<T>>(gate[0], gate[1], gate[2], gate[3], c);
  const Vec<T> now = c;
  if (task.zoneout_c.active()) c = zone_out(task.zoneout_c, row * task.H + unit, n, before, c);
  store_first(c_row, c, n);
  if (task.gates)
    for (int g = 0; g < kGates; ++g) store_first(task.gates + row * kGates * task.H + g * task.H + unit, gate[g], n);
  if (task.cells) store_first(task.cells + row * task.H + unit, c, n);
  return now;
}

// h_t of n adjacent units, before the projection.
template <class T, class A>
inline __attribute__((always_inline)) void put_unprojected(const ForwardTask<T, A>& task, int64_t t, int64_t batch,
                                                           int64_t unit, int64_t n, Vec<T> h) {
  if (task.hidden)
    Operand<T, A>::store_values(task.hidden + batch * terms<A>(task.H), unit, h, n);
  else
    put_output(task, t, batch, unit, n, h);
}

// c_t of `lanes` units of one row (the first n of them where kTail). `products` may be null: all is in gates_x. Leaves
// o and c_t in `state` for output_of_block.
template <class T, class A, bool kTail>
inline void state_of_block(const ForwardTask<T, A>& task, int64_t t, int64_t batch, int64_t block, const T* products,
                           T* state) {
  constexpr int W = kLanes<T>;
  const int64_t unit = block * W, n = kTail ? task.H - unit : W, row = task.schedule->offsets[t] + batch;
  Vec<T> gate[kGates];
  for (int g = 0; g < kGates; ++g) {
    gate[g] = load(task.bias + (block * kGates + g) * W);
    if (products) gate[g] = gate[g] + load(products + g * W);
    if (task.gates_x)
      gate[g] = gate[g] + load_first(task.gates_x + (row - task.first) * kGates * task.H + g * task.H + unit, n);
  }
  const Vec<T> c = advance_cell(task, row, batch, unit, n, gate);
  store(state, gate[3]);
  store(state + W, c);
}

// h_t of the same units.
template <class T, class A, bool kTail>
inline void output_of_block(const ForwardTask<T, A>& task, int64_t t, int64_t batch, int64_t block, const T* state) {
  constexpr int W = kLanes<T>;
  const int64_t unit = block * W, n = kTail ? task.H - unit : W;
  put_unprojected(task, t, batch, unit, n, cell_output<VecMath<T>>(load(state), load(state + W)));
}

// The cell of `count` rows and of adjacent unit blocks, whose products stand in the scratch buffer (`multiplied`) or
// are all in gates_x. In two passes: the one through c_t and the one from there to h_t are long chains of dependent
// instructions, and a processor overlaps more rows of half the length.
template <class T, class A>
void cells_of_blocks(const ForwardTask<T, A>& task, int64_t t, int64_t first, int64_t count, Range blocks,
                     bool multiplied, Scratch<T>& scratch) {
  constexpr int W = kLanes<T>;
  const int64_t whole = std::min(blocks.end, task.H / W);  // blocks before that have all their units
  for (int64_t r = 0; r < count; ++r)
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      T* const at = scratch.row(r) + (block - blocks.begin) * kGates * W;
      const T* const products = multiplied ? at : nullptr;
      if (block < whole)
        state_of_block<T, A, false>(task, t, first + r, block, products, at);
      else
        state_of_block<T, A, true>(task, t, first + r, block, products, at);
    }
  for (int64_t r = 0; r < count; ++r)
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const T* const state = scratch.row(r) + (block - blocks.begin) * kGates * W;
      if (block < whole)
        output_of_block<T, A, false>(task, t, first + r, block, state);
      else
        output_of_block<T, A, true>(task, t, first + r, block, state);
    }
}

// Rows [begin, end) of step t that share one source of h_{t-1}: h points at the row `begin` of it.
template <class T, class A>
void forward_segment(const ForwardTask<T, A>& task, GateProduct product, int64_t t, Range rows, Range blocks,
                     const A* h, int64_t h_stride, A* workspace) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kGroupBlocks = kGroupPanels / 2;
  Scratch<T> scratch;
  const int64_t offset = task.schedule->offsets[t], depth_x = task.gates_x ? 0 : terms<A>(task.I);
  const int64_t depth = depth_x + terms<A>(task.P), columns = (blocks.end - blocks.begin) * kGates * W;
  const A* const x = task.gates_x ? nullptr : task.x + (offset + rows.begin) * depth_x;
  const EvenSplit passes(rows.end - rows.begin, rows_per_pass(depth * columns * static_cast<int64_t>(sizeof(A))));
  for (int64_t i = 0; i < passes.pieces; ++i) {
    const EvenSplit chunks(passes.length(i), kChunkRows);
    LeftTiles<A> lefts[kFarRows / kChunkRows];  // of each chunk of rows, x and behind it h
    if (product == GateProduct::kPacked)
      for (int64_t c = 0; c < chunks.pieces; ++c) {
        const int64_t row = passes.begin(i) + chunks.begin(c);
        lefts[c] = {chunks.length(c), depth, workspace + c * LeftTiles<A>::size(chunks.largest(), depth)};
        if (x) pack_left<T>(x + row * depth_x, depth_x, 0, depth_x, lefts[c]);
        pack_left<T>(h + row * h_stride, h_stride, depth_x, depth - depth_x, lefts[c]);
      }
    const Groups groups = {blocks, kGroupBlocks, (t + i) % 2 == 1};
    for (int64_t g = 0; g < groups.count(); ++g) {
      const Range units = groups.at(g);
      const int64_t column = units.begin * kGates * W, group_columns = (units.end - units.begin) * kGates * W;
      for (int64_t c = 0; c < chunks.pieces; ++c) {
        const int64_t row = passes.begin(i) + chunks.begin(c), count = chunks.length(c);
        if (product == GateProduct::kPacked)
          multiply_panels(lefts[c], Panels<A>{task.packed + column * depth, depth, group_columns}, scratch.values,
                          scratch.kRowStride);
        if constexpr (kFullPrecision<T, A>)
          if (product == GateProduct::kUnpacked)
            for (int64_t block = units.begin; block < units.end; ++block)
              dot_rows(task, h + row * h_stride, h_stride, x ? x + row * depth_x : nullptr, count, block, scratch,
                       (block - units.begin) * kGates * W);
        cells_of_blocks(task, t, rows.begin + row, count, units, product != GateProduct::kDone, scratch);
      }
    }
  }
}

// Elements that forward_cells needs as workspace for at most so many rows: as many chunks as a pass may have.
template <class A>
int64_t forward_workspace(int64_t rows, int64_t I, int64_t P) {
  return ceil_div(std::min(rows, kFarRows), kChunkRows) *
         LeftTiles<A>::size(std::min(rows, kChunkRows), terms<A>(I) + terms<A>(P));
}

// f(segment, h, stride) for the parts of the rows of step t that find h_{t-1} in different places: from h on.
template <class T, class A, class F>
void for_each_segment(const ForwardTask<T, A>& task, int64_t t, Range rows, const F& f) {
  const Schedule& schedule = *task.schedule;
  const int64_t previous = task.previous(t), h_0_stride = terms<A>(task.P);
  rows.end = std::min(rows.end, schedule.active(t));
  if (task.restarts_at(t)) {
    if (rows.begin < rows.end) f(rows, task.restarted_h + rows.begin * h_0_stride, h_0_stride);
    return;
  }
  // Rows that were active in the previous step find h_{t-1} there, the others start from h_0.
  const int64_t boundary = std::clamp(schedule.active(previous), rows.begin, std::max(rows.begin, rows.end));
  if (rows.begin < boundary)
    f(Range{rows.begin, boundary}, task.h.at(schedule, previous) + rows.begin * task.h.stride, task.h.stride);
  if (boundary < rows.end) f(Range{boundary, rows.end}, task.h_0 + boundary * h_0_stride, h_0_stride);
}

template <class T, class A>
void forward_cells(const ForwardTask<T, A>& task, GateProduct product, int64_t t, Range rows, Range blocks,
                   A* workspace) {
  for_each_segment(task, t, rows, [&](Range segment, const A* h, int64_t h_stride) {
    forward_segment(task, product, t, segment, blocks, h, h_stride, workspace);
  });
}

// Makes h_t of y = hidden W_hr^T.
template <class T, class A>
void finish_projection(const ForwardTask<T, A>& task, int64_t t, Range rows, Range panels) {
  constexpr int W = kLanes<T>;
  if (task.h.batch == 0 && !task.zoneout_h.active()) return;
  rows.end = std::min(rows.end, task.schedule->active(t));
  const int64_t last = std::min(task.P, panels.end * 2 * W);
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const T* const y = task.y + (task.schedule->offsets[t] + b) * task.y_stride;
    for (int64_t c = panels.begin * 2 * W; c < last; c += W) {
      const int64_t n = std::min<int64_t>(W, last - c);
      put_output(task, t, b, c, n, load_first(y + c, n));
    }
  }
}

template <class T, class A>
void forward_project(const ForwardTask<T, A>& task, int64_t t, Range rows, Range panels, A* buffer) {
  rows.end = std::min(rows.end, task.schedule->active(t));
  T* y = task.y + task.schedule->offsets[t] * task.y_stride;
  const int64_t depth = terms<A>(task.H);
  multiply_rows<T, A>(task.hidden, depth, rows, task.packed_hr, depth, task.P, panels, y, task.y_stride, false, buffer);
  finish_projection(task, t, rows, panels);
}

template <class T>
void activate_gates(const T* bias, int64_t H, Range rows, T* gates) {
  constexpr int W = kLanes<T>;
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for (int64_t unit = 0; unit < H; unit += W) {
      const int64_t n = std::min<int64_t>(W, H - unit);
      T* const at = gates + row * kGates * H + unit;
      Vec<T> gate[kGates], unused_c = {};
      for (int g = 0; g < kGates; ++g) gate[g] = load_first(at + g * H, n) + load(bias + (unit / W * kGates + g) * W);
      cell_state<VecMath<T>>(gate[0], gate[1], gate[2], gate[3], unused_c);
      for (int g = 0; g < kGates; ++g) store_first(at + g * H, gate[g], n);
    }
}

// ---------------------------------------------------------------------------------------------- backward

// Makes d_h, the gradient of h_{t-1}, of the product d_gates[t] W_hh.
template <class T, class A>
void finish_recurrent(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels) {
  if (!task.restarts && !task.recurrent_mask && !task.kept_d_h) return;
  rows.end = std::min(rows.end, task.schedule->active(t));
  const int64_t first = panels.begin * 2 * kLanes<T>, last = std::min(task.P, panels.end * 2 * kLanes<T>);
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    T* const d_h = task.d_h + b * task.P;
    if (task.recurrent_mask)
      for (int64_t p = first; p < last; ++p) d_h[p] *= task.recurrent_mask[b * task.P + p];
    if (task.kept_d_h)
      for (int64_t p = first; p < last; ++p) d_h[p] += task.kept_d_h[b * task.P + p];
    if (!task.restarts_row(task.schedule->offsets[t] + b)) continue;
    if (task.d_reset_h)
      for (int64_t p = first; p < last; ++p) task.d_reset_h[b * task.P + p] += d_h[p];
    std::fill(d_h + first, d_h + last, T(0));
  }
}

template <class T, class A>
void backward_recurrent(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels, A* buffer) {
  rows.end = std::min(rows.end, task.schedule->active(t));
  const StepRows<A>& d_gates = task.d_gates_terms;
  const A* const a = d_gates.at(*task.schedule, t);
  const int64_t first = panels.begin * 2 * kLanes<T>, last = std::min(task.P, panels.end * 2 * kLanes<T>);
  if constexpr (kFullPrecision<T, A>)
    if (task.w_hh)
      multiply_stored(a + rows.begin * d_gates.stride, d_gates.stride, rows.end - rows.begin, task.w_hh,
                      kGates * task.H, task.P, {first, last}, task.d_h + rows.begin * task.P, task.P, false);
  if (task.packed_hh)
    multiply_rows(a, d_gates.stride, rows, task.packed_hh, terms<A>(kGates * task.H), task.P, panels, task.d_h, task.P,
                  false, buffer);
  finish_recurrent(task, t, rows, panels);
}

template <class T, class A>
void backward_output(const BackwardTask<T, A>& task, int64_t t, Range rows) {
  rows.end = std::min(rows.end, task.schedule->active(t));
  const int64_t offset = task.schedule->offsets[t];
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    T* const d_projected = task.d_projected + (offset + b - task.first) * task.P;
    for (int64_t p = 0; p < task.P; ++p)
      d_projected[p] = task.d_h[b * task.P + p] + (task.d_y ? task.d_y[(offset + b) * task.d_y_stride + p] : T(0));
    if (task.kept_d_h)
      for (int64_t p = 0; p < task.P; ++p) {
        const Zoneout<T>& zoneout = task.zoneout_h;
        const T kept = zoneout.mask ? T(zoneout.mask[(offset + b) * task.P + p]) : zoneout.rate;
        task.kept_d_h[b * task.P + p] = kept * d_projected[p];
        d_projected[p] *= 1 - kept;
      }
    if constexpr (!kFullPrecision<T, A>) {
      const StepRows<A>& rounded = task.d_projected_terms;
      round_rows(d_projected, 1, task.P, rounded.at(*task.schedule, t) + b * rounded.stride);
    }
  }
}

template <class T, class A>
void backward_project(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels, A* buffer) {
  rows.end = std::min(rows.end, task.schedule->active(t));
  const StepRows<A>& d_projected = task.d_projected_terms;
  multiply_rows(d_projected.at(*task.schedule, t), d_projected.stride, rows, task.packed_hr, terms<A>(task.P), task.H,
                panels, task.d_hidden, task.H, false, buffer);
}

// The whole gradient of h_t of n adjacent units of one row (of o * tanh(c) with projection), but for what zoneout hands
// on, which goes into kept_d_h.
template <class T, class A>
inline __attribute__((always_inline)) Vec<T> output_gradient(const BackwardTask<T, A>& task, int64_t row, int64_t batch,
                                                             int64_t unit, int64_t n) {
  const int64_t at = batch * task.H + unit;
  if (task.d_hidden) return load_first(task.d_hidden + at, n);
  Vec<T> d_h = load_first(task.d_h + at, n);
  if (task.d_y) d_h = d_h + load_first(task.d_y + row * task.d_y_stride + unit, n);
  if (task.kept_d_h) {
    const Vec<T> kept_d_h = kept_part(task.zoneout_h, row * task.H + unit, n) * d_h;
    store_first(task.kept_d_h + at, kept_d_h, n);
    d_h = d_h - kept_d_h;
  }
  return d_h;
}

// The gradient of c_t of n adjacent units through the steps behind and the cell states that are returned, but for what
// zoneout hands on: that is kept_d_c.
template <class T, class A>
inline __attribute__((always_inline)) Vec<T> state_gradient(const BackwardTask<T, A>& task, int64_t row, int64_t batch,
                                                            int64_t unit, int64_t n, Vec<T>& kept_d_c) {
  Vec<T> d_c = load_first(task.d_c + batch * task.H + unit, n);
  if (task.d_cells) d_c = d_c + load_first(task.d_cells + row * task.H + unit, n);
  kept_d_c = Vec<T>{};
  if (task.zoneout_c.active()) {
    kept_d_c = kept_part(task.zoneout_c, row * task.H + unit, n) * d_c;
    d_c = d_c - kept_d_c;
  }
  return d_c;
}

// c_{t-1} of one row.
template <class T, class A>
inline const T* previous_cells(const BackwardTask<T, A>& task, int64_t t, int64_t batch) {
  const Schedule& schedule = *task.schedule;
  const int64_t previous = task.previous(t);
  return task.restarts_row(schedule.offsets[t] + batch) ? task.reset_c_of(batch)
         : batch < schedule.active(previous)            ? task.cells + (schedule.offsets[previous] + batch) * task.H
                                                        : task.c_0 + batch * task.H;
}

// Hands what reached c_{t-1} to the reset states where the row restarts before step t.
template <class T, class A>
inline void cut_state_gradient(const BackwardTask<T, A>& task, int64_t t, int64_t batch, Range units) {
  if (!task.restarts_row(task.schedule->offsets[t] + batch)) return;
  T* const d_c = task.d_c + batch * task.H;
  if (task.d_reset_c)
    for (int64_t unit = units.begin; unit < units.end; ++unit) task.d_reset_c[batch * task.H + unit] += d_c[unit];
  std::fill(d_c + units.begin, d_c + units.end, T(0));
}

template <class T, class A, bool kTail>
inline void backward_cell_of_units(const BackwardTask<T, A>& task, int64_t t, int64_t batch, const T* c_prev,
                                   int64_t unit) {
  const int64_t H = task.H, n = kTail ? H - unit : kLanes<T>, row = task.schedule->offsets[t] + batch;
  const auto get = [&](const T* p) { return kTail ? load_first(p, n) : load(p); };
  const auto put = [&](T* p, Vec<T> v) { kTail ? store_first(p, v, n) : store(p, v); };
  Vec<T> gate[kGates];
  for (int g = 0; g < kGates; ++g) gate[g] = get(task.gates + (row - task.gates_first) * kGates * H + g * H + unit);
  const Vec<T> d_h = output_gradient(task, row, batch, unit, n);
  Vec<T> kept_d_c, d_c = state_gradient(task, row, batch, unit, n, kept_d_c);
  Vec<T> c = get(task.cells + row * H + unit);
  const Vec<T> c_before = get(c_prev + unit);
  // The cells are what zoneout made of c_t, and h_t comes from c_t itself.
  if (task.zoneout_c.active()) c = gate[1] * c_before + gate[0] * gate[2];
  if (task.hidden) put(task.hidden + (row - task.first) * H + unit, gate[3] * VecMath<T>::tanh(c));
  cell_backward<VecMath<T>>(gate[0], gate[1], gate[2], gate[3], c, c_before, d_h, d_c);
  put(task.d_c + batch * H + unit, d_c + kept_d_c);
  for (int g = 0; g < kGates; ++g) {
    put(task.d_gates + (row - task.first) * kGates * H + g * H + unit, gate[g]);
    if constexpr (!kFullPrecision<T, A>) {
      const StepRows<A>& rounded = task.d_gates_terms;
      Operand<T, A>::store_values(rounded.at(*task.schedule, t) + batch * rounded.stride, g * H + unit, gate[g], n);
    }
  }
}

template <class T, class A>
void backward_cells(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels) {
  constexpr int W = kLanes<T>;
  rows.end = std::min(rows.end, task.schedule->active(t));
  const int64_t first = panels.begin * 2 * W, last = std::min(task.H, panels.end * 2 * W);
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const T* const c_prev = previous_cells(task, t, b);
    int64_t unit = first;
    for (; unit + W <= last; unit += W) backward_cell_of_units<T, A, false>(task, t, b, c_prev, unit);
    if (unit < last) backward_cell_of_units<T, A, true>(task, t, b, c_prev, unit);
    cut_state_gradient(task, t, b, {first, last});
  }
}

#include "layer_norm.inl"

// ---------------------------------------------------------------------------------------------- the table

template <class T>
void apply(Function function, T* values, int64_t n) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < n; i += W) {
    const int64_t count = std::min<int64_t>(W, n - i);
    const Vec<T> x = load_first(values + i, count);
    const Vec<T> result = function == Function::kExp       ? VecMath<T>::exp(x)
                          : function == Function::kSigmoid ? VecMath<T>::sigmoid(x)
                                                           : VecMath<T>::tanh(x);
    store_first(values + i, result, count);
  }
}

template <class T>
int64_t multiply_add(int64_t n, T* sink) {
  constexpr int kChains = 12;  // two pipes, four to six cycles each
  const Vec<T> factor = broadcast<T>(*sink);
  Vec<T> sums[kChains];
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) sums[c] = factor + static_cast<T>(c);  // no two are the same
  for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sums[c] = fma(sums[c], factor, factor);
  Vec<T> total = {};
  for (const Vec<T>& sum : sums) total = total + sum;
  sink[1] = sum_lanes<T>(total);
  return n * kChains * kLanes<T>;
}

template <class T>
T sum(const T* values, int64_t n) {
  constexpr int W = kLanes<T>, kChains = 8;
  Vec<T> sums[kChains] = {};
  for (int64_t i = 0; i + kChains * W <= n; i += kChains * W)
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) sums[c] = sums[c] + load(values + i + c * W);
  Vec<T> total = {};
  for (const Vec<T>& chain : sums) total = total + chain;
  return sum_lanes<T>(total);
}

template <class T, class A>
constexpr Kernels<T, A> kKernels = {
    kLanes<T>,
    apply<T>,
    multiply_add<T>,
    sum<T>,
    kFullPrecision<T, A> ? nullptr : round_rows<T, A>,
    pack_gates<T, A>,
    pack_columns<T, A>,
    pack_transposed<T, A>,
    pack_bias<T>,
    block_buffer<A>,
    forward_workspace<A>,
    forward_cells<T, A>,
    forward_recurrent<T, A>,
    forward_normalized<T, A>,
    forward_project<T, A>,
    finish_projection<T, A>,
    backward_recurrent<T, A>,
    finish_recurrent<T, A>,
    backward_output<T, A>,
    backward_project<T, A>,
    backward_cells<T, A>,
    backward_normalized<T, A>,
    activate_gates<T>,
    normalize_rows<T>,
    add_column_sums<T>,
    multiply_rows<T, A>,
    multiply_dots<T>,
    multiply_stored<T>,
    add_gradients<T, A>,
};
