// The recurrent CPU kernels, written once. Included by recurrent_{scalar,avx2,avx512,avx512_bf16}.cpp inside the
// namespace of the instruction set, which has set kVectorBytes, kAccumulators (vector registers a tile may use for
// sums), fma(), larger() and smaller() (of two; the second operand where one is NaN), and kNativeBf16 with
// native_multiply_pairs() and native_round_to_pairs() where it has instructions for that.
//
// Order of summation: each output element is the sum of one chain for every kDepth terms, in increasing order (packed),
// or of `lanes` interleaved chains over k (dot products), whatever the tile it falls in: the result of a row depends
// neither on the other rows nor on how the work is split. The chains are short because rounding errors grow along them;
// only products with k-major weights in place, which are for few rows, are one chain each.

#include "vec.h"

constexpr int kTileRows = 6;         // batch rows of the largest register tile
constexpr int kPrefetchingRows = 4;  // batch rows of the smallest tile that prefetches: smaller ones read without pause
constexpr int kGroupPanels = 4;      // panels computed before the epilogue runs: two unit blocks
constexpr int64_t kRowsAhead = 8;    // rows between the one that is packed and the one that is prefetched
constexpr int64_t kDepth = 256;      // terms of a panel that stay in L1 under the row tiles (16 KB with AVX2)
constexpr int64_t kTermsAtOnce = 4;  // terms of a tile in one round of its loop
constexpr int64_t kTileGap = 16;     // elements between packed tiles: at least what a store of a vector may overrun

// Panels that a tile of this many rows processes at once: as many accumulators as registers allow, to hide FMA latency.
constexpr int tile_panels(int rows) {
  for (int panels = kGroupPanels; panels > 1; panels /= 2)
    if (2 * panels * rows <= kAccumulators) return panels;
  return 1;
}

// Products of one group of panels for a chunk of rows: [row][panel][2][lanes], 9 KB with AVX2.
template <class T>
struct Scratch {
  static constexpr int kRowStride = kGroupPanels * 2 * kLanes<T>;
  alignas(64) T values[kChunkRows * kRowStride];
  T* row(int64_t r) { return values + r * kRowStride; }
};

// Splits n into the fewest pieces of at most `most`, as evenly as possible (32 rows: 6, 6, 5, 5, 5, 5, never 6 ... 2):
// the first `longer` pieces have one more than the others.
struct EvenSplit {
  int64_t pieces, size, longer;
  EvenSplit() = default;
  EvenSplit(int64_t n, int64_t most) : pieces(ceil_div(n, most)), size(n / pieces), longer(n % pieces) {}
  int64_t begin(int64_t piece) const { return piece * size + std::min(piece, longer); }
  int64_t length(int64_t piece) const { return size + (piece < longer ? 1 : 0); }
  int64_t largest() const { return length(0); }
};

// Groups of `size` adjacent items of a range, from the first to the last or the other way. Where the items' weights are
// larger than a cache, the end that a pass over them leaves in it is where the next pass should begin.
struct Groups {
  Range range;
  int64_t size;
  bool backwards;

  int64_t count() const { return ceil_div(range.end - range.begin, size); }
  Range at(int64_t i) const {
    const int64_t begin = range.begin + (backwards ? count() - 1 - i : i) * size;
    return {begin, std::min(begin + size, range.end)};
  }
};

// ---------------------------------------------------------------------------------------------- packing

// Brings n adjacent values closer to the core: where rows lie far apart, no prefetcher of the processor does.
template <class T>
inline void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}

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

