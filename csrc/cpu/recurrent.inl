// The recurrent CPU kernels, written once. Included by recurrent_{scalar,avx2,avx512,avx512_bf16}.cpp inside the
// namespace of the instruction set, which has set kVectorBytes, kAccumulators (vector registers a tile may use for
// sums), fma(), and kNativeBf16 with native_multiply_pairs() where it has an instruction for that.
//
// Order of summation: each output element is one chain over k in increasing order (packed) or `lanes` interleaved
// chains over k added in a fixed order (unpacked), whatever the tile it falls in: the result of a row depends neither
// on the other rows nor on how the work is split.

#include "vec.h"

constexpr int kTileRows = 6;        // batch rows of the largest register tile
constexpr int kGroupPanels = 4;     // panels computed before the epilogue runs: two unit blocks
constexpr int64_t kChunkRows = 96;  // rows whose products wait in the scratch buffer (24 KB with AVX2)
constexpr int64_t kDepth = 256;     // terms of a panel that stay in L1 under the row tiles (16 KB with AVX2)

// Panels that a tile of this many rows processes at once: as many accumulators as registers allow, to hide FMA latency.
constexpr int tile_panels(int rows) {
  for (int panels = kGroupPanels; panels > 1; panels /= 2)
    if (2 * panels * rows <= kAccumulators) return panels;
  return 1;
}

// Products of one group of panels for a chunk of rows: [row][panel][2][lanes].
template <class T>
struct Scratch {
  static constexpr int kRowStride = kGroupPanels * 2 * kLanes<T>;
  alignas(64) T values[kChunkRows * kRowStride];
  T* row(int64_t r) { return values + r * kRowStride; }
};

// Splits n into the fewest pieces of at most `most`, as evenly as possible (32 rows: 6, 5, 5, 6, 5, 5, never 6 ... 2).
struct EvenSplit {
  int64_t n, pieces;
  EvenSplit(int64_t n, int64_t most) : n(n), pieces(ceil_div(n, most)) {}
  int64_t begin(int64_t piece) const { return n * piece / pieces; }
  int64_t largest() const { return ceil_div(n, pieces); }
};

// ---------------------------------------------------------------------------------------------- packing

template <class T, class A>
void round_rows(const T* from, int64_t rows, int64_t K, A* out) {
  constexpr int W = kLanes<T>;
  const int64_t stride = terms<A>(K);
  for (int64_t r = 0; r < rows; ++r, from += K, out += stride) {
    int64_t k = 0;
    for (; k + W <= K; k += W) Operand<T, A>::store_values(out, k, load(from + k), W);
    for (k = terms<A>(k); k < stride; ++k) out[k] = Operand<T, A>::make(from, 1, k, K);
  }
}

template <class T, class A>
void pack_gates(const T* w, int64_t H, int64_t K, A* packed, Range blocks) {
  constexpr int W = kLanes<T>;
  const int64_t depth = terms<A>(K);
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    A* out = packed + block * depth * 4 * W;
    const int64_t units = std::min<int64_t>(W, H - block * W);
    if (units < W) std::fill(out, out + depth * 4 * W, A{});
    for (int gate = 0; gate < kGates; ++gate) {
      A* panel = out + (gate / 2) * depth * 2 * W + (gate % 2) * W;
      const T* source = w + (gate * H + block * W) * K;
      // Slices of k keep the strided writes within a few cache lines.
      for (int64_t k0 = 0; k0 < depth; k0 += 16) {
        const int64_t k1 = std::min(depth, k0 + 16);
        for (int64_t u = 0; u < units; ++u)
          for (int64_t k = k0; k < k1; ++k) panel[k * 2 * W + u] = Operand<T, A>::make(source + u * K, 1, k, K);
      }
    }
  }
}

