#include "stack.h"

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "../cell.h"
#include "lockstep.h"
#include "runtime.h"

namespace fastlstm::cpu {

namespace {

constexpr int64_t kPackGrain = 16384;       // elements below which a thread is not worth waking
constexpr int64_t kMultiplyGrain = 262144;  // multiply-adds, likewise
constexpr int64_t kBulkRows = 24;           // rows that a thread of a bulk product should have at least
constexpr int64_t kGradientDepth = 1024;    // rows of the factors that are packed at once for a weight gradient
constexpr int64_t kChunk = 1024;            // rows of a chunk of steps
constexpr int64_t kGradientUnit = 24;       // columns of the left factor that threads share out

// The part of n items that one of `parts` threads has.
Range share(int64_t n, int64_t part, int64_t parts) { return {n * part / parts, n * (part + 1) / parts}; }

// f(direction, range) for the part of D adjacent ranges of n items each that one of `parts` threads has.
template <class F>
void share_directions(int64_t directions, int64_t n, int64_t part, int64_t parts, const F& f) {
  const int64_t begin = directions * n * part / parts, end = directions * n * (part + 1) / parts;
  for (int64_t d = begin / n; d * n < end; ++d)
    f(d, Range{std::max(begin - d * n, int64_t{0}), std::min(end - d * n, n)});
}

// A direction and a range of its batch rows: what one thread runs through all steps without waiting for others.
struct RowItem {
  int64_t direction;
  Range rows;
};

// Cuts the batch so that the parts have about the same number of (row, step) pairs: in a packed sequence the first rows
// are the longest.
std::vector<RowItem> split_rows(const Schedule& schedule, int64_t directions) {
  const int64_t batch = schedule.active(0);
  const int64_t parts = std::clamp<int64_t>(thread_count() / directions, 1, batch);
  std::vector<int64_t> work(batch + 1, 0);  // work[b]: pairs in the rows before b
  for (int64_t b = 0, t = schedule.steps(); b < batch; ++b) {
    while (t > 0 && schedule.active(t - 1) <= b) --t;
    work[b + 1] = work[b] + t;
  }
  std::vector<RowItem> items;
  for (int64_t d = 0; d < directions; ++d) {
    int64_t begin = 0;
    for (int64_t part = 1; part <= parts; ++part) {
      const auto cut = std::lower_bound(work.begin(), work.end(), work[batch] * part / parts);
      const int64_t end = part == parts ? batch : std::max<int64_t>(begin, cut - work.begin());
      if (begin < end) items.push_back({d, {begin, end}});
      begin = end;
    }
  }
  return items;
}

template <class T>
void zero_elements(T* out, int64_t n) {
  parallel(n, kElementwiseGrain, [&](int64_t begin, int64_t end) { std::fill(out + begin, out + end, T(0)); });
}

template <class T>
void multiply_elements(const T* a, const T* b, T* out, int64_t n) {
  parallel(n, kElementwiseGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = a[i] * b[i];
  });
}

// f(rows) for the rows of a matrix, over all threads.
template <class F>
void for_rows(int64_t rows, int64_t columns, const F& f) {
  parallel(rows, kElementwiseGrain / columns + 1, [&](int64_t begin, int64_t end) { f(Range{begin, end}); });
}

// Packs all panels of one matrix, shared among threads unless it is small.
template <class Pack>
void pack_panels(int64_t panels, int64_t elements, const Pack& pack) {
  parallel(panels, panels * kPackGrain / std::max<int64_t>(elements, 1) + 1,
           [&](int64_t begin, int64_t end) { pack(Range{begin, end}); });
}

// Pointers to the rows of a matrix.
template <class T>
std::vector<const T*> row_pointers(const T* data, int64_t rows, int64_t stride) {
  std::vector<const T*> pointers(rows);
  for (int64_t r = 0; r < rows; ++r) pointers[r] = data + r * stride;
  return pointers;
}

// Packs a whole [K, columns] matrix in column panels.
template <class T, class A>
void pack_rows(const Kernels<T, A>& k, const T* w, int64_t K, int64_t columns, A* packed) {
  const std::vector<const T*> rows = row_pointers(w, K, columns);
  pack_panels(column_panels(k, columns), K * columns,
              [&](Range panels) { k.pack_columns(rows.data(), K, columns, packed, panels); });
}

// A buffer of factors whose rows may end in half a pair, which nobody writes and products read.
template <class A>
Buffer<A> zeroed_pairs(int64_t size) {
  Buffer<A> buffer(size);
  if constexpr (std::is_same_v<A, Bf16Pair>) std::fill_n(buffer.data(), size, A{});
  return buffer;
}

// Rows of T as products take them: as they are, or rounded into a buffer that is kept as long as this object.
template <class T, class A>
class Factors {
 public:
  explicit Factors(const Kernels<T, A>& k) : kernels_(k) {}

  // The factors of `rows` rows of K values; valid until the next call.
  const A* of(const T* values, int64_t rows, int64_t K) {
    if constexpr (kFullPrecision<T, A>) {
      return values;
    } else {
      if (rows * terms<A>(K) > capacity_) rounded_.emplace(capacity_ = rows * terms<A>(K));
      A* const out = rounded_->data();
      for_rows(rows, K, [&](Range r) {
        kernels_.round_rows(values + r.begin * K, r.end - r.begin, K, out + r.begin * terms<A>(K));
      });
      return out;
    }
  }

