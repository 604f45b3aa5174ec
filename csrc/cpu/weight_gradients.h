// The gradients of weights and biases: sums over the rows of a chunk of steps, over all threads.
#pragma once

#include <algorithm>
#include <vector>

#include "bulk.h"

namespace fastlstm::cpu {

constexpr int64_t kGradientDepth = 1024;  // rows of the factors that are packed at once
constexpr int64_t kGradientUnit = 24;     // columns of the left factor that threads share out

// The part of n items that one of `parts` threads has.
inline Range share(int64_t n, int64_t part, int64_t parts) { return {n * part / parts, n * (part + 1) / parts}; }

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
inline std::vector<std::vector<int64_t>> rows_of_groups(const Schedule& schedule, int64_t groups,
                                                        const std::vector<int64_t>& group_of) {
  std::vector<std::vector<int64_t>> rows(groups);
  for (int64_t t = 0; t < schedule.steps(); ++t)
    for (int64_t b = 0; b < schedule.active(t); ++b) rows[group_of[b]].push_back(schedule.offsets[t] + b);
  return rows;
}

}  // namespace fastlstm::cpu
