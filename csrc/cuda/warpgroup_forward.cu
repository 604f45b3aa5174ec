// The warpgroup family, forward. A CTA of a team owns `octets` * 8 hidden units, all four gates of them, and all of K.
// Of a tile of 64 rows, rows i and i + 8 of a warp are two gates of one unit: i and f, or g and o. With 4 octets, a
// warp has both halves of one octet in two tiles; with 2, warps 2j and 2j + 1 have the halves of octet j.
//
// Called by the driver for a few runs at the same time. All CTAs of the grid have to run at the same time.
#include "launchers.h"

#ifdef FASTLSTM_WARPGROUPS  // compiled for sm_90a

#include "forward_tile.cuh"
#include "warpgroup.cuh"

namespace fastlstm::cuda {

namespace {

// The tag of a packet of h. In 16-bit elements, it is the top bit of the exponent of the last but one, which is 0 in
// every |h| <= 1; a NaN of that element travels as a value between 1 and 2, which no h has. Of TF32, it is a bit that
// products do not see.
template <class E>
struct TagOfH : TagBits<Words<E>::kHalf ? 0x4000u : 1u> {
  static __device__ __forceinline__ uint32_t removed(uint32_t word) {
    if constexpr (!Words<E>::kHalf) return word;
    const uint32_t value = word & ~TagOfH::kBits;
    // Carries into that bit from a magnitude greater than 1.
    return value | ((value + (0x3fffu - E::kOne)) & TagOfH::kBits);
  }
};

// Which octet of a CTA, and which half of its gates, a warp of a warpgroup has in tile m.
template <int Octets>
struct RowsOfWarp {
  __device__ __forceinline__ RowsOfWarp(int warp_of_group, int m) {
    const int pair = Octets == 4 ? 2 * warp_of_group + m : warp_of_group;
    octet = pair / 2;
    half = pair % 2;
  }
  int octet, half;
};

// A row of W_hh: of a gate of a unit, words of K from `first` on; zero where there is none.
template <class E>
class GateRow {
 public:
  __device__ __forceinline__ GateRow(const ForwardParams& p, const ForwardRun& run, int gate, int unit, int first) {
    constexpr int kElements = sizeof(uint32_t) / Words<E>::kBytes;
    const int stride = p.row_stride / kElements;
    words_ = unit < p.hidden ? stride - first : 0;
    first_ = static_cast<const uint32_t*>(run.w_hh) + (static_cast<int64_t>(gate) * p.hidden + unit) * stride + first;
  }
  __device__ __forceinline__ uint32_t word(int i) const { return i < words_ ? first_[i] : 0; }

 private:
  const uint32_t* first_;
  int words_;
};

// h on its way to shared memory.
template <class E, int Tiles, int RoundBlocks>
class ArrivingH : public ArrivingPackets<TagOfH<E>, Tiles, RoundBlocks> {
  using Base = ArrivingPackets<TagOfH<E>, Tiles, RoundBlocks>;

 public:
  using W = Words<E>;

  __device__ __forceinline__ ArrivingH(const ForwardParams& p, const ForwardRun& run, const WarpgroupPlace& at,
                                       int first_block, int first_column)
      : Base(at, forward_blocks(p.hidden, W::kBytes) * kWarpThreads, first_block, p.hidden / W::kPerVector),
        p_(p),
        run_(run),
        first_column_(first_column) {}

  // Whether a sequence of the columns that this warp loads begins with the n-th step. All read their initial states in
  // the first one; in reverse, shorter sequences begin later.
  __device__ __forceinline__ bool begins(int n) const {
    if (n == run_.begin) return true;
    if (!run_.reverse || p_.sequences.lengths == nullptr) return false;
    const int t = Order{true}.time(n, p_.sequences.steps);
    bool any = false;
#pragma unroll
    for (int i = 0; i < Base::kTilesOfWarp; ++i) any = any || t == length_of(p_.sequences, column(i)) - 1;
    return warp_any(any);
  }

