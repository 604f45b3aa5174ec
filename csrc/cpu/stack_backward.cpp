// The backward pass: from the highest layer down, chunk after chunk of the steps, the recurrence and the bulk products
// that are left: gradients of the input and of the weights.
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../cell.h"
#include "bulk.h"
#include "gates_again.h"
#include "weight_gradients.h"

namespace fastlstm::cpu {

namespace {

// The s-th time step of the pass.
template <class Task>
int64_t backward_step(const Task& task, int64_t s) {
  return task.reverse ? s : task.schedule->steps() - 1 - s;
}

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

template <class T, class A>
class BackwardPass {
 public:
  BackwardPass(const StackBackward<T>& stack, const Kernels<T, A>& k, const PassPlan& plan)
      : stack_(stack), p_(*stack.problem), k_(k), plan_(plan) {
    std::fill_n(zeros_.data(), restarts_ ? H_ : 0, T(0));
    if (computes_gates_) gates_again_.emplace(k, p_, chunk_rows_, widest_input_);
    if (grouped_) groups_ = rows_of_groups(*stack.schedule, stack.groups, stack.group_of);
  }

  void run() {
    const int64_t lowest = lowest_layer();
    const T* d_output = stack_.d_y;
    for (int64_t layer = p_.layers - 1; layer >= lowest; --layer) {
      T* const d_input = layer == 0       ? stack_.d_x
                         : layer > lowest ? d_outputs_.data() + layer % 2 * p_.N * width_
                                          : nullptr;
      run_layer(layer, d_output, d_input);
      d_output = d_input;
    }
  }

 private:
  // A layer, and the gradients of its outputs and of its input; either may be null: zero, and not needed.
  struct Layer {
    int64_t index, I;
    const T* input;                             // [N, I], as the layer has read it
    T* d_input;                                 // [N, I]
    bool both_add;                              // two directions, which come to a row in either order, add to d_input
    std::vector<const T*> x_rows;               // of `input`
    std::vector<BackwardTask<T, A>> tasks;      // per direction
    std::vector<std::vector<const T*>> h_rows;  // per direction: h_{t-1} of every row

    const Weights<const T>& weights(const BackwardPass& pass, int64_t d) const {
      return pass.stack_.weights[index * pass.p_.directions + d];
    }
  };

  // Where the packed weights of a direction are.
  struct Packs {
    A *hh, *hr, *ih;
  };
  Packs packs_of(int64_t direction) const {
    A* const hh = packs_.data() + direction * (hh_size_ + hr_size_ + ih_size_);
    return {hh, hh + hh_size_, hh + hh_size_ + hr_size_};
  }

  // Layers below the lowest one that needs a gradient are not visited.
  int64_t lowest_layer() const {
    if (stack_.d_x || stack_.needs_d_h_0) return 0;  // the latter also where reset states need gradients
    const auto needed = [](const Weights<T>& w) {
      return w.w_ih || w.w_hh || w.b_ih || w.b_hh || w.w_hr || w.norm.gain_ih || w.norm.gain_hh || w.norm.gain_c ||
             w.norm.bias_c;
    };
    const auto first = std::find_if(stack_.d_weights.begin(), stack_.d_weights.end(), needed);
    return (first - stack_.d_weights.begin()) / p_.directions;
  }

  void run_layer(int64_t index, const T* d_output, T* d_input) {
    const int64_t N = p_.N;
    const T* const mask = stack_.dropout_mask && index > 0 ? stack_.dropout_mask + (index - 1) * N * width_ : nullptr;
    const T* const output = index == p_.layers - 1 ? stack_.y : stack_.layer_outputs + index * N * width_;
    Layer layer = {index, stack_.input_size(index), stack_.x, d_input, d_input && p_.directions == 2, {}, {}, {}};
    if (index > 0) layer.input = stack_.layer_outputs + (index - 1) * N * width_;
    if (mask) {
      multiply_elements(layer.input, mask, dropped_.data(), N * width_);
      layer.input = dropped_.data();
    }
    layer.x_rows = row_pointers(layer.input, N, layer.I);
    for (int64_t d = 0; d < p_.directions; ++d) {
      pack(layer, d);
      layer.tasks.push_back(task_of(layer, d, d_output));
      layer.h_rows.push_back(
          previous_rows(layer.tasks[d], output + d * P_, width_, stack_.h_0 + (index * p_.directions + d) * p_.B * P_));
    }
    if (layer.both_add) zero_elements(d_input, N * layer.I);
    for_each_chunk(p_.T, chunk_steps_, [&](Range steps) { run_chunk(layer, steps); });
    if (mask && d_input) multiply_elements<T>(d_input, mask, d_input, N * width_);
  }