 private:
  const Kernels<T, A>& kernels_;
  std::optional<Buffer<A>> rounded_;
  int64_t capacity_ = 0;
};

// out [rows, columns] (+)= a [rows, depth] * packed matrix, over all threads; then finish(rows), if that is given.
template <class T, class A, class Finish = std::nullptr_t>
void multiply_bulk(const Kernels<T, A>& k, const A* a, int64_t rows, int64_t depth, const A* packed, int64_t columns,
                   T* out, bool accumulate, const Finish& finish = nullptr) {
  constexpr bool kFinish = !std::is_same_v<Finish, std::nullptr_t>;
  const int64_t panels = column_panels(k, columns), grain = kMultiplyGrain / (depth * columns) + 1;
  const auto multiply = [&](Range own_rows, Range own_panels) {
    const Buffer<A> buffer(k.block_buffer(own_rows.end - own_rows.begin, depth));
    k.multiply_rows(a, depth, own_rows, packed, depth, columns, own_panels, out, columns, accumulate, buffer.data());
  };
  if (rows >= kBulkRows * thread_count()) {
    parallel(rows, std::max(grain, kBulkRows), [&](int64_t begin, int64_t end) {
      multiply({begin, end}, {0, panels});
      if constexpr (kFinish) finish(Range{begin, end});
    });
    return;
  }
  parallel(panels, kMultiplyGrain / (depth * rows * 2 * k.lanes) + 1,
           [&](int64_t begin, int64_t end) { multiply({0, rows}, {begin, end}); });
  if constexpr (kFinish) for_rows(rows, columns, finish);
}

// out [rows, columns] = x W^T, W [columns, K] packed by pack_transposed, or as it is stored where that is null.
template <class T, class A, class Finish = std::nullptr_t>
void multiply_input(const Kernels<T, A>& k, const A* x, int64_t rows, int64_t K, const A* packed, const T* w,
                    int64_t columns, T* out, const Finish& finish = nullptr) {
  if constexpr (kFullPrecision<T, A>)
    if (!packed) {
      parallel(column_panels(k, columns), kPackGrain / (2 * k.lanes * K) + 1, [&](int64_t begin, int64_t end) {
        const Range range = {begin * 2 * k.lanes, std::min(end * 2 * k.lanes, columns)};
        k.multiply_dots(x, K, rows, w, K, range, out, columns);
      });
      if constexpr (!std::is_same_v<Finish, std::nullptr_t>) for_rows(rows, columns, finish);
      return;
    }
  multiply_bulk(k, x, rows, terms<A>(K), packed, columns, out, false, finish);
}

// The time steps of a pass, in order.
template <class Task>
int64_t forward_step(const Task& task, int64_t s) {
  return task.reverse ? task.schedule->steps() - 1 - s : s;
}
template <class Task>
int64_t backward_step(const Task& task, int64_t s) {
  return task.reverse ? s : task.schedule->steps() - 1 - s;
}

// The rows of these steps of a pass, counted in its order, which is that of time or the opposite.
Range rows_of_steps(const Schedule& schedule, Range steps, bool opposite) {
  const int64_t T = schedule.steps();
  return opposite ? Range{schedule.offsets[T - steps.end], schedule.offsets[T - steps.begin]}
                  : Range{schedule.offsets[steps.begin], schedule.offsets[steps.end]};
}

// Steps of a chunk, which has about kChunk rows. What bulk products write and read of a chunk stays in a cache, and
// never needs memory for all steps.
int64_t steps_of_chunk(const Problem& p) { return std::clamp<int64_t>(kChunk / p.B, 1, p.T); }

// f(chunk) for the T steps of a pass, in order.
template <class F>
void for_each_chunk(int64_t T, int64_t chunk_steps, const F& f) {
  for (int64_t begin = 0; begin < T; begin += chunk_steps) f(Range{begin, std::min(begin + chunk_steps, T)});
}

// ------------------------------------------------------------------------------------------------ forward

// Before step t, where rows restart: h_{t-1} of all rows copied, that of a restart where they do, and c_{t-1} changed
// in place.
template <class T, class A>
void restart_rows(const ForwardTask<T, A>& task, int64_t t, Range rows) {
  if (!task.restarts_at(t)) return;
  const Schedule& schedule = *task.schedule;
  const int64_t previous = task.previous(t), before = schedule.active(previous), width = terms<A>(task.P);
  for (int64_t b = rows.begin; b < std::min(rows.end, schedule.active(t)); ++b) {
    A* const h = task.restarted_h + b * width;
    T* const c = task.c + b * task.H;
    if (task.restarts->rows[schedule.offsets[t] + b]) {
      task.reset_h ? std::copy_n(task.reset_h + b * width, width, h) : std::fill_n(h, width, A{});
      task.reset_c ? std::copy_n(task.reset_c + b * task.H, task.H, c) : std::fill_n(c, task.H, T(0));
    } else {
      std::copy_n(b < before ? task.h.at(schedule, previous) + b * task.h.stride : task.h_0 + b * width, width, h);
    }
  }
}

// A chunk of the steps of all directions, counted in the order of the pass.
template <class T, class A>
void forward_steps(const std::vector<ForwardTask<T, A>>& tasks, const Kernels<T, A>& k, const PassPlan& plan,
                   Range steps) {
  const ForwardTask<T, A>& first = tasks[0];
  const Schedule& schedule = *first.schedule;
  const int64_t directions = static_cast<int64_t>(tasks.size());
  const int64_t blocks = unit_blocks(k, first.H), panels = column_panels(k, first.P);
  const int64_t gate_panels = column_panels(k, kGates * first.H);
  const bool normalized = first.norm.active();
  const GateProduct product = plan.family == Family::kPacked ? GateProduct::kPacked : GateProduct::kUnpacked;
  const Range all_rows = {0, schedule.active(0)};
  const auto workspace_size = [&](int64_t rows) {
    if (product == GateProduct::kUnpacked) return int64_t{0};
    const int64_t cells = normalized ? k.block_buffer(rows, terms<A>(first.P))
                                     : k.forward_workspace(rows, first.gates_x ? 0 : first.I, first.P);
    return first.hidden ? std::max(cells, k.block_buffer(rows, terms<A>(first.H))) : cells;
  };

  if (plan.split == Split::kRows) {
    const std::vector<RowItem> items = split_rows(schedule, directions);
    parallel(static_cast<int64_t>(items.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const ForwardTask<T, A>& task = tasks[items[i].direction];
        const Buffer<A> workspace(workspace_size(items[i].rows.end - items[i].rows.begin));
        for (int64_t s = steps.begin; s < steps.end; ++s) {
          const int64_t t = forward_step(task, s);
          restart_rows(task, t, items[i].rows);
          if (normalized) {
            k.forward_recurrent(task, product, t, items[i].rows, {0, gate_panels}, workspace.data());
            k.forward_normalized(task, t, items[i].rows);
          } else {
            k.forward_cells(task, product, t, items[i].rows, {0, blocks}, workspace.data());
          }
          if (task.hidden) k.forward_project(task, t, items[i].rows, {0, panels}, workspace.data());
        }
      }
    });
    return;
  }
  // Threads own hidden units, and each product needs the whole of h_{t-1}: they meet after every phase of a step.
  enum class Phase { kRestart, kCells, kRecurrent, kNormalized, kProject };
  std::vector<Phase> phases;
  // A cut that restarts the reverse direction restarts the other one, too.
  if (first.restarts) phases.push_back(Phase::kRestart);
  if (normalized)
    phases.insert(phases.end(), {Phase::kRecurrent, Phase::kNormalized});
  else
    phases.push_back(Phase::kCells);
  if (first.hidden) phases.push_back(Phase::kProject);
  const int64_t size = workspace_size(all_rows.end);
  const Buffer<A> workspaces(size * Lockstep::most_threads());
  const auto phases_of_step = static_cast<int64_t>(phases.size());
  const int64_t count = (steps.end - steps.begin) * phases_of_step;
  Lockstep::run(Lockstep::most_threads(), count, [&](int64_t i, int64_t part, int64_t parts) {
    const int64_t s = steps.begin + i / phases_of_step;
    A* const workspace = workspaces.data() + part * size;
    // f(task, t, part of n items of that task)
    const auto share_step = [&](int64_t n, const auto& f) {
      share_directions(directions, n, part, parts,
                       [&](int64_t d, Range range) { f(tasks[d], forward_step(tasks[d], s), range); });
    };
    switch (phases[i % phases_of_step]) {
      case Phase::kRestart:
        share_step(all_rows.end, [&](const auto& task, int64_t t, Range rows) { restart_rows(task, t, rows); });
        break;
      case Phase::kCells:
        share_step(blocks, [&](const auto& task, int64_t t, Range units) {
          k.forward_cells(task, product, t, all_rows, units, workspace);
        });
        break;
      case Phase::kRecurrent:
        share_step(gate_panels, [&](const auto& task, int64_t t, Range columns) {
          k.forward_recurrent(task, product, t, all_rows, columns, workspace);
        });
        break;
      case Phase::kNormalized:  // a row is one thread's
        share_step(all_rows.end, [&](const auto& task, int64_t t, Range rows) { k.forward_normalized(task, t, rows); });
        break;
      case Phase::kProject:
        share_step(panels, [&](const auto& task, int64_t t, Range columns) {
          k.forward_project(task, t, all_rows, columns, workspace);
        });
        break;
    }
  });
}

// The same for one direction with library GEMMs: gates_x += h_{t-1} W_hh^T by one per step (two where rows start in
// mid-sequence), then the cell. With normalised gates the product stands by itself.
template <class T>
void forward_stepwise(const ForwardTask<T, T>& task, const T* w_hr, const Kernels<T, T>& k, Range steps) {
  const Schedule& schedule = *task.schedule;
  const Matrix<const T> w_hh = dense(task.w_hh, kGates * task.H, task.P).transposed();
  const int64_t blocks = unit_blocks(k, task.H);
  for (int64_t s = steps.begin; s < steps.end; ++s) {
    const int64_t t = forward_step(task, s), previous = task.previous(t), rows = schedule.active(t);
    const bool normalized = task.norm.active();
    T* const gates_of_step = normalized ? task.products_hh.at(schedule, t)
                                        : task.gates_x + (schedule.offsets[t] - task.first) * kGates * task.H;
    const Matrix<T> gates = dense(gates_of_step, rows, kGates * task.H);
    if (task.restarts_at(t)) {
      restart_rows(task, t, {0, rows});
      matmul<T>(gates, dense<const T>(task.restarted_h, rows, task.P), w_hh, !normalized);
    } else {
      const int64_t running = std::min(rows, schedule.active(previous));
      if (running > 0)
        matmul<T>(gates.rows_from(0, running), {task.h.at(schedule, previous), running, task.P, task.h.stride}, w_hh,
                  !normalized);
      matmul<T>(gates.rows_from(running, rows - running), dense(task.h_0 + running * task.P, rows - running, task.P),
                w_hh, !normalized);
    }
    for_rows(rows, kGates * task.H, [&](Range r) {
      if (normalized)
        k.forward_normalized(task, t, r);
      else
        k.forward_cells(task, GateProduct::kDone, t, r, {0, blocks}, nullptr);
    });
    if (!task.hidden) continue;
    matmul<T>({task.y + schedule.offsets[t] * task.y_stride, rows, task.P, task.y_stride},
              dense<const T>(task.hidden, rows, task.H), dense(w_hr, task.P, task.H).transposed());
    k.finish_projection(task, t, {0, rows}, {0, column_panels(k, task.P)});
  }
}