  // load() and receive() for such a step: one state after the other, for it is rare.
  __device__ __forceinline__ void receive_beginning(int n, int round, uint4* slot) const {
    const bool begins_run = n == run_.begin;
    const Order order = {run_.reverse};
    const int t = order.time(n, p_.sequences.steps);
#pragma unroll 1
    for (int i = 0; i < Base::kLoads; ++i) {
      const int b = column(i), length = length_of(p_.sequences, b);
      const bool first = t < length && (begins_run || order.first(t, length));
      uint4 state = {};
      // Who begins waits, too, for states that it does not read: whoever publishes a step has to have seen all of the
      // one before, or would overwrite what others still read.
      if (!begins_run && Base::exists(round, i)) {
        SpinLimit limit;
        while (Base::wrong(state = load_relaxed_packet(Base::from(round, i))) != 0) limit.tick();
        state.w = TagOfH<E>::removed(state.w);
      }
      if (first) state = {};
      if (first && Base::exists(round, i) && !order.restarts(p_.sequences, t, b, length)) {
        // Later on, others may already write what the next run begins with.
        const void* const h_0 = begins_run ? initial_h(run_) : run_.h_0;
        const auto* const row = static_cast<const typename E::Storage*>(h_0) + static_cast<int64_t>(b) * p_.row_stride;
        const int k = Base::block(round, i) * W::kPerBlock + Base::packet() * W::kPerVector;
        state = load_relaxed(reinterpret_cast<const uint4*>(row + k));
        state = {E::part(state.x, 0), E::part(state.y, 0), E::part(state.z, 0), E::part(state.w, 0)};
      }
      store_factor(Base::place(slot, i), state);
    }
  }

 private:
  __device__ __forceinline__ int column(int i) const {
    return first_column_ + Base::tile(i) * kColumns + Base::column();
  }

  const ForwardParams& p_;
  const ForwardRun& run_;
  const int first_column_;
};

// Publishes h of an octet and a column tile, as packets in a buffer [packet][column]: h[e] of unit lane / 4 and column
// 2 (lane % 4) + e. `octet` counts from the first hidden unit.
template <class E>
__device__ __forceinline__ void publish_h(uint4* buffer, int octet, int lane, bool tag, const float (&h)[2]) {
  const auto put = [&](int packet, int column, const uint32_t (&words)[4]) {
    store_relaxed_packet(buffer + packet * kColumns + column,
                         {words[0], words[1], words[2], TagOfH<E>::with(words[3], tag)});
  };
  uint32_t words[4];
  if constexpr (Words<E>::kHalf) {
    // Transposed, lane 4 column + q has word q of the octet.
    const auto word = static_cast<int>(transpose_8x8(E::pack(h[0], h[1])));
#pragma unroll
    for (int q = 0; q < 4; ++q) words[q] = static_cast<uint32_t>(warp_shuffle(word, lane / 4 * 4 + q));
    if (lane % 4 == 0) put(octet, lane / 4, words);
  } else {
    // Word i of unit 4 j + i: lanes of unit 4 j gather those of the even columns, those of unit 4 j + 1 the odd ones.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = lane / 16 * 16 + i * 4 + lane % 4;
      const int even = warp_shuffle(static_cast<int>(E::factor(h[0])), from),
                odd = warp_shuffle(static_cast<int>(E::factor(h[1])), from);
      words[i] = static_cast<uint32_t>(lane / 4 % 4 == 0 ? even : odd);
    }
    if (lane / 4 % 4 < 2) put(octet * 2 + lane / 16, 2 * (lane % 4) + lane / 4 % 4, words);
  }
}

// Sums of both warpgroups, each over its half of K, in shared memory: [warpgroup][cell tile][half][lane]; a cell tile
// is octet i % Octets of column tile i / Octets.
template <int Octets, int Tiles>
class GateSums {
 public:
  static constexpr int kVectors = kWarpgroups * Octets * Tiles * 2 * kWarpThreads;  // float4 of a step

  __device__ __forceinline__ explicit GateSums(float4* memory) : memory_(memory) {}