  void pack(const Layer& layer, int64_t d) {
    const Weights<const T>& w = layer.weights(*this, d);
    const Packs to = packs_of(d);
    if (hh_size_ > 0) pack_rows(k_, w.w_hh, columns_, P_, to.hh);
    if (hr_size_ > 0) pack_rows(k_, w.w_hr, P_, H_, to.hr);
    if (layer.d_input && plan_.pack_input) pack_rows(k_, w.w_ih, columns_, layer.I, to.ih);
    if (p_.layer_norm) k_.pack_bias(w.b_ih, w.b_hh, H_, bias_.data() + d * bias_size_);
    if (gates_again_) gates_again_->pack(d, w, layer.I);
  }

  BackwardTask<T, A> task_of(const Layer& layer, int64_t d, const T* d_output) const {
    const int64_t index = layer.index * p_.directions + d, B = p_.B, N = p_.N;
    const Weights<const T>& w = layer.weights(*this, d);
    const Packs packs = packs_of(d);
    BackwardTask<T, A> task = {};
    task.schedule = stack_.schedule;
    task.restarts = stack_.restarts[d];
    task.reverse = d == 1;
    task.H = H_;
    task.P = P_;
    task.gates = block_of(stack_.gates, index, N * columns_);
    task.cells = stack_.cells + index * N * H_;
    task.resets_to_zero = !stack_.reset_h;
    task.reset_h = stack_.reset_h ? stack_.reset_h + index * B * P_ : zeros_.data();
    task.reset_c = stack_.reset_c ? stack_.reset_c + index * B * H_ : zeros_.data();
    task.c_0 = stack_.c_0 + index * B * H_;
    task.w_hh = plan_.family == Family::kUnpacked ? w.w_hh : nullptr;
    task.packed_hh = hh_size_ > 0 ? packs.hh : nullptr;
    task.packed_hr = hr_size_ > 0 ? packs.hr : nullptr;
    task.d_y = d_output ? d_output + d * P_ : nullptr;
    task.d_y_stride = width_;
    if (stack_.d_cell_states && index >= first_returned_)
      task.d_cells = stack_.d_cell_states + (index - first_returned_) * N * H_;
    task.recurrent_mask = block_of(stack_.recurrent_mask, index, B * P_);
    task.zoneout_h = block_of(stack_.zoneout_h, index, N * P_);
    task.zoneout_c = block_of(stack_.zoneout_c, index, N * H_);
    task.kept_d_h = stack_.zoneout_h.active() ? kept_d_h_.data() + d * B * P_ : nullptr;
    task.d_reset_h = block_of(stack_.d_reset_h, index, B * P_);
    task.d_reset_c = block_of(stack_.d_reset_c, index, B * H_);
    task.d_h = stack_.d_h + index * B * P_;
    task.d_c = stack_.d_c + index * B * H_;
    task.d_hidden = projected_ ? d_hidden_.data() + d * B * H_ : nullptr;
    task.d_projected = projected_ ? d_projected_.data() + d * chunk_rows_ * P_ : nullptr;
    task.hidden = projected_ ? hidden_.data() + d * chunk_rows_ * H_ : nullptr;
    task.d_gates = d_gates_.data() + d * chunk_rows_ * columns_;
    if (p_.layer_norm) {
      task.norm = w.norm;
      task.bias = bias_.data() + d * bias_size_;
      task.norm_ih = block_of(stack_.norm_ih, index, N * columns_);
      task.norm_hh = block_of(stack_.norm_hh, index, N * columns_);
      task.rstd_ih = block_of(stack_.rstd_ih, index, N);
      task.rstd_hh = block_of(stack_.rstd_hh, index, N);
      task.d_products_ih = d_products_.data() + d * 2 * chunk_rows_ * columns_;
      task.d_products_hh = task.d_products_ih + chunk_rows_ * columns_;
      task.norm_c = norm_c_.data() + d * chunk_rows_ * H_;
      task.d_norm_c = d_norm_c_.data() + d * chunk_rows_ * H_;
    }
    if constexpr (kFullPrecision<T, A>) {
      task.d_gates_terms = {p_.layer_norm ? task.d_products_hh : task.d_gates, columns_, 0, 0};
      task.d_projected_terms = {task.d_projected, P_, 0, 0};
    } else {
      const int64_t first_row = d * 2 * B;
      task.d_gates_terms = {two_steps_d_gates_.data() + first_row * width_gates_, width_gates_, B, 0};
      if (projected_)
        task.d_projected_terms = {two_steps_d_projected_.data() + first_row * width_projected_, width_projected_, B, 0};
    }
    return task;
  }