// One of many blocks of an array that may be missing.
template <class T>
T* block_of(T* blocks, int64_t block, int64_t size) {
  return blocks ? blocks + block * size : nullptr;
}

// The zoneout of one block of rows.
template <class T>
Zoneout<T> block_of(const Zoneout<T>& zoneout, int64_t block, int64_t size) {
  return {zoneout.mask ? zoneout.mask + block * size : nullptr, zoneout.rate};
}

// Factors on states, with which they are multiplied for the recurrent product; without a mask the states themselves.
template <class T>
const T* masked_states(const StackInputs<T>& stack, const T* states, const Buffer<T>& masked) {
  const Problem& p = *stack.problem;
  if (!stack.recurrent_mask || !states) return states;
  multiply_elements(states, stack.recurrent_mask, masked.data(), p.layers * p.directions * p.B * p.output_size());
  return masked.data();
}

// h_n: the output of each row's last step.
template <class T, class A>
void copy_final_states(const ForwardTask<T, A>& task, T* h_n) {
  const Schedule& schedule = *task.schedule;
  for (int64_t t = 0; t < schedule.steps(); ++t) {
    // Forward in time, a row ends where the next step has fewer rows; in reverse all rows end at step 0.
    const int64_t first = task.reverse ? 0 : schedule.active(t + 1);
    for (int64_t b = first; b < schedule.active(t); ++b)
      std::copy_n(task.y + (schedule.offsets[t] + b) * task.y_stride, task.P, h_n + b * task.P);
    if (task.reverse) break;
  }
}

}  // namespace

template <class T, class A>
void run_pass(const StackForward<T>& stack, const Kernels<T, A>& k, const PassPlan& plan) {
  const Problem& p = *stack.problem;
  const int64_t H = p.H, P = p.output_size(), N = p.N, width = p.directions * P;
  const int64_t blocks = unit_blocks(k, H), gate_columns = kGates * H;
  const bool packed = plan.family == Family::kPacked, normalized = p.layer_norm;
  const int64_t inner_layers = p.layers - 1;

  // Outputs of the lower layers: saved, or two buffers in turn; and the dropped copy that the next layer reads.
  const Buffer<T> outputs(stack.layer_outputs ? 0 : std::min<int64_t>(inner_layers, 2) * N * width);
  const Buffer<T> dropped(stack.dropout_mask ? N * width : 0);
  // What is kept of all steps is made of all steps: the threads meet less often.
  const bool in_chunks = plan.bulk_input && !stack.norm_ih;
  const int64_t chunk_steps = in_chunks ? steps_of_chunk(p) : p.T, chunk_rows = chunk_steps * p.B;
  T* const kept_products = normalized ? stack.norm_ih : stack.gates;  // of the input, or what becomes of them
  const Buffer<T> gates_x(plan.bulk_input && !kept_products ? p.directions * chunk_rows * gate_columns : 0);
  const int64_t width_h = terms<A>(P), width_hidden = terms<A>(H);
  const Buffer<A> hidden = zeroed_pairs<A>(p.P > 0 ? p.directions * p.B * width_hidden : 0);
  const bool two_forms = !kFullPrecision<T, A> || stack.recurrent_mask;  // what is multiplied is not y itself
  const Buffer<A> two_steps_h = zeroed_pairs<A>(two_forms ? p.directions * 2 * p.B * width_h : 0);
  const bool restarts = stack.restarts[0] || stack.restarts[1];
  const Buffer<A> restarted_h(restarts ? p.directions * p.B * width_h : 0);
  const Buffer<T> bias(p.directions * blocks * kGates * k.lanes);
  const int64_t widest_input = std::max(p.I, inner_layers > 0 ? width : 0);
  const bool pack_input = plan.bulk_input && plan.pack_input;
  const int64_t ih_size = pack_input ? packed_columns_size(k, widest_input, gate_columns) : 0;
  const bool fused_input = packed && !plan.bulk_input;
  const int64_t gates_size = !packed ? 0
                             : normalized
                                 ? packed_columns_size(k, P, gate_columns)
                                 : packed_gates_size(k, H, (fused_input ? terms<A>(widest_input) : 0) + terms<A>(P));
  const int64_t hr_size = packed && p.P > 0 ? packed_columns_size(k, H, P) : 0;
  const Buffer<A> packs(p.directions * (ih_size + gates_size + hr_size));
  const Buffer<T> products_hh(normalized && !stack.norm_hh ? p.directions * 2 * p.B * gate_columns : 0);
  const Buffer<T> new_states(normalized ? p.directions * p.B * 2 * H : 0);
  Factors<T, A> h_0_factors(k), reset_factors(k), x_factors(k);
  const int64_t states = p.layers * p.directions * p.B, masked_size = stack.recurrent_mask ? states * P : 0;
  const Buffer<T> masked_h_0(masked_size), masked_reset_h(stack.reset_h ? masked_size : 0);
  const A* const h_0 = h_0_factors.of(masked_states(stack, stack.h_0, masked_h_0), states, P);
  const T* const masked_reset = masked_states(stack, stack.reset_h, masked_reset_h);
  const A* const reset_h = masked_reset ? reset_factors.of(masked_reset, states, P) : nullptr;
  const Buffer<T> zeros(restarts ? P : 0);
  std::fill_n(zeros.data(), restarts ? P : 0, T(0));

  std::copy_n(stack.c_0, states * H, stack.c_n);
  const int64_t first_returned = (p.layers - stack.cell_layers) * p.directions;  // of the cell states that are returned
  const T* input = stack.x;
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    const int64_t I = stack.input_size(layer);
    T* output = layer == inner_layers ? stack.y
                : stack.layer_outputs ? stack.layer_outputs + layer * N * width
                                      : outputs.data() + layer % 2 * N * width;
    const A* const x = x_factors.of(input, N, I);
    std::vector<ForwardTask<T, A>> tasks;
    for (int64_t d = 0; d < p.directions; ++d) {
      const int64_t index = layer * p.directions + d;
      const Weights<const T>& w = stack.weights[index];
      A* const pack_ih = packs.data() + d * (ih_size + gates_size + hr_size);
      A* const pack_gates = pack_ih + ih_size;
      A* const pack_hr = pack_gates + gates_size;
      const int64_t depth_x = fused_input ? terms<A>(I) : 0, depth = depth_x + terms<A>(P);
      if (packed && normalized)
        pack_panels(column_panels(k, gate_columns), gate_columns * P,
                    [&](Range r) { k.pack_transposed(w.w_hh, P, gate_columns, pack_gates, r); });
      else if (packed)
        pack_panels(blocks, gate_columns * depth, [&](Range r) {
          if (fused_input) k.pack_gates(w.w_ih, H, I, pack_gates, depth, r);
          k.pack_gates(w.w_hh, H, P, pack_gates + depth_x * 2 * k.lanes, depth, r);
        });
      if (hr_size > 0)
        pack_panels(column_panels(k, P), P * H, [&](Range r) { k.pack_transposed(w.w_hr, H, P, pack_hr, r); });
      T* const direction_bias = bias.data() + d * blocks * kGates * k.lanes;
      k.pack_bias(w.b_ih, w.b_hh, H, direction_bias);
      T* const own_products = block_of(kept_products, index, N * gate_columns);
      if (pack_input)
        pack_panels(column_panels(k, gate_columns), gate_columns * I,
                    [&](Range r) { k.pack_transposed(w.w_ih, I, gate_columns, pack_ih, r); });

      ForwardTask<T, A> task = {};
      task.schedule = stack.schedule;
      task.restarts = stack.restarts[d];
      task.reverse = d == 1;
      task.I = I;
      task.H = H;
      task.P = P;
      task.x = x;
      task.gates_x = !plan.bulk_input ? nullptr
                     : own_products   ? own_products
                                      : gates_x.data() + d * chunk_rows * gate_columns;
      task.w_ih = w.w_ih;
      task.w_hh = w.w_hh;
      task.packed = packed ? pack_gates : nullptr;
      task.packed_hr = hr_size > 0 ? pack_hr : nullptr;
      task.bias = direction_bias;
      task.h_0 = h_0 + index * p.B * width_h;
      task.reset_h = reset_h ? reset_h + index * p.B * width_h : nullptr;
      task.reset_c = stack.reset_c ? stack.reset_c + index * p.B * H : nullptr;
      task.restarted_h = restarts ? restarted_h.data() + d * p.B * width_h : nullptr;
      task.c = stack.c_n + index * p.B * H;
      task.hidden = p.P > 0 ? hidden.data() + d * p.B * width_hidden : nullptr;
      task.y = output + d * P;
      task.y_stride = width;
      if (two_forms)
        task.h = {two_steps_h.data() + d * 2 * p.B * width_h, width_h, p.B, 0};
      else if constexpr (kFullPrecision<T, A>)
        task.h = {task.y, width, 0, 0};
      task.recurrent_mask = stack.recurrent_mask ? stack.recurrent_mask + index * p.B * P : nullptr;
      task.zoneout_h = block_of(stack.zoneout_h, index, N * P);
      task.zoneout_c = block_of(stack.zoneout_c, index, N * H);
      task.initial_h = stack.h_0 + index * p.B * P;
      task.kept_h_of_restart = stack.reset_h ? stack.reset_h + index * p.B * P : zeros.data();
      task.kept_h_stride = stack.reset_h ? P : 0;
      task.gates = block_of(stack.gates, index, N * gate_columns);
      T* const cell_states = index >= first_returned ? stack.cell_states + (index - first_returned) * N * H : nullptr;
      task.cells = stack.cells ? stack.cells + index * N * H : cell_states;
      if (normalized) {
        task.norm = w.norm;
        task.products_hh = {block_of(stack.norm_hh, index, N * gate_columns), gate_columns, 0, 0};
        if (!stack.norm_hh) task.products_hh = {products_hh.data() + d * 2 * p.B * gate_columns, gate_columns, p.B, 0};
        task.rstd_hh = block_of(stack.rstd_hh, index, N);
        task.new_states = new_states.data() + d * p.B * 2 * H;
      }
      tasks.push_back(task);
    }
    for_each_chunk(p.T, chunk_steps, [&](Range steps) {
      for (int64_t d = 0; d < p.directions && plan.bulk_input; ++d) {
        ForwardTask<T, A>& task = tasks[d];
        const Range rows = rows_of_steps(*task.schedule, steps, task.reverse);
        task.first = kept_products ? 0 : rows.begin;
        T* const product = task.gates_x + (rows.begin - task.first) * gate_columns;
        const A* const pack_ih = pack_input ? packs.data() + d * (ih_size + gates_size + hr_size) : nullptr;
        const int64_t index = layer * p.directions + d, count = rows.end - rows.begin;
        const A* const own_x = x + rows.begin * terms<A>(I);
        T* const rstd = block_of(stack.rstd_ih, index * N + rows.begin, 1);
        const auto normalize = [&](Range r) { k.normalize_rows(product, gate_columns, r, rstd); };
        if (normalized)
          multiply_input(k, own_x, count, I, pack_ih, task.w_ih, gate_columns, product, normalize);
        else
          multiply_input(k, own_x, count, I, pack_ih, task.w_ih, gate_columns, product);
      }
      if constexpr (kFullPrecision<T, A>)
        if (plan.family == Family::kStepwise)
          for (int64_t d = 0; d < p.directions; ++d)
            forward_stepwise(tasks[d], stack.weights[layer * p.directions + d].w_hr, k, steps);
      if (plan.family != Family::kStepwise) forward_steps(tasks, k, plan, steps);
    });
    for (int64_t d = 0; d < p.directions; ++d) {
      const int64_t index = layer * p.directions + d;
      copy_final_states(tasks[d], stack.h_n + index * p.B * P);
      if (stack.cells && index >= first_returned)
        std::copy_n(tasks[d].cells, N * H, stack.cell_states + (index - first_returned) * N * H);
    }

    input = output;
    if (stack.dropout_mask && layer < inner_layers) {
      multiply_elements(output, stack.dropout_mask + layer * N * width, dropped.data(), N * width);
      input = dropped.data();
    }
  }
}