template <class T, class A>
void pack_columns(const T* w, int64_t K, int64_t columns, A* packed, Range panels) {
  constexpr int W2 = 2 * kLanes<T>;
  const int64_t depth = terms<A>(K);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t n = std::min<int64_t>(W2, columns - panel * W2);
    const T* source = w + panel * W2;
    A* out = packed + panel * depth * W2;
    for (int64_t k = 0; k < depth; ++k, out += W2) {
      for (int64_t c = 0; c < n; ++c) out[c] = Operand<T, A>::make(source + c, columns, k, K);
      std::fill(out + n, out + W2, A{});
    }
  }
}

template <class T, class A>
void pack_transposed(const T* w, int64_t K, int64_t columns, A* packed, Range panels) {
  constexpr int W2 = 2 * kLanes<T>;
  const int64_t depth = terms<A>(K);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t n = std::min<int64_t>(W2, columns - panel * W2);
    const T* source = w + panel * W2 * K;
    A* out = packed + panel * depth * W2;
    if (n < W2) std::fill(out, out + depth * W2, A{});
    for (int64_t k0 = 0; k0 < depth; k0 += 16) {
      const int64_t k1 = std::min(depth, k0 + 16);
      for (int64_t c = 0; c < n; ++c)
        for (int64_t k = k0; k < k1; ++k) out[k * W2 + c] = Operand<T, A>::make(source + c * K, 1, k, K);
    }
  }
}

template <class T>
void pack_bias(const T* b_ih, const T* b_hh, int64_t H, T* packed) {
  constexpr int W = kLanes<T>;
  for (int64_t block = 0; block * W < H; ++block)
    for (int gate = 0; gate < kGates; ++gate)
      for (int64_t l = 0; l < W; ++l) {
        const int64_t unit = block * W + l, index = gate * H + unit;
        *packed++ = unit < H ? (b_ih ? b_ih[index] : T(0)) + (b_hh ? b_hh[index] : T(0)) : T(0);
      }
}

// ---------------------------------------------------------------------------------------------- register tiles

// out[r][p][v] (+)= sum_k a[r][k] * panels[p][k][v] for `kRows` rows and `kPanels` panels, `depth` terms.
template <class T, class A, int kRows, int kPanels>
void tile(const A* a, int64_t a_stride, const A* panels, int64_t panel_stride, int64_t depth, T* out, bool accumulate) {
  using Factor = Operand<T, A>;
  constexpr int W = kLanes<T>, kRowStride = Scratch<T>::kRowStride;
  Vec<T> sum[kRows][2 * kPanels];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kPanels; ++v) sum[r][v] = accumulate ? load(out + r * kRowStride + v * W) : Vec<T>{};
  // The smaller operand of the outer product stays in registers, the other passes through one.
  for (int64_t k = 0; k < depth; ++k) {
    const auto left = [=](int r) { return Factor::broadcast_from(a + r * a_stride + k); };
    const auto right = [=](int v) { return Factor::load_from(panels + (v / 2) * panel_stride + (2 * k + v % 2) * W); };
    if constexpr (kRows <= 2 * kPanels) {
      typename Factor::Vector lefts[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) lefts[r] = left(r);
#pragma GCC unroll 8
      for (int v = 0; v < 2 * kPanels; ++v) {
        const typename Factor::Vector one = right(v);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][v] = Factor::multiply_add(lefts[r], one, sum[r][v]);
      }
    } else {
      typename Factor::Vector rights[2 * kPanels];
#pragma GCC unroll 8
      for (int v = 0; v < 2 * kPanels; ++v) rights[v] = right(v);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename Factor::Vector one = left(r);
#pragma GCC unroll 8
        for (int v = 0; v < 2 * kPanels; ++v) sum[r][v] = Factor::multiply_add(one, rights[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kPanels; ++v) store(out + r * kRowStride + v * W, sum[r][v]);
}

template <class T, class A>
using TileFunction = void (*)(const A*, int64_t, const A*, int64_t, int64_t, T*, bool);

// The tile for (rows, panels at once); only the combinations that tile_panels allows exist.
template <class T, class A, int kRows = 1>
TileFunction<T, A> select_tile(int64_t rows, int64_t panels) {
  if constexpr (kRows > kTileRows) {
    return nullptr;
  } else {
    if (rows != kRows) return select_tile<T, A, kRows + 1>(rows, panels);
    constexpr int kMost = tile_panels(kRows);
    if constexpr (kMost >= 4) {
      if (panels == 4) return tile<T, A, kRows, 4>;
    }
    if constexpr (kMost >= 2) {
      if (panels == 2) return tile<T, A, kRows, 2>;
    }
    return tile<T, A, kRows, 1>;
  }
}

// scratch (+)= a[rows, depth] * packed panels, for `count` <= kGroupPanels adjacent panels starting at `packed`.
template <class T, class A>
void multiply_panels(const A* a, int64_t a_stride, int64_t rows, const A* packed, int64_t depth, int64_t count,
                     bool accumulate, Scratch<T>& scratch) {
  constexpr int W = kLanes<T>;
  const EvenSplit tiles(rows, kTileRows);
  const int64_t at_once = tile_panels(static_cast<int>(tiles.largest()));
  const int64_t panel_stride = depth * 2 * W;
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t slice = std::min(kDepth, depth - k);
    for (int64_t panel = 0; panel < count;) {
      int64_t panels = at_once;
      while (panels > count - panel) panels /= 2;
      for (int64_t i = 0; i < tiles.pieces; ++i) {
        const int64_t r = tiles.begin(i);
        select_tile<T, A>(tiles.begin(i + 1) - r, panels)(a + r * a_stride + k, a_stride,
                                                          packed + panel * panel_stride + k * 2 * W, panel_stride,
                                                          slice, scratch.row(r) + panel * 2 * W, accumulate || k > 0);
      }
      panel += panels;
    }
  }
}

