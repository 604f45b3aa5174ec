// The products of the CPU kernels, and the packing of their factors. Included by recurrent.inl.
//
// Order of summation: each output element is the sum of one chain for every kDepth terms, in increasing order (packed),
// or of `lanes` interleaved chains over k (dot products), whatever the tile it falls in: the result of a row depends
// neither on the other rows nor on how the work is split. The chains are short because rounding errors grow along them;
// only products with k-major weights in place, which are for few rows, are one chain each.

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