// ------------------------------------------------------------------------------------------------ backward

namespace {

// A chunk of the steps of all directions, counted in the order of the pass. Leaves in d_h the gradient that the step
// behind the chunk gets through it, where that is needed.
template <class T, class A>
void backward_steps(const std::vector<BackwardTask<T, A>>& tasks, const Kernels<T, A>& k, Split split, Range steps,
                    bool needs_d_h) {
  const BackwardTask<T, A>& first = tasks[0];
  const Schedule& schedule = *first.schedule;
  const auto directions = static_cast<int64_t>(tasks.size());
  const int64_t panels_h = column_panels(k, first.P), panels_c = column_panels(k, first.H);
  const Range all_rows = {0, schedule.active(0)};
  const bool packed = first.packed_hh || first.packed_hr, normalized = first.norm.active();
  const int64_t buffer_size = packed ? k.block_buffer(all_rows.end, terms<A>(kGates * first.H)) : 0;

  if (split == Split::kRows) {
    const std::vector<RowItem> items = split_rows(schedule, directions);
    parallel(static_cast<int64_t>(items.size()), 1, [&](int64_t begin, int64_t end) {
      const Buffer<A> buffer(buffer_size);
      for (int64_t i = begin; i < end; ++i) {
        const BackwardTask<T, A>& task = tasks[items[i].direction];
        const Range rows = items[i].rows;
        for (int64_t s = steps.begin; s < steps.end; ++s) {
          const int64_t t = backward_step(task, s);
          if (s > steps.begin) k.backward_recurrent(task, task.next(t), rows, {0, panels_h}, buffer.data());
          if (task.d_hidden) {
            k.backward_output(task, t, rows);
            k.backward_project(task, t, rows, {0, panels_c}, buffer.data());
          }
          if (normalized)
            k.backward_normalized(task, t, rows);
          else
            k.backward_cells(task, t, rows, {0, panels_c});
        }
        if (needs_d_h)
          k.backward_recurrent(task, backward_step(task, steps.end - 1), rows, {0, panels_h}, buffer.data());
      }
    });
    return;
  }
  // Threads own hidden units. Without projection the d_h that a thread makes is all that its own cells need, so one
  // phase per step is enough; with projection each product needs the whole of the one before, and normalised gates need
  // the whole of d_h.
  enum class Phase { kRecurrent, kOutput, kProject, kCells, kNormalized };
  std::vector<Phase> phases;
  if (first.d_hidden || normalized) phases.push_back(Phase::kRecurrent);
  if (first.d_hidden) phases.push_back(Phase::kOutput);
  if (first.d_hidden && normalized) phases.push_back(Phase::kProject);
  phases.push_back(normalized ? Phase::kNormalized : Phase::kCells);
  const auto phases_of_step = static_cast<int64_t>(phases.size());
  const Buffer<A> buffers(buffer_size * Lockstep::most_threads());
  const int64_t count = (steps.end - steps.begin) * phases_of_step + (needs_d_h ? 1 : 0);
  Lockstep::run(Lockstep::most_threads(), count, [&](int64_t i, int64_t part, int64_t parts) {
    const int64_t s = steps.begin + i / phases_of_step;
    A* const buffer = buffers.data() + part * buffer_size;
    // f(task, part of n items of that task)
    const auto share_step = [&](int64_t n, const auto& f) {
      share_directions(directions, n, part, parts, [&](int64_t d, Range range) { f(tasks[d], range); });
    };
    switch (s == steps.end ? Phase::kRecurrent : phases[i % phases_of_step]) {
      case Phase::kRecurrent:
        if (s > steps.begin)
          share_step(panels_h, [&](const auto& task, Range panels) {
            k.backward_recurrent(task, backward_step(task, s - 1), all_rows, panels, buffer);
          });
        break;
      case Phase::kOutput:
        share_step(all_rows.end,
                   [&](const auto& task, Range rows) { k.backward_output(task, backward_step(task, s), rows); });
        break;
      case Phase::kProject:
        share_step(panels_c, [&](const auto& task, Range panels) {
          k.backward_project(task, backward_step(task, s), all_rows, panels, buffer);
        });
        break;
      case Phase::kCells:
        share_step(panels_c, [&](const auto& task, Range panels) {
          const int64_t t = backward_step(task, s);
          if (first.d_hidden)
            k.backward_project(task, t, all_rows, panels, buffer);
          else if (s > steps.begin)
            k.backward_recurrent(task, task.next(t), all_rows, panels, buffer);
          k.backward_cells(task, t, all_rows, panels);
        });
        break;
      case Phase::kNormalized:
        share_step(all_rows.end,
                   [&](const auto& task, Range rows) { k.backward_normalized(task, backward_step(task, s), rows); });
        break;
    }
  });
}

// The same for one direction, with library GEMMs.
template <class T>
void backward_stepwise(const BackwardTask<T, T>& task, const Weights<const T>& w, const Kernels<T, T>& k, Range steps,
                       bool needs_d_h) {
  const Schedule& schedule = *task.schedule;
  const int64_t columns = kGates * task.H, panels = column_panels(k, task.H);
  const auto recurrent = [&](int64_t t) {
    const int64_t rows = schedule.active(t);
    matmul<T>(dense(task.d_h, rows, task.P), dense<const T>(task.d_gates_terms.at(schedule, t), rows, columns),
              dense(w.w_hh, columns, task.P));
    k.finish_recurrent(task, t, {0, rows}, {0, column_panels(k, task.P)});
  };
  for (int64_t s = steps.begin; s < steps.end; ++s) {
    const int64_t t = backward_step(task, s), rows = schedule.active(t);
    if (s > steps.begin) recurrent(task.next(t));
    if (task.d_hidden) {
      k.backward_output(task, t, {0, rows});
      matmul<T>(dense(task.d_hidden, rows, task.H),
                dense<const T>(task.d_projected_terms.at(schedule, t), rows, task.P), dense(w.w_hr, task.P, task.H));
    }
    for_rows(rows, columns, [&](Range r) {
      if (task.norm.active())
        k.backward_normalized(task, t, r);
      else
        k.backward_cells(task, t, r, {0, panels});
    });
  }
  if (needs_d_h) recurrent(backward_step(task, steps.end - 1));
}

// h_{t-1} of every row.
template <class T, class A>
std::vector<const T*> previous_rows(const BackwardTask<T, A>& task, const T* y, int64_t y_stride, const T* h_0) {
  const Schedule& schedule = *task.schedule;
  std::vector<const T*> rows(schedule.rows());
  for (int64_t t = 0; t < schedule.steps(); ++t) {
    const int64_t previous = task.previous(t);
    for (int64_t b = 0; b < schedule.active(t); ++b) {
      const int64_t row = schedule.offsets[t] + b;
      rows[row] = task.restarts_row(row)          ? task.reset_h_of(b)
                  : b < schedule.active(previous) ? y + (schedule.offsets[previous] + b) * y_stride
                                                  : h_0 + b * task.P;
    }
  }
  return rows;
}

// Copies of these rows of K values.
template <class T>
void gather_rows(const T* const* from, int64_t rows, int64_t K, T* to) {
  for_rows(rows, K, [&](Range range) {
    for (int64_t r = range.begin; r < range.end; ++r) std::copy_n(from[r], K, to + r * K);
  });
}

// h_{t-1} of the rows of a chunk as the recurrent product read it, [rows, P].
template <class T, class A>
void gather_factors(const BackwardTask<T, A>& task, const std::vector<const T*>& h_rows, Range rows, T* to) {
  gather_rows(h_rows.data() + rows.begin, rows.end - rows.begin, task.P, to);
  if (!task.recurrent_mask) return;
  const Schedule& schedule = *task.schedule;
  for (int64_t t = 0; t < schedule.steps(); ++t) {
    if (schedule.offsets[t] < rows.begin || schedule.offsets[t] >= rows.end) continue;
    T* const of_step = to + (schedule.offsets[t] - rows.begin) * task.P;
    multiply_elements<T>(of_step, task.recurrent_mask, of_step, schedule.active(t) * task.P);
  }
}

// One right factor of weight gradients that share their left factor.
template <class T>
struct RightFactor {
  const T* const* rows;  // N of `columns` values
  int64_t columns;
  T* out;  // [columns of left, columns]
};

// The left factor [N, columns] of some matrices' gradients.
template <class T>
struct LeftFactor {
  const T* rows;
  std::vector<RightFactor<T>> rights;
  T* sums;  // of its own columns; null where not needed
};

// Sums over K rows of another matrix [., columns]; see add_column_sums.
template <class T>
struct SummedRows {
  const T* left;
  int64_t columns;
  const int64_t* rows;  // null: the first K
  int64_t K;
  std::vector<ColumnSums<T>> sums;
};

// For each left factor: out (+)= left^T right for its right factors, and sums (+)= left^T 1. And the sums of other
// matrices. Every element is summed in the same order, whatever the threads.
template <class T, class A>
void weight_gradients(const Kernels<T, A>& k, const std::vector<LeftFactor<T>>& lefts, int64_t N, int64_t columns,
                      const std::vector<SummedRows<T>>& summed, bool accumulate) {
  const int64_t slices = ceil_div(N, kGradientDepth), deepest = terms<A>(std::min(N, kGradientDepth));
  const int64_t units = ceil_div(columns, kGradientUnit), buffer_size = k.block_buffer(columns, deepest);
  int64_t panels = 0;  // of all right factors
  for (const LeftFactor<T>& left : lefts)
    for (const RightFactor<T>& right : left.rights) panels += column_panels(k, right.columns);
  int64_t summed_elements = 0;
  for (const SummedRows<T>& s : summed) summed_elements += s.K * s.columns;
  const int64_t multiply_adds = std::min(N, kGradientDepth) * columns * panels * 2 * k.lanes;
  const bool alone = multiply_adds < kMultiplyGrain && summed_elements < kElementwiseGrain;
  const int threads = alone ? 1 : Lockstep::most_threads();
  const Buffer<A> packed(panels * 2 * k.lanes * deepest), buffers(lefts.empty() ? 0 : buffer_size * threads);
  std::vector<std::vector<Gradient<T, A>>> gradients(lefts.size());
  A* to = packed.data();
  for (size_t l = 0; l < lefts.size(); ++l)
    for (const RightFactor<T>& right : lefts[l].rights) {
      gradients[l].push_back({to, right.columns, right.out});
      to += column_panels(k, right.columns) * 2 * k.lanes * deepest;
    }

  // Two phases per slice of rows: the right factors are packed, then multiplied.
  Lockstep::run(threads, 2 * slices, [&](int64_t phase, int64_t part, int64_t parts) {
    const int64_t first = phase / 2 * kGradientDepth, K = std::min(kGradientDepth, N - first);
    if (phase % 2 == 0) {
      const Range own = share(panels, part, parts);
      A* to = packed.data();
      int64_t before = 0;  // panels of the factors before this one
      for (const LeftFactor<T>& left : lefts)
        for (const RightFactor<T>& right : left.rights) {
          const int64_t count = column_panels(k, right.columns);
          const Range range = {std::clamp(own.begin - before, int64_t{0}, count),
                               std::clamp(own.end - before, int64_t{0}, count)};
          k.pack_columns(right.rows + first, K, right.columns, to, range);
          to += count * 2 * k.lanes * deepest;
          before += count;
        }
    } else {
      const Range own = share(units, part, parts);
      const Range own_columns = {own.begin * kGradientUnit, std::min(own.end * kGradientUnit, columns)};
      for (size_t l = 0; l < lefts.size() && own_columns.begin < own_columns.end; ++l)
        k.add_gradients(lefts[l].rows + first * columns, columns, K, own_columns, buffers.data() + part * buffer_size,
                        gradients[l], lefts[l].sums, accumulate || first > 0);
      for (const SummedRows<T>& s : summed)
        if (first == 0)
          k.add_column_sums(s.left, s.columns, s.rows, s.K, share(s.columns, part, parts), s.sums, accumulate);
    }
  });
}

// The same for each group of rows apart, whose gradients lie one behind the other; all rows are one if there are none.
// (The other matrices' sums are of a group already.)
template <class T, class A>
void grouped_weight_gradients(const Kernels<T, A>& k, const std::vector<std::vector<int64_t>>& groups,
                              const std::vector<LeftFactor<T>>& lefts, int64_t N, int64_t columns,
                              const std::vector<SummedRows<T>>& summed, bool accumulate) {
  if (groups.empty()) {
    weight_gradients(k, lefts, N, columns, summed, accumulate);
    return;
  }
  if (!summed.empty()) weight_gradients(k, std::vector<LeftFactor<T>>(), N, columns, summed, accumulate);
  const Buffer<T> own_left(lefts.empty() ? 0 : N * columns);
  for (const LeftFactor<T>& left : lefts)
    for (size_t g = 0; g < groups.size(); ++g) {
      const auto rows = static_cast<int64_t>(groups[g].size());
      const auto group = static_cast<int64_t>(g);
      const auto of_group = [&](const auto& row) {
        std::vector<const T*> pointers;
        for (const int64_t r : groups[g]) pointers.push_back(row(r));
        return pointers;
      };
      gather_rows(of_group([&](int64_t r) { return left.rows + r * columns; }).data(), rows, columns, own_left.data());
      std::vector<std::vector<const T*>> right_rows;
      LeftFactor<T> own = {own_left.data(), {}, left.sums ? left.sums + group * columns : nullptr};
      for (const RightFactor<T>& right : left.rights) {
        right_rows.push_back(of_group([&](int64_t r) { return right.rows[r]; }));
        const int64_t size = columns * right.columns;
        own.rights.push_back({right_rows.back().data(), right.columns, right.out + group * size});
        if (rows == 0) zero_elements(own.rights.back().out, size);
      }
      if (rows == 0 && own.sums) zero_elements(own.sums, columns);
      weight_gradients(k, std::vector<LeftFactor<T>>{own}, rows, columns, {}, false);
    }
}

// The rows of all steps, by the group of their sequence.
std::vector<std::vector<int64_t>> rows_of_groups(const Schedule& schedule, int64_t groups,
                                                 const std::vector<int64_t>& group_of) {
  std::vector<std::vector<int64_t>> rows(groups);
  for (int64_t t = 0; t < schedule.steps(); ++t)
    for (int64_t b = 0; b < schedule.active(t); ++b) rows[group_of[b]].push_back(schedule.offsets[t] + b);
  return rows;
}

// The gates of a layer, computed again for a chunk of steps. All h_{t-1} are known by then, so that these are products
// of all rows at once.
template <class T, class A>
class GatesAgain {
 public:
  GatesAgain(const Kernels<T, A>& k, const Problem& p, int64_t chunk_rows, int64_t widest_input)
      : k_(k),
        H_(p.H),
        P_(p.output_size()),
        rows_(chunk_rows),
        ih_size_(packed_columns_size(k, widest_input, kGates * p.H)),
        hh_size_(packed_columns_size(k, P_, kGates * p.H)),
        bias_size_(unit_blocks(k, p.H) * kGates * k.lanes),
        packs_(p.directions * (ih_size_ + hh_size_)),
        biases_(p.layer_norm ? 0 : p.directions * bias_size_),
        gates_(p.layer_norm ? 0 : p.directions * chunk_rows * kGates * p.H),
        norms_(p.layer_norm ? p.directions * chunk_rows * 2 * kGates * p.H : 0),
        rstds_(p.layer_norm ? p.directions * chunk_rows * 2 : 0),
        factors_(k) {}

