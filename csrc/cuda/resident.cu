// The resident family: one CTA keeps all recurrent weights of a layer in its registers and runs one column tile of the
// batch through a run of steps. Nothing leaves the CTA: the state goes from warp to warp through shared memory, and
// they meet once per step. Called by the driver for a few runs at the same time.
//
// A warp owns `octets` * 8 hidden units with all of K, so its sums are whole and stay where the cells need them.
#include "backward_tile.cuh"
#include "dispatch.cuh"
#include "exchange.cuh"
#include "forward_tile.cuh"
#include "launchers.h"
#include "product.cuh"

namespace fastlstm::cuda {

namespace {

// The state of a step in shared memory, [2][block][lane], alternating by step: one barrier per step is enough.
class SharedStates {
 public:
  static constexpr bool kPolls = false;
  static constexpr int kAheadOfMany = 4;

  __device__ __forceinline__ SharedStates(unsigned char* shared, int blocks, int lane)
      : buffers_(reinterpret_cast<uint4*>(shared)), blocks_(blocks), lane_(lane) {}

  __device__ __forceinline__ int bytes() const { return 2 * blocks_ * kWarpThreads * static_cast<int>(sizeof(uint4)); }
  // What no unit fills is multiplied by zero weights, so it must not be NaN.
  __device__ __forceinline__ void clear() const {
    for (int i = thread_index(); i < 2 * blocks_ * kWarpThreads; i += block_threads()) buffers_[i] = uint4{};
  }

  __device__ __forceinline__ uint4* buffer(int n) const { return buffers_ + (n & 1) * blocks_ * kWarpThreads; }
  __device__ __forceinline__ uint32_t* words(int n) const { return reinterpret_cast<uint32_t*>(buffer(n)); }
  __device__ __forceinline__ void set_step(int n) { from_ = buffer(n) + lane_; }

  template <int Blocks>
  __device__ __forceinline__ void load(uint4 (&states)[Blocks], int, int first_block) const {
#pragma unroll
    for (int b = 0; b < Blocks; ++b)
      states[b] = first_block + b < blocks_ ? from_[(first_block + b) * kWarpThreads] : uint4{};
  }
  __device__ __forceinline__ void accept(const uint4&, int) const {}
  template <int MTiles>
  __device__ __forceinline__ void poison(float (&)[MTiles][4]) const {}

