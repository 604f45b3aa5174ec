// Sizes and layouts that kernels, driver and planner agree on. Plain C++: the planner runs on machines without CUDA.
//
// The recurrence is cut into tiles of 8 hidden units (an octet) by 8 rows of the batch (the columns of a matrix
// product). One warp computes the cells of a tile: with g = lane / 4 and q = lane % 4, a thread owns unit g and columns
// 2q and 2q + 1, which is how tensor cores hand out their sums.
//
// The terms of a product (K) are cut into blocks of 64 bytes: 32 elements of 16 bits or 16 of 32 bits. Of a block, the
// four lanes of a column hold 16 bytes each, which are the B operands of two MMAs. Which term a lane holds where is
// free as long as both factors agree, so a lane takes 16 consecutive bytes of a row of the weights as they are stored.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlstm::cuda {

constexpr int kOctet = 8;    // hidden units of a tile
constexpr int kColumns = 8;  // rows of the batch of a tile
constexpr int kWarpThreads = 32;
constexpr int kCellsOfTile = kOctet * kColumns;
constexpr int kBlockBytes = 64;  // of K
constexpr int kTeamWarps = 8;    // of a CTA, at most: registers hold the most weights with 8

// Runs of a launch, at most (see params.h): of two directions, or of layers, each some steps behind the one below. A
// run begins at a multiple of kRunStepMultiple: the tags of exchanged states repeat after so many steps, and the states
// that runs hand on are only overwritten when all CTAs have read them.
constexpr int kMaxRuns = 4;
constexpr int kRunStepMultiple = 4;

// Steps whose inputs are in shared memory or on their way: the latency of device memory spans several steps.
constexpr int kForwardStages = 4;
constexpr int kBackwardStages = 5;  // one more, because a step reads the cell state of the next one too

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How CTAs divide a layer. In the persistent family, team_ctas() of them, a team, divide the hidden units of `tiles`
// column tiles; in the others, each has its own.
struct TeamShape {
  int octets;  // per CTA, or per warp (resident)
  // Of K per warp (warpgroup: per warpgroup), weights of which stay in its registers or in shared memory; 0: none stay
  // (streamed).
  int blocks;
  int tiles;  // column tiles of a team, or of a CTA

  constexpr bool operator==(const TeamShape&) const = default;
};

// What of it a kernel is compiled for.
struct TeamVariant {
  int octets, blocks;

  constexpr bool operator==(const TeamVariant&) const = default;
};
constexpr TeamVariant variant_of(const TeamShape& shape) { return {shape.octets, shape.blocks}; }

// How the factors of products are held: bytes of an element, and how many of its parts are multiplied. Full float32 has
// two, its TF32 value and what that lacks: three products on tensor cores give nearly all bits of one.
struct Factors {
  int bytes, parts;
};

// The element types of tensors and, for float32, of the factors of products.
enum class Element { kBf16, kFp16, kTf32, kFp32, kFp64 };
constexpr int storage_bytes(Element e) {
  return e == Element::kBf16 || e == Element::kFp16 ? 2 : e == Element::kFp64 ? 8 : 4;
}

constexpr Factors factors_of(Element e) { return {storage_bytes(e), e == Element::kFp32 ? 2 : 1}; }

// The shapes that are compiled.
template <int Parts>
inline constexpr TeamVariant kForwardVariants[12] = {{1, 1}, {2, 1}, {4, 1}, {1, 2}, {2, 2}, {4, 2},
                                                     {1, 3}, {2, 3}, {1, 4}, {2, 4}, {1, 8}, {2, 8}};
template <>
inline constexpr TeamVariant kForwardVariants<2>[3] = {{1, 1}, {1, 2}, {1, 4}};
template <int Parts>
inline constexpr TeamVariant kBackwardVariants[7] = {{2, 4}, {4, 4}, {2, 8}, {4, 8}, {2, 12}, {2, 16}, {2, 32}};
template <>
inline constexpr TeamVariant kBackwardVariants<2>[3] = {{2, 4}, {2, 8}, {2, 16}};

