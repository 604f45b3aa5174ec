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

namespace fastlstm::cuda {

namespace {

template <class W>
__device__ const AbsentStates absent = {{{0, 0, 0, 0}, {W::kTag, W::kTag, W::kTag, W::kTag}}};

// h as the team exchanges it: 16-bit or 32-bit elements, tagged in the top bit of the exponent, which is 0 in every
// |h| <= 1. A NaN travels as a value between 1 and 2, which no h has.
template <class E>
class ExchangedH {
 public:
  using W = Words<E>;
  static constexpr bool kPolls = true;
  static constexpr int kAheadOfMany = 4;

  __device__ __forceinline__ ExchangedH(const ForwardParams& params, uint4* team_exchange, int warp, int lane)
      : p_(params), exchange_(team_exchange), warp_(warp), lane_(lane) {
    const int units = ceil_div(p_.hidden, kOctet) * kOctet, stride = kTeamWarps * W::kPerBlock;
    const int first = warp * W::kPerBlock + lane % 4 * W::kPerVector;
    blocks_ = first < units ? ceil_div(units - first, stride) : 0;
    tile_vectors_ = forward_blocks(p_.hidden, W::kBytes) * kWarpThreads;
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
        states[b] = load_relaxed(first_block + b < blocks_ ? from(tile, first_block + b) : absent_state());
    }
  }

  __device__ __forceinline__ uint32_t wrong_tags(const uint4& state, int) const {
    return tag_errors(state, tag_) & W::kTag;
  }

  __device__ __forceinline__ void accept(uint4& state, int) { clear_tags(state, W::kTag); }

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
    uint4* const to = buffer(n) + tile * tile_vectors_;
    const uint32_t tag = tag_of(n) ? W::kTag : 0;
    put_h<E>(octet, lane_, h, [&](int block, int column, int quarter, int word, uint32_t value) {
      store_relaxed(reinterpret_cast<uint32_t*>(to + vector_by_octet(block, column, quarter)) + word,
                    (value & ~W::kTag) | tag);
    });
  }

 protected:
  __device__ __forceinline__ const uint4* from(int tile, int block) const {
    return from_ + tile * tile_vectors_ + block * (kTeamWarps * kWarpThreads);
  }
  __device__ __forceinline__ const uint4* absent_state() const { return &absent<W>.of_tag[tag_ != 0]; }
  // `tags`: those bits of a word that are one.
  __device__ __forceinline__ void clear_tags(uint4& state, uint32_t tags) {
    state.x &= ~tags;
    state.y &= ~tags;
    state.z &= ~tags;
    state.w &= ~tags;
    above_one_ |= tags & (above_one(state.x) | above_one(state.y) | above_one(state.z) | above_one(state.w));
  }

  const ForwardParams& p_;

 private:
  // In the tag bits, which are clear: whether an |h| is greater than 1.
  static __device__ __forceinline__ uint32_t above_one(uint32_t word) { return word + W::kUpToTag; }
  // [tile][block] times 32 vectors, of what the n-th step has made.
  __device__ __forceinline__ uint4* buffer(int n) const {
    return exchange_ + (n & 1) * p_.team.tiles * tile_vectors_;
  }

  uint4* const exchange_;

 protected:
  const int warp_, lane_;
  int blocks_;  // of K, of this lane
  uint32_t tag_ = 0;

 private:
  int tile_vectors_;
  const uint4* from_ = nullptr;
  uint32_t above_one_ = 0;
};

// The same for a step that is the first of a sequence, which reads h_0 itself: that may have any value.
template <class E>
class BeginningH : public ExchangedH<E> {
  using Base = ExchangedH<E>;
  using Base::p_, Base::warp_, Base::lane_, Base::blocks_, Base::tag_;

 public:
  using W = Words<E>;

  // Whether a sequence of these column tiles begins with the n-th step of `run`.
  __device__ __forceinline__ BeginningH(const ExchangedH<E>& states, const ForwardRun& run, int first_column, int n)
      : Base(states), run_(run), first_column_(first_column), begins_run_(n == run.begin) {
    const Order order = {run.reverse};
    const int t = order.time(n, p_.sequences.steps);
#pragma unroll 1
    for (int tile = 0; tile < p_.team.tiles; ++tile) {
      const int b = column(tile), length = length_of(p_.sequences, b);
      const bool begins = t < length && (begins_run_ || order.first(t, length));
      if (begins || begins_run_) initial_ |= 1u << tile;
      if (!begins || order.restarts(p_.sequences, t, b, length)) zero_ |= 1u << tile;
    }
  }