// One half of a panel from `units` <= lanes rows of a matrix [., K]: out[k][u] = rows[u][k], `out` rows 2 * lanes
// apart, lanes beyond `units` zero. Squares of lanes x lanes elements are transposed in registers.
template <class T, class A>
void pack_half(const T* rows, int64_t units, int64_t K, A* out) {
  constexpr int W = kLanes<T>;
  const int64_t depth = terms<A>(K);
  int64_t k = 0;
  for (; (k + W) * kValuesPerTerm<A> <= K && units == W; k += W) {
    typename VecTraits<T>::Int square[W];  // elements as bits: a pair of bfloat16 is as wide as a float
    for (int u = 0; u < W; ++u) square[u] = Operand<T, A>::load_terms(rows + u * K, k);
    transpose(square);
    for (int l = 0; l < W; ++l) __builtin_memcpy(out + (k + l) * 2 * W, &square[l], sizeof(square[l]));
  }
  for (; k < depth; ++k) {
    for (int64_t u = 0; u < units; ++u) out[k * 2 * W + u] = Operand<T, A>::make(rows + u * K, 1, k, K);
    std::fill(out + k * 2 * W + units, out + k * 2 * W + W, A{});
  }
}

template <class T, class A>
void pack_gates(const T* w, int64_t H, int64_t K, A* packed, int64_t depth, Range blocks) {
  constexpr int W = kLanes<T>;
  for (int64_t block = blocks.begin; block < blocks.end; ++block)
    for (int gate = 0; gate < kGates; ++gate)
      pack_half(w + (gate * H + block * W) * K, std::min<int64_t>(W, H - block * W), K,
                packed + (block * kGates + gate / 2 * 2) * depth * W + gate % 2 * W);
}

template <class T, class A>
void pack_transposed(const T* w, int64_t K, int64_t columns, A* packed, Range panels) {
  constexpr int W = kLanes<T>;
  for (int64_t half = 2 * panels.begin; half < 2 * panels.end; ++half) {
    const int64_t first = std::min(half * W, columns);
    pack_half(w + first * K, std::min<int64_t>(W, columns - first), K,
              packed + half / 2 * terms<A>(K) * 2 * W + half % 2 * W);
  }
}

// Term k of n columns of K rows, of which row(i) is one.
template <class T, class A, class Row, class Size>
inline void copy_term(const Row& row, int64_t k, int64_t K, Size n, A* out) {
  if constexpr (kFullPrecision<T, A>)
    __builtin_memcpy(out, row(k), static_cast<size_t>(n) * sizeof(T));
  else
    Operand<T, A>::pair_rows(row(2 * k), 2 * k + 1 < K ? row(2 * k + 1) : nullptr, n, out);
}