// ---------------------------------------------------------------------------------------------- dot products

// sum[r][g][u] += a[r] . w[g][u] over K, vectors along k. Rows w[g][0 ...] belong to adjacent units of one gate.
template <class T, int kRows, int kGatesAtOnce, int kUnits>
struct DotTile {
  Vec<T> sum[kRows][kGatesAtOnce][kUnits];
  T tail[kRows][kGatesAtOnce][kUnits] = {};

  // Element by element: as one block of memory the sums would be cleared by a string instruction.
  inline __attribute__((always_inline)) DotTile() {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int g = 0; g < kGatesAtOnce; ++g)
#pragma GCC unroll 8
        for (int u = 0; u < kUnits; ++u) sum[r][g][u] = Vec<T>{};
  }

  inline __attribute__((always_inline)) void add(const T* a, int64_t a_stride, const T* const (*w)[kUnits], int64_t K) {
    constexpr int W = kLanes<T>;
    int64_t k = 0;
    for (; k + W <= K; k += W) {
      Vec<T> left[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) left[r] = load(a + r * a_stride + k);
#pragma GCC unroll 8
      for (int g = 0; g < kGatesAtOnce; ++g)
#pragma GCC unroll 8
        for (int u = 0; u < kUnits; ++u) {
          const Vec<T> right = load(w[g][u] + k);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) sum[r][g][u] = fma(left[r], right, sum[r][g][u]);
        }
    }
    for (; k < K; ++k)
      for (int r = 0; r < kRows; ++r)
        for (int g = 0; g < kGatesAtOnce; ++g)
          for (int u = 0; u < kUnits; ++u) tail[r][g][u] += a[r * a_stride + k] * w[g][u][k];
  }

  void totals(int r, int g, T* out) const {
    sum_lanes<T>(sum[r][g], out);
    for (int u = 0; u < kUnits; ++u) out[u] += tail[r][g][u];
  }
};

