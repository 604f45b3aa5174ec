// What both passes do with many rows at once, over all threads: products with packed weights, copies, and how rows and
// steps are shared out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "lockstep.h"
#include "runtime.h"
#include "stack.h"

namespace fastlstm::cpu {

constexpr int64_t kPackGrain = 16384;       // elements below which a thread is not worth waking
constexpr int64_t kMultiplyGrain = 262144;  // multiply-adds, likewise
constexpr int64_t kBulkRows = 24;           // rows that a thread of a bulk product should have at least
constexpr int64_t kChunk = 1024;            // rows of a chunk of steps

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
inline std::vector<RowItem> split_rows(const Schedule& schedule, int64_t directions) {
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

// Copies of these rows of K values.
template <class T>
void gather_rows(const T* const* from, int64_t rows, int64_t K, T* to) {
  for_rows(rows, K, [&](Range range) {
    for (int64_t r = range.begin; r < range.end; ++r) std::copy_n(from[r], K, to + r * K);
  });
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

// The rows of these steps of a pass, counted in its order, which is that of time or the opposite.
inline Range rows_of_steps(const Schedule& schedule, Range steps, bool opposite) {
  const int64_t T = schedule.steps();
  return opposite ? Range{schedule.offsets[T - steps.end], schedule.offsets[T - steps.begin]}
                  : Range{schedule.offsets[steps.begin], schedule.offsets[steps.end]};
}

// Steps of a chunk, which has about kChunk rows. What bulk products write and read of a chunk stays in a cache, and
// never needs memory for all steps.
inline int64_t steps_of_chunk(const Problem& p) { return std::clamp<int64_t>(kChunk / p.B, 1, p.T); }

// f(chunk) for the T steps of a pass, in order.
template <class F>
void for_each_chunk(int64_t T, int64_t chunk_steps, const F& f) {
  for (int64_t begin = 0; begin < T; begin += chunk_steps) f(Range{begin, std::min(begin + chunk_steps, T)});
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

}  // namespace fastlstm::cpu
