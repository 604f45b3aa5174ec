// What both passes of the warpgroup family share. As in the persistent family, a team of CTAs keeps the recurrent
// weights of a layer and exchanges states through L2 after every step (see product.cuh). But the product is one of
// Hopper's warpgroups, which read the states from shared memory: so a CTA adds up two sums, not eight, and can have
// many rows of the batch.
//
// Each of the two warpgroups of a CTA has half of the CTA's part of K, and all rows of its weights, which are one or
// two tiles of 64 rows. Of such a tile, warp w has rows 16 w ... 16 w + 15.
//
// States travel in packets of 16 bytes, which relaxed accesses store and load as a whole. One of their bits is the tag.
// A packet is also what a row of a factor in shared memory consists of: what arrives is stored there as it is.
#pragma once

#include <type_traits>

#include "dispatch.cuh"
#include "elements.cuh"
#include "layout.h"
#include "product.cuh"
#include "wgmma.cuh"

namespace fastlstm::cuda {

constexpr int kBlockThreads = kWarpgroups * kWarpgroupThreads;
constexpr int kStepsOfBlock = 2;  // products along a block of K, of 32 bytes each
constexpr int kPacketsOfBlock = kBlockBytes / 16;
constexpr int kWordsOfPacket = 4;

template <class E, int Tiles, class A>
__device__ __forceinline__ void multiply(float (&sums)[Tiles][4], const A& a, const SharedFactor& b, bool accumulate) {
  if constexpr (std::is_same_v<E, Bf16>)
    wgmma_bf16(sums, a, b, accumulate);
  else if constexpr (std::is_same_v<E, Fp16>)
    wgmma_fp16(sums, a, b, accumulate);
  else
    wgmma_tf32(sums, a, b, accumulate);
}

// The place of a thread in its CTA. The warp comes from a lane, so that the compiler knows it to be the same for all:
// what describes factors in shared memory then stays in uniform registers, where products read it without waiting for
// others.
struct WarpgroupPlace {
  __device__ __forceinline__ WarpgroupPlace()
      : lane(thread_index() % kWarpThreads),
        warp(warp_shuffle(thread_index() / kWarpThreads, 0)),
        warpgroup(warp / kWarpgroupWarps),
        warp_of_group(warp % kWarpgroupWarps) {}

  int lane, warp, warpgroup, warp_of_group;
};

// The weights of a warpgroup: in registers, and what these cannot hold in shared memory, as [tile of 64 rows][block]
// times [vector of 16 bytes][row].
template <class E, int MTiles, int Blocks, int InRegisters>
class WarpgroupWeights {
 public:
  static constexpr int kMTiles = MTiles;

  // rows(m, i): row i of this warp in tile m, of which word(j) is word j of this warpgroup's part of K, of a block for
  // which load_block(block) was called last.
  template <class Rows, class LoadBlock>
  __device__ __forceinline__ WarpgroupWeights(const WarpgroupPlace& at, uint4* shared, const Rows& rows,
                                              const LoadBlock& load_block)
      : shared_(shared) {
    constexpr int kBlockWords = kPacketsOfBlock * kWordsOfPacket;
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
      const auto upper = rows(m, at.lane / 4), lower = rows(m, at.lane / 4 + 8);
#pragma unroll
      for (int block = 0; block < InRegisters; ++block) {
        load_block(block);
#pragma unroll
        for (int step = block * kStepsOfBlock; step < (block + 1) * kStepsOfBlock; ++step) {
          const int word = step * 2 * kWordsOfPacket + at.lane % 4;
          registers_[m][step][0] = E::part(upper.word(word), 0);
          registers_[m][step][1] = E::part(lower.word(word), 0);
          registers_[m][step][2] = E::part(upper.word(word + kWordsOfPacket), 0);
          registers_[m][step][3] = E::part(lower.word(word + kWordsOfPacket), 0);
        }
      }
      const int row = at.lane / 2;
      const auto from = rows(m, row);
#pragma unroll 1
      for (int block = InRegisters; block < Blocks; ++block) {
        load_block(block);
#pragma unroll
        for (int i = 0; i < kPacketsOfBlock / 2; ++i) {
          const int packet = at.lane % 2 * (kPacketsOfBlock / 2) + i;
          uint32_t words[kWordsOfPacket];
#pragma unroll
          for (int j = 0; j < kWordsOfPacket; ++j)
            words[j] = E::part(from.word(block * kBlockWords + packet * kWordsOfPacket + j), 0);
          const int vector = m * kSharedVectors + (block - InRegisters) * kPacketsOfBlock + packet;
          store_factor(shared_ + vector * kWarpgroupRows + at.warp_of_group * 16 + row,
                       {words[0], words[1], words[2], words[3]});
        }
      }
    }
    fence_factors();
  }

