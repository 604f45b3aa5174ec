// The forward pass: layer after layer, chunk after chunk of the steps, the bulk product of the input and the
// recurrence.
#include <algorithm>
#include <vector>

#include "../cell.h"
#include "bulk.h"

namespace fastlstm::cpu {

namespace {

// The s-th time step of the pass.
template <class Task>
int64_t forward_step(const Task& task, int64_t s) {
  return task.reverse ? task.schedule->steps() - 1 - s : s;
}

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

template <class T, class A>
class ForwardPass {
 public:
  ForwardPass(const StackForward<T>& stack, const Kernels<T, A>& k, const PassPlan& plan)
      : stack_(stack), p_(*stack.problem), k_(k), plan_(plan) {
    std::fill_n(zeros_.data(), restarts_ ? P_ : 0, T(0));
    std::copy_n(stack.c_0, states_ * H_, stack.c_n);
  }

  void run() {
    const T* input = stack_.x;
    for (int64_t layer = 0; layer < p_.layers; ++layer) {
      const bool last = layer == p_.layers - 1;
      T* const output = last                   ? stack_.y
                        : stack_.layer_outputs ? stack_.layer_outputs + layer * p_.N * width_
                                               : outputs_.data() + layer % 2 * p_.N * width_;
      run_layer(layer, input, output);
      input = output;
      if (stack_.dropout_mask && !last) {
        multiply_elements(output, stack_.dropout_mask + layer * p_.N * width_, dropped_.data(), p_.N * width_);
        input = dropped_.data();
      }
    }
  }

 private:
  // Where the packed weights of a direction are.
  struct Packs {
    A *ih, *gates, *hr;
  };
  Packs packs_of(int64_t direction) const {
    A* const ih = packs_.data() + direction * (ih_size_ + gates_size_ + hr_size_);
    return {ih, ih + ih_size_, ih + ih_size_ + gates_size_};
  }

  void run_layer(int64_t layer, const T* input, T* output) {
    const A* const x = x_factors_.of(input, p_.N, stack_.input_size(layer));
    std::vector<ForwardTask<T, A>> tasks;
    for (int64_t d = 0; d < p_.directions; ++d) {
      pack(layer, d);
      tasks.push_back(task_of(layer, d, x, output));
    }
    for_each_chunk(p_.T, chunk_steps_, [&](Range steps) {
      for (int64_t d = 0; d < p_.directions && plan_.bulk_input; ++d) multiply_input_of(layer, d, tasks[d], steps);
      if constexpr (kFullPrecision<T, A>)
        if (plan_.family == Family::kStepwise)
          for (int64_t d = 0; d < p_.directions; ++d)
            forward_stepwise(tasks[d], stack_.weights[layer * p_.directions + d].w_hr, k_, steps);
      if (plan_.family != Family::kStepwise) forward_steps(tasks, k_, plan_, steps);
    });
    for (int64_t d = 0; d < p_.directions; ++d) {
      const int64_t index = layer * p_.directions + d;
      copy_final_states(tasks[d], stack_.h_n + index * p_.B * P_);
      if (stack_.cells && index >= first_returned_) std::copy_n(tasks[d].cells, p_.N * H_, returned_cells(index));
    }
  }

  // The cell states of a direction that the caller gets.
  T* returned_cells(int64_t index) const { return stack_.cell_states + (index - first_returned_) * p_.N * H_; }

  void pack(int64_t layer, int64_t d) {
    const Weights<const T>& w = stack_.weights[layer * p_.directions + d];
    const int64_t I = stack_.input_size(layer), depth_x = fused_input_ ? terms<A>(I) : 0, depth = depth_x + width_h_;
    const Packs to = packs_of(d);
    if (packed_ && p_.layer_norm)
      pack_panels(column_panels(k_, columns_), columns_ * P_,
                  [&](Range r) { k_.pack_transposed(w.w_hh, P_, columns_, to.gates, r); });
    else if (packed_)
      pack_panels(blocks_, columns_ * depth, [&](Range r) {
        if (fused_input_) k_.pack_gates(w.w_ih, H_, I, to.gates, depth, r);
        k_.pack_gates(w.w_hh, H_, P_, to.gates + depth_x * 2 * k_.lanes, depth, r);
      });
    if (hr_size_ > 0)
      pack_panels(column_panels(k_, P_), P_ * H_, [&](Range r) { k_.pack_transposed(w.w_hr, H_, P_, to.hr, r); });
    if (pack_input_)
      pack_panels(column_panels(k_, columns_), columns_ * I,
                  [&](Range r) { k_.pack_transposed(w.w_ih, I, columns_, to.ih, r); });
    k_.pack_bias(w.b_ih, w.b_hh, H_, bias_.data() + d * bias_size_);
  }

