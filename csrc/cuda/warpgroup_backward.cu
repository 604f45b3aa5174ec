// The warpgroup family, backward. What the CTAs of a team exchange after every step are the gradients of the gates, and
// the weights that they keep are columns of W_hh: d_h of the step before is W_hh^T d_gates.
//
// A product of a warpgroup has 64 rows, here hidden units, of which all gates of all units (K) would be too much for a
// CTA. So four CTAs share 64 units: each has a quarter of K, of which each of its warpgroups has half. Its warp w makes
// sums for 16 of the units, which are those that the w-th of the four CTAs computes the gradients of: they go there
// through L2, tagged as the gradients themselves are. K runs over the gates of all units in the order in which they
// travel, in packets of all gates of two units (elements of 16 bits) or one (TF32).
//
// Two buffers are enough for both exchanges (see product.cuh): whoever publishes sums of a step has met the warps of
// its CTA that took those of the step before, which came from all four.
#include "launchers.h"

#ifdef FASTLSTM_WARPGROUPS  // compiled for sm_90a

#include "backward_tile.cuh"
#include "exchange.cuh"
#include "warpgroup.cuh"

namespace fastlstm::cuda {

namespace {

constexpr int kOctetsOfCta = 2;

// The lowest bit of the last number, which the o gate of every second unit gives up in this product; of TF32, products
// do not see it. The gradients of the weights use the exact ones.
struct LastBit : TagBits<1> {
  static __device__ __forceinline__ uint32_t removed(uint32_t word) { return word & ~kBits; }
};

// Columns of W_hh as rows of the product. A block of K of all 64 of them, as W_hh has it in rows for the gates of some
// units, goes through shared memory: as words of packets, [packet][gate][column].
template <class E>
class TransposedWeights {
 public:
  __device__ __forceinline__ TransposedWeights(const BackwardParams& p, const BackwardRun& run, int first_column,
                                               int first_block, const WarpgroupPlace& at, uint4* memory)
      : p_(p), run_(run), first_column_(first_column), first_block_(first_block), at_(at), memory_(memory) {}

  // By all threads of the warpgroup.
  __device__ __forceinline__ void load_block(int block) const {
    const int thread = thread_index() % kWarpgroupThreads, first_packet = (first_block_ + block) * kPacketsOfBlock;
    warpgroup_barrier(at_.warpgroup);  // all have read what is there
    if constexpr (Words<E>::kHalf) {
      // A thread has a gate of the two units of a packet, 8 columns.
      const int row = thread / kOctet, packet = row / kGates, gate = row % kGates, column = thread % kOctet * kOctet;
      const uint4 low = weights(2 * (first_packet + packet), gate, column),
                  high = weights(2 * (first_packet + packet) + 1, gate, column);
      put(row, column,
          {paired(low.x, high.x), paired(low.x >> 16, high.x >> 16), paired(low.y, high.y),
           paired(low.y >> 16, high.y >> 16)});
      put(row, column + 4,
          {paired(low.z, high.z), paired(low.z >> 16, high.z >> 16), paired(low.w, high.w),
           paired(low.w >> 16, high.w >> 16)});
    } else {
      constexpr int kVectorsOfRow = kWarpgroupRows / 4;
#pragma unroll
      for (int i = thread; i < kPacketsOfBlock * kGates * kVectorsOfRow; i += kWarpgroupThreads) {
        const int row = i / kVectorsOfRow, column = i % kVectorsOfRow * 4;
        put(row, column, weights(first_packet + row / kGates, row % kGates, column));
      }
    }
    warpgroup_barrier(at_.warpgroup);
  }

  class Row {
   public:
    __device__ __forceinline__ Row(const uint4* memory, int column) : memory_(memory), column_(column) {}
    // Gate i % 4 of packet i / 4, counted in the block.
    __device__ __forceinline__ uint32_t word(int i) const {
      const int row = i % (kPacketsOfBlock * kWordsOfPacket);
      return reinterpret_cast<const uint32_t*>(memory_ + place(row, column_))[column_ % 4];
    }