constexpr int team_ctas(int hidden, int octets) { return ceil_div(hidden, octets * kOctet); }

// Blocks of K: of h in forward, of the gradients of all four gates in backward.
constexpr int forward_blocks(int hidden, int element_bytes) { return ceil_div(hidden * element_bytes, kBlockBytes); }
constexpr int backward_blocks(int hidden, int element_bytes) {
  return ceil_div(hidden, kOctet) * kOctet * 4 * element_bytes / kBlockBytes;
}

// Tiles of 16 rows by one block that a warp keeps in registers (8 per thread and part); the others wait in shared
// memory. More would spill.
constexpr int register_weight_tiles(int m_tiles, int blocks, const Factors& f) {
  const int tiles = m_tiles * blocks, most = f.parts > 1 ? 6 : f.bytes == 2 ? 15 : 14;
  return tiles <= most ? tiles : f.parts > 1 ? (m_tiles == 1 ? 4 : 3) : most;
}
constexpr int forward_m_tiles(int octets) { return 2 * octets; }
constexpr int backward_m_tiles(int octets) { return ceil_div(octets, 2); }

// Shared memory of one warp for its other tiles.
constexpr size_t shared_weight_bytes(int m_tiles, int blocks, const Factors& f) {
  return static_cast<size_t>(m_tiles * blocks - register_weight_tiles(m_tiles, blocks, f)) * f.parts * kWarpThreads *
         8 * sizeof(uint32_t);
}
// Sums of all warps, of one step. Where steps follow each other, there are two sets: one is still read while the next
// step's is written.
constexpr size_t partial_bytes(int cell_tiles, int values_per_cell) {
  return static_cast<size_t>(kTeamWarps) * cell_tiles * kCellsOfTile * values_per_cell * sizeof(float);
}
// Whether the warps that compute the cells of a step leave it to others to store them: where there are as many others,
// and neither registers nor shared memory are full of weights.
constexpr bool has_helpers(const TeamShape& s, int m_tiles, int parts) {
  return 2 * s.octets * s.tiles <= kTeamWarps && m_tiles * s.blocks * parts <= 16;
}
// What they leave to them, of two steps: `values` of each cell.
constexpr size_t results_bytes(const TeamShape& s, int m_tiles, int parts, int values) {
  if (!has_helpers(s, m_tiles, parts)) return 0;
  return static_cast<size_t>(2) * s.octets * s.tiles * kCellsOfTile * values * sizeof(float);
}
constexpr int kForwardResults = 6;  // gates, c, h
constexpr int kBackwardResults = 4;

// Inputs and biases of a tile.
constexpr size_t forward_tile_bytes(int element_bytes) {
  return static_cast<size_t>(kForwardStages) * kCellsOfTile * 4 * element_bytes + kOctet * 4 * sizeof(float);
}
constexpr size_t backward_tile_bytes(int element_bytes) {  // gates and d_y, cells
  return static_cast<size_t>(kBackwardStages) * kCellsOfTile * (5 * element_bytes + sizeof(float));
}
constexpr size_t forward_shared_bytes(const TeamShape& s, const Factors& f) {
  const int cell_tiles = s.octets * s.tiles;
  return 2 * partial_bytes(cell_tiles, 4) + kTeamWarps * shared_weight_bytes(forward_m_tiles(s.octets), s.blocks, f) +
         cell_tiles * forward_tile_bytes(f.bytes) +
         results_bytes(s, forward_m_tiles(s.octets), f.parts, kForwardResults);
}
constexpr size_t backward_shared_bytes(const TeamShape& s, const Factors& f) {
  const int cell_tiles = s.octets * s.tiles;
  return 2 * partial_bytes(cell_tiles, 1) + kTeamWarps * shared_weight_bytes(backward_m_tiles(s.octets), s.blocks, f) +
         cell_tiles * backward_tile_bytes(f.bytes) +
         results_bytes(s, backward_m_tiles(s.octets), f.parts, kBackwardResults);
}