  ForwardTask<T, A> task_of(int64_t layer, int64_t d, const A* x, T* output) const {
    const int64_t index = layer * p_.directions + d, B = p_.B, N = p_.N;
    const Weights<const T>& w = stack_.weights[index];
    const Packs packs = packs_of(d);
    T* const own_products = block_of(kept_products_, index, N * columns_);
    ForwardTask<T, A> task = {};
    task.schedule = stack_.schedule;
    task.restarts = stack_.restarts[d];
    task.reverse = d == 1;
    task.I = stack_.input_size(layer);
    task.H = H_;
    task.P = P_;
    task.x = x;
    task.gates_x = !plan_.bulk_input ? nullptr
                   : own_products    ? own_products
                                     : gates_x_.data() + d * chunk_rows_ * columns_;
    task.w_ih = w.w_ih;
    task.w_hh = w.w_hh;
    task.packed = packed_ ? packs.gates : nullptr;
    task.packed_hr = hr_size_ > 0 ? packs.hr : nullptr;
    task.bias = bias_.data() + d * bias_size_;
    task.h_0 = h_0_ + index * B * width_h_;
    task.reset_h = reset_h_ ? reset_h_ + index * B * width_h_ : nullptr;
    task.reset_c = block_of(stack_.reset_c, index, B * H_);
    task.restarted_h = restarts_ ? restarted_h_.data() + d * B * width_h_ : nullptr;
    task.c = stack_.c_n + index * B * H_;
    task.hidden = p_.P > 0 ? hidden_.data() + d * B * width_hidden_ : nullptr;
    task.y = output + d * P_;
    task.y_stride = width_;
    if (two_forms_)
      task.h = {two_steps_h_.data() + d * 2 * B * width_h_, width_h_, B, 0};
    else if constexpr (kFullPrecision<T, A>)
      task.h = {task.y, width_, 0, 0};
    task.recurrent_mask = block_of(stack_.recurrent_mask, index, B * P_);
    task.zoneout_h = block_of(stack_.zoneout_h, index, N * P_);
    task.zoneout_c = block_of(stack_.zoneout_c, index, N * H_);
    task.initial_h = stack_.h_0 + index * B * P_;
    task.kept_h_of_restart = stack_.reset_h ? stack_.reset_h + index * B * P_ : zeros_.data();
    task.kept_h_stride = stack_.reset_h ? P_ : 0;
    task.gates = block_of(stack_.gates, index, N * columns_);
    task.cells = stack_.cells               ? stack_.cells + index * N * H_
                 : index >= first_returned_ ? returned_cells(index)
                                            : nullptr;
    if (p_.layer_norm) {
      task.norm = w.norm;
      task.products_hh = {block_of(stack_.norm_hh, index, N * columns_), columns_, 0, 0};
      if (!stack_.norm_hh) task.products_hh = {products_hh_.data() + d * 2 * B * columns_, columns_, B, 0};
      task.rstd_hh = block_of(stack_.rstd_hh, index, N);
      task.new_states = new_states_.data() + d * B * 2 * H_;
    }
    return task;
  }

  // x W_ih^T for the steps of a chunk.
  void multiply_input_of(int64_t layer, int64_t d, ForwardTask<T, A>& task, Range steps) {
    const Range rows = rows_of_steps(*task.schedule, steps, task.reverse);
    task.first = kept_products_ ? 0 : rows.begin;
    T* const product = task.gates_x + (rows.begin - task.first) * columns_;
    const A* const packed = pack_input_ ? packs_of(d).ih : nullptr;
    const int64_t index = layer * p_.directions + d, count = rows.end - rows.begin;
    const A* const x = task.x + rows.begin * terms<A>(task.I);
    if (!p_.layer_norm) {
      multiply_input(k_, x, count, task.I, packed, task.w_ih, columns_, product);
      return;
    }
    T* const rstd = block_of(stack_.rstd_ih, index * p_.N + rows.begin, 1);
    const auto normalize = [&](Range r) { k_.normalize_rows(product, columns_, r, rstd); };
    multiply_input(k_, x, count, task.I, packed, task.w_ih, columns_, product, normalize);
  }

  const StackForward<T>& stack_;
  const Problem& p_;
  const Kernels<T, A>& k_;
  const PassPlan& plan_;