  // Starts to multiply a step along K: sums[m] = or += weights times `states`.
  template <int Tiles>
  __device__ __forceinline__ void multiply_step(float (&sums)[MTiles][Tiles][4], int step, const SharedFactor& states,
                                                bool accumulate) const {
#pragma unroll
    for (int m = 0; m < MTiles; ++m) {
      if (step < InRegisters * kStepsOfBlock) {
        multiply<E, Tiles>(sums[m], registers_[m][step % (InRegisters * kStepsOfBlock)], states, accumulate);
      } else {
        const int vector = m * kSharedVectors + (step - InRegisters * kStepsOfBlock) * 2;
        multiply<E, Tiles>(sums[m], SharedFactor(shared_, kWarpgroupRows, kOctet).from(vector * kWarpgroupRows), states,
                           accumulate);
      }
    }
  }

 private:
  static constexpr int kSharedVectors = (Blocks - InRegisters) * kPacketsOfBlock;

  uint32_t registers_[MTiles][InRegisters * kStepsOfBlock][4];
  uint4* const shared_;
};

// How the last word of a packet has its tag: in some bits.
template <uint32_t Bits>
struct TagBits {
  static constexpr uint32_t kBits = Bits;

  // A tag as a word has it.
  static __device__ __forceinline__ uint32_t of(bool tag) { return tag ? kBits : 0; }
  // Not 0 if the word has the other tag; `tag` as of() gives it.
  static __device__ __forceinline__ uint32_t wrong(uint32_t word, uint32_t tag) { return (word ^ tag) & kBits; }
  static __device__ __forceinline__ uint32_t with(uint32_t word, bool tag) { return (word & ~kBits) | of(tag); }
};

// What lanes without a packet load, with both tags: a value that is chosen after a load would have to wait for it.
template <class Tag>
__device__ const AbsentStates absent_packets = {{{0, 0, 0, 0}, {0, 0, 0, Tag::kBits}}};

// Packets of states on their way to shared memory: from a team's buffer [tile][block of K][packet][column] into slots
// [tile][block][packet][column]. In a round, a warp of a warpgroup has some pairs of a block and a column tile, and a
// lane one packet of each.
//
// Tag: the TagBits of a packet, which say what step it belongs to; Tag::removed() is its last word without them.
template <class Tag, int Tiles, int RoundBlocks>
class ArrivingPackets {
 public:
  // first_block: of K, of this warpgroup. packets: how many there are along K.
  __device__ __forceinline__ ArrivingPackets(const WarpgroupPlace& at, int tile_vectors, int first_block, int packets)
      : warp_(at.warp_of_group),
        lane_(at.lane),
        tile_vectors_(tile_vectors),
        first_block_(first_block + at.warp_of_group / Tiles),
        blocks_(ceil_div(packets - at.lane / kColumns, kPacketsOfBlock)) {}

  // The following calls are about what lies in this buffer, when its tags are these.
  __device__ __forceinline__ void set(const uint4* buffer, bool tag) {
    from_ = opaque(buffer + warp_ % Tiles * tile_vectors_ + first_block_ * kWarpThreads + lane_);
    tag_ = Tag::of(tag);
  }

