// The persistent family, forward: a team of CTAs keeps the recurrent weights of a layer in registers for a run of steps
// and exchanges h through L2 after every step (see product.cuh). Called by the driver for a few runs at the same time.
//
// A CTA of a team owns `octets` * 8 hidden units, all four gates of them, of which two MMA tiles of 16 rows hold
// one octet: gates i and f, then g and o. Teams split runs and the batch; they do not meet. All CTAs of the grid
// have to run at the same time.
#include "dispatch.cuh"
#include "exchange.cuh"
#include "forward_tile.cuh"
#include "launchers.h"
#include "partial_sums.cuh"
#include "product.cuh"
#include "results.cuh"

namespace fastlstm::cuda {

namespace {

template <class W>
__device__ const AbsentStates absent = {{{0, 0, 0, 0}, {W::kTag, W::kTag, W::kTag, W::kTag}}};

template <class E>
class BeginningH;

// h as the team exchanges it: 16-bit or 32-bit elements, tagged in the top bit of the exponent, which is 0 in every
// |h| <= 1. A NaN travels as a value between 1 and 2, which no h has.
template <class E>
class ExchangedH {
 public:
  using W = Words<E>;
  static constexpr bool kPolls = true;
  static constexpr int kAheadOfMany = W::kHalf ? 4 : 3;

  __device__ __forceinline__ ExchangedH(const ForwardParams& params, int team, int warp, int lane)
      : p_(params), warp_(warp), lane_(lane) {
    const int units = ceil_div(p_.hidden, kOctet) * kOctet, stride = kTeamWarps * W::kPerBlock;
    const int first = warp * W::kPerBlock + lane % 4 * W::kPerVector;
    blocks_ = first < units ? ceil_div(units - first, stride) : 0;
    tile_vectors_ = forward_blocks(p_.hidden, W::kBytes) * kWarpThreads;
    team_vectors_ = static_cast<uint32_t>(team) * 2 * p_.team.tiles * tile_vectors_;
  }

  // The following calls are about the product of the n-th step.
  __device__ __forceinline__ void set_step(int n) {
    from_ = buffer(n - 1) + vector_by_octet(warp_, lane_ / 4, lane_ % 4);
    tag_ = tag_of(n - 1) ? W::kTag : 0;
  }

  template <int Blocks>
  __device__ __forceinline__ void load(uint4 (&states)[Blocks], int tile, int first_block) const {
    if (first_block + Blocks <= blocks_) {
#pragma unroll
      for (int b = 0; b < Blocks; ++b) states[b] = load_relaxed(from(tile, first_block + b));
    } else {
#pragma unroll
      for (int b = 0; b < Blocks; ++b)
        states[b] = load_relaxed(has_block(first_block + b) ? from(tile, first_block + b) : absent_state());
    }
  }

  __device__ __forceinline__ uint32_t wrong_tags(const uint4& state, int) const {
    return tag_errors_of(state) & W::kTag;
  }

  __device__ __forceinline__ void accept(uint4& state, int) { clear_tags(state, W::kTag); }

  // Waits for all that this lane could read of a column tile.
  __device__ __forceinline__ void wait(int tile) const {
#pragma unroll 1
    for (int block = 0; has_block(block); ++block) {
      SpinLimit limit;
      while (wrong_tags(load_relaxed(from(tile, block)), tile) != 0) limit.tick();
    }
  }