  // The rows of a chunk that a direction has.
  static Range rows_of(const BackwardTask<T, A>& task, Range steps) {
    return rows_of_steps(*task.schedule, steps, !task.reverse);
  }

  void run_chunk(Layer& layer, Range steps) {
    for (int64_t d = 0; d < p_.directions; ++d) {
      BackwardTask<T, A>& task = layer.tasks[d];
      const Range rows = rows_of(task, steps);
      task.first = task.d_gates_terms.first = task.d_projected_terms.first = rows.begin;
      if (!gathered_) continue;
      T* const h_before = h_before_.data() + d * chunk_rows_ * P_;
      gather_factors(task, layer.h_rows[d], rows, h_before);
      if (!gates_again_) continue;
      gates_again_->compute(d, layer.input + rows.begin * layer.I, layer.I, h_before, rows.end - rows.begin, task);
      task.gates_first = rows.begin;
    }
    const bool needs_d_h = steps.end < p_.T || stack_.needs_d_h_0;
    if constexpr (kFullPrecision<T, A>)
      if (plan_.family == Family::kStepwise)
        for (int64_t d = 0; d < p_.directions; ++d)
          backward_stepwise(layer.tasks[d], layer.weights(*this, d), k_, steps, needs_d_h);
    if (plan_.family != Family::kStepwise) backward_steps(layer.tasks, k_, plan_.split, steps, needs_d_h);
    for (int64_t d = 0; d < p_.directions; ++d) {
      if (layer.d_input) add_input_gradient(layer, d, steps);
      add_weight_gradients(layer, d, steps);
    }
  }

  void add_input_gradient(const Layer& layer, int64_t d, Range steps) {
    const BackwardTask<T, A>& task = layer.tasks[d];
    const Range rows = rows_of(task, steps);
    const T* const d_products = p_.layer_norm ? task.d_products_ih : task.d_gates;
    input_gradient(k_, d_products, columns_, layer.weights(*this, d).w_ih, plan_.pack_input ? packs_of(d).ih : nullptr,
                   rows.end - rows.begin, layer.I, d_gates_factors_, layer.d_input + rows.begin * layer.I,
                   layer.both_add);
  }

  void add_weight_gradients(const Layer& layer, int64_t d, Range steps) {
    const BackwardTask<T, A>& task = layer.tasks[d];
    const Weights<T>& d_w = stack_.d_weights[layer.index * p_.directions + d];
    const int64_t first = task.first, rows = rows_of(task, steps).end - first;
    const bool accumulate = steps.begin > 0;
    // The two biases are added, so their gradients are the same sum over all rows.
    T* const d_bias = d_w.b_ih ? d_w.b_ih : d_w.b_hh;
    const std::vector<const T*> gathered_rows =
        gathered_ ? row_pointers<T>(h_before_.data() + d * chunk_rows_ * P_, rows, P_) : std::vector<const T*>();
    std::vector<RightFactor<T>> of_x, of_h;
    if (d_w.w_ih) of_x.push_back({layer.x_rows.data() + first, layer.I, d_w.w_ih});
    if (d_w.w_hh) of_h.push_back({gathered_ ? gathered_rows.data() : layer.h_rows[d].data() + first, P_, d_w.w_hh});
    std::vector<LeftFactor<T>> lefts;
    std::vector<SummedRows<T>> summed;
    if (p_.layer_norm) {
      if (!of_x.empty()) lefts.push_back({task.d_products_ih, of_x, nullptr});
      if (!of_h.empty()) lefts.push_back({task.d_products_hh, of_h, nullptr});
      summed = norm_gradients(task, groups_, rows, d_w.norm, d_bias);
    } else if (d_bias || d_w.w_ih || d_w.w_hh) {
      of_x.insert(of_x.end(), of_h.begin(), of_h.end());
      lefts.push_back({task.d_gates, of_x, d_bias});
    }
    if (!lefts.empty() || !summed.empty())
      grouped_weight_gradients(k_, groups_, lefts, rows, columns_, summed, accumulate);
    if (d_bias && d_w.b_hh && d_w.b_hh != d_bias) std::copy_n(d_bias, stack_.groups * columns_, d_w.b_hh);
    if (d_w.w_hr) {
      const std::vector<const T*> hidden_rows = row_pointers<T>(task.hidden, rows, H_);
      const LeftFactor<T> left = {task.d_projected, {{hidden_rows.data(), H_, d_w.w_hr}}, nullptr};
      grouped_weight_gradients<T, A>(k_, groups_, {left}, rows, P_, {}, accumulate);
    }
  }

