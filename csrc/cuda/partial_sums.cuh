// Sums of the warps of a CTA, each over its own part of K, meet in shared memory: the warp that computes the cells of a
// cell tile adds up what all of them have put there.
#pragma once

#include "../cell.h"
#include "layout.h"
#include "ptx.cuh"

namespace fastlstm::cuda {

// Forward: the gates of a unit and two columns, as two MMA tiles hold them. Memory of a cell tile:
// [warp][column][lane].
constexpr int kGateSums = kTeamWarps * kCellsOfTile;  // float4 of a cell tile

__device__ __forceinline__ void put_gate_sums(float4* sums, int cell_tile, int warp, int lane, const float (&i_f)[4],
                                              const float (&g_o)[4]) {
  float4* const to = sums + (cell_tile * kTeamWarps + warp) * kCellsOfTile + lane;
  to[0] = float4{i_f[0], i_f[2], g_o[0], g_o[2]};
  to[kWarpThreads] = float4{i_f[1], i_f[3], g_o[1], g_o[3]};
}

// Unroll: all at once would take 64 registers.
template <int Unroll>
__device__ __forceinline__ void add_gate_sums(const float4* sums, int cell_tile, int lane, float (&a)[2][kGates]) {
#pragma unroll(Unroll)
  for (int w = 0; w < kTeamWarps; ++w)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float4 part = sums[(cell_tile * kTeamWarps + w) * kCellsOfTile + e * kWarpThreads + lane];
      a[e][0] += part.x;
      a[e][1] += part.y;
      a[e][2] += part.z;
      a[e][3] += part.w;
    }
}

// Backward: d_h of a unit and two columns, of which an MMA tile holds those of two octets. Memory: [warp][lane].
constexpr int kUnitSums = kTeamWarps * kWarpThreads;  // float2 of a cell tile

__device__ __forceinline__ void put_unit_sums(float2* sums, int cell_tile, int warp, int lane, const float (&d_h)[4],
                                              int half) {
  sums[(cell_tile * kTeamWarps + warp) * kWarpThreads + lane] = float2{d_h[half * 2], d_h[half * 2 + 1]};
}

__device__ __forceinline__ void add_unit_sums(const float2* sums, int cell_tile, int lane, float (&d_h)[2]) {
#pragma unroll
  for (int w = 0; w < kTeamWarps; ++w) {
    const float2 part = sums[(cell_tile * kTeamWarps + w) * kWarpThreads + lane];
    d_h[0] += part.x;
    d_h[1] += part.y;
  }
}

}  // namespace fastlstm::cuda