   private:
    const uint4* const memory_;
    const int column_;
  };
  // Row i of this warp.
  __device__ __forceinline__ Row row(int i) const { return Row(memory_, at_.warp_of_group * 16 + i); }

 private:
  // Where four columns of a row lie: so that the gates of a column, which lanes read at the same time, have different
  // banks.
  static __device__ __forceinline__ int place(int row, int column) {
    return row * (kWarpgroupRows / 4) + (column / 4 ^ row % kGates * 2);
  }
  __device__ __forceinline__ void put(int row, int column, const uint4& words) const {
    memory_[place(row, column)] = words;
  }
  static __device__ __forceinline__ uint32_t paired(uint32_t low, uint32_t high) {
    return (low & 0xffffu) | high << 16;
  }
  // 16 bytes of a row of W_hh.
  __device__ __forceinline__ uint4 weights(int unit, int gate, int column) const {
    if (unit >= p_.hidden || first_column_ + column >= p_.row_stride) return uint4{0, 0, 0, 0};
    const int64_t row = static_cast<int64_t>(gate) * p_.hidden + unit;
    const auto* const w_hh = static_cast<const typename E::Storage*>(run_.w_hh);
    return *reinterpret_cast<const uint4*>(w_hh + row * p_.row_stride + first_column_ + column);
  }

  const BackwardParams& p_;
  const BackwardRun& run_;
  const int first_column_, first_block_;
  const WarpgroupPlace& at_;
  uint4* const memory_;
};

// Publishes the gradients of the gates of an octet and a column tile, as packets in a buffer [packet][column].
template <class E>
__device__ __forceinline__ void publish_gradients(uint4* buffer, int octet, int lane, bool tag,
                                                  const float (&d_gates)[2][kGates]) {
  put_gradients<E>(octet, lane, d_gates, [&](int vector, uint4 packet) {
    const int block = vector / kWarpThreads, column = vector % kWarpThreads / 4, in_block = vector % 4;
    packet.w = LastBit::with(packet.w, tag);
    store_relaxed_packet(buffer + block * kWarpThreads + in_block * kColumns + column, packet);
  });
}

// The sums of 16 units over parts of K that the CTAs which share them exchange, in a buffer of the team
// [CTA][column tile][part][lane]: of unit lane / 4 of both octets and columns 2 (lane % 4) + {0, 1}.
template <int Tiles>
struct ExchangedSums {
  static constexpr int kPartVectors = kWarpThreads, kTileVectors = kSumsOfCell * kPartVectors;

  // This lane's of a part of the first column tile.
  static __device__ __forceinline__ uint4* of(uint4* buffer, int cta, int part, int lane) {
    return opaque(buffer + cta * Tiles * kTileVectors + part * kPartVectors + lane);
  }
  // `to`: that of the CTA that the sums are for, [column tile].
  static __device__ __forceinline__ void publish(uint4* to, bool tag, const float (&sums)[Tiles][4]) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const float (&s)[4] = sums[tile];
      // All go without their last bit: a row's gradients do not depend on which column of the batch it is.
      store_relaxed_packet(to + tile * kTileVectors,
                           {LastBit::removed(bits_of(s[0])), LastBit::removed(bits_of(s[1])),
                            LastBit::removed(bits_of(s[2])), LastBit::with(bits_of(s[3]), tag)});
    }
  }
  // Waits for all parts of a column tile, of which `from` is the first, and adds up those of some octets.
  template <int Octets>
  static __device__ __forceinline__ void add(const uint4* from, bool tag, int first_octet, float (&d_h)[Octets][2]) {
    uint4 parts[kSumsOfCell];
#pragma unroll
    for (int i = 0; i < kSumsOfCell; ++i) parts[i] = load_relaxed_packet(from + i * kPartVectors);
    SpinLimit limit;
    for (;;) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < kSumsOfCell; ++i) any = any || LastBit::wrong(parts[i].w, LastBit::of(tag)) != 0;
      if (warp_all(!any)) break;
#pragma unroll
      for (int i = 0; i < kSumsOfCell; ++i)
        if (warp_any(LastBit::wrong(parts[i].w, LastBit::of(tag)) != 0))
          parts[i] = load_relaxed_packet(from + i * kPartVectors);
      limit.tick();
    }