  void pack(int64_t direction, const Weights<const T>& w, int64_t I) {
    A* const ih = packs_.data() + direction * (ih_size_ + hh_size_);
    const int64_t columns = kGates * H_, panels = column_panels(k_, columns);
    pack_panels(panels, columns * I, [&](Range r) { k_.pack_transposed(w.w_ih, I, columns, ih, r); });
    pack_panels(panels, columns * P_, [&](Range r) { k_.pack_transposed(w.w_hh, P_, columns, ih + ih_size_, r); });
    if (!w.norm.active()) k_.pack_bias(w.b_ih, w.b_hh, H_, biases_.data() + direction * bias_size_);
  }

  // Gates [rows, 4H] for the task, or the normalised products that they are made of, of x [rows, I] and h_before
  // [rows, P].
  void compute(int64_t direction, const T* x, int64_t I, const T* h_before, int64_t rows, BackwardTask<T, A>& task) {
    const A* const ih = packs_.data() + direction * (ih_size_ + hh_size_);
    const int64_t columns = kGates * H_;
    const A* const hh = ih + ih_size_;
    if (task.norm.active()) {
      T* const norm_ih = norms_.data() + direction * rows_ * 2 * columns;
      T* const norm_hh = norm_ih + rows_ * columns;
      T* const rstd_ih = rstds_.data() + direction * rows_ * 2;
      T* const rstd_hh = rstd_ih + rows_;
      const auto normalize_ih = [&](Range r) { k_.normalize_rows(norm_ih, columns, r, rstd_ih); };
      const auto normalize_hh = [&](Range r) { k_.normalize_rows(norm_hh, columns, r, rstd_hh); };
      multiply_bulk(k_, factors_.of(x, rows, I), rows, terms<A>(I), ih, columns, norm_ih, false, normalize_ih);
      multiply_bulk(k_, factors_.of(h_before, rows, P_), rows, terms<A>(P_), hh, columns, norm_hh, false, normalize_hh);
      task.norm_ih = norm_ih, task.norm_hh = norm_hh;
      task.rstd_ih = rstd_ih, task.rstd_hh = rstd_hh;
    } else {
      T* const gates = gates_.data() + direction * rows_ * columns;
      const T* const bias = biases_.data() + direction * bias_size_;
      const auto finish = [&](Range r) { k_.activate_gates(bias, H_, r, gates); };
      multiply_bulk(k_, factors_.of(x, rows, I), rows, terms<A>(I), ih, columns, gates, false);
      multiply_bulk(k_, factors_.of(h_before, rows, P_), rows, terms<A>(P_), hh, columns, gates, true, finish);
      task.gates = gates;
    }
  }

