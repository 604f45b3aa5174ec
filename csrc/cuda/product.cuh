// The product of weights that stay in a CTA with the states that the CTAs of a team exchange: the heart of the
// persistent family.
//
// All warps of a CTA have all its rows of the weights, each for its own blocks of K. So each element of the state is
// loaded once per CTA, straight into the register that an MMA reads, and the sums of the warps are added in shared
// memory afterwards.
//
// States are exchanged through L2 as data that are their own flag: a few of their bits, the tag, say which step they
// belong to, and a reader asks again until all tags are right. There are two buffers, and step n writes to buffer n % 2
// with tag n / 2 % 2. Two are enough: who overwrites step n with step n + 2 has seen all of step n + 1, and a CTA
// publishes its part of that only after all its warps have read step n (they meet at a barrier in between).
#pragma once

#include "weights.cuh"

namespace fastlstm::cuda {

// What a thread derives from its place in the grid: CTAs of a team in turn, then teams of a run, then runs.
struct TeamPlace {
  template <class Params>
  __device__ __forceinline__ TeamPlace(const Params& p, const TeamShape& shape, int m_tiles, int parts)
      : lane(thread_index() % kWarpThreads), warp(thread_index() / kWarpThreads) {
    const int octets = shape.octets, ctas = team_ctas(p.hidden, octets);
    team = block_index() / ctas;
    run = team / p.groups;
    first_octet = block_index() % ctas * octets;
    first_column = p.first_column + team % p.groups * p.team.tiles * kColumns;
    const int cell_tiles = octets * p.team.tiles;
    helped = has_helpers(shape, m_tiles, parts);
    cell_tile = warp < cell_tiles ? warp : warp - cell_tiles;
    octet = first_octet + cell_tile % octets;
    tile = cell_tile / octets;
    const bool exists = cell_tile < cell_tiles && octet * kOctet < p.hidden;
    has_cells = exists && warp < cell_tiles;
    moves = exists && (helped ? warp >= cell_tiles : warp < cell_tiles);
  }

  int lane, warp;
  int team, run;                  // of all teams of the grid
  int first_octet, first_column;  // of the CTA, of the team
  int cell_tile, octet, tile;     // of the CTA, of the layer, of the team: whose cells this warp
  bool has_cells, moves;          // computes; whose inputs and results it moves from and to memory:
  bool helped;                    // another warp's, so that those with cells go on with the next product
};

__device__ __forceinline__ bool tag_of(int step) { return (step >> 1) & 1; }

// Of `n`, not larger than `most`.
constexpr int largest_divisor(int n, int most) {
  while (n % most != 0) --most;
  return most;
}

// sink(tile, sums[MTiles][4]) for every column tile: the weights times that tile's states.
//
// `source` supplies the states: load(states, tile, first_block) starts to, of consecutive blocks; if it polls,
// wrong_tags(state, tile) is zero once the state has arrived; accept(state, tile) clears its tags before the product;
// poison(sums) comes after the last block of a tile. Its kAheadOfMany states are asked for at a time where weights take
// half of the registers. meanwhile() runs while the first states are on their way.
template <class Weights, class Source, class Meanwhile, class Sink>
__device__ __forceinline__ void multiply_tiles(const Weights& weights, int tiles, Source& source,
                                               const Meanwhile& meanwhile, const Sink& sink) {
  constexpr int kMTiles = Weights::kMTiles, kBlocks = Weights::kBlocks;
  // A round is what registers are left for: a few tiles, or a part of the blocks of one. Its loads are issued while the
  // products of the round before are taken, and it is waited for as a whole: a load takes several hundred cycles, and
  // what was asked for too early has to be asked for again.
  // Sums of many tiles of rows take registers too.
  constexpr int kMany = kMTiles > 4 && Source::kAheadOfMany > 1 ? Source::kAheadOfMany / 2 : Source::kAheadOfMany;
  constexpr int kMost = kMTiles * kBlocks <= 8 ? 8 : kMTiles * kBlocks <= 16 || kMany < 4 ? kMany : 4;
  constexpr int kRoundBlocks = largest_divisor(kBlocks, kMost), kRoundTiles = kMost / kRoundBlocks;
  // A single tile of rows would leave the tensor cores waiting for their own sums: it adds up two sets in turn.
  constexpr int kSets = kMTiles <= 2 ? 2 : 1;

  static_assert(kRoundTiles == 1 || kRoundBlocks == kBlocks, "the sums of a tile are finished before the next one's");

  uint4 states[kRoundTiles][kRoundBlocks];
  const auto load_round = [&](int first_tile, int first_block) {
#pragma unroll
    for (int i = 0; i < kRoundTiles; ++i) {
      if (first_tile + i >= tiles) break;
      source.load(states[i], first_tile + i, first_block);
    }
  };

  load_round(0, 0);
  meanwhile();
#pragma unroll 1
  for (int first = 0; first < tiles; first += kRoundTiles) {
    float sums[kSets][kMTiles][4] = {};
#pragma unroll
    for (int first_block = 0; first_block < kBlocks; first_block += kRoundBlocks) {
      if constexpr (Source::kPolls) {
        SpinLimit limit;
        for (;;) {
          uint32_t wrong = 0;
#pragma unroll
          for (int i = 0; i < kRoundTiles; ++i) {
            if (first + i >= tiles) break;
#pragma unroll
            for (int b = 0; b < kRoundBlocks; ++b) wrong |= source.wrong_tags(states[i][b], first + i);
          }
          if (warp_all(wrong == 0)) break;
          // To ask for all of them again takes no longer than to find out which are missing.
          load_round(first, first_block);
          limit.tick();
        }
      }
      const bool last_blocks = first_block + kRoundBlocks == kBlocks;
#pragma unroll
      for (int i = 0; i < kRoundTiles; ++i) {
        const int tile = first + i;
        if (tile >= tiles) break;
#pragma unroll
        for (int b = 0; b < kRoundBlocks; ++b) {
          source.accept(states[i][b], tile);
          weights.multiply(sums, first_block + b, states[i][b]);
        }
        if (!last_blocks) {
          source.load(states[i], tile, first_block + kRoundBlocks);
          continue;
        }
        if (tile + kRoundTiles < tiles) source.load(states[i], tile + kRoundTiles, 0);
        if constexpr (kSets == 2) {
#pragma unroll
          for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[0][m][k] += sums[1][m][k];
        }
        source.poison(sums[0]);
        sink(tile, sums[0]);
#pragma unroll
        for (int set = 0; set < kSets; ++set)
#pragma unroll
          for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[set][m][k] = 0.f;
      }
    }
  }
}

// What a lane of the persistent family loads where it has no block of K: zeros with the right tag, as if they had
// arrived.
struct AbsentStates {
  uint4 of_tag[2];
};

// Zero where all four words carry the tag.
__device__ __forceinline__ uint32_t tag_errors(const uint4& v, uint32_t tag) {
  return (v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag);
}

}  // namespace fastlstm::cuda
