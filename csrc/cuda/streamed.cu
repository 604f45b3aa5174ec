// The streamed family: one kernel per time step, which reads all recurrent weights from L2 (or from memory, where they
// do not fit), multiplies on tensor cores and computes the cells in its epilogue. For what no CTA can keep: any number
// of hidden units, any batch. Called by the driver for one step of one direction of one layer.
//
// A CTA has the rows of the weights of `octets` * 8 hidden units, all gates of them, and `tiles` column tiles; each of
// its warps has an eighth of K, so that weights and states go from L2 straight into the registers that MMAs read, each
// once per CTA. The sums of the warps meet in shared memory. What a step hands on lies in rows of the batch, of whole
// blocks of K, in two buffers in turn.
#include "dispatch.cuh"
#include "launchers.h"
#include "partial_sums.cuh"
#include "step_cells.cuh"
#include "weights.cuh"

namespace fastlstm::cuda {

namespace {

// What both kernels derive from their place in the grid: slices of the hidden units in turn, for the same columns.
template <int Octets, int Tiles>
struct Tiling {
  __device__ __forceinline__ Tiling(int hidden, int batch)
      : lane(thread_index() % kWarpThreads), warp(thread_index() / kWarpThreads), hidden_(hidden), batch_(batch) {
    const int slices = team_ctas(hidden, Octets);
    first_unit = block_index() % slices * Octets * kOctet;
    first_column = block_index() / slices * Tiles * kColumns;
  }
  // Of cell tile i, which is octet i % Octets of column tile i / Octets: a cell of this thread.
  __device__ __forceinline__ Place cell(int i, int e) const {
    return {first_column + i / Octets * kColumns + 2 * (lane % 4) + e, first_unit + i % Octets * kOctet + lane / 4};
  }
  __device__ __forceinline__ bool has_cell(int i, int e) const {
    const Place x = cell(i, e);
    return i < Octets * Tiles && x.i < hidden_ && x.b < batch_;
  }

  int lane, warp, first_unit, first_column;

 private:
  int hidden_, batch_;
};

// sums[tile][m] of this warp: its blocks of K of the weights, rows(m, half, block), times the rows of `states`.
template <class E, int MTiles, int Tiles, class Rows>
__device__ __forceinline__ void multiply_rows(float (&sums)[Tiles][MTiles][4], const void* states, int blocks,
                                              int batch, int first_column, int warp, int lane, const Rows& rows) {
  // Two blocks at a time, so that enough loads are under way where few columns share the weights.
  constexpr int kAtOnce = MTiles * Tiles * E::kParts <= 8 ? 2 : 1;
  const int stride = blocks * Words<E>::kPerBlock;
#pragma unroll 1
  for (int first = warp; first < blocks; first += kAtOnce * kTeamWarps) {
    uint4 a[kAtOnce][MTiles][2], b[kAtOnce][Tiles];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int block = first + i * kTeamWarps;
#pragma unroll
      for (int m = 0; m < MTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) a[i][m][half] = block < blocks ? rows(m, half, block) : uint4{};
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        const int column = first_column + tile * kColumns + lane / 4;
        b[i][tile] = block < blocks && column < batch ? *row_vector<E>(states, column, stride, block, lane) : uint4{};
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) b[i][tile] = as_factors<E>(b[i][tile]);
#pragma unroll
      for (int m = 0; m < MTiles; ++m) {
        const OperandWords words(a[i][m][0], a[i][m][1]);
        uint32_t parts[E::kParts][OperandWords::kCount];
#pragma unroll
        for (int part = 0; part < E::kParts; ++part)
#pragma unroll
          for (int j = 0; j < OperandWords::kCount; ++j) parts[part][j] = E::part(words[j], part);
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile)
          multiply_block<E>(sums[tile][m], sums[tile][m], b[i][tile], [&](int part, int j) { return parts[part][j]; });
      }
    }
  }
}