 private:
  uint4* const buffers_;
  const int blocks_, lane_;
  const uint4* from_ = nullptr;
};

// What both kernels derive from their place in the grid.
template <class Params>
struct ResidentPlace {
  __device__ __forceinline__ explicit ResidentPlace(const Params& p)
      : lane(thread_index() % kWarpThreads),
        warp(thread_index() / kWarpThreads),
        run(block_index() / p.groups),
        first_column(p.first_column + block_index() % p.groups * kColumns) {}
  const int lane, warp, run, first_column;
};

// Shared memory holds the states [2][block][lane], then what the tiles of the warps need.
template <class E, int Octets, int Blocks>
__global__ void __launch_bounds__(kTeamWarps* kWarpThreads, 1) resident_forward(const ForwardParams p) {
  using Cells = ForwardTile<E, Octets>;
  constexpr int kMTiles = forward_m_tiles(Octets);
  const ResidentPlace<ForwardParams> at(p);
  const ForwardRun& run = p.run[at.run];
  unsigned char* const shared = shared_memory();
  SharedStates states(shared, forward_blocks(p.hidden, Words<E>::kBytes), at.lane);
  states.clear();

  const ResidentWeights<E, kMTiles, Blocks, kMTiles * Blocks> weights(
      nullptr, at.lane, [&](int m, int half, int block) {
        return forward_weights<E>(run.w_hh, p.hidden, p.row_stride, m % 2 * 2 + half,
                                  (at.warp * Octets + m / 2) * kOctet, block, at.lane);
      });
  Cells cells(p, run, at.warp * Octets * kOctet, at.first_column, at.lane,
              shared + states.bytes() + at.warp * Octets * forward_tile_bytes(Words<E>::kBytes), true);
  for (int n = run.begin; n < run.begin + kForwardStages - 1; ++n) cells.copy_inputs(n);
  block_barrier();  // states are clear

  const auto put_outputs = [&](int n) {
    typename Cells::States h;
    cells.outputs(h);
#pragma unroll
    for (int o = 0; o < Octets; ++o)
      if ((at.warp * Octets + o) * kOctet < p.hidden)
        put_h<E>(at.warp * Octets + o, at.lane, h[o],
                 [&](int block, int column, int quarter, int word, uint32_t value) {
                   states.words(n)[vector_by_lane(block, column, quarter) * 4 + word] = value;
                 });
  };
  put_outputs(run.begin - 1);
  for (int n = run.begin; n < run.end; ++n) {
    block_barrier();
    typename Cells::Gates a;
    states.set_step(n - 1);
    multiply_tiles(
        weights, 1, states,
        [&] {
          copy_async_wait<kForwardStages - 2>();
          warp_barrier();
          cells.begin(n, a);
        },
        [&](int, const float (&sums)[kMTiles][4]) {
#pragma unroll
          for (int o = 0; o < Octets; ++o)
#pragma unroll
            for (int e = 0; e < 2; ++e)
#pragma unroll
              for (int gate = 0; gate < kGates; ++gate) a[o][e][gate] += sums[2 * o + gate / 2][gate % 2 * 2 + e];
        });
    cells.compute(n, a);
    put_outputs(n);
    cells.store(n, a, cells.h(), cells.c());
    cells.copy_inputs(n + kForwardStages - 1);
  }
  copy_async_wait<0>();
  cells.finish();
}

template <class E, int Octets, int Blocks>
__global__ void __launch_bounds__(kTeamWarps* kWarpThreads, 1) resident_backward(const BackwardParams p) {
  using Cells = BackwardTile<E, Octets>;
  constexpr int kMTiles = backward_m_tiles(Octets);
  const ResidentPlace<BackwardParams> at(p);
  const BackwardRun& run = p.run[at.run];
  unsigned char* const shared = shared_memory();
  SharedStates states(shared, backward_blocks(p.hidden, Words<E>::kBytes), at.lane);

  const ResidentWeights<E, kMTiles, Blocks, kMTiles * Blocks> weights(
      nullptr, at.lane, [&](int m, int half, int block) {
        const int octet = 2 * m + half;
        const int first = octet < Octets ? (at.warp * Octets + octet) * kOctet : p.row_stride;
        return transposed_weights<E>(run.w_hh, p.hidden, p.row_stride, first, block, at.lane);
      });
  Cells cells(p, run, at.warp * Octets * kOctet, at.first_column, at.lane,
              shared + states.bytes() + at.warp * Octets * backward_tile_bytes(Words<E>::kBytes), true);
  for (int n = run.begin; n < run.begin + kBackwardStages - 1; ++n) cells.copy_inputs(n);
  const auto begin_cells = [&](int n) {
    copy_async_wait<kBackwardStages - 3>();
    warp_barrier();
    cells.begin(n);
  };

  // The product of the last step gives d_h_0, or what the next run begins with.
  const int last_product = run.d_h_0 == nullptr && run.end == p.sequences.steps ? run.end - 1 : run.end;
  for (int n = run.begin; n <= last_product; ++n) {
    const bool has_step = n < run.end;
    if (n == run.begin) {
      begin_cells(n);
    } else {
      block_barrier();
      states.set_step(n - 1);
      typename Cells::Products product;
      multiply_tiles(
          weights, 1, states,
          [&] {
            if (has_step) begin_cells(n);
          },
          [&](int, const float (&sums)[kMTiles][4]) {
#pragma unroll
            for (int o = 0; o < Octets; ++o)
#pragma unroll
              for (int e = 0; e < 2; ++e) product[o][e] = sums[o / 2][o % 2 * 2 + e];
          });
      cells.carry(product);
    }
    if (!has_step) break;
    typename Cells::Gates d_gates;
    cells.compute(n, d_gates);
#pragma unroll
    for (int o = 0; o < Octets; ++o)
      if ((at.warp * Octets + o) * kOctet < p.hidden)
        put_gradients<E>(at.warp * Octets + o, at.lane, d_gates[o],
                         [&](int vector, const uint4& packet) { states.buffer(n)[vector] = packet; });
    cells.store(n, d_gates);
    cells.copy_inputs(n + kBackwardStages - 1);
  }
  copy_async_wait<0>();
  cells.finish();
}

template <class E>
struct ForwardKernels {
  template <TeamVariant V>
  static auto kernel() {
    return &resident_forward<E, V.octets, V.blocks>;
  }
};
template <class E>
struct BackwardKernels {
  template <TeamVariant V>
  static auto kernel() {
    return &resident_backward<E, V.octets, V.blocks>;
  }
};

template <class Params>
cudaError_t launch_resident(void (*kernel)(Params), const Params& p, int blocks_of_k, size_t tile_bytes,
                            cudaStream_t stream) {
  const LaunchShape shape = {p.runs * p.groups, resident_warps(p.hidden, p.team.octets) * kWarpThreads,
                             resident_shared_bytes(p.hidden, p.team.octets, blocks_of_k, tile_bytes), false};
  return launch(kernel, shape, stream, p);
}

}  // namespace

cudaError_t launch_resident_forward(Element element, const ForwardParams& params, cudaStream_t stream) {
  return with_mma_element(element, [&]<class E>(E) {
    return launch_resident(
        find_variant<kResidentForwardVariants<E::kParts>, ForwardKernels<E>>(variant_of(params.team)), params,
        forward_blocks(params.hidden, Words<E>::kBytes), forward_tile_bytes(Words<E>::kBytes), stream);
  });
}

cudaError_t launch_resident_backward(Element element, const BackwardParams& params, cudaStream_t stream) {
  return with_mma_element(element, [&]<class E>(E) {
    return launch_resident(
        find_variant<kResidentBackwardVariants<E::kParts>, BackwardKernels<E>>(variant_of(params.team)), params,
        backward_blocks(params.hidden, Words<E>::kBytes), backward_tile_bytes(Words<E>::kBytes), stream);
  });
}

}  // namespace fastlstm::cuda