template <class T, class A>
void pack_columns(const T* const* rows, int64_t K, int64_t columns, A* packed, Range panels) {
  constexpr int W2 = 2 * kLanes<T>;
  const int64_t depth = terms<A>(K);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t first = panel * W2, n = std::min<int64_t>(W2, columns - first);
    A* out = packed + panel * depth * W2;
    for (int64_t k = 0; k < depth; ++k, out += W2) {
      prefetch_row(rows[std::min((k + kRowsAhead) * kValuesPerTerm<A>, K - 1)] + first, n);
      const auto row = [&](int64_t i) { return rows[i] + first; };
      if (n == W2) {
        copy_term<T>(row, k, K, std::integral_constant<int64_t, W2>(), out);  // moves of whole vectors
      } else {
        copy_term<T>(row, k, K, n, out);
        std::fill(out + n, out + W2, A{});
      }
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

// A left operand as tiles read it: cut in tiles of rows, each [terms][rows of the tile]. A gap between tiles lets their
// beginnings fall in different sets of the cache.
template <class A>
struct LeftTiles {
  EvenSplit tiles;
  int64_t depth;  // terms of a row
  A* data;

  LeftTiles() = default;
  LeftTiles(int64_t rows, int64_t depth_, A* buffer) : tiles(rows, kTileRows), depth(depth_), data(buffer) {}
  A* at(int64_t tile, int64_t term) const {
    return data + tiles.begin(tile) * depth + tile * kTileGap + term * tiles.length(tile);
  }
  static constexpr int64_t size(int64_t rows, int64_t depth) {
    return rows * depth + ceil_div(rows, kTileRows) * kTileGap;
  }
};

// out[k][r] = rows[r][k] for kRows adjacent rows, transposed in registers. It may write kTileGap elements too many.
template <class T, class A, int kRows>
void pack_tile(const A* rows, int64_t stride, int64_t depth, A* out) {
  constexpr int W = kLanes<T>;
  static_assert(kTileGap >= W);
  int64_t k = 0;
  for (; k + W <= depth; k += W)
#pragma GCC unroll 8
    for (int first = 0; first < kRows; first += W) {
      constexpr int kMost = std::min(W, kRows);
      typename VecTraits<T>::Int square[W] = {};  // elements as bits: a pair of bfloat16 is as wide as a float
#pragma GCC unroll 16
      for (int r = 0; r < kMost; ++r)
        if (first + r < kRows) __builtin_memcpy(&square[r], rows + (first + r) * stride + k, sizeof(square[r]));
      transpose(square);
      // A whole vector is one store; the next overwrites what it has too much, that of the last falls into the gap.
      const size_t bytes = kRows <= W ? sizeof(square[0]) : std::min(W, kRows - first) * sizeof(A);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) __builtin_memcpy(out + (k + l) * kRows + first, &square[l], bytes);
    }
  for (; k < depth; ++k)
    for (int r = 0; r < kRows; ++r) out[k * kRows + r] = rows[r * stride + k];
}

// Fills terms begin ... begin + count - 1 of `left` from rows that lie `stride` apart. Earlier terms come first: what a
// tile has too much falls into terms that follow.
template <class T, class A>
void pack_left(const A* rows, int64_t stride, int64_t begin, int64_t count, const LeftTiles<A>& left) {
  const EvenSplit& tiles = left.tiles;
  const int64_t all_rows = tiles.begin(tiles.pieces);
  for (int64_t i = 0; i < tiles.pieces; ++i) {
    const A* const from = rows + tiles.begin(i) * stride;
    A* const to = left.at(i, begin);
    for (int64_t r = tiles.begin(i + 1), end = std::min(r + kTileRows, all_rows); r < end; ++r)
      prefetch_row(rows + r * stride, count);
    switch (tiles.length(i)) {
      case 1: std::copy_n(from, count, to); break;
      case 2: pack_tile<T, A, 2>(from, stride, count, to); break;
      case 3: pack_tile<T, A, 3>(from, stride, count, to); break;
      case 4: pack_tile<T, A, 4>(from, stride, count, to); break;
      case 5: pack_tile<T, A, 5>(from, stride, count, to); break;
      default: pack_tile<T, A, 6>(from, stride, count, to); break;
    }
  }
}

// out[r][p][v] (+)= sum_k left[k][r] * panels[p][k][v] for `kRows` rows and `kPanels` panels, `depth` terms. Brings
// every kTermsAtOnce-th term of the panel at `upcoming` closer to the core.
template <class T, class A, int kRows, int kPanels>
void tile(const A* left, const A* panels, int64_t panel_stride, int64_t depth, T* out, int64_t out_stride,
          bool accumulate, const A* upcoming) {
  using Factor = Operand<T, A>;
  constexpr int W = kLanes<T>;
  Vec<T> sum[kRows][2 * kPanels];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kPanels; ++v) sum[r][v] = Vec<T>{};
  // The smaller operand of the outer product stays in registers, the other passes through one.
  const auto add_term = [&](int64_t k) __attribute__((always_inline)) {
    const auto right = [=](int v) { return Factor::load_from(panels + (v / 2) * panel_stride + (2 * k + v % 2) * W); };
    if constexpr (kRows <= 2 * kPanels) {
      typename Factor::Vector lefts[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) lefts[r] = Factor::broadcast_from(left + k * kRows + r);
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
        const typename Factor::Vector one = Factor::broadcast_from(left + k * kRows + r);
#pragma GCC unroll 8
        for (int v = 0; v < 2 * kPanels; ++v) sum[r][v] = Factor::multiply_add(one, rights[v], sum[r][v]);
      }
    }
  };
  // Several terms in a round: where somebody else keeps the other hardware thread of the core busy, instructions are
  // what limits the tile.
  int64_t k = 0;
  for (; k + kTermsAtOnce <= depth; k += kTermsAtOnce) {
    if constexpr (kRows >= kPrefetchingRows) __builtin_prefetch(upcoming + k * 2 * W, 0, 2);
#pragma GCC unroll 8
    for (int64_t j = 0; j < kTermsAtOnce; ++j) add_term(k + j);
  }
  for (; k < depth; ++k) add_term(k);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kPanels; ++v) {
      T* const to = out + r * out_stride + v * W;
      store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <class T, class A>
using TileFunction = void (*)(const A*, const A*, int64_t, int64_t, T*, int64_t, bool, const A*);

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

// n columns of `count` rows, in vectors.
template <class T>
void copy_rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count, int64_t n) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < count; ++r, from += from_stride, to += to_stride) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store_first(to + i, load_first(from + i, n - i), n - i);
  }
}