// f(i, cells) for each cell tile i of this warp, the cells of which begin to load while the product is computed if
// there is one tile, and after it, where registers are needed for the sums, if there are two. cells_of(i): two cells.
template <int CellTiles, class CellsOf, class Product, class F>
__device__ __forceinline__ void with_cells(int warp, const CellsOf& cells_of, const Product& product, const F& f) {
  if constexpr (CellTiles <= kTeamWarps) {
    auto cells = cells_of(warp);
    product();
    if (warp < CellTiles) f(warp, cells);
  } else {
    product();
#pragma unroll 1
    for (int i = warp; i < CellTiles; i += kTeamWarps) {
      auto cells = cells_of(i);
      f(i, cells);
    }
  }
}
template <class Cells>
struct TwoCells {
  Cells of[2];
};

template <class E, int Octets, int Tiles>
__global__ void __launch_bounds__(kTeamWarps* kWarpThreads,
                                  streamed_ctas_of_sm(forward_m_tiles(Octets), Tiles, E::kParts))
    streamed_forward(const StreamedForwardParams p) {
  using Storage = typename E::Storage;
  using Cells = ForwardCells<E, 1>;
  constexpr int kMTiles = forward_m_tiles(Octets), kCellTiles = Octets * Tiles;
  const Tiling<Octets, Tiles> at(p.hidden, p.sequences.batch);
  float4* const partial = reinterpret_cast<float4*>(shared_memory());  // [cell tile][kGateSums]

  const auto cells_of = [&](int i) {
    return TwoCells<Cells>{{Cells(p, at.cell(i, 0), at.has_cell(i, 0)), Cells(p, at.cell(i, 1), at.has_cell(i, 1))}};
  };
  const auto put_products = [&] {
    float sums[Tiles][kMTiles][4] = {};
    multiply_rows<E, kMTiles, Tiles>(sums, p.h_before, forward_blocks(p.hidden, Words<E>::kBytes), p.sequences.batch,
                                     at.first_column, at.warp, at.lane, [&](int m, int half, int block) {
                                       return forward_weights<E>(p.run.w_hh, p.hidden, p.row_stride, m % 2 * 2 + half,
                                                                 at.first_unit + m / 2 * kOctet, block, at.lane);
                                     });
#pragma unroll
    for (int i = 0; i < kCellTiles; ++i) {
      const auto& of_tile = sums[i / Octets];
      put_gate_sums(partial, i, at.warp, at.lane, of_tile[i % Octets * 2], of_tile[i % Octets * 2 + 1]);
    }
    block_barrier();
  };
  with_cells<kCellTiles>(at.warp, cells_of, put_products, [&](int i, TwoCells<Cells>& cells) {
    float products[2][kGates] = {};
    add_gate_sums<4>(partial, i, at.lane, products);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Place x = at.cell(i, e);
      if (!at.has_cell(i, e)) continue;
      if (!cells.of[e].has_step()) {  // but in reverse, it may have the next one
        const int64_t h = x.in_rows_of(p.h_stride);
        static_cast<Storage*>(p.h)[h] = static_cast<const Storage*>(p.h_before)[h];
        continue;
      }
      float product[kGates][1];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) product[gate][0] = products[e][gate];
      cells.of[e].finish(product);
    }
  });
}

