// The persistent family, backward: as persistent_forward.cu, but what the CTAs of a team exchange after every step are
// the gradients of the gates, and the weights that they keep are columns of W_hh: d_h of the step before is
// W_hh^T d_gates. The gradients of the weights and of x are products over all steps that come afterwards.
//
// A CTA of a team owns `octets` * 8 hidden units, of which an MMA tile of 16 rows holds two octets. K runs over
// the gates of all units: a block is 8 units for elements of 16 bits and 4 for those of 32.
#include "backward_tile.cuh"
#include "dispatch.cuh"
#include "exchange.cuh"
#include "launchers.h"
#include "partial_sums.cuh"
#include "product.cuh"
#include "results.cuh"

namespace fastlstm::cuda {

namespace {

__device__ const AbsentStates absent = {{{0, 0, 0, 0}, {0, 0, 0, 1}}};

// Gradients of gates as the team exchanges them. They may have any value, so no bit of them is free: they travel in
// packets of 16 bytes, which the hardware stores as a whole, and the lowest bit of the last word is the tag. For that
// the o gate of every second unit gives up its last bit in this product; the gradients of the weights use the exact
// ones.
template <class E>
class ExchangedGradients {
 public:
  using W = Words<E>;
  static constexpr bool kPolls = true;
  static constexpr int kAheadOfMany = 8;

  __device__ __forceinline__ ExchangedGradients(const BackwardParams& params, int team, int warp, int lane)
      : p_(params), warp_(warp), lane_(lane) {
    const int blocks = backward_blocks(params.hidden, W::kBytes);
    blocks_ = warp < blocks ? ceil_div(blocks - warp, kTeamWarps) : 0;
    tile_vectors_ = blocks * kWarpThreads;
    team_vectors_ = static_cast<uint32_t>(team) * 2 * p_.team.tiles * tile_vectors_;
  }

  // The following calls are about the product with what the n-th step made.
  __device__ __forceinline__ void set_step(int n) {
    from_ = buffer(n) + warp_ * kWarpThreads + lane_;
    tag_ = tag_of(n);
  }

  template <int Blocks>
  __device__ __forceinline__ void load(uint4 (&states)[Blocks], int tile, int first_block) const {
    const uint4* const from = exchange() + (from_ + tile * tile_vectors_) + first_block * (kTeamWarps * kWarpThreads);
    if (first_block + Blocks <= blocks_) {
#pragma unroll
      for (int b = 0; b < Blocks; ++b) states[b] = load_relaxed_packet(from + b * (kTeamWarps * kWarpThreads));
    } else {
#pragma unroll
      for (int b = 0; b < Blocks; ++b)
        states[b] = load_relaxed_packet(first_block + b < blocks_ ? from + b * (kTeamWarps * kWarpThreads)
                                                                  : &absent.of_tag[tag_]);
    }
  }

  __device__ __forceinline__ uint32_t wrong_tags(const uint4& state, int) const { return (state.w ^ tag_) & 1; }
  __device__ __forceinline__ void accept(uint4& state, int) const { state.w &= ~1u; }
  template <int MTiles>
  __device__ __forceinline__ void poison(float (&)[MTiles][4]) const {}  // a NaN travels as it is

  __device__ __forceinline__ void publish(int n, int octet, int tile, const float (&d_gates)[2][kGates]) const {
    const uint32_t to = buffer(n) + tile * tile_vectors_;
    const uint32_t tag = tag_of(n);
    put_gradients<E>(octet, lane_, d_gates, [&](int vector, uint4 packet) {
      packet.w = (packet.w & ~1u) | tag;
      store_relaxed_packet(exchange() + (to + vector), packet);
    });
  }

 private:
  // The team's [tile][block][lane] of what the n-th step has made: the number of the first vector.
  __device__ __forceinline__ uint32_t buffer(int n) const {
    return team_vectors_ + (n & 1) * p_.team.tiles * tile_vectors_;
  }
  __device__ __forceinline__ uint4* exchange() const { return static_cast<uint4*>(p_.exchange); }