 private:
  const Kernels<T, A>& k_;
  const int64_t H_, P_, rows_, ih_size_, hh_size_, bias_size_;
  const Buffer<A> packs_;
  const Buffer<T> biases_, gates_;
  const Buffer<T> norms_, rstds_;  // per direction of W_ih x, then of W_hh h
  Factors<T, A> factors_;
};

// The sums over the rows of a chunk, or of its groups, that the gradients of layer normalisation and the biases are.
template <class T, class A>
std::vector<SummedRows<T>> norm_gradients(const BackwardTask<T, A>& task,
                                          const std::vector<std::vector<int64_t>>& groups, int64_t rows,
                                          const LayerNorm<T>& d_norm, T* d_bias) {
  const int64_t H = task.H, columns = kGates * H, saved = (task.first - task.gates_first) * columns;
  std::vector<SummedRows<T>> all;
  for (size_t g = 0; g < std::max<size_t>(groups.size(), 1); ++g) {
    const auto want = [&](const T* left, int64_t width, std::initializer_list<ColumnSums<T>> sums) {
      SummedRows<T> wanted = {left, width, nullptr, rows, {}};
      if (!groups.empty()) wanted.rows = groups[g].data(), wanted.K = static_cast<int64_t>(groups[g].size());
      for (const ColumnSums<T>& sum : sums)
        if (sum.out) wanted.sums.push_back({sum.right, sum.out + static_cast<int64_t>(g) * width});
      if (!wanted.sums.empty()) all.push_back(wanted);
    };
    want(task.d_gates, columns,
         {{nullptr, d_bias}, {task.norm_ih + saved, d_norm.gain_ih}, {task.norm_hh + saved, d_norm.gain_hh}});
    want(task.d_norm_c, H, {{nullptr, d_norm.bias_c}, {task.norm_c, d_norm.gain_c}});
  }
  return all;
}

// d_x (+)= d_products W_ih for the rows of a chunk, from their first.
template <class T, class A>
void input_gradient(const Kernels<T, A>& k, const T* d_products, int64_t columns, const T* w_ih, const A* packed_ih,
                    int64_t rows, int64_t I, Factors<T, A>& factors, T* d_x, bool accumulate) {
  if (packed_ih) {
    multiply_bulk(k, factors.of(d_products, rows, columns), rows, terms<A>(columns), packed_ih, I, d_x, accumulate);
    return;
  }
  // Reading the weights is what takes the time, so they are what is counted.
  parallel(column_panels(k, I), kPackGrain / (2 * k.lanes * columns) + 1, [&](int64_t begin, int64_t end) {
    const Range range = {begin * 2 * k.lanes, std::min(end * 2 * k.lanes, I)};
    k.multiply_stored(d_products, columns, rows, w_ih, columns, I, range, d_x, I, accumulate);
  });
}

}  // namespace