// Products of all gates of unit block `block` for kRows rows, h (and x where there is no gates_x) against stored
// weights.
template <class T, int kRows>
void dot_block(const ForwardTask<T, T>& task, const T* h, int64_t h_stride, const T* x, int64_t block, T* out) {
  constexpr int W = kLanes<T>, kRowStride = Scratch<T>::kRowStride;
  constexpr int kUnits = std::min(4, W);            // adjacent rows of a weight matrix: one stretch of memory
  constexpr int kGatesAtOnce = kRows == 1 ? 2 : 1;  // eight chains at least, to hide the FMA latency
  const int64_t first = block * W, last = std::min<int64_t>(task.H, first + W);
  for (int64_t unit = first; unit < last; unit += kUnits) {
    for (int gate = 0; gate < kGates; gate += kGatesAtOnce) {
      const T *w_hh[kGatesAtOnce][kUnits], *w_ih[kGatesAtOnce][kUnits];
      for (int g = 0; g < kGatesAtOnce; ++g)
        for (int u = 0; u < kUnits; ++u) {
          // Beyond the last unit the last one is computed again, for lanes that nobody reads.
          const int64_t row = (gate + g) * task.H + std::min(unit + u, last - 1);
          w_hh[g][u] = task.w_hh + row * task.P;
          w_ih[g][u] = task.w_ih + row * task.I;
        }
      DotTile<T, kRows, kGatesAtOnce, kUnits> dots;
      if (x) dots.add(x, task.I, w_ih, task.I);
      dots.add(h, h_stride, w_hh, task.P);
      for (int r = 0; r < kRows; ++r)
        for (int g = 0; g < kGatesAtOnce; ++g) dots.totals(r, g, out + r * kRowStride + (gate + g) * W + unit - first);
    }
  }
}

template <class T>
void dot_rows(const ForwardTask<T, T>& task, const T* h, int64_t h_stride, const T* x, int64_t rows, int64_t block,
              Scratch<T>& scratch) {
  const EvenSplit tiles(rows, 3);
  for (int64_t i = 0; i < tiles.pieces; ++i) {
    const int64_t r = tiles.begin(i);
    const T* tile_h = h + r * h_stride;
    const T* tile_x = x ? x + r * task.I : nullptr;
    switch (tiles.begin(i + 1) - r) {
      case 1: dot_block<T, 1>(task, tile_h, h_stride, tile_x, block, scratch.row(r)); break;
      case 2: dot_block<T, 2>(task, tile_h, h_stride, tile_x, block, scratch.row(r)); break;
      default: dot_block<T, 3>(task, tile_h, h_stride, tile_x, block, scratch.row(r)); break;
    }
  }
}

// ---------------------------------------------------------------------------------------------- forward

// The cell on `lanes` units of one row (the first n of them where kTail). `products` may be null: all is in gates_x.
template <class T, class A, bool kTail>
inline void cell_of_block(const ForwardTask<T, A>& task, int64_t t, int64_t batch, int64_t block, const T* products) {
  constexpr int W = kLanes<T>;
  const int64_t unit = block * W, n = kTail ? task.H - unit : W, row = task.schedule->offsets[t] + batch;
  Vec<T> gate[kGates];
  for (int g = 0; g < kGates; ++g) {
    gate[g] = load(task.bias + (block * kGates + g) * W);
    if (products) gate[g] = gate[g] + load(products + g * W);
    if (task.gates_x) {
      const T* extra = task.gates_x + row * kGates * task.H + g * task.H + unit;
      gate[g] = gate[g] + (kTail ? load_first(extra, n) : load(extra));
    }
  }
  T* c_row = task.c + batch * task.H + unit;
  Vec<T> c = kTail ? load_first(c_row, n) : load(c_row);
  const Vec<T> h = cell_forward<VecMath<T>>(gate[0], gate[1], gate[2], gate[3], c);

  const auto put = [&](T* p, Vec<T> v) { kTail ? store_first(p, v, n) : store(p, v); };
  put(c_row, c);
  if (task.hidden) {
    Operand<T, A>::store_values(task.hidden + batch * terms<A>(task.H), unit, h, n);
  } else {
    put(task.y + row * task.y_stride + unit, h);
    if constexpr (!kFullPrecision<T, A>)
      Operand<T, A>::store_values(task.h.at(*task.schedule, t) + batch * task.h.stride, unit, h, n);
  }
  if (task.gates) {
    for (int g = 0; g < kGates; ++g) put(task.gates + row * kGates * task.H + g * task.H + unit, gate[g]);
    put(task.cells + row * task.H + unit, c);
  }
}