template <class E, int Octets, int Tiles>
__global__ void __launch_bounds__(kTeamWarps* kWarpThreads,
                                  streamed_ctas_of_sm(backward_m_tiles(Octets), Tiles, E::kParts))
    streamed_backward(const StreamedBackwardParams p) {
  using Storage = typename E::Storage;
  using Cells = BackwardCells<E, 1>;
  constexpr int kMTiles = backward_m_tiles(Octets), kCellTiles = Octets * Tiles;
  const Tiling<Octets, Tiles> at(p.hidden, p.sequences.batch);
  float2* const partial = reinterpret_cast<float2*>(shared_memory());  // [cell tile][kUnitSums]
  const bool has_product = p.n > 0, is_step = p.n < p.sequences.steps;

  const auto cells_of = [&](int i) {
    return TwoCells<Cells>{
        {Cells(p, at.cell(i, 0), is_step && at.has_cell(i, 0)), Cells(p, at.cell(i, 1), is_step && at.has_cell(i, 1))}};
  };
  const auto put_products = [&] {
    if (!has_product) return;
    const int blocks = backward_blocks(p.hidden, Words<E>::kBytes);
    float sums[Tiles][kMTiles][4] = {};
    multiply_rows<E, kMTiles, Tiles>(
        sums, p.gradients_before, blocks, p.sequences.batch, at.first_column, at.warp, at.lane,
        [&](int m, int half, int block) {
          const int unit = at.first_unit + (2 * m + half) * kOctet + at.lane / 4;
          return unit < p.hidden ? *row_vector<E>(p.transposed_w_hh, unit, p.row_stride, block, at.lane) : uint4{};
        });
#pragma unroll
    for (int i = 0; i < kCellTiles; ++i)
      put_unit_sums(partial, i, at.warp, at.lane, sums[i / Octets][i % Octets / 2], i % Octets % 2);
    block_barrier();
  };
  with_cells<kCellTiles>(at.warp, cells_of, put_products, [&](int i, TwoCells<Cells>& cells) {
    float products[2] = {};
    if (has_product) add_unit_sums(partial, i, at.lane, products);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Place x = at.cell(i, e);
      if (!at.has_cell(i, e)) continue;
      const float product[1] = {products[e]};
      float d_h[1];
      carry<E, false>(p, x, product, d_h);
      if (!is_step) {
        put_initial_d_h<E>(p, x, d_h);
        put_initial_d_c<E, 1>(p, x);
      }
      if (!cells.of[e].has_step()) continue;
      add_d_y<E>(p, x, d_h);
      typename Cells::Gradients d_gates;
      cells.of[e].finish(d_h, d_gates);
      Packed<Storage, kGates> packed;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) packed.values[gate] = E::store(d_gates[gate][0]);
      const int64_t to = x.in_rows_of(p.row_stride) + x.i * (kGates - 1);  // of a row's 4 x.i
      *reinterpret_cast<Packed<Storage, kGates>*>(static_cast<Storage*>(p.gradients) + to) = packed;
    }
  });
}

template <class E>
struct ForwardKernels {
  template <StreamedVariant V>
  static auto kernel() {
    return &streamed_forward<E, V.octets, V.tiles>;
  }
};
template <class E>
struct BackwardKernels {
  template <StreamedVariant V>
  static auto kernel() {
    return &streamed_backward<E, V.octets, V.tiles>;
  }
};

template <class Params>
cudaError_t launch_streamed(void (*kernel)(Params), const Params& p, int values_per_cell, cudaStream_t stream) {
  const int column_groups = ceil_div(p.sequences.batch, p.variant.tiles * kColumns);
  const LaunchShape shape = {team_ctas(p.hidden, p.variant.octets) * column_groups, kTeamWarps * kWarpThreads,
                             streamed_shared_bytes(p.variant, values_per_cell), false};
  return launch(kernel, shape, stream, p);
}

}  // namespace

cudaError_t launch_streamed_forward(Element element, const StreamedForwardParams& params, cudaStream_t stream) {
  return with_mma_element(element, [&]<class E>(E) {
    return launch_streamed(find_variant<kStreamedForwardVariants<E::kParts>, ForwardKernels<E>>(params.variant), params,
                           kGates, stream);
  });
}

cudaError_t launch_streamed_backward(Element element, const StreamedBackwardParams& params, cudaStream_t stream) {
  return with_mma_element(element, [&]<class E>(E) {
    return launch_streamed(find_variant<kStreamedBackwardVariants<E::kParts>, BackwardKernels<E>>(params.variant),
                           params, 1, stream);
  });
}

}  // namespace fastlstm::cuda