  const int64_t H_ = p_.H, P_ = p_.output_size(), width_ = p_.directions * P_, columns_ = kGates * H_;
  const int64_t blocks_ = unit_blocks(k_, H_), width_h_ = terms<A>(P_), width_hidden_ = terms<A>(H_);
  const int64_t states_ = p_.layers * p_.directions * p_.B, inner_layers_ = p_.layers - 1;
  const int64_t first_returned_ = (p_.layers - stack_.cell_layers) * p_.directions;  // of the returned cell states

  // Outputs of the lower layers: saved, or two buffers in turn; and the dropped copy that the next layer reads.
  const Buffer<T> outputs_{stack_.layer_outputs ? 0 : std::min<int64_t>(inner_layers_, 2) * p_.N * width_};
  const Buffer<T> dropped_{stack_.dropout_mask ? p_.N * width_ : 0};

  // What is kept of all steps is made of all steps: the threads meet less often.
  const bool in_chunks_ = plan_.bulk_input && !stack_.norm_ih;
  const int64_t chunk_steps_ = in_chunks_ ? steps_of_chunk(p_) : p_.T, chunk_rows_ = chunk_steps_ * p_.B;
  T* const kept_products_ = p_.layer_norm ? stack_.norm_ih : stack_.gates;  // of the input, or what becomes of them
  const Buffer<T> gates_x_{plan_.bulk_input && !kept_products_ ? p_.directions * chunk_rows_ * columns_ : 0};
  const Buffer<T> products_hh_{p_.layer_norm && !stack_.norm_hh ? p_.directions * 2 * p_.B * columns_ : 0};
  const Buffer<T> new_states_{p_.layer_norm ? p_.directions * p_.B * 2 * H_ : 0};

  // Weights.
  const bool packed_ = plan_.family == Family::kPacked, fused_input_ = packed_ && !plan_.bulk_input;
  const bool pack_input_ = plan_.bulk_input && plan_.pack_input;
  const int64_t widest_input_ = std::max(p_.I, inner_layers_ > 0 ? width_ : 0);
  const int64_t ih_size_ = pack_input_ ? packed_columns_size(k_, widest_input_, columns_) : 0;
  const int64_t gates_size_ = !packed_ ? 0
                              : p_.layer_norm
                                  ? packed_columns_size(k_, P_, columns_)
                                  : packed_gates_size(k_, H_, (fused_input_ ? terms<A>(widest_input_) : 0) + width_h_);
  const int64_t hr_size_ = packed_ && p_.P > 0 ? packed_columns_size(k_, H_, P_) : 0;
  const Buffer<A> packs_{p_.directions * (ih_size_ + gates_size_ + hr_size_)};
  const int64_t bias_size_ = blocks_ * kGates * k_.lanes;
  const Buffer<T> bias_{p_.directions * bias_size_};

  // States as products take them.
  const bool two_forms_ = !kFullPrecision<T, A> || stack_.recurrent_mask;  // what is multiplied is not y itself
  const bool restarts_ = stack_.restarts[0] || stack_.restarts[1];
  const Buffer<A> hidden_ = zeroed_pairs<A>(p_.P > 0 ? p_.directions * p_.B * width_hidden_ : 0);
  const Buffer<A> two_steps_h_ = zeroed_pairs<A>(two_forms_ ? p_.directions * 2 * p_.B * width_h_ : 0);
  const Buffer<A> restarted_h_{restarts_ ? p_.directions * p_.B * width_h_ : 0};
  const Buffer<T> zeros_{restarts_ ? P_ : 0};
  const Buffer<T> masked_h_0_{stack_.recurrent_mask ? states_ * P_ : 0};
  const Buffer<T> masked_reset_h_{stack_.recurrent_mask && stack_.reset_h ? states_ * P_ : 0};
  Factors<T, A> x_factors_{k_}, h_0_factors_{k_}, reset_factors_{k_};
  const A* const h_0_ = h_0_factors_.of(masked_states(stack_, stack_.h_0, masked_h_0_), states_, P_);
  const T* const masked_reset_ = masked_states(stack_, stack_.reset_h, masked_reset_h_);
  const A* const reset_h_ = masked_reset_ ? reset_factors_.of(masked_reset_, states_, P_) : nullptr;
};

}  // namespace

template <class T, class A>
void run_pass(const StackForward<T>& stack, const Kernels<T, A>& k, const PassPlan& plan) {
  ForwardPass<T, A>(stack, k, plan).run();
}

template void run_pass(const StackForward<float>&, const Kernels<float, float>&, const PassPlan&);
template void run_pass(const StackForward<float>&, const Kernels<float, Bf16Pair>&, const PassPlan&);
template void run_pass(const StackForward<double>&, const Kernels<double, double>&, const PassPlan&);

}  // namespace fastlstm::cpu