// Rows [begin, end) of step t that share one source of h_{t-1}: h points at the row `begin` of it.
template <class T, class A>
void forward_segment(const ForwardTask<T, A>& task, GateProduct product, int64_t t, Range rows, Range blocks,
                     const A* h, int64_t h_stride) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kGroupBlocks = kGroupPanels / 2;
  Scratch<T> scratch;
  const int64_t offset = task.schedule->offsets[t], depth_x = terms<A>(task.I), depth_h = terms<A>(task.P);
  const EvenSplit chunks(rows.end - rows.begin, kChunkRows);
  for (int64_t i = 0; i < chunks.pieces; ++i) {
    const int64_t first = rows.begin + chunks.begin(i), count = chunks.begin(i + 1) - chunks.begin(i);
    const A* chunk_h = h + chunks.begin(i) * h_stride;
    const A* x = task.gates_x ? nullptr : task.x + (offset + first) * depth_x;
    for (int64_t group = blocks.begin; group < blocks.end; group += kGroupBlocks) {
      const int64_t group_blocks = std::min(kGroupBlocks, blocks.end - group);
      if (product == GateProduct::kPacked) {
        if (x)
          multiply_panels(x, depth_x, count, task.packed_ih + group * depth_x * 4 * W, depth_x, 2 * group_blocks, false,
                          scratch);
        multiply_panels(chunk_h, h_stride, count, task.packed_hh + group * depth_h * 4 * W, depth_h, 2 * group_blocks,
                        x != nullptr, scratch);
      }
      for (int64_t b = 0; b < group_blocks; ++b) {
        const int64_t block = group + b;
        T* products = scratch.values + (product == GateProduct::kPacked ? b * 4 * W : 0);
        if constexpr (kFullPrecision<T, A>)
          if (product == GateProduct::kUnpacked) dot_rows(task, chunk_h, h_stride, x, count, block, scratch);
        for (int64_t r = 0; r < count; ++r) {
          const T* row_products = product == GateProduct::kDone ? nullptr : products + r * Scratch<T>::kRowStride;
          if ((block + 1) * W <= task.H)
            cell_of_block<T, A, false>(task, t, first + r, block, row_products);
          else
            cell_of_block<T, A, true>(task, t, first + r, block, row_products);
        }
      }
    }
  }
}

template <class T, class A>
void forward_cells(const ForwardTask<T, A>& task, GateProduct product, int64_t t, Range rows, Range blocks) {
  const Schedule& schedule = *task.schedule;
  const int64_t previous = task.previous(t), h_0_stride = terms<A>(task.P);
  rows.end = std::min(rows.end, schedule.active(t));
  if (task.restarts_at(t)) {
    if (rows.begin < rows.end)
      forward_segment(task, product, t, rows, blocks, task.restarted_h + rows.begin * h_0_stride, h_0_stride);
    return;
  }
  // Rows that were active in the previous step find h_{t-1} there, the others start from h_0.
  const int64_t boundary = std::clamp(schedule.active(previous), rows.begin, std::max(rows.begin, rows.end));
  if (rows.begin < boundary) {
    const A* h = task.h.at(schedule, previous) + rows.begin * task.h.stride;
    forward_segment(task, product, t, {rows.begin, boundary}, blocks, h, task.h.stride);
  }
  if (boundary < rows.end)
    forward_segment(task, product, t, {boundary, rows.end}, blocks, task.h_0 + boundary * h_0_stride, h_0_stride);
}