  template <int Blocks>
  __device__ __forceinline__ void load(uint4 (&states)[Blocks], int tile, int first_block) const {
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      const int block = first_block + b;
      const bool exists = block < blocks_;
      states[b] = uint4{};
      if (!(initial_ >> tile & 1)) {
        states[b] = load_relaxed(exists ? Base::from(tile, block) : Base::absent_state());
      } else if (exists && !(zero_ >> tile & 1)) {
        // Later on, others may already write what the next run begins with.
        const void* const h_0 = begins_run_ ? initial_h(run_) : run_.h_0;
        states[b] =
            load_relaxed(row_vector<E>(h_0, column(tile), p_.row_stride, block * kTeamWarps + warp_, lane_));
      }
    }
  }

  __device__ __forceinline__ uint32_t wrong_tags(const uint4& state, int tile) const {
    return tag_errors(state, tag_) & tagged(tile);
  }

  __device__ __forceinline__ void accept(uint4& state, int tile) {
    Base::clear_tags(state, tagged(tile));
    if constexpr (!W::kHalf)
      if (tagged(tile) == 0) state = as_factors<E>(state);  // who publishes a state makes it a factor
  }

 private:
  // The tag bits, if the states of this tile have any.
  __device__ __forceinline__ uint32_t tagged(int tile) const { return initial_ >> tile & 1 ? 0 : W::kTag; }
  // The column whose states this lane multiplies.
  __device__ __forceinline__ int column(int tile) const { return first_column_ + tile * kColumns + lane_ / 4; }

  const ForwardRun& run_;
  const int first_column_;
  const bool begins_run_;
  uint32_t initial_ = 0, zero_ = 0;  // column tiles whose column begins, and those where it begins with zeros
};

template <class E, int Octets, int Blocks>
__global__ void __launch_bounds__(kTeamWarps* kWarpThreads, 1) persistent_forward(const ForwardParams p) {
  using W = Words<E>;
  constexpr int kMTiles = forward_m_tiles(Octets);
  const TeamPlace at(p, Octets);
  const ForwardRun& run = p.run[at.run];
  const int tiles = p.team.tiles, cell_tiles = Octets * tiles;

  unsigned char* const shared = shared_memory();
  float4* const partial = reinterpret_cast<float4*>(shared);  // [2][cell tile][kGateSums]
  unsigned char* const shared_weights = shared + 2 * partial_bytes(cell_tiles, kGates);
  unsigned char* const tile_memory = shared_weights + kTeamWarps * shared_weight_bytes(kMTiles, Blocks, E::kParts);

  const auto weight_rows = [&](int m, int half, int block) {
    return forward_weights<E>(run.w_hh, p.hidden, p.row_stride, m % 2 * 2 + half, (at.first_octet + m / 2) * kOctet,
                              block * kTeamWarps + at.warp, at.lane);
  };
  const ResidentWeights<E, kMTiles, Blocks, register_weight_tiles(kMTiles, Blocks, E::kParts)> weights(
      reinterpret_cast<uint4*>(shared_weights + shared_weight_bytes(kMTiles, Blocks, E::kParts) * at.warp), at.lane,
      weight_rows);

  const int buffer_vectors = forward_blocks(p.hidden, W::kBytes) * tiles * kWarpThreads;
  ExchangedH<E> states(p, static_cast<uint4*>(p.exchange) + static_cast<int64_t>(at.team) * 2 * buffer_vectors, at.warp,
                       at.lane);
  // Warps without cells have a tile too, whose inputs they never copy.
  ForwardTile<E, 1> cells(p, run, at.has_cells ? at.octet * kOctet : p.hidden, at.first_column + at.tile * kColumns,
                          at.lane, tile_memory + at.warp * forward_tile_bytes(W::kBytes));

  for (int n = run.begin; n < run.end; ++n) {
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
    if (n == run.begin || (run.reverse && p.sequences.lengths != nullptr)) {
      BeginningH<E> beginning(states, run, at.first_column, n);
      multiply_tiles(weights, tiles, beginning, begin_cells, put_sums);
    } else {
      multiply_tiles(weights, tiles, states, begin_cells, put_sums);
    }
    block_barrier();
    if (!at.has_cells) continue;
    add_gate_sums<kMTiles * Blocks <= 8 ? 4 : 2>(sums_of_step, at.warp, at.lane, a[0]);
    cells.compute(n, a);
    typename ForwardTile<E, 1>::Outputs h;
    cells.outputs(h);
    if (n + 1 < run.end) states.publish(n, at.octet, at.tile, h[0]);
    cells.end(n, a);
  }
  if (at.has_cells) cells.finish();
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