  // Starts to load the states of a round.
  __device__ __forceinline__ void load(int round) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) load(round, i);
  }

  // Waits for them and puts them into `slot`.
  __device__ __forceinline__ void receive(int round, uint4* slot) {
    SpinLimit limit;
    for (;;) {
      uint32_t wrong = 0;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) wrong |= this->wrong(states_[i]);
      if (warp_all(wrong == 0)) break;
      // Whoever asked for all of them again would wait for what L2 can deliver.
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (warp_any(this->wrong(states_[i]) != 0)) load(round, i);
      limit.tick();
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      states_[i].w = Tag::removed(states_[i].w);
      store_factor(place(slot, i), states_[i]);
    }
  }

  // Of a round, this warp has pair i = 0, 1, ...: of tile warp_ % Tiles and every fourth one from there on, in turn,
  // and of block warp_ / Tiles and those from there on.
  static constexpr int kLoads = RoundBlocks * Tiles / kWarpgroupWarps;
  static constexpr int kTilesOfWarp = Tiles > kWarpgroupWarps ? Tiles / kWarpgroupWarps : 1;

  // Not 0 if a packet is not that of the step.
  __device__ __forceinline__ uint32_t wrong(const uint4& packet) const { return Tag::wrong(packet.w, tag_); }

  __device__ __forceinline__ bool exists(int round, int i) const { return block(round, i) < blocks_; }
  __device__ __forceinline__ const uint4* from(int round, int i) const {
    return from_ + i % kTilesOfWarp * kWarpgroupWarps * tile_vectors_ +
           (round * RoundBlocks + later_blocks(i)) * kWarpThreads;
  }
  __device__ __forceinline__ uint4* place(uint4* slot, int i) const {
    return slot + (tile(i) * RoundBlocks + warp_ / Tiles + later_blocks(i)) * kWarpThreads + lane_;
  }
  // Of the layer, the block and the column tile of pair i; the column of the tile, and the packet of the block.
  __device__ __forceinline__ int block(int round, int i) const {
    return first_block_ + round * RoundBlocks + later_blocks(i);
  }
  __device__ __forceinline__ int tile(int i) const { return warp_ % Tiles + i % kTilesOfWarp * kWarpgroupWarps; }
  __device__ __forceinline__ int column() const { return lane_ % kColumns; }
  __device__ __forceinline__ int packet() const { return lane_ / kColumns; }

 private:
  __device__ __forceinline__ void load(int round, int i) {
    states_[i] = load_relaxed_packet(exists(round, i) ? from(round, i) : &absent_packets<Tag>.of_tag[tag_ != 0]);
  }
  static constexpr int later_blocks(int i) {
    constexpr int kWarpsOfTile = Tiles < kWarpgroupWarps ? kWarpgroupWarps / Tiles : 1;
    return i / kTilesOfWarp * kWarpsOfTile;
  }

  const int warp_, lane_, tile_vectors_, first_block_, blocks_;  // the last: of K, that have this lane's packet
  uint32_t tag_ = 0;
  const uint4* from_ = nullptr;
  uint4 states_[kLoads];
};

// sums = weights times the states that go through `slots` in rounds: arrive(round, slot) puts them there.
template <int RoundBlocks, int Slots, int Rounds, class Weights, int Tiles, class Arrive>
__device__ __forceinline__ void multiply_rounds(const Weights& weights, float (&sums)[Weights::kMTiles][Tiles][4],
                                                int warpgroup, uint4* slots, const Arrive& arrive) {
  constexpr int kSlotVectors = RoundBlocks * Tiles * kWarpThreads, kSteps = RoundBlocks * kStepsOfBlock;
#pragma unroll
  for (int round = 0; round < Rounds; ++round) {
    uint4* const slot = slots + round % Slots * kSlotVectors;
    arrive(round, slot);
    fence_factors();
    // The next round may overwrite what all but the newest products read.
    if (Slots < Rounds && round > 0) products_wait();
    warpgroup_barrier(warpgroup);
    products_begin();
    const SharedFactor states(slot, kColumns, RoundBlocks * kWarpThreads);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      weights.multiply_step(sums, round * kSteps + step, states.from(step * 2 * kColumns), round + step > 0);
    products_commit();
  }
}

// Launches the kernel of a shape, Kernels<E>::kernel<shape>(), in teams of so many CTAs; `pass` is what it has.
template <const auto& Variants, template <class E> class Kernels, class Params>
cudaError_t launch_warpgroups(Element element, const Params& params, int ctas,
                              WarpgroupPass (*pass)(const TeamShape&, int element_bytes), cudaStream_t stream) {
  return with_mma_element(element, [&]<class E>(E) {
    if constexpr (E::kParts > 1) {
      return cudaErrorInvalidValue;
    } else {
      const LaunchShape shape = {params.runs * params.groups * ctas, kBlockThreads,
                                 pass(params.team, Words<E>::kBytes).shared_bytes, true};
      return launch(find_variant<Variants, Kernels<E>>(params.team), shape, stream, params);
    }
  });
}

}  // namespace fastlstm::cuda