#pragma unroll
    for (int i = 0; i < kSumsOfCell; ++i) {
      const uint32_t sums[kOctetsOfCta][2] = {{parts[i].x, parts[i].y}, {parts[i].z, LastBit::removed(parts[i].w)}};
#pragma unroll
      for (int o = 0; o < Octets; ++o)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          d_h[o][e] += float_of_bits(Octets > 1 ? sums[o][e] : first_octet == 0 ? sums[0][e] : sums[1][e]);
    }
  }
};

template <class E, int Octets, int Blocks, int Tiles>
__global__ void __launch_bounds__(kBlockThreads, 1) warpgroup_backward(const BackwardParams p) {
  static_assert(Octets == kOctetsOfCta);
  constexpr TeamShape kShape = {Octets, Blocks, Tiles};
  constexpr WarpgroupPass kPass = warpgroup_backward_pass(kShape, Words<E>::kBytes);
  constexpr int kRounds = Blocks / kPass.round_blocks;
  constexpr int kSlotVectors = static_cast<int>(kPass.slot_bytes / sizeof(uint4));
  constexpr int kWeightVectors = static_cast<int>(kPass.weight_bytes / sizeof(uint4));
  using Gradients = ArrivingPackets<LastBit, Tiles, kPass.round_blocks>;
  using Sums = ExchangedSums<Tiles>;
  // A warp has the cells of one octet of a column tile, or of both.
  constexpr int kOwnOctets = ceil_div(kOctetsOfCta * Tiles, kTeamWarps), kWarpsOfTile = kOctetsOfCta / kOwnOctets;
  using Cells = BackwardTile<E, kOwnOctets>;

  const WarpgroupPlace at;
  const int ctas = warpgroup_backward_ctas(p.hidden), team = block_index() / ctas, cta = block_index() % ctas;
  const int part_of_k = cta % kPartsOfK, first_of_units = cta - part_of_k;  // of the four CTAs
  const int first_column = p.first_column + team % p.groups * Tiles * kColumns;
  const BackwardRun& run = p.run[team / p.groups];

  auto* const all_slots = reinterpret_cast<uint4*>(shared_memory());
  auto* const all_weights = all_slots + kWarpgroups * kPass.slots * kSlotVectors;
  auto* const tile_memory = reinterpret_cast<unsigned char*>(all_weights + kWarpgroups * kWeightVectors);

  const int own_tile = at.warp / kWarpsOfTile, own_octet = at.warp % kWarpsOfTile;
  const int first_octet = cta * kOctetsOfCta + own_octet;
  const bool has_cells = own_tile < Tiles && first_octet * kOctet < p.hidden;
  Cells cells(p, run, first_octet * kOctet, first_column + own_tile * kColumns, at.lane,
              tile_memory + (own_tile * kOctetsOfCta + own_octet) * backward_tile_bytes(Words<E>::kBytes), has_cells);
  const int stored_length = cells.stored_length(), copied_length = cells.copied_length();
  if (has_cells)
    for (int n = run.begin; n < run.begin + kBackwardStages - 1; ++n) cells.copy_aligned_inputs(n, copied_length);

  const int part = part_of_k * kWarpgroups + at.warpgroup, first_block = part * Blocks;
  uint4* const slots = all_slots + at.warpgroup * kPass.slots * kSlotVectors;
  const TransposedWeights<E> columns(p, run, first_of_units / kPartsOfK * kWarpgroupRows, first_block, at, slots);
  const WarpgroupWeights<E, 1, Blocks, kPass.register_blocks> weights(
      at, all_weights + at.warpgroup * kWeightVectors, [&](int, int i) { return columns.row(i); },
      [&](int block) { columns.load_block(block); });
  const int blocks_of_k = backward_blocks(p.hidden, Words<E>::kBytes), tile_vectors = blocks_of_k * kWarpThreads;
  Gradients gradients(at, tile_vectors, first_block, blocks_of_k * kPacketsOfBlock);
  // Of what the n-th step makes; and of the sums of the product with that.
  auto* const exchange = static_cast<uint4*>(p.exchange);
  const auto buffer = [&](int n) {
    return exchange + static_cast<uint32_t>(2 * team + (n & 1)) * Tiles * tile_vectors;
  };
  auto* const all_sums = exchange + static_cast<uint32_t>(2 * p.runs * p.groups) * Tiles * tile_vectors;
  const auto sums_buffer = [&](int n) {
    return all_sums + static_cast<uint32_t>(2 * team + (n & 1)) * ctas * Tiles * kSumsOfCell * kWarpThreads;
  };
  block_barrier();

  // The product of the last step gives d_h_0, or what the next run begins with.
  const int last_product = run.d_h_0 == nullptr && run.end == p.sequences.steps ? run.end - 1 : run.end;
  for (int n = run.begin; n <= last_product; ++n) {
    const bool has_step = has_cells && n < run.end;
    if (has_step) cells.begin(n);
    if (n > run.begin) {
      float sums[1][Tiles][4] = {};
      multiply_rounds<kPass.round_blocks, kPass.slots, kRounds>(weights, sums, at.warpgroup, slots,
                                                                [&](int round, uint4* slot) {
                                                                  gradients.receive(round, slot);
                                                                  if (round + 1 < kRounds) gradients.load(round + 1);
                                                                });
      products_wait();
      Sums::publish(Sums::of(sums_buffer(n - 1), first_of_units + at.warp_of_group, part, at.lane), tag_of(n - 1),
                    sums[0]);
      if (own_tile < Tiles) {  // without cells, too: so that nobody publishes sums before these were taken
        typename Cells::Products product = {};
        Sums::add(Sums::of(sums_buffer(n - 1) + own_tile * Sums::kTileVectors, cta, 0, at.lane), tag_of(n - 1),
                  own_octet, product);
        if (has_cells) cells.carry(product);
      }
    }
    typename Cells::Gates d_gates;
    if (has_step) {
      copy_async_wait<kBackwardStages - 3>();  // this step's and the next step's
      warp_barrier();
      cells.compute(n, d_gates);
#pragma unroll
      for (int o = 0; o < kOwnOctets; ++o)
        if (n < last_product && (first_octet + o) * kOctet < p.hidden)
          publish_gradients<E>(opaque(buffer(n) + own_tile * tile_vectors), first_octet + o, at.lane, tag_of(n),
                               d_gates[o]);
    }
    block_barrier();
    if (has_step) {
      cells.store_aligned(n, d_gates, stored_length);
      cells.copy_aligned_inputs(n + kBackwardStages - 1, copied_length);
    }
    if (n < last_product) {
      gradients.set(buffer(n), tag_of(n));
      gradients.load(0);
    }
  }
  copy_async_wait<0>();
  if (has_cells) cells.finish();
}

template <class E>
struct Kernels {
  template <TeamShape V>
  static auto kernel() {
    return &warpgroup_backward<E, V.octets, V.blocks, V.tiles>;
  }
};

}  // namespace

cudaError_t launch_warpgroup_backward(Element element, const BackwardParams& params, cudaStream_t stream) {
  return launch_warpgroups<kWarpgroupBackwardVariants, Kernels>(element, params, warpgroup_backward_ctas(params.hidden),
                                                                warpgroup_backward_pass, stream);
}

}  // namespace fastlstm::cuda

#else

namespace fastlstm::cuda {

cudaError_t launch_warpgroup_backward(Element, const BackwardParams&, cudaStream_t) { return cudaErrorInvalidValue; }

}  // namespace fastlstm::cuda

#endif  // FASTLSTM_WARPGROUPS