// The resident family: a CTA has all hidden units of one column tile, `octets` per warp with all blocks of K.
template <int Parts>
inline constexpr TeamVariant kResidentForwardVariants[4] = {{1, 1}, {1, 2}, {1, 4}, {2, 4}};
template <>
inline constexpr TeamVariant kResidentForwardVariants<2>[2] = {{1, 2}, {1, 4}};
template <int Parts>
inline constexpr TeamVariant kResidentBackwardVariants[3] = {{1, 4}, {1, 8}, {2, 16}};
template <>
inline constexpr TeamVariant kResidentBackwardVariants<2>[1] = {{1, 8}};
constexpr int resident_warps(int hidden, int octets) { return ceil_div(hidden, octets * kOctet); }
constexpr size_t resident_shared_bytes(int hidden, int octets, int blocks_of_k, size_t tile_bytes) {
  return static_cast<size_t>(2) * blocks_of_k * kWarpThreads * 16 +
         resident_warps(hidden, octets) * octets * tile_bytes;
}

// The streamed family: what a CTA has of the weights and of the batch.
struct StreamedVariant {
  int octets, tiles;

  constexpr bool operator==(const StreamedVariant&) const = default;
};
template <int Parts>
inline constexpr StreamedVariant kStreamedForwardVariants[4] = {{1, 1}, {1, 4}, {2, 4}, {2, 8}};
template <>
inline constexpr StreamedVariant kStreamedForwardVariants<2>[2] = {{1, 1}, {1, 4}};
template <int Parts>
inline constexpr StreamedVariant kStreamedBackwardVariants[4] = {{2, 1}, {2, 4}, {4, 4}, {4, 8}};
template <>
inline constexpr StreamedVariant kStreamedBackwardVariants<2>[3] = {{2, 1}, {2, 4}, {4, 4}};
// CTAs of an SM that registers are kept for: one may load while another multiplies.
constexpr int streamed_ctas_of_sm(int m_tiles, int tiles, int parts) {
  return parts == 1 && m_tiles * tiles <= 4 ? 2 : 1;
}
constexpr size_t streamed_shared_bytes(const StreamedVariant& variant, int values_per_cell) {
  return partial_bytes(variant.octets * variant.tiles, values_per_cell);
}

// The warpgroup family: two warpgroups of four warps each divide a CTA's part of K. Forward, the rows of a CTA are all
// gates of 2 or 4 octets, one or two tiles of 64 rows. Backward, four CTAs share the 64 units of a tile and divide K;
// each computes the gradients of two octets. All of a shape is compiled in.
constexpr int kWarpgroups = 2, kWarpgroupWarps = 4, kWarpgroupThreads = kWarpgroupWarps * kWarpThreads;
constexpr int kWarpgroupRows = 64, kPartsOfK = 4;
inline constexpr TeamShape kWarpgroupForwardVariants[] = {{2, 4, 2},  {2, 4, 4},  {2, 4, 8},  {4, 4, 2},  {4, 4, 4},
                                                          {2, 8, 2},  {2, 8, 4},  {2, 8, 8},  {4, 8, 2},  {4, 8, 4},
                                                          {2, 12, 2}, {2, 12, 4}, {2, 12, 8}, {2, 16, 2}, {2, 16, 4},
                                                          {2, 16, 8}, {2, 24, 4}, {2, 32, 2}, {2, 32, 4}};
inline constexpr TeamShape kWarpgroupBackwardVariants[] = {{2, 4, 2},  {2, 4, 4},  {2, 4, 8},  {2, 8, 2},  {2, 8, 4},
                                                           {2, 8, 8},  {2, 12, 2}, {2, 12, 4}, {2, 12, 8}, {2, 16, 2},
                                                           {2, 16, 4}, {2, 16, 8}, {2, 24, 4}, {2, 32, 2}, {2, 32, 4}};