// out[row] = a[row] * panels for the given rows; columns beyond `columns` are padding and not written.
template <class T, class A>
void multiply_rows(const A* a, int64_t a_stride, int64_t rows, const A* packed, int64_t depth, int64_t columns,
                   Range panels, T* out, int64_t out_stride) {
  constexpr int W2 = 2 * kLanes<T>;
  if (rows <= 0) return;
  Scratch<T> scratch;
  const EvenSplit chunks(rows, kChunkRows);
  for (int64_t i = 0; i < chunks.pieces; ++i) {
    const int64_t first = chunks.begin(i), count = chunks.begin(i + 1) - first;
    for (int64_t group = panels.begin; group < panels.end; group += kGroupPanels) {
      const int64_t group_panels = std::min<int64_t>(kGroupPanels, panels.end - group);
      multiply_panels(a + first * a_stride, a_stride, count, packed + group * depth * W2, depth, group_panels, false,
                      scratch);
      const int64_t n = std::min(group_panels * W2, columns - group * W2);
      for (int64_t r = 0; r < count; ++r) std::copy_n(scratch.row(r), n, out + (first + r) * out_stride + group * W2);
    }
  }
}

// Columns of the given panels of one row, rounded for the next product.
template <class T, class A>
void round_columns(const T* from, int64_t columns, Range panels, A* to) {
  constexpr int W = kLanes<T>;
  const int64_t last = std::min(columns, panels.end * 2 * W);
  for (int64_t c = panels.begin * 2 * W; c < last; c += W) {
    const int64_t n = std::min<int64_t>(W, last - c);
    Operand<T, A>::store_values(to, c, load_first(from + c, n), n);
  }
}

template <class T, class A>
void forward_project(const ForwardTask<T, A>& task, int64_t t, Range rows, Range panels) {
  rows.end = std::min(rows.end, task.schedule->active(t));
  T* y = task.y + task.schedule->offsets[t] * task.y_stride;
  const int64_t depth = terms<A>(task.H);
  multiply_rows(task.hidden + rows.begin * depth, depth, rows.end - rows.begin, task.packed_hr, depth, task.P, panels,
                y + rows.begin * task.y_stride, task.y_stride);
  if constexpr (!kFullPrecision<T, A>)
    for (int64_t b = rows.begin; b < rows.end; ++b)
      round_columns(y + b * task.y_stride, task.P, panels, task.h.at(*task.schedule, t) + b * task.h.stride);
}

// ---------------------------------------------------------------------------------------------- backward

template <class T, class A>
void backward_recurrent(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels) {
  rows.end = std::min(rows.end, task.schedule->active(t));
  const StepRows<A>& d_gates = task.d_gates_terms;
  multiply_rows(d_gates.at(*task.schedule, t) + rows.begin * d_gates.stride, d_gates.stride, rows.end - rows.begin,
                task.packed_hh, terms<A>(kGates * task.H), task.P, panels, task.d_h + rows.begin * task.P, task.P);
  const int64_t first = panels.begin * 2 * kLanes<T>, last = std::min(task.P, panels.end * 2 * kLanes<T>);
  for (int64_t b = rows.begin; b < rows.end; ++b)
    if (task.restarts_row(task.schedule->offsets[t] + b))
      std::fill(task.d_h + b * task.P + first, task.d_h + b * task.P + last, T(0));
}

template <class T, class A>
void backward_output(const BackwardTask<T, A>& task, int64_t t, Range rows) {
  rows.end = std::min(rows.end, task.schedule->active(t));
  const int64_t offset = task.schedule->offsets[t];
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    T* const d_projected = task.d_projected + (offset + b) * task.P;
    for (int64_t p = 0; p < task.P; ++p)
      d_projected[p] = task.d_h[b * task.P + p] + (task.d_y ? task.d_y[(offset + b) * task.d_y_stride + p] : T(0));
    if constexpr (!kFullPrecision<T, A>) {
      const StepRows<A>& rounded = task.d_projected_terms;
      round_rows(d_projected, 1, task.P, rounded.at(*task.schedule, t) + b * rounded.stride);
    }
  }
}