  // Makes the sums of columns NaN in which a NaN has arrived.
  template <int MTiles>
  __device__ __forceinline__ void poison(float (&sums)[MTiles][4]) {
    const uint32_t lanes = warp_ballot((above_one_ & W::kTag) != 0);
    above_one_ = 0;
    if (lanes == 0) return;
    const uint32_t of_columns = lanes >> (8 * (lane_ % 4));  // four lanes hold the states of a column
#pragma unroll
    for (int m = 0; m < MTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (of_columns & (i % 2 == 0 ? 0x0fu : 0xf0u)) sums[m][i] = float_of_bits(0x7fffffffu);
  }

  // Publishes the h of a tile that the n-th step has made, for the product of the next step.
  __device__ __forceinline__ void publish(int n, int octet, int tile, const float (&h)[2]) const {
    const uint32_t to = buffer(n) + tile * tile_vectors_;
    const uint32_t tag = tag_of(n) ? W::kTag : 0;
    put_h<E>(octet, lane_, h, [&](int block, int column, int quarter, int word, uint32_t value) {
      store_relaxed(reinterpret_cast<uint32_t*>(exchange() + (to + vector_by_octet(block, column, quarter))) + word,
                    (value & ~W::kTag) | tag);
    });
  }

 private:
  friend class BeginningH<E>;

  __device__ __forceinline__ bool has_block(int block) const { return block < blocks_; }
  __device__ __forceinline__ const uint4* from(int tile, int block) const {
    return exchange() + (from_ + tile * tile_vectors_) + block * (kTeamWarps * kWarpThreads);
  }
  __device__ __forceinline__ const uint4* absent_state() const { return &absent<W>.of_tag[tag_ != 0]; }
  __device__ __forceinline__ uint32_t tag_errors_of(const uint4& state) const { return tag_errors(state, tag_); }
  // `tags`: those bits of a word that are one.
  __device__ __forceinline__ void clear_tags(uint4& state, uint32_t tags) {
    state.x &= ~tags;
    state.y &= ~tags;
    state.z &= ~tags;
    state.w &= ~tags;
    above_one_ |= tags & (above_one(state.x) | above_one(state.y) | above_one(state.z) | above_one(state.w));
  }
  // In the tag bits, which are clear: whether an |h| is greater than 1.
  static __device__ __forceinline__ uint32_t above_one(uint32_t word) { return word + W::kUpToTag; }
  // The team's [tile][block] times 32 vectors of what the n-th step has made: the number of the first one. A pointer
  // would take twice the registers.
  __device__ __forceinline__ uint32_t buffer(int n) const {
    return team_vectors_ + (n & 1) * p_.team.tiles * tile_vectors_;
  }
  __device__ __forceinline__ uint4* exchange() const { return static_cast<uint4*>(p_.exchange); }

  const ForwardParams& p_;
  const int warp_, lane_;
  int blocks_, tile_vectors_;  // blocks of K of this lane, vectors of a tile
  uint32_t team_vectors_, from_ = 0, tag_ = 0, above_one_ = 0;
};

// The same for a step that is the first of a sequence, which reads h_0 itself: that may have any value.
template <class E>
class BeginningH {
 public:
  using W = Words<E>;
  static constexpr bool kPolls = true;
  static constexpr int kAheadOfMany = W::kHalf ? 4 : 1;

  // Whether a sequence of these column tiles begins with the n-th step of `run`.
  __device__ __forceinline__ BeginningH(ExchangedH<E>& states, const ForwardParams& p, const ForwardRun& run,
                                        int first_column, int n)
      : states_(states), p_(p), run_(run), first_column_(first_column), begins_run_(n == run.begin) {
    const Order order = {run.reverse};
    const int t = order.time(n, p_.sequences.steps);
#pragma unroll 1
    for (int tile = 0; tile < p_.team.tiles; ++tile) {
      const int b = column(tile), length = length_of(p_.sequences, b);
      const bool begins = t < length && (begins_run_ || order.first(t, length));
      if (begins || begins_run_) initial_ |= 1u << tile;
      if (!begins || order.restarts(p_.sequences, t, b, length)) zero_ |= 1u << tile;
    }
    if (begins_run_) return;
    // Who begins reads nothing of the step before. But whoever publishes a step has to have seen all of the one before:
    // where all columns of a tile begin, a CTA would else overwrite what others still read.
#pragma unroll 1
    for (int tile = 0; tile < p_.team.tiles; ++tile)
      if (initial_ >> tile & 1) states_.wait(tile);
  }