  __device__ __forceinline__ void put(const WarpgroupPlace& at, int m, int tile, const float (&sums)[4]) const {
    const RowsOfWarp<Octets> rows(at.warp_of_group, m);
    *of(at.warpgroup, tile * Octets + rows.octet, rows.half, at.lane) = {sums[0], sums[1], sums[2], sums[3]};
  }
  __device__ __forceinline__ void add_to(float (&a)[2][kGates], int octet, int tile, int lane) const {
#pragma unroll
    for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 part = *of(warpgroup, tile * Octets + octet, half, lane);
        a[0][2 * half] += part.x;
        a[1][2 * half] += part.y;
        a[0][2 * half + 1] += part.z;
        a[1][2 * half + 1] += part.w;
      }
  }

 private:
  __device__ __forceinline__ float4* of(int warpgroup, int cell_tile, int half, int lane) const {
    return memory_ + ((warpgroup * Octets * Tiles + cell_tile) * 2 + half) * kWarpThreads + lane;
  }
  float4* const memory_;
};

template <class E, int Octets, int Blocks, int Tiles>
__global__ void __launch_bounds__(kBlockThreads, 1) warpgroup_forward(const ForwardParams p) {
  constexpr TeamShape kShape = {Octets, Blocks, Tiles};
  constexpr WarpgroupPass kPass = warpgroup_forward_pass(kShape, Words<E>::kBytes);
  constexpr int kRounds = Blocks / kPass.round_blocks, kMTiles = kPass.m_tiles;
  constexpr int kSlotVectors = static_cast<int>(kPass.slot_bytes / sizeof(uint4));
  // A warp computes the cells of a few octets of one column tile.
  constexpr int kOwnOctets = ceil_div(Octets * Tiles, kTeamWarps), kWarpsOfTile = Octets / kOwnOctets;
  using States = ArrivingH<E, Tiles, kPass.round_blocks>;
  using Sums = GateSums<Octets, Tiles>;
  using Cells = ForwardTile<E, kOwnOctets>;

  // Where there are registers for them beside the weights.
  constexpr bool kLoadsEarly = 8 * kMTiles * kPass.register_blocks + 4 * States::kLoads <= 144;

  const WarpgroupPlace at;
  const int ctas = team_ctas(p.hidden, Octets), team = block_index() / ctas;
  const int first_octet = block_index() % ctas * Octets,
            first_column = p.first_column + team % p.groups * Tiles * kColumns;
  const ForwardRun& run = p.run[team / p.groups];

  auto* const all_slots = reinterpret_cast<uint4*>(shared_memory());
  auto* const all_weights = all_slots + kWarpgroups * kPass.slots * kSlotVectors;
  constexpr int kWeightVectors = static_cast<int>(kPass.weight_bytes / sizeof(uint4));
  auto* const sums_memory = reinterpret_cast<float4*>(all_weights + kWarpgroups * kWeightVectors);
  // Sums of two steps: one is still read while the next one's is written.
  auto* const tile_memory = reinterpret_cast<unsigned char*>(sums_memory + 2 * Sums::kVectors);

  const int own_tile = at.warp / kWarpsOfTile, own_octet = at.warp % kWarpsOfTile * kOwnOctets;
  const int own_first_octet = first_octet + own_octet;
  const bool has_cells = own_tile < Tiles && own_first_octet * kOctet < p.hidden;
  Cells cells(p, run, own_first_octet * kOctet, first_column + own_tile * kColumns, at.lane,
              tile_memory + (own_tile * Octets + own_octet) * forward_tile_bytes(Words<E>::kBytes), has_cells);
  const int stored_length = cells.stored_length(), copied_length = cells.copied_length();
  if (has_cells) {
    for (int n = run.begin; n < run.begin + kForwardStages; ++n) cells.copy_aligned_inputs(n, copied_length);
    copy_async_wait<kForwardStages - 1>();
  }
  const int first_block = at.warpgroup * Blocks;
  const WarpgroupWeights<E, kMTiles, Blocks, kPass.register_blocks> weights(
      at, all_weights + at.warpgroup * kWeightVectors,
      [&](int m, int i) {
        const RowsOfWarp<Octets> rows(at.warp_of_group, m);
        return GateRow<E>(p, run, 2 * rows.half + i / kOctet, (first_octet + rows.octet) * kOctet + i % kOctet,
                          first_block * kPacketsOfBlock * kWordsOfPacket);
      },
      [](int) { warp_barrier(); });  // loads that ran further ahead would take registers that there are not
  States states(p, run, at, first_block, first_column);
  const int tile_vectors = forward_blocks(p.hidden, Words<E>::kBytes) * kWarpThreads;
  const auto buffer = [&](int n) {  // of what the n-th step makes
    return static_cast<uint4*>(p.exchange) + static_cast<uint32_t>(2 * team + (n & 1)) * Tiles * tile_vectors;
  };
  block_barrier();

  bool begins = true;
  for (int n = run.begin; n < run.end; ++n) {
    const Sums sums_of_step(sums_memory + (n & 1) * Sums::kVectors);
    float sums[kMTiles][Tiles][4] = {};
    multiply_rounds<kPass.round_blocks, kPass.slots, kRounds>(weights, sums, at.warpgroup,
                                                              all_slots + at.warpgroup * kPass.slots * kSlotVectors,
                                                              [&](int round, uint4* slot) {
                                                                if (begins) {
                                                                  states.receive_beginning(n, round, slot);
                                                                } else {
                                                                  states.receive(round, slot);
                                                                  if (round + 1 < kRounds) states.load(round + 1);
                                                                }
                                                              });
    typename Cells::Gates a;
    // While products are under way, if there are registers.
    if (kOwnOctets == 1 && has_cells) cells.begin(n, a);
    products_wait();
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) sums_of_step.put(at, m, tile, sums[m][tile]);
    if (has_cells) copy_async_wait<kForwardStages - 2>();  // the next step's
    block_barrier();
    if (has_cells) {
      if (kOwnOctets > 1) cells.begin(n, a);
#pragma unroll
      for (int o = 0; o < kOwnOctets; ++o) sums_of_step.add_to(a[o], own_octet + o, own_tile, at.lane);
      cells.compute(n, a);
      if (n + 1 < run.end) {
        typename Cells::States h;
        cells.outputs(h);
#pragma unroll
        for (int o = 0; o < kOwnOctets; ++o)
          if ((own_first_octet + o) * kOctet < p.hidden)
            publish_h<E>(opaque(buffer(n) + own_tile * tile_vectors), own_first_octet + o, at.lane, tag_of(n), h[o]);
      }
    }
    const auto load_next = [&] {
      if (n + 1 == run.end) return;
      states.set(buffer(n), tag_of(n));
      begins = states.begins(n + 1);
      if (!begins) states.load(0);
    };
    if constexpr (kLoadsEarly) load_next();  // states are on their way while results are stored
    if (has_cells) {
      cells.store_aligned(n, a, cells.h(), cells.c(), stored_length);
      if (kOwnOctets > 1) warp_barrier();  // the copies go where begin() has read, behind the last barrier
      cells.copy_aligned_inputs(n + kForwardStages, copied_length);
    }
    if constexpr (!kLoadsEarly) load_next();
  }
  copy_async_wait<0>();
  if (has_cells) cells.finish();
}

template <class E>
struct Kernels {
  template <TeamShape V>
  static auto kernel() {
    return &warpgroup_forward<E, V.octets, V.blocks, V.tiles>;
  }
};

}  // namespace

bool has_warpgroup_kernels() { return true; }

cudaError_t launch_warpgroup_forward(Element element, const ForwardParams& params, cudaStream_t stream) {
  return launch_warpgroups<kWarpgroupForwardVariants, Kernels>(
      element, params, team_ctas(params.hidden, params.team.octets), warpgroup_forward_pass, stream);
}

}  // namespace fastlstm::cuda

#else

namespace fastlstm::cuda {

bool has_warpgroup_kernels() { return false; }

cudaError_t launch_warpgroup_forward(Element, const ForwardParams&, cudaStream_t) { return cudaErrorInvalidValue; }

}  // namespace fastlstm::cuda

#endif  // FASTLSTM_WARPGROUPS