template <class T, class A>
void backward_project(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels) {
  rows.end = std::min(rows.end, task.schedule->active(t));
  const StepRows<A>& d_projected = task.d_projected_terms;
  multiply_rows(d_projected.at(*task.schedule, t) + rows.begin * d_projected.stride, d_projected.stride,
                rows.end - rows.begin, task.packed_hr, terms<A>(task.P), task.H, panels,
                task.d_hidden + rows.begin * task.H, task.H);
}

template <class T, class A, bool kTail>
inline void backward_cell_of_units(const BackwardTask<T, A>& task, int64_t t, int64_t batch, const T* c_prev,
                                   int64_t unit) {
  const int64_t H = task.H, n = kTail ? H - unit : kLanes<T>, row = task.schedule->offsets[t] + batch;
  const auto get = [&](const T* p) { return kTail ? load_first(p, n) : load(p); };
  const auto put = [&](T* p, Vec<T> v) { kTail ? store_first(p, v, n) : store(p, v); };
  Vec<T> gate[kGates];
  for (int g = 0; g < kGates; ++g) gate[g] = get(task.gates + row * kGates * H + g * H + unit);
  Vec<T> d_h = get((task.d_hidden ? task.d_hidden : task.d_h) + batch * H + unit);
  if (task.d_y && !task.d_hidden) d_h = d_h + get(task.d_y + row * task.d_y_stride + unit);
  Vec<T> d_c = get(task.d_c + batch * H + unit);
  const Vec<T> c = get(task.cells + row * H + unit);
  if (task.hidden) put(task.hidden + row * H + unit, gate[3] * VecMath<T>::tanh(c));
  cell_backward<VecMath<T>>(gate[0], gate[1], gate[2], gate[3], c, get(c_prev + unit), d_h, d_c);
  put(task.d_c + batch * H + unit, d_c);
  for (int g = 0; g < kGates; ++g) {
    put(task.d_gates + row * kGates * H + g * H + unit, gate[g]);
    if constexpr (!kFullPrecision<T, A>) {
      const StepRows<A>& rounded = task.d_gates_terms;
      Operand<T, A>::store_values(rounded.at(*task.schedule, t) + batch * rounded.stride, g * H + unit, gate[g], n);
    }
  }
}

template <class T, class A>
void backward_cells(const BackwardTask<T, A>& task, int64_t t, Range rows, Range panels) {
  constexpr int W = kLanes<T>;
  const Schedule& schedule = *task.schedule;
  rows.end = std::min(rows.end, schedule.active(t));
  const int64_t offset = schedule.offsets[t], previous = task.previous(t), before = schedule.active(previous);
  const int64_t first = panels.begin * 2 * W, last = std::min(task.H, panels.end * 2 * W);
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const bool restarts = task.restarts_row(offset + b);
    const T* c_prev = restarts     ? task.zeros
                      : b < before ? task.cells + (schedule.offsets[previous] + b) * task.H
                                   : task.c_0 + b * task.H;
    int64_t unit = first;
    for (; unit + W <= last; unit += W) backward_cell_of_units<T, A, false>(task, t, b, c_prev, unit);
    if (unit < last) backward_cell_of_units<T, A, true>(task, t, b, c_prev, unit);
    if (restarts) std::fill(task.d_c + b * task.H + first, task.d_c + b * task.H + last, T(0));
  }
}

template <class T, class A>
constexpr Kernels<T, A> kKernels = {
    kLanes<T>,
    kFullPrecision<T, A> ? nullptr : round_rows<T, A>,
    pack_gates<T, A>,
    pack_columns<T, A>,
    pack_transposed<T, A>,
    pack_bias<T>,
    forward_cells<T, A>,
    forward_project<T, A>,
    backward_recurrent<T, A>,
    backward_output<T, A>,
    backward_project<T, A>,
    backward_cells<T, A>,
};
