// Every device instruction that plain C++ cannot express, each behind a named function.
//
// Kernels use these names only. That keeps inline PTX out of their control flow, and it lets the same kernel files be
// compiled as host C++ (FASTLSTM_EMULATE_CUDA), where tests/host_cuda/emulation.h supplies the same names on top of
// fibers: that is how indexing, layouts and protocols are tested on machines without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FASTLSTM_EMULATE_CUDA
#include "emulation.h"
#else

#include <cuda_runtime.h>

namespace fastlstm::cuda {

// ------------------------------------------------------------------------------------------------ threads

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_index() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int grid_blocks() { return static_cast<int>(gridDim.x); }

// Dynamic shared memory of the block, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// Bit i of the result: the predicate of lane i.
__device__ __forceinline__ uint32_t warp_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
__device__ __forceinline__ bool warp_all(bool predicate) { return __all_sync(0xffffffffu, predicate); }
__device__ __forceinline__ bool warp_any(bool predicate) { return !warp_all(!predicate); }
// The value of lane `from`.
template <class T>
__device__ __forceinline__ T warp_shuffle(T value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}

// The same address, of which the compiler knows nothing: it would compute what is a constant distance away, before a
// loop, and keep all of it in registers.
template <class T>
__device__ __forceinline__ T* opaque(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// ------------------------------------------------------------------------------------------------ arithmetic

// D += A B for one tile of 16 x 16 times 16 x 8, sums in float32. Thread `lane` holds, with g = lane / 4, q = lane % 4:
//   a[0] = A[g][2q..], a[1] = A[g + 8][2q..], a[2] = A[g][2q + 8..], a[3] = A[g + 8][2q + 8..]   two columns each
//   b0 = B[2q..][g], b1 = B[2q + 8..][g]                                                         two rows each
//   d[0], d[1] = D[g][2q], D[g][2q + 1];  d[2], d[3] = D[g + 8][2q], D[g + 8][2q + 1]
__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_fp16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same for 16 x 8 times 8 x 8 of TF32, one element per register:
//   a[0] = A[g][q], a[1] = A[g + 8][q], a[2] = A[g][q + 4], a[3] = A[g + 8][q + 4];  b0 = B[q][g], b1 = B[q + 4][g]
__device__ __forceinline__ void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes the 8 x 8 matrix of 16-bit elements whose row lane / 4 holds columns 2 (lane % 4) + {0, 1} in `x`.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Two floats rounded to nearest even, `low` in bits 0-15. A NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float float_of_fp16(uint16_t bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
// The nearest value of 10 mantissa bits, ties away from zero.
__device__ __forceinline__ uint32_t round_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of_bits(uint32_t x) { return __uint_as_float(x); }

// Errors: exp2 2 ulp, reciprocal 1 ulp, tanh 2^-11 relative.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ------------------------------------------------------------------------------------------------ memory that CTAs
// share
//
// Relaxed accesses at GPU scope bypass L1 and meet in L2. They order nothing but themselves, and only per address.

// Atomic in each of its 32-bit words.
__device__ __forceinline__ uint4 load_relaxed(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Atomic as a whole: all 16 bytes of one store, or none.
__device__ __forceinline__ uint4 load_relaxed_packet(const uint4* p) {
  uint4 v;
  asm volatile(
      "{\n.reg .b128 packet;\n.reg .b64 low, high;\nld.relaxed.gpu.global.b128 packet, [%4];\n"
      "mov.b128 {low, high}, packet;\nmov.b64 {%0, %1}, low;\nmov.b64 {%2, %3}, high;\n}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p)
      : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed_packet(uint4* p, uint4 v) {
  asm volatile(
      "{\n.reg .b128 packet;\n.reg .b64 low, high;\nmov.b64 low, {%1, %2};\nmov.b64 high, {%3, %4};\n"
      "mov.b128 packet, {low, high};\nst.relaxed.gpu.global.b128 [%0], packet;\n}" ::"l"(p),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}

// ------------------------------------------------------------------------------------------------ asynchronous copies

// Starts to copy `bytes` <= 16 from global to shared memory, both aligned to 16; the rest of the 16 becomes zero.
// `from` must be a valid address even if bytes is 0.
__device__ __forceinline__ void copy_async_16(void* to_shared, const void* from, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to_shared))),
      "l"(from), "r"(bytes)
      : "memory");
}
// Closes this thread's group of copies; a group may be empty.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of this thread's newest groups are under way. Other threads see the copies only after a
// barrier.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ------------------------------------------------------------------------------------------------ waiting

// Ends a wait that can never end. Only debug builds look at the clock: in others a spin loop is as short as can be.
class SpinLimit {
 public:
  __device__ __forceinline__ void tick() {
#ifdef FASTLSTM_CUDA_DEBUG
    constexpr long long kCycles = 2'000'000'000;
    if (start_ == 0) start_ = clock64();
    if (clock64() - start_ > kCycles) __trap();
#endif
  }

 private:
#ifdef FASTLSTM_CUDA_DEBUG
  long long start_ = 0;
#endif
};

// ------------------------------------------------------------------------------------------------ launching

struct LaunchShape {
  int blocks, threads;
  size_t shared_bytes;
  bool cooperative;  // all blocks run at the same time, or the launch fails: required where they wait for each other
};

template <class Params>
cudaError_t launch(void (*kernel)(Params), const LaunchShape& shape, cudaStream_t stream, const Params& params) {
  if (shape.shared_bytes > 48 * 1024) {  // more has to be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = shape.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace fastlstm::cuda

#endif  // FASTLSTM_EMULATE_CUDA