constexpr int warpgroup_forward_m_tiles(int octets) { return octets * kOctet * 4 / kWarpgroupRows; }
constexpr int warpgroup_backward_ctas(int hidden) { return kPartsOfK * ceil_div(hidden, kWarpgroupRows); }
// What a kernel of a shape has; sizes are those of a warpgroup, but for all the shared memory of a CTA.
struct WarpgroupPass {
  int m_tiles;
  // Of the weights, the blocks of K that registers hold, 8 words of each tile of 64 rows in every thread; the others
  // wait in shared memory.
  int register_blocks;
  size_t weight_bytes;
  // States go through shared memory in rounds of so many blocks, each in a slot: of a ring, if there is no room for all
  // of them. A thread loads 8 vectors of 16 bytes in a round, or fewer.
  int round_blocks, slots;
  size_t slot_bytes, shared_bytes;
};
// register_words: of weights, at most; more would spill. others: bytes of shared memory that a CTA needs besides.
constexpr WarpgroupPass warpgroup_pass(const TeamShape& s, int m_tiles, int register_words, size_t others) {
  constexpr size_t kMostBytes = 227 * 1024;  // of the GPUs that have such products
  WarpgroupPass pass = {};
  pass.m_tiles = m_tiles;
  pass.register_blocks = register_words / (8 * m_tiles);
  if (pass.register_blocks > s.blocks) pass.register_blocks = s.blocks;
  pass.weight_bytes = static_cast<size_t>(s.blocks - pass.register_blocks) * m_tiles * kWarpgroupRows * kBlockBytes;
  for (int blocks = 8 * kWarpgroupWarps / s.tiles; blocks * s.tiles >= kWarpgroupWarps; --blocks) {
    if (s.blocks % blocks != 0 || blocks * s.tiles % kWarpgroupWarps != 0) continue;
    pass.round_blocks = blocks;
    pass.slot_bytes = static_cast<size_t>(blocks) * s.tiles * kWarpThreads * 16;
    for (int slots = s.blocks / blocks;; slots = 2) {
      pass.slots = slots;
      pass.shared_bytes = kWarpgroups * (slots * pass.slot_bytes + pass.weight_bytes) + others;
      if (pass.shared_bytes <= kMostBytes) return pass;
      if (slots <= 2) break;
    }
  }
  return pass;
}
// Words of weights in registers, found by trial: with more, ptxas 13.0 spills.
constexpr int warpgroup_forward_words(const TeamShape& s) {
  if (s.octets * s.tiles >= 16) return 88;  // sums of many columns
  if (s.blocks == 24 || (s.blocks == 32 && s.tiles == 2)) return 96;
  return s.tiles >= 4 ? 112 : 128;
}
constexpr WarpgroupPass warpgroup_forward_pass(const TeamShape& s, int element_bytes) {
  // Inputs, and the sums of both warpgroups for two steps.
  const size_t sums = static_cast<size_t>(2) * kWarpgroups * kCellsOfTile * 4 * sizeof(float);
  return warpgroup_pass(s, warpgroup_forward_m_tiles(s.octets), warpgroup_forward_words(s),
                        s.octets * s.tiles * (sums + forward_tile_bytes(element_bytes)));
}
constexpr WarpgroupPass warpgroup_backward_pass(const TeamShape& s, int element_bytes) {
  return warpgroup_pass(s, 1, s.tiles >= 8 ? 56 : 96, s.octets * s.tiles * backward_tile_bytes(element_bytes));
}

// Bytes of the two buffers through which one team exchanges what its next products read.
constexpr size_t exchange_bytes(int blocks_of_k, int tiles) {
  return static_cast<size_t>(2) * blocks_of_k * tiles * kWarpThreads * 16;
}
// The same for the sums over parts of K that CTAs of the warpgroup family exchange backward: vectors of all lanes, from
// each warpgroup of the four CTAs that share units.
constexpr int kSumsOfCell = kWarpgroups * kPartsOfK;
constexpr size_t exchanged_sums_bytes(int hidden, int tiles) {
  return static_cast<size_t>(2) * warpgroup_backward_ctas(hidden) * tiles * kSumsOfCell * kWarpThreads * 16;
}

}  // namespace fastlstm::cuda
