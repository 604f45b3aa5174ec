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
  __device__ __forceinline__ TeamPlace(const Params& p, int octets)
      : lane(thread_index() % kWarpThreads), warp(thread_index() / kWarpThreads) {
    const int ctas = team_ctas(p.hidden, octets);
    team = block_index() / ctas;
    run = team / p.groups;
    first_octet = block_index() % ctas * octets;
    first_column = p.first_column + team % p.groups * p.team.tiles * kColumns;
    octet = first_octet + warp % octets;
    tile = warp / octets;
    has_cells = tile < p.team.tiles && octet * kOctet < p.hidden;
  }

  int lane, warp;
  int team, run;                  // of all teams of the grid
  int first_octet, first_column;  // of the CTA, of the team
  int octet, tile;                // whose cells this warp computes,
  bool has_cells;                 // if it does
};

__device__ __forceinline__ bool tag_of(int step) { return (step >> 1) & 1; }

// Waits until all states of a round have arrived, asking again only for those that have not: polling everything would
// take bandwidth from the stores that are waited for.
template <int RoundBlocks, int States, class Source>
__device__ __forceinline__ void await_round(uint4 (&states)[States], Source& source, int first_tile, int first_block,
                                            int tiles) {
  const auto for_each = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < States; ++i)
      if (first_tile + i / RoundBlocks < tiles)
        f(states[i], first_tile + i / RoundBlocks, first_block + i % RoundBlocks);
  };
  SpinLimit limit;
  for (;;) {
    bool stale = false;
    for_each([&](uint4& state, int tile, int block) { stale = stale || source.is_stale(state, tile, block); });
    if (warp_all(!stale)) break;
    for_each([&](uint4& state, int tile, int block) {
      if (source.is_stale(state, tile, block)) source.issue(state, tile, block);
    });
    limit.tick();
  }
}

// sink(tile, sums[MTiles][4]) for every column tile: the weights times that tile's states.
//
// `source` supplies the states: issue(state, tile, block) starts to load; if it polls, is_stale(state, tile, block)
// says whether the tags are wrong; accept(state, tile, block) clears them before the product; poison(sums) comes after
// the last block of a tile. meanwhile() runs while the first states are on their way.
template <class Weights, class Source, class Meanwhile, class Sink>
__device__ __forceinline__ void multiply_tiles(const Weights& weights, int tiles, Source& source,
                                               const Meanwhile& meanwhile, const Sink& sink) {
  constexpr int kMTiles = Weights::kMTiles, kBlocks = Weights::kBlocks;
  // A round is what registers are left for: a few tiles, or a part of the blocks of one. Its loads are issued while the
  // products of the round before are taken, and it is waited for as a whole: a load takes several hundred cycles, and
  // what was asked for too early has to be asked for again.
  constexpr int kAhead = kMTiles * kBlocks > 8 ? 4 : 8;
  constexpr int kRoundTiles = kAhead / kBlocks > 1 ? kAhead / kBlocks : 1;
  constexpr int kRoundBlocks = kBlocks < kAhead ? kBlocks : kAhead;
  constexpr int kStates = kRoundTiles * kRoundBlocks;
  static_assert(kBlocks % kRoundBlocks == 0, "rounds are alike");
  // A single tile of rows would leave the tensor cores waiting for their own sums: it adds up two sets in turn.
  constexpr int kSets = kMTiles <= 2 ? 2 : 1;

  uint4 states[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    if (i / kRoundBlocks < tiles) source.issue(states[i], i / kRoundBlocks, i % kRoundBlocks);
  meanwhile();
#pragma unroll 1
  for (int first = 0; first < tiles; first += kRoundTiles) {
    float sums[kSets][kMTiles][4] = {};
#pragma unroll
    for (int first_block = 0; first_block < kBlocks; first_block += kRoundBlocks) {
      if constexpr (Source::kPolls) await_round<kRoundBlocks>(states, source, first, first_block, tiles);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const int tile = first + i / kRoundBlocks, block = first_block + i % kRoundBlocks;
        if (tile >= tiles) break;
        source.accept(states[i], tile, block);
        weights.multiply(sums, block, states[i]);
        const bool last_block = block == kBlocks - 1;
        const int next_tile = first_block + kRoundBlocks < kBlocks ? tile : tile + kRoundTiles;
        if (next_tile < tiles) source.issue(states[i], next_tile, (block + kRoundBlocks) % kBlocks);
        if (!last_block) continue;
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

// Zero where all four words carry the tag.
__device__ __forceinline__ uint32_t tag_errors(const uint4& v, uint32_t tag) {
  return (v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag);
}

}  // namespace fastlstm::cuda