// Adjacent panels of a packed matrix.
template <class A>
struct Panels {
  const A* data;
  int64_t depth;    // terms
  int64_t columns;  // the last panel may be filled in part
};

// out (+)= left * panels over at most kDepth terms, from `begin` of the panels and from `left_begin` of the left
// operand on. The slice of a panel stays in the nearest cache while all tiles pass over it. Columns beyond the last are
// padding and not written.
template <class T, class A>
void multiply_slice(const LeftTiles<A>& left, int64_t left_begin, const Panels<A>& panels, int64_t begin, T* out,
                    int64_t out_stride, bool accumulate) {
  constexpr int64_t W2 = 2 * kLanes<T>;
  const EvenSplit& tiles = left.tiles;
  const int64_t depth = std::min(kDepth, panels.depth - begin), stride = panels.depth * W2;
  const int64_t count = ceil_div(panels.columns, W2);
  int64_t at_once = tile_panels(static_cast<int>(tiles.largest()));
  for (int64_t panel = 0; panel < count; panel += at_once) {
    while (at_once > count - panel) at_once /= 2;
    const TileFunction<T, A> longer = select_tile<T, A>(tiles.size + 1, at_once),
                             shorter = select_tile<T, A>(tiles.size, at_once);
    const A* const right = panels.data + panel * stride + begin * W2;
    const int64_t n = std::min(panels.columns - panel * W2, at_once * W2);
    for (int64_t i = 0; i < tiles.pieces; ++i) {
      // So many tiles prefetch all of the next panel (or behind the last panel something that nobody needs).
      const A* const upcoming = right + at_once * stride + i % kTermsAtOnce * W2;
      T* const to = out + tiles.begin(i) * out_stride + panel * W2;
      const auto run = [&](T* sums, int64_t sums_stride) {
        (i < tiles.longer ? longer : shorter)(left.at(i, left_begin), right, stride, depth, sums, sums_stride,
                                              accumulate, upcoming);
      };
      if (n == at_once * W2) {
        run(to, out_stride);
      } else {
        T whole[kTileRows * kGroupPanels * W2];
        if (accumulate) copy_rows(to, out_stride, whole, at_once * W2, tiles.length(i), n);
        run(whole, at_once * W2);
        copy_rows(whole, at_once * W2, to, out_stride, tiles.length(i), n);
      }
    }
  }
}

// out = left * panels over all terms.
template <class T, class A>
void multiply_panels(const LeftTiles<A>& left, const Panels<A>& panels, T* out, int64_t out_stride) {
  for (int64_t k = 0; k < panels.depth; k += kDepth) multiply_slice(left, k, panels, k, out, out_stride, k > 0);
}

// to[i] += from[i]
template <class T>
inline void add_row(const T* from, int64_t n, T* to) {
  constexpr int W = kLanes<T>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(to + i) + load(from + i));
  if (i < n) store_first(to + i, load_first(to + i, n - i) + load_first(from + i, n - i), n - i);
}