template <class T, class A>
void run_pass(const StackBackward<T>& stack, const Kernels<T, A>& k, const PassPlan& plan) {
  const Problem& p = *stack.problem;
  const int64_t H = p.H, P = p.output_size(), N = p.N, width = p.directions * P, columns = kGates * H;
  const bool packed = plan.family == Family::kPacked, projected = p.P > 0, inner = p.layers > 1;
  const bool normalized = p.layer_norm;

  const bool grouped = stack.groups > 1;  // a group's gradient is made once, of all its rows
  const int64_t chunk_steps = grouped ? p.T : steps_of_chunk(p), chunk_rows = chunk_steps * p.B;
  const Buffer<T> d_gates(p.directions * chunk_rows * columns), hidden(projected ? p.directions * chunk_rows * H : 0);
  const Buffer<T> d_projected(projected ? p.directions * chunk_rows * P : 0);
  const Buffer<T> d_hidden(projected ? p.directions * p.B * H : 0);
  const int64_t normalized_rows = normalized ? p.directions * chunk_rows : 0;
  const Buffer<T> d_products(2 * normalized_rows * columns), norm_c(normalized_rows * H), d_norm_c(normalized_rows * H);
  const int64_t bias_size = normalized ? unit_blocks(k, H) * kGates * k.lanes : 0;
  const Buffer<T> bias(p.directions * bias_size);
  const bool recurrent = p.T > 1 || stack.needs_d_h_0;  // a single step needs no d_h W_hh
  const int64_t hh_size = packed && recurrent ? packed_columns_size(k, columns, P) : 0;
  const int64_t hr_size = packed && projected ? packed_columns_size(k, P, H) : 0;
  const bool pack_input = plan.pack_input;
  const int64_t widest_input = std::max(p.I, inner ? width : 0);
  const int64_t ih_size = pack_input ? packed_columns_size(k, columns, widest_input) : 0;
  const Buffer<A> packs(p.directions * (hh_size + hr_size + ih_size));
  Factors<T, A> d_gates_factors(k);
  const int64_t width_gates = terms<A>(columns), width_projected = terms<A>(P);
  const int64_t two_steps = kFullPrecision<T, A> ? 0 : p.directions * 2 * p.B;
  const Buffer<A> two_steps_d_gates(two_steps * width_gates);
  const Buffer<A> two_steps_d_projected(projected ? two_steps * width_projected : 0);
  const Buffer<T> d_outputs(inner ? 2 * N * width : 0);  // gradients of the lower layers' outputs, two in turn
  const Buffer<T> dropped(inner && stack.dropout_mask ? N * width : 0);
  const bool restarts = stack.restarts[0] || stack.restarts[1];
  const Buffer<T> zeros(restarts ? H : 0);
  std::fill_n(zeros.data(), restarts ? H : 0, T(0));
  const Buffer<T> kept_d_h(stack.zoneout_h.active() ? p.directions * p.B * P : 0);
  // What the recurrent product read, where it does not stand in y or has to be multiplied again.
  const bool computes_gates = !(normalized ? stack.norm_ih : stack.gates);
  const bool gathered = stack.recurrent_mask || computes_gates;
  const Buffer<T> h_before(gathered ? p.directions * chunk_rows * P : 0);
  std::optional<GatesAgain<T, A>> gates_again;
  if (computes_gates) gates_again.emplace(k, p, chunk_rows, widest_input);
  const auto groups =
      grouped ? rows_of_groups(*stack.schedule, stack.groups, stack.group_of) : std::vector<std::vector<int64_t>>();
  const int64_t first_returned = (p.layers - stack.cell_layers) * p.directions;  // of the cell states that are returned

  // Layers below the lowest one that needs a gradient are not visited.
  int64_t lowest = 0;
  if (!stack.d_x && !stack.needs_d_h_0) {  // the latter also where reset states need gradients
    const auto needed = [](const Weights<T>& w) {
      return w.w_ih || w.w_hh || w.b_ih || w.b_hh || w.w_hr || w.norm.gain_ih || w.norm.gain_hh || w.norm.gain_c ||
             w.norm.bias_c;
    };
    const auto first = std::find_if(stack.d_weights.begin(), stack.d_weights.end(), needed);
    lowest = (first - stack.d_weights.begin()) / p.directions;
  }
  const T* d_output = stack.d_y;
  for (int64_t layer = p.layers - 1; layer >= lowest; --layer) {
    const int64_t I = stack.input_size(layer);
    const T* output = layer == p.layers - 1 ? stack.y : stack.layer_outputs + layer * N * width;
    const T* mask = stack.dropout_mask && layer > 0 ? stack.dropout_mask + (layer - 1) * N * width : nullptr;
    const T* input = layer == 0 ? stack.x : stack.layer_outputs + (layer - 1) * N * width;
    if (mask) {
      multiply_elements(input, mask, dropped.data(), N * width);
      input = dropped.data();
    }
    T* const d_input = layer == 0 ? stack.d_x : layer > lowest ? d_outputs.data() + layer % 2 * N * width : nullptr;
    std::vector<BackwardTask<T, A>> tasks;
    std::vector<const A*> packed_ih;            // per direction: column panels of W_ih; null where stored ones serve
    std::vector<std::vector<const T*>> h_rows;  // per direction: h_{t-1} of every row
    const std::vector<const T*> x_rows = row_pointers(input, N, I);
    for (int64_t d = 0; d < p.directions; ++d) {
      const int64_t index = layer * p.directions + d;
      const Weights<const T>& w = stack.weights[index];
      A* const pack_hh = packs.data() + d * (hh_size + hr_size + ih_size);
      A* const pack_hr = pack_hh + hh_size;
      if (hh_size > 0) pack_rows(k, w.w_hh, columns, P, pack_hh);
      if (hr_size > 0) pack_rows(k, w.w_hr, P, H, pack_hr);
      packed_ih.push_back(d_input && pack_input ? pack_hr + hr_size : nullptr);
      if (d_input && pack_input) pack_rows(k, w.w_ih, columns, I, pack_hr + hr_size);

      BackwardTask<T, A> task = {};
      task.schedule = stack.schedule;
      task.restarts = stack.restarts[d];
      task.reverse = d == 1;
      task.H = H;
      task.P = P;
      task.gates = block_of(stack.gates, index, N * columns);
      task.cells = stack.cells + index * N * H;
      task.resets_to_zero = !stack.reset_h;
      task.reset_h = stack.reset_h ? stack.reset_h + index * p.B * P : zeros.data();
      task.reset_c = stack.reset_c ? stack.reset_c + index * p.B * H : zeros.data();
      task.c_0 = stack.c_0 + index * p.B * H;
      task.w_hh = plan.family == Family::kUnpacked ? w.w_hh : nullptr;
      task.packed_hh = hh_size > 0 ? pack_hh : nullptr;
      task.packed_hr = hr_size > 0 ? pack_hr : nullptr;
      task.d_y = d_output ? d_output + d * P : nullptr;
      task.d_y_stride = width;
      if (stack.d_cell_states && index >= first_returned)
        task.d_cells = stack.d_cell_states + (index - first_returned) * N * H;
      task.recurrent_mask = stack.recurrent_mask ? stack.recurrent_mask + index * p.B * P : nullptr;
      task.zoneout_h = block_of(stack.zoneout_h, index, N * P);
      task.zoneout_c = block_of(stack.zoneout_c, index, N * H);
      task.kept_d_h = stack.zoneout_h.active() ? kept_d_h.data() + d * p.B * P : nullptr;
      task.d_reset_h = stack.d_reset_h ? stack.d_reset_h + index * p.B * P : nullptr;
      task.d_reset_c = stack.d_reset_c ? stack.d_reset_c + index * p.B * H : nullptr;
      task.d_h = stack.d_h + index * p.B * P;
      task.d_c = stack.d_c + index * p.B * H;
      task.d_hidden = projected ? d_hidden.data() + d * p.B * H : nullptr;
      task.d_projected = projected ? d_projected.data() + d * chunk_rows * P : nullptr;
      task.hidden = projected ? hidden.data() + d * chunk_rows * H : nullptr;
      task.d_gates = d_gates.data() + d * chunk_rows * columns;
      if (normalized) {
        task.norm = w.norm;
        task.bias = bias.data() + d * bias_size;
        k.pack_bias(w.b_ih, w.b_hh, H, bias.data() + d * bias_size);
        task.norm_ih = block_of(stack.norm_ih, index, N * columns);
        task.norm_hh = block_of(stack.norm_hh, index, N * columns);
        task.rstd_ih = block_of(stack.rstd_ih, index, N);
        task.rstd_hh = block_of(stack.rstd_hh, index, N);
        task.d_products_ih = d_products.data() + d * 2 * chunk_rows * columns;
        task.d_products_hh = task.d_products_ih + chunk_rows * columns;
        task.norm_c = norm_c.data() + d * chunk_rows * H;
        task.d_norm_c = d_norm_c.data() + d * chunk_rows * H;
      }
      if constexpr (kFullPrecision<T, A>) {
        task.d_gates_terms = {normalized ? task.d_products_hh : task.d_gates, columns, 0, 0};
        task.d_projected_terms = {task.d_projected, P, 0, 0};
      } else {
        const int64_t first_row = d * 2 * p.B;
        task.d_gates_terms = {two_steps_d_gates.data() + first_row * width_gates, width_gates, p.B, 0};
        if (projected)
          task.d_projected_terms = {two_steps_d_projected.data() + first_row * width_projected, width_projected, p.B,
                                    0};
      }
      if (gates_again) gates_again->pack(d, w, I);
      tasks.push_back(task);
      h_rows.push_back(previous_rows(task, output + d * P, width, stack.h_0 + index * p.B * P));
    }

    // Two directions come to a row in either order.
    const bool both_add = d_input && p.directions == 2;
    if (both_add) zero_elements(d_input, N * I);
    for_each_chunk(p.T, chunk_steps, [&](Range steps) {
      const auto rows_of = [&](const BackwardTask<T, A>& task) {
        return rows_of_steps(*task.schedule, steps, !task.reverse);
      };
      for (BackwardTask<T, A>& task : tasks)
        task.first = task.d_gates_terms.first = task.d_projected_terms.first = rows_of(task).begin;
      for (int64_t d = 0; d < p.directions && gathered; ++d) {
        BackwardTask<T, A>& task = tasks[d];
        const Range rows = rows_of(task);
        T* const own_h = h_before.data() + d * chunk_rows * P;
        gather_factors(task, h_rows[d], rows, own_h);
        if (!gates_again) continue;
        gates_again->compute(d, input + rows.begin * I, I, own_h, rows.end - rows.begin, task);
        task.gates_first = rows.begin;
      }
      const bool needs_d_h = steps.end < p.T || stack.needs_d_h_0;
      if constexpr (kFullPrecision<T, A>)
        if (plan.family == Family::kStepwise)
          for (int64_t d = 0; d < p.directions; ++d)
            backward_stepwise(tasks[d], stack.weights[layer * p.directions + d], k, steps, needs_d_h);
      if (plan.family != Family::kStepwise) backward_steps(tasks, k, plan.split, steps, needs_d_h);

      // Everything that is left is bulk products over the rows of the chunk.
      for (int64_t d = 0; d < p.directions; ++d) {
        const BackwardTask<T, A>& task = tasks[d];
        const Weights<T>& d_w = stack.d_weights[layer * p.directions + d];
        const int64_t first = task.first, rows = rows_of(task).end - first;
        const bool accumulate = steps.begin > 0;
        const T* const d_products = normalized ? task.d_products_ih : task.d_gates;
        if (d_input)
          input_gradient(k, d_products, columns, stack.weights[layer * p.directions + d].w_ih, packed_ih[d], rows, I,
                         d_gates_factors, d_input + first * I, both_add);
        // The two biases are added, so their gradients are the same sum over all rows.
        T* const d_bias = d_w.b_ih ? d_w.b_ih : d_w.b_hh;
        const std::vector<const T*> own_h_rows =
            gathered ? row_pointers<T>(h_before.data() + d * chunk_rows * P, rows, P) : std::vector<const T*>();
        std::vector<RightFactor<T>> of_x, of_h;
        if (d_w.w_ih) of_x.push_back({x_rows.data() + first, I, d_w.w_ih});
        if (d_w.w_hh) of_h.push_back({gathered ? own_h_rows.data() : h_rows[d].data() + first, P, d_w.w_hh});
        std::vector<LeftFactor<T>> lefts;
        std::vector<SummedRows<T>> summed;
        if (normalized) {
          if (!of_x.empty()) lefts.push_back({task.d_products_ih, of_x, nullptr});
          if (!of_h.empty()) lefts.push_back({task.d_products_hh, of_h, nullptr});
          summed = norm_gradients(task, groups, rows, d_w.norm, d_bias);
        } else if (d_bias || d_w.w_ih || d_w.w_hh) {
          of_x.insert(of_x.end(), of_h.begin(), of_h.end());
          lefts.push_back({task.d_gates, of_x, d_bias});
        }
        if (!lefts.empty() || !summed.empty())
          grouped_weight_gradients(k, groups, lefts, rows, columns, summed, accumulate);
        if (d_bias && d_w.b_hh && d_w.b_hh != d_bias) std::copy_n(d_bias, stack.groups * columns, d_w.b_hh);
        if (d_w.w_hr) {
          const std::vector<const T*> hidden_rows = row_pointers<T>(task.hidden, rows, H);
          const LeftFactor<T> left = {task.d_projected, {{hidden_rows.data(), H, d_w.w_hr}}, nullptr};
          grouped_weight_gradients<T, A>(k, groups, {left}, rows, P, {}, accumulate);
        }
      }
    });
    if (mask && d_input) multiply_elements<T>(d_input, mask, d_input, N * width);
    d_output = d_input;
  }
}

#define FASTLSTM_INSTANTIATE(T, A)                                                             \
  template void run_pass<T, A>(const StackForward<T>&, const Kernels<T, A>&, const PassPlan&); \
  template void run_pass<T, A>(const StackBackward<T>&, const Kernels<T, A>&, const PassPlan&);
FASTLSTM_INSTANTIATE(float, float)
FASTLSTM_INSTANTIATE(float, Bf16Pair)
FASTLSTM_INSTANTIATE(double, double)
#undef FASTLSTM_INSTANTIATE

}  // namespace fastlstm::cpu