  template <int Blocks>
  __device__ __forceinline__ void load(uint4 (&states)[Blocks], int tile, int first_block) const {
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      const int block = first_block + b;
      const bool exists = states_.has_block(block);
      states[b] = uint4{};
      if (!(initial_ >> tile & 1)) {
        states[b] = load_relaxed(exists ? states_.from(tile, block) : states_.absent_state());
      } else if (exists && !(zero_ >> tile & 1)) {
        // Later on, others may already write what the next run begins with.
        const void* const h_0 = begins_run_ ? initial_h(run_) : run_.h_0;
        states[b] = load_relaxed(row_vector<E>(h_0, column(tile), p_.row_stride, block * kTeamWarps + warp(), lane()));
      }
    }
  }

  __device__ __forceinline__ uint32_t wrong_tags(const uint4& state, int tile) const {
    return states_.tag_errors_of(state) & tagged(tile);
  }

  __device__ __forceinline__ void accept(uint4& state, int tile) {
    states_.clear_tags(state, tagged(tile));
    if constexpr (!W::kHalf)
      if (tagged(tile) == 0) state = as_factors<E>(state);  // who publishes a state makes it a factor
  }

  template <int MTiles>
  __device__ __forceinline__ void poison(float (&sums)[MTiles][4]) {
    states_.poison(sums);
  }

 private:
  static __device__ __forceinline__ int lane() { return thread_index() % kWarpThreads; }
  static __device__ __forceinline__ int warp() { return thread_index() / kWarpThreads; }
  // The tag bits, if the states of this tile have any.
  __device__ __forceinline__ uint32_t tagged(int tile) const { return initial_ >> tile & 1 ? 0 : W::kTag; }
  // The column whose states this lane multiplies.
  __device__ __forceinline__ int column(int tile) const { return first_column_ + tile * kColumns + lane() / 4; }