// Elements of the buffer for the blocks of a product with so many rows and terms.
template <class A>
int64_t block_buffer(int64_t rows, int64_t depth) {
  return LeftTiles<A>::size(std::min(rows, kBlockRows), std::min(depth, kDepth));
}

// out[rows] (+)= a[rows] * panels.
template <class T, class A>
void multiply_rows(const A* a, int64_t a_stride, Range rows, const A* packed, int64_t depth, int64_t columns,
                   Range panels, T* out, int64_t out_stride, bool accumulate, A* buffer) {
  constexpr int64_t W2 = 2 * kLanes<T>;
  if (rows.begin >= rows.end) return;
  const EvenSplit blocks(rows.end - rows.begin, kBlockRows);
  const int64_t column = panels.begin * W2;
  const Panels<A> right = {packed + column * depth, depth, std::min(columns, panels.end * W2) - column};
  for (int64_t i = 0; i < blocks.pieces; ++i) {
    const int64_t row = rows.begin + blocks.begin(i);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const LeftTiles<A> left(blocks.length(i), std::min(kDepth, depth - k), buffer);
      pack_left<T>(a + row * a_stride + k, a_stride, 0, left.depth, left);
      multiply_slice(left, 0, right, k, out + row * out_stride + column, out_stride, accumulate || k > 0);
    }
  }
}

// ---------------------------------------------------------------------------------------------- products in place

// out[r][c] (+)= sum_k a[r][k] * w[k][c] for kRows rows and the given columns: few rows against a matrix that is not
// packed, read in the order in which it lies in memory. The sums are one chain over k.
template <class T, int kRows>
void multiply_stored_rows(const T* a, int64_t a_stride, const T* w, int64_t K, int64_t w_columns, Range columns, T* out,
                          int64_t out_stride, bool accumulate) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kAtOnce = 4;  // rows of w that pass over a row of sums together
  for (int64_t k = 0; k < K; k += kAtOnce) {
    const int64_t count = std::min(kAtOnce, K - k);
    const bool add = accumulate || k > 0;
    int64_t c = columns.begin;
    if (count == kAtOnce)
      for (; c + W <= columns.end; c += W) {
        Vec<T> sum[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[r] = add ? load(out + r * out_stride + c) : Vec<T>{};
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) {
          const Vec<T> right = load(w + (k + j) * w_columns + c);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) sum[r] = fma(broadcast<T>(a[r * a_stride + k + j]), right, sum[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) store(out + r * out_stride + c, sum[r]);
      }
    for (; c < columns.end; c += W) {
      const int64_t n = std::min<int64_t>(W, columns.end - c);
      for (int r = 0; r < kRows; ++r) {
        Vec<T> sum = add ? load_first(out + r * out_stride + c, n) : Vec<T>{};
        for (int64_t j = k; j < k + count; ++j)
          sum = fma(broadcast<T>(a[r * a_stride + j]), load_first(w + j * w_columns + c, n), sum);
        store_first(out + r * out_stride + c, sum, n);
      }
    }
  }
}

template <class T>
void multiply_stored(const T* a, int64_t a_stride, int64_t rows, const T* w, int64_t K, int64_t w_columns,
                     Range columns, T* out, int64_t out_stride, bool accumulate) {
  if (rows <= 0) return;
  const EvenSplit groups(rows, kStoredRows);
  for (int64_t i = 0; i < groups.pieces; ++i) {
    const int64_t r = groups.begin(i);
    const auto run = [&](auto function) {
      function(a + r * a_stride, a_stride, w, K, w_columns, columns, out + r * out_stride, out_stride, accumulate);
    };
    switch (groups.length(i)) {
      case 1: run(multiply_stored_rows<T, 1>); break;
      case 2: run(multiply_stored_rows<T, 2>); break;
      case 3: run(multiply_stored_rows<T, 3>); break;
      default: run(multiply_stored_rows<T, 4>); break;
    }
  }
}