  const StackBackward<T>& stack_;
  const Problem& p_;
  const Kernels<T, A>& k_;
  const PassPlan& plan_;

  const int64_t H_ = p_.H, P_ = p_.output_size(), width_ = p_.directions * P_, columns_ = kGates * H_;
  const bool packed_ = plan_.family == Family::kPacked, projected_ = p_.P > 0, inner_ = p_.layers > 1;
  const int64_t widest_input_ = std::max(p_.I, inner_ ? width_ : 0);
  const int64_t first_returned_ = (p_.layers - stack_.cell_layers) * p_.directions;  // of the returned cell states

  // What the rows of a chunk have.
  const bool grouped_ = stack_.groups > 1;  // a group's gradient is made once, of all its rows
  const int64_t chunk_steps_ = grouped_ ? p_.T : steps_of_chunk(p_), chunk_rows_ = chunk_steps_ * p_.B;
  const int64_t all_rows_ = p_.directions * chunk_rows_;
  const Buffer<T> d_gates_{all_rows_ * columns_};
  const Buffer<T> hidden_{projected_ ? all_rows_ * H_ : 0}, d_projected_{projected_ ? all_rows_ * P_ : 0};
  const int64_t normalized_rows_ = p_.layer_norm ? all_rows_ : 0;
  const Buffer<T> d_products_{2 * normalized_rows_ * columns_};
  const Buffer<T> norm_c_{normalized_rows_ * H_}, d_norm_c_{normalized_rows_ * H_};
  // What the recurrent product read, where it does not stand in y or has to be multiplied again.
  const bool computes_gates_ = !(p_.layer_norm ? stack_.norm_ih : stack_.gates);
  const bool gathered_ = stack_.recurrent_mask || computes_gates_;
  const Buffer<T> h_before_{gathered_ ? all_rows_ * P_ : 0};
  std::optional<GatesAgain<T, A>> gates_again_;

  // Weights.
  const bool recurrent_ = p_.T > 1 || stack_.needs_d_h_0;  // a single step needs no d_h W_hh
  const int64_t hh_size_ = packed_ && recurrent_ ? packed_columns_size(k_, columns_, P_) : 0;
  const int64_t hr_size_ = packed_ && projected_ ? packed_columns_size(k_, P_, H_) : 0;
  const int64_t ih_size_ = plan_.pack_input ? packed_columns_size(k_, columns_, widest_input_) : 0;
  const Buffer<A> packs_{p_.directions * (hh_size_ + hr_size_ + ih_size_)};
  const int64_t bias_size_ = p_.layer_norm ? unit_blocks(k_, H_) * kGates * k_.lanes : 0;
  const Buffer<T> bias_{p_.directions * bias_size_};

  // Gradients on their way from step to step and from layer to layer.
  Factors<T, A> d_gates_factors_{k_};
  const int64_t width_gates_ = terms<A>(columns_), width_projected_ = terms<A>(P_);
  const int64_t two_steps_ = kFullPrecision<T, A> ? 0 : p_.directions * 2 * p_.B;
  const Buffer<A> two_steps_d_gates_{two_steps_ * width_gates_};
  const Buffer<A> two_steps_d_projected_{projected_ ? two_steps_ * width_projected_ : 0};
  const Buffer<T> d_hidden_{projected_ ? p_.directions * p_.B * H_ : 0};
  const Buffer<T> kept_d_h_{stack_.zoneout_h.active() ? p_.directions * p_.B * P_ : 0};
  const Buffer<T> d_outputs_{inner_ ? 2 * p_.N * width_ : 0};  // of the lower layers, two in turn
  const Buffer<T> dropped_{inner_ && stack_.dropout_mask ? p_.N * width_ : 0};
  const bool restarts_ = stack_.restarts[0] || stack_.restarts[1];
  const Buffer<T> zeros_{restarts_ ? H_ : 0};
  std::vector<std::vector<int64_t>> groups_;  // of sequences, their rows; empty if all are one
};

}  // namespace

template <class T, class A>
void run_pass(const StackBackward<T>& stack, const Kernels<T, A>& k, const PassPlan& plan) {
  BackwardPass<T, A>(stack, k, plan).run();
}

template void run_pass(const StackBackward<float>&, const Kernels<float, float>&, const PassPlan&);
template void run_pass(const StackBackward<float>&, const Kernels<float, Bf16Pair>&, const PassPlan&);
template void run_pass(const StackBackward<double>&, const Kernels<double, double>&, const PassPlan&);

}  // namespace fastlstm::cpu