  ExchangedH<E>& states_;
  const ForwardParams& p_;
  const ForwardRun& run_;
  const int first_column_;
  const bool begins_run_;
  uint32_t initial_ = 0, zero_ = 0;  // column tiles whose column begins, and those where it begins with zeros
};

template <class E, int Octets, int Blocks>
__global__ void __launch_bounds__(kTeamWarps* kWarpThreads, 1) persistent_forward(const ForwardParams p) {
  using W = Words<E>;
  constexpr int kMTiles = forward_m_tiles(Octets);
  const TeamShape shape = {Octets, Blocks, p.team.tiles};
  const TeamPlace at(p, shape, kMTiles, E::kParts);
  const ForwardRun& run = p.run[at.run];
  const int tiles = p.team.tiles, cell_tiles = Octets * tiles;

  unsigned char* const shared = shared_memory();
  const Results<kForwardResults> results(shared, cell_tiles, at.cell_tile, at.lane);
  float4* const partial =  // [2][cell tile][kGateSums]
      reinterpret_cast<float4*>(shared + results_bytes(shape, kMTiles, E::kParts, kForwardResults));
  unsigned char* const shared_weights =
      reinterpret_cast<unsigned char*>(partial) + 2 * partial_bytes(cell_tiles, kGates);
  unsigned char* const tile_memory = shared_weights + kTeamWarps * shared_weight_bytes(kMTiles, Blocks, W::kFactors);

  const auto weight_rows = [&](int m, int half, int block) {
    return forward_weights<E>(run.w_hh, p.hidden, p.row_stride, m % 2 * 2 + half, (at.first_octet + m / 2) * kOctet,
                              block * kTeamWarps + at.warp, at.lane);
  };
  const ResidentWeights<E, kMTiles, Blocks, register_weight_tiles(kMTiles, Blocks, W::kFactors)> weights(
      reinterpret_cast<uint4*>(shared_weights + shared_weight_bytes(kMTiles, Blocks, W::kFactors) * at.warp), at.lane,
      weight_rows);

  ExchangedH<E> states(p, at.team, at.warp, at.lane);
  // Warps without a tile of their own have one too, and nothing to do with it.
  ForwardTile<E, 1> cells(p, run, at.octet * kOctet, at.first_column + at.tile * kColumns, at.lane,
                          tile_memory + at.cell_tile * forward_tile_bytes(W::kBytes), at.has_cells);
  const auto store_results = [&](int n) {
    typename ForwardTile<E, 1>::Gates a;
    float h_c[4];
    if (cells.saves_gates()) {
      results.get(n, 0, a[0][0]);
      results.get(n, 1, a[0][1]);
    }
    results.get(n, 2, h_c);
    cells.store(n, a, {{h_c[0], h_c[1]}}, {{h_c[2], h_c[3]}});
  };

  // Inputs are there for all warps when the one that moves them has waited for them before a barrier.
  if (at.moves) {
    for (int n = run.begin; n < run.begin + kForwardStages; ++n) cells.copy_inputs(n);
    copy_async_wait<kForwardStages - 1>();
  }
  block_barrier();
  const int begin_of_run = run.begin;
  for (int n = begin_of_run; n < run.end; ++n) {
    float4* const sums_of_step = partial + (n & 1) * cell_tiles * kGateSums;
    typename ForwardTile<E, 1>::Gates a;
    const auto begin_cells = [&] {
      if (at.has_cells) cells.begin(n, a);
    };
    const auto put_sums = [&](int column_tile, const float (&sums)[kMTiles][4]) {
#pragma unroll
      for (int o = 0; o < Octets; ++o)
        put_gate_sums(sums_of_step, column_tile * Octets + o, at.warp, at.lane, sums[2 * o], sums[2 * o + 1]);
    };
    states.set_step(n);
    // All read their initial states in the first step; in reverse, shorter sequences begin later.
    if (n == begin_of_run || (run.reverse && p.sequences.lengths != nullptr)) {
      BeginningH<E> beginning(states, p, run, at.first_column, n);
      multiply_tiles(weights, tiles, beginning, begin_cells, put_sums);
    } else {
      multiply_tiles(weights, tiles, states, begin_cells, put_sums);
    }
    if (at.moves) copy_async_wait<kForwardStages - 2>();  // the next step's
    block_barrier();
    if (at.has_cells) {
      add_gate_sums<kMTiles * Blocks <= 8    ? 8
                    : kMTiles * Blocks <= 16 ? 4
                                             : 2>(sums_of_step, at.cell_tile, at.lane, a[0]);
      cells.compute(n, a);
      typename ForwardTile<E, 1>::States h;
      cells.outputs(h);
      if (n + 1 < run.end) states.publish(n, at.octet, at.tile, h[0]);
      if (!at.helped) {
        cells.store(n, a, cells.h(), cells.c());
      } else {
        if (cells.saves_gates()) {
          results.put(n, 0, a[0][0]);
          results.put(n, 1, a[0][1]);
        }
        results.put(n, 2, {cells.h()[0][0], cells.h()[0][1], cells.c()[0][0], cells.c()[0][1]});
      }
    }
    if (at.moves) {
      if (at.helped && n > run.begin) store_results(n - 1);
      cells.copy_inputs(n + kForwardStages);
    }
  }
  copy_async_wait<0>();
  if (at.has_cells) cells.finish();
  if (!at.helped) return;
  block_barrier();
  if (at.moves) store_results(run.end - 1);
}

template <class E>
struct Kernels {
  template <TeamVariant V>
  static auto kernel() {
    return &persistent_forward<E, V.octets, V.blocks>;
  }
};

}  // namespace

cudaError_t launch_persistent_forward(Element element, const ForwardParams& params, cudaStream_t stream) {
  const auto run = [&]<class E>(E) {
    const auto kernel = find_variant<kForwardVariants<E::kParts>, Kernels<E>>(variant_of(params.team));
    const LaunchShape shape = {params.runs * params.groups * team_ctas(params.hidden, params.team.octets),
                               kTeamWarps * kWarpThreads, forward_shared_bytes(params.team, Words<E>::kFactors), true};
    return launch(kernel, shape, stream, params);
  };
  return with_mma_element(element, run);
}

}  // namespace fastlstm::cuda