// ---------------------------------------------------------------------------------------------- weight gradients

// out[c] (+)= left^T right over K rows, for the given columns of left and all of each right. Each block of columns of
// left is packed into `buffer` on its way.
template <class T, class A>
void add_gradients(const T* left, int64_t left_stride, int64_t K, Range columns, A* buffer,
                   const std::vector<Gradient<T, A>>& gradients, T* sums, bool accumulate) {
  const int64_t depth = terms<A>(K);
  const EvenSplit blocks(columns.end - columns.begin, kBlockRows);
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const int64_t end = std::min(begin + kDepth, depth);
    const bool add = accumulate || begin > 0;
    for (int64_t i = 0; i < blocks.pieces; ++i) {
      const int64_t first = columns.begin + blocks.begin(i), count = blocks.length(i);
      const LeftTiles<A> packed_left(count, end - begin, buffer);
      const EvenSplit& tiles = packed_left.tiles;
      T column_sums[kBlockRows] = {};
      A term[kBlockRows];
      const auto row_of_block = [&](int64_t row) { return left + row * left_stride + first; };
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t row = k * kValuesPerTerm<A>; row < std::min(K, (k + 1) * kValuesPerTerm<A>); ++row) {
          prefetch_row(left + std::min(row + kRowsAhead, K - 1) * left_stride + first, count);
          if (sums) add_row(left + row * left_stride + first, count, column_sums);
        }
        const A* values;
        if constexpr (kFullPrecision<T, A>)
          values = row_of_block(k);
        else
          copy_term<T>(row_of_block, k, K, count, term), values = term;
        for (int64_t t = 0; t < tiles.pieces; ++t) {
          const A* const from = values + tiles.begin(t);
          A* const to = packed_left.at(t, k - begin);
          // Constant sizes become a few moves; other ones occur only with very few columns.
          switch (tiles.length(t)) {
            case kTileRows: __builtin_memcpy(to, from, kTileRows * sizeof(A)); break;
            case kTileRows - 1: __builtin_memcpy(to, from, (kTileRows - 1) * sizeof(A)); break;
            default: std::copy_n(from, tiles.length(t), to);
          }
        }
      }
      if (sums && add)
        add_row(column_sums, count, sums + first);
      else if (sums)
        std::copy_n(column_sums, count, sums + first);
      for (const Gradient<T, A>& gradient : gradients)
        multiply_slice(packed_left, 0, Panels<A>{gradient.packed, depth, gradient.columns}, begin,
                       gradient.out + first * gradient.columns, gradient.columns, add);
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

// Adjacent rows of stored weight matrices for kGatesAtOnce gates: one stretch of memory for each.
template <class T, int kGatesAtOnce, int kUnits>
struct StoredRows {
  const T *w_hh[kGatesAtOnce][kUnits], *w_ih[kGatesAtOnce][kUnits];

  StoredRows(const ForwardTask<T, T>& task, int gate, int64_t unit, int64_t last) {
    for (int g = 0; g < kGatesAtOnce; ++g)
      for (int u = 0; u < kUnits; ++u) {
        // Beyond the last unit the last one is computed again, for lanes that nobody reads.
        const int64_t row = (gate + g) * task.H + std::min(unit + u, last - 1);
        w_hh[g][u] = task.w_hh + row * task.P;
        w_ih[g][u] = task.w_ih + row * task.I;
      }
  }

  // Products with kRows rows of h (and of x where it is not null) into out[row][gate][unit].
  template <int kRows>
  void multiply(const ForwardTask<T, T>& task, const T* h, int64_t h_stride, const T* x, T* out) const {
    DotTile<T, kRows, kGatesAtOnce, kUnits> dots;
    if (x) dots.add(x, task.I, w_ih, task.I);
    dots.add(h, h_stride, w_hh, task.P);
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < kGatesAtOnce; ++g) dots.totals(r, g, out + r * Scratch<T>::kRowStride + g * kLanes<T>);
  }
};