  const BackwardParams& p_;
  const int warp_, lane_;
  int blocks_, tile_vectors_;  // blocks of K of this warp, vectors of a tile
  uint32_t team_vectors_, from_ = 0, tag_ = 0;
};

template <class E, int Octets, int Blocks>
__global__ void __launch_bounds__(kTeamWarps* kWarpThreads, 1) persistent_backward(const BackwardParams p) {
  using W = Words<E>;
  constexpr int kMTiles = backward_m_tiles(Octets);
  const TeamShape shape = {Octets, Blocks, p.team.tiles};
  const TeamPlace at(p, shape, kMTiles, E::kParts);
  const BackwardRun& run = p.run[at.run];
  const int tiles = p.team.tiles, cell_tiles = Octets * tiles;

  unsigned char* const shared = shared_memory();
  const Results<kBackwardResults> results(shared, cell_tiles, at.cell_tile, at.lane);
  float2* const partial =  // [2][cell tile][kUnitSums]
      reinterpret_cast<float2*>(shared + results_bytes(shape, kMTiles, E::kParts, kBackwardResults));
  unsigned char* const shared_weights = reinterpret_cast<unsigned char*>(partial) + 2 * partial_bytes(cell_tiles, 1);
  unsigned char* const tile_memory = shared_weights + kTeamWarps * shared_weight_bytes(kMTiles, Blocks, W::kFactors);

  const auto weight_rows = [&](int m, int half, int block) {
    const int octet = 2 * m + half;
    const int first = octet < Octets ? (at.first_octet + octet) * kOctet : p.row_stride;
    return transposed_weights<E>(run.w_hh, p.hidden, p.row_stride, first, block * kTeamWarps + at.warp, at.lane);
  };
  const ResidentWeights<E, kMTiles, Blocks, register_weight_tiles(kMTiles, Blocks, W::kFactors)> weights(
      reinterpret_cast<uint4*>(shared_weights + shared_weight_bytes(kMTiles, Blocks, W::kFactors) * at.warp), at.lane,
      weight_rows);

  ExchangedGradients<E> gradients(p, at.team, at.warp, at.lane);
  BackwardTile<E, 1> cells(p, run, at.octet * kOctet, at.first_column + at.tile * kColumns, at.lane,
                           tile_memory + at.cell_tile * backward_tile_bytes(W::kBytes), at.has_cells);
  const auto store_results = [&](int n) {
    typename BackwardTile<E, 1>::Gates d_gates;
    results.get(n, 0, d_gates[0][0]);
    results.get(n, 1, d_gates[0][1]);
    cells.store(n, d_gates);
  };

  // Inputs are there for all warps when the one that moves them has waited for them before a barrier.
  if (at.moves)
    for (int n = run.begin; n < run.begin + kBackwardStages - 1; ++n) cells.copy_inputs(n);
  // The product of the last step gives d_h_0, or what the next run begins with.
  const int last_product = run.d_h_0 == nullptr && run.end == p.sequences.steps ? run.end - 1 : run.end;
  for (int n = run.begin; n <= last_product; ++n) {
    float2* const sums_of_step = partial + (n & 1) * cell_tiles * kUnitSums;
    const bool has_step = at.has_cells && n < run.end;
    const auto begin_cells = [&] {
      if (has_step) cells.begin(n);
    };
    if (n == run.begin) {
      begin_cells();
    } else {
      gradients.set_step(n - 1);
      multiply_tiles(weights, tiles, gradients, begin_cells, [&](int column_tile, const float (&sums)[kMTiles][4]) {
#pragma unroll
        for (int o = 0; o < Octets; ++o)
          put_unit_sums(sums_of_step, column_tile * Octets + o, at.warp, at.lane, sums[o / 2], o % 2);
      });
    }
    if (at.moves) copy_async_wait<kBackwardStages - 3>();  // this step's and the next step's
    block_barrier();
    if (at.has_cells && n > run.begin) {
      float product[1][2] = {};
      add_unit_sums(sums_of_step, at.cell_tile, at.lane, product[0]);
      cells.carry(product);
    }
    if (has_step) {
      typename BackwardTile<E, 1>::Gates d_gates;
      cells.compute(n, d_gates);
      if (n < last_product) gradients.publish(n, at.octet, at.tile, d_gates[0]);
      if (!at.helped) {
        cells.store(n, d_gates);
      } else {
        results.put(n, 0, d_gates[0][0]);
        results.put(n, 1, d_gates[0][1]);
      }
    }
    if (at.moves) {
      if (at.helped && n > run.begin) store_results(n - 1);
      if (n < run.end) cells.copy_inputs(n + kBackwardStages - 1);
    }
  }
  copy_async_wait<0>();
  if (at.has_cells) cells.finish();
  // What the product of the last step did not bring to an end.
  if (!at.helped || last_product == run.end) return;
  block_barrier();
  if (at.moves) store_results(run.end - 1);
}

template <class E>
struct Kernels {
  template <TeamVariant V>
  static auto kernel() {
    return &persistent_backward<E, V.octets, V.blocks>;
  }
};

}  // namespace

cudaError_t launch_persistent_backward(Element element, const BackwardParams& params, cudaStream_t stream) {
  const auto run = [&]<class E>(E) {
    const auto kernel = find_variant<kBackwardVariants<E::kParts>, Kernels<E>>(variant_of(params.team));
    const LaunchShape shape = {params.runs * params.groups * team_ctas(params.hidden, params.team.octets),
                               kTeamWarps * kWarpThreads, backward_shared_bytes(params.team, Words<E>::kFactors), true};
    return launch(kernel, shape, stream, params);
  };
  return with_mma_element(element, run);
}

}  // namespace fastlstm::cuda
