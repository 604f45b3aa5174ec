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

// h as the team exchanges it: 16-bit or 32-bit elements, tagged in the top bit of the exponent, which is 0 in every
// |h| <= 1. A NaN travels as a value between 1 and 2, which no h has. The first step of a sequence reads h_0 itself,
// which may have any value.
template <class E>
class ExchangedH {
 public:
  using W = Words<E>;
  static constexpr bool kPolls = true;

  __device__ __forceinline__ ExchangedH(const ForwardParams& params, const ForwardRun& run, uint4* team_exchange,
                                        int first_column, int warp, int lane)
      : p_(params),
        run_(run),
        order_{run.reverse},
        exchange_(team_exchange),
        first_column_(first_column),
        warp_(warp),
        lane_(lane) {
    const int octets = ceil_div(p_.hidden, kOctet);
    const int first = warp * W::kPerBlock + lane % 4 * W::kPerVector, stride = kTeamWarps * W::kPerBlock;
    blocks_ = first < octets * kOctet ? ceil_div(octets * kOctet - first, stride) : 0;
    all_blocks_ = forward_blocks(p_.hidden, W::kBytes);
  }

  // The following calls are about the product of the n-th step.
  __device__ __forceinline__ void set_step(int n) {
    from_ = buffer(n - 1) + warp_ * kWarpThreads + lane_;
    tag_ = tag_of(n - 1) ? W::kTag : 0;
    initial_ = zero_ = 0;
    // All read their initial states in the first step; in reverse, shorter sequences begin later.
    const bool ragged = order_.reverse && p_.sequences.lengths != nullptr, first = n == run_.begin;
    if (!first && !ragged) return;
    if (first) initial_ = kFirst;
    for (int tile = 0; tile < p_.team.tiles; ++tile) {
      const int b = column(tile), length = length_of(p_.sequences, b), t = order_.time(n, p_.sequences.steps);
      const bool begins = t < length && (first || order_.first(t, length));
      if (begins || first) initial_ |= 1u << tile;
      if (!begins || order_.restarts(p_.sequences, t, b, length)) zero_ |= 1u << tile;
    }
  }

  __device__ __forceinline__ void issue(uint4& state, int tile, int block) const {
    state = uint4{};
    if (block >= blocks_) return;
    const uint4* from = from_ + (tile * all_blocks_ + block * kTeamWarps) * kWarpThreads;
    if (initial_ >> tile & 1) {
      if (zero_ >> tile & 1) return;
      // Later on, others may already write what the next run begins with.
      const void* const states = initial_ & kFirst ? initial_h(run_) : run_.h_0;
      from = row_vector<E>(states, column(tile), p_.row_stride, block * kTeamWarps + warp_, lane_);
    }
    state = load_relaxed(from);
  }

  __device__ __forceinline__ bool is_stale(const uint4& state, int tile, int block) const {
    return (tag_errors(state, tag_) & tagged(tile, block)) != 0;
  }

  __device__ __forceinline__ void accept(uint4& state, int tile, int block) {
    const uint32_t tags = tagged(tile, block);
    above_one_ |=
        tags & (is_above_one(state.x) | is_above_one(state.y) | is_above_one(state.z) | is_above_one(state.w));
    state.x &= ~tags;
    state.y &= ~tags;
    state.z &= ~tags;
    state.w &= ~tags;
    if constexpr (!W::kHalf)
      if (tags == 0) state = as_factors<E>(state);  // initial; who publishes a state makes it a factor
  }

  // Makes the sums of columns NaN in which a NaN has arrived.
  template <int MTiles>
  __device__ __forceinline__ void poison(float (&sums)[MTiles][4]) {
    const uint32_t lanes = warp_ballot(above_one_ != 0);
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
    uint32_t* const to = reinterpret_cast<uint32_t*>(buffer(n) + tile * all_blocks_ * kWarpThreads);
    const uint32_t tag = tag_of(n) ? W::kTag : 0;
    put_h<E>(octet, lane_, h, [&](int word, uint32_t value) { store_relaxed(to + word, (value & ~W::kTag) | tag); });
  }

 private:
  // The tag bits, if this state has any.
  __device__ __forceinline__ uint32_t tagged(int tile, int block) const {
    return block < blocks_ && !(initial_ >> tile & 1) ? W::kTag : 0;
  }
  // In the tag bits: whether an |h| is greater than 1.
  static __device__ __forceinline__ uint32_t is_above_one(uint32_t word) {
    return (word & W::kMagnitude) + W::kUpToTag;
  }
  // [tile][block][lane], of what the n-th step has made.
  __device__ __forceinline__ uint4* buffer(int n) const {
    return exchange_ + (n & 1) * p_.team.tiles * all_blocks_ * kWarpThreads;
  }
  // The column whose states this lane multiplies.
  __device__ __forceinline__ int column(int tile) const { return first_column_ + tile * kColumns + lane_ / 4; }

  const ForwardParams& p_;
  const ForwardRun& run_;
  const Order order_;
  uint4* const exchange_;
  const int first_column_, warp_, lane_;
  int blocks_, all_blocks_;  // of K: of this lane, of all warps
  const uint4* from_ = nullptr;
  uint32_t tag_ = 0, above_one_ = 0;
  // Column tiles whose column begins, and those where it begins with zeros; whether this is the run's first step.
  uint32_t initial_ = 0, zero_ = 0;
  static constexpr uint32_t kFirst = 0x80000000u;
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
  ExchangedH<E> states(p, run, static_cast<uint4*>(p.exchange) + static_cast<int64_t>(at.team) * 2 * buffer_vectors,
                       at.first_column, at.warp, at.lane);
  // Warps without cells have a tile too, whose inputs they never copy.
  ForwardTile<E, 1> cells(p, run, at.has_cells ? at.octet * kOctet : p.hidden, at.first_column + at.tile * kColumns,
                          at.lane, tile_memory + at.warp * forward_tile_bytes(W::kBytes));

  for (int n = run.begin; n < run.end; ++n) {
    float4* const sums_of_step = partial + (n & 1) * cell_tiles * kGateSums;
    typename ForwardTile<E, 1>::Gates a;
    states.set_step(n);
    multiply_tiles(
        weights, tiles, states,
        [&] {
          if (at.has_cells) cells.begin(n, a);
        },
        [&](int column_tile, const float (&sums)[kMTiles][4]) {
#pragma unroll
          for (int o = 0; o < Octets; ++o)
            put_gate_sums(sums_of_step, column_tile * Octets + o, at.warp, at.lane, sums[2 * o], sums[2 * o + 1]);
        });
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