// Products of all gates of unit block `block` for `rows` rows against stored weights, into scratch from `column` on. A
// few rows of the weights at a time meet all rows of the batch: only the first of these fetches them from afar.
template <class T>
void dot_rows(const ForwardTask<T, T>& task, const T* h, int64_t h_stride, const T* x, int64_t rows, int64_t block,
              Scratch<T>& scratch, int64_t column) {
  constexpr int W = kLanes<T>, kUnits = std::min(4, W);
  const int64_t first = block * W, last = std::min<int64_t>(task.H, first + W);
  const EvenSplit tiles(rows, 3);
  for (int64_t unit = first; unit < last; unit += kUnits) {
    T* const out = scratch.values + column + unit - first;
    if (rows == 1) {
      // Eight chains at least, to hide the FMA latency: of one row it takes two gates.
      for (int gate = 0; gate < kGates; gate += 2)
        StoredRows<T, 2, kUnits>(task, gate, unit, last).template multiply<1>(task, h, h_stride, x, out + gate * W);
      continue;
    }
    for (int gate = 0; gate < kGates; ++gate) {
      const StoredRows<T, 1, kUnits> w(task, gate, unit, last);
      for (int64_t i = 0; i < tiles.pieces; ++i) {
        const int64_t r = tiles.begin(i);
        const T* const tile_h = h + r * h_stride;
        const T* const tile_x = x ? x + r * task.I : nullptr;
        T* const to = out + r * Scratch<T>::kRowStride + gate * W;
        if (tiles.length(i) == 3)
          w.template multiply<3>(task, tile_h, h_stride, tile_x, to);
        else if (tiles.length(i) == 2)
          w.template multiply<2>(task, tile_h, h_stride, tile_x, to);
        else
          w.template multiply<1>(task, tile_h, h_stride, tile_x, to);
      }
    }
  }
}

// out[r][c] = a[r] . w[c] for kRows rows and the given columns.
template <class T, int kRows>
void multiply_dot_rows(const T* a, int64_t a_stride, const T* w, int64_t K, Range columns, T* out, int64_t out_stride) {
  // Eight chains at least of vectors of four lanes or more, to hide the FMA latency.
  constexpr int kColumns = std::min(4, kLanes<T>), kGroups = kRows == 1 ? 2 : 1;
  for (int64_t first = columns.begin; first < columns.end; first += kGroups * kColumns) {
    const T* at[kGroups][kColumns];
    for (int g = 0; g < kGroups; ++g)
      for (int c = 0; c < kColumns; ++c) at[g][c] = w + std::min(first + g * kColumns + c, columns.end - 1) * K;
    DotTile<T, kRows, kGroups, kColumns> dots;
    dots.add(a, a_stride, at, K);
    const int64_t n = std::min<int64_t>(kGroups * kColumns, columns.end - first);
    for (int r = 0; r < kRows; ++r) {
      T totals[kGroups * kColumns];
      for (int g = 0; g < kGroups; ++g) dots.totals(r, g, totals + g * kColumns);
      std::copy_n(totals, n, out + r * out_stride + first);
    }
  }
}

template <class T>
void multiply_dots(const T* a, int64_t a_stride, int64_t rows, const T* w, int64_t K, Range columns, T* out,
                   int64_t out_stride) {
  if (rows <= 0) return;
  const EvenSplit tiles(rows, 3);
  for (int64_t i = 0; i < tiles.pieces; ++i) {
    const int64_t r = tiles.begin(i);
    const auto run = [&](auto function) {
      function(a + r * a_stride, a_stride, w, K, columns, out + r * out_stride, out_stride);
    };
    switch (tiles.length(i)) {
      case 1: run(multiply_dot_rows<T, 1>); break;
      case 2: run(multiply_dot_rows<T, 2>); break;
      default: run(multiply_dot_rows<T, 3>); break;
    }
  }
}

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
