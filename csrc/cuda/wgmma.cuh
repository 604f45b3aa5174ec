// Hopper's products of warpgroups (wgmma), behind named functions like everything in ptx.cuh. Kernels that use them are
// compiled for sm_90a alone.
//
// A warpgroup is four consecutive warps, the first of a number divisible by four. Its product is asynchronous: D lies
// in registers that nobody may touch before a wait, B in shared memory, read by another path than ordinary loads: what
// threads have stored there is seen by products only after a fence of each of these threads and a barrier.
#pragma once

#include "ptx.cuh"

#ifndef FASTLSTM_EMULATE_CUDA

namespace fastlstm::cuda {

// For the threads of a warpgroup, of which a block has up to 8.
__device__ __forceinline__ void warpgroup_barrier(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// A factor in shared memory, which begins at `first`: rows of K, 8 at a time in 8 consecutive vectors of 16 bytes.
// Along K, the next vectors of these rows begin `along_k` vectors further on, the next 8 rows `along_rows`.
class SharedFactor {
 public:
  __device__ __forceinline__ SharedFactor(const uint4* first, int along_k, int along_rows)
      // Addresses in units of 16 bytes, 14 bits each. No bits of a swizzle are set.
      : descriptor_(static_cast<uint64_t>(__cvta_generic_to_shared(first) >> 4 & 0x3fff) |
                    static_cast<uint64_t>(along_k) << 16 | static_cast<uint64_t>(along_rows) << 32) {}
  // The same that begins so many vectors further on.
  __device__ __forceinline__ SharedFactor from(int vectors) const { return SharedFactor(descriptor_ + vectors); }
  __device__ __forceinline__ uint64_t descriptor() const { return descriptor_; }

 private:
  explicit __device__ __forceinline__ SharedFactor(uint64_t descriptor) : descriptor_(descriptor) {}
  uint64_t descriptor_;
};

__device__ __forceinline__ void store_factor(uint4* to_shared, const uint4& vector) { *to_shared = vector; }
// What this thread has stored may be read by products, of those who meet it at a barrier afterwards.
__device__ __forceinline__ void fence_factors() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product, and whenever registers of one have been written.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all products that were committed.
__device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// D (64 x 8 Tiles) = A B, or D += A B. Of D, thread `lane` of warp w holds, with g = lane / 4, q = lane % 4:
//   d[tile][0], d[tile][1] = D[16 w + g][8 tile + 2q + {0, 1}];  d[tile][2], d[tile][3]: those of row 16 w + g + 8
// K is 32 bytes. A from registers, words of 4 bytes of K:
//   a[0] = A[16 w + g][word q], a[1] = A[16 w + g + 8][word q], a[2] and a[3]: the same of word q + 4
// or A from shared memory, as B.
#define FASTLSTM_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FASTLSTM_D8 FASTLSTM_D4(0), FASTLSTM_D4(1)
#define FASTLSTM_D16 FASTLSTM_D8, FASTLSTM_D4(2), FASTLSTM_D4(3)
#define FASTLSTM_D32 FASTLSTM_D16, FASTLSTM_D4(4), FASTLSTM_D4(5), FASTLSTM_D4(6), FASTLSTM_D4(7)
#define FASTLSTM_REGISTERS8 "{%0,%1,%2,%3,%4,%5,%6,%7}"
#define FASTLSTM_REGISTERS16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define FASTLSTM_REGISTERS32                                                                                    \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31}"
// COUNT: of a thread's sums. N: columns. A0 ... A5: numbers of the operands behind the sums. OF_ONE, OF_BOTH: signs of
// the factors and, for elements of 16 bits, whether one or both of them are transposed in shared memory.
#define FASTLSTM_PRODUCT(NAME, TYPES, DEPTH, OF_ONE, OF_BOTH, COUNT, TILES, N, A0, A1, A2, A3, A4, A5)                \
  __device__ __forceinline__ void NAME(float (&d)[TILES][4], const uint32_t (&a)[4], const SharedFactor& b,           \
                                       bool accumulate) {                                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" A5                                                              \
                 ", 0;\n"                                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" N DEPTH TYPES " " FASTLSTM_REGISTERS##COUNT                      \
                 ", {%" A0 ",%" A1 ",%" A2 ",%" A3 "}, %" A4 ", p" OF_ONE ";\n}"                                      \
                 : FASTLSTM_D##COUNT                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()),                                   \
                   "r"(static_cast<int>(accumulate)));                                                                \
  }                                                                                                                   \
  __device__ __forceinline__ void NAME(float (&d)[TILES][4], const SharedFactor& a, const SharedFactor& b,            \
                                       bool accumulate) {                                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" A2                                                              \
                 ", 0;\n"                                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" N DEPTH TYPES " " FASTLSTM_REGISTERS##COUNT ", %" A0 ", %" A1    \
                                                                                                 ", p" OF_BOTH ";\n}" \
                 : FASTLSTM_D##COUNT                                                                                  \
                 : "l"(a.descriptor()), "l"(b.descriptor()), "r"(static_cast<int>(accumulate)));                      \
  }
#define FASTLSTM_PRODUCTS(NAME, TYPES, DEPTH, OF_ONE, OF_BOTH)                                           \
  FASTLSTM_PRODUCT(NAME, TYPES, DEPTH, OF_ONE, OF_BOTH, 8, 2, "16", "8", "9", "10", "11", "12", "13")    \
  FASTLSTM_PRODUCT(NAME, TYPES, DEPTH, OF_ONE, OF_BOTH, 16, 4, "32", "16", "17", "18", "19", "20", "21") \
  FASTLSTM_PRODUCT(NAME, TYPES, DEPTH, OF_ONE, OF_BOTH, 32, 8, "64", "32", "33", "34", "35", "36", "37")
FASTLSTM_PRODUCTS(wgmma_bf16, ".f32.bf16.bf16", "k16", ", 1, 1, 0", ", 1, 1, 0, 0")
FASTLSTM_PRODUCTS(wgmma_fp16, ".f32.f16.f16", "k16", ", 1, 1, 0", ", 1, 1, 0, 0")
FASTLSTM_PRODUCTS(wgmma_tf32, ".f32.tf32.tf32", "k8", ", 1, 1", ", 1, 1")
#undef FASTLSTM_PRODUCTS
#undef FASTLSTM_PRODUCT
#undef FASTLSTM_REGISTERS32
#undef FASTLSTM_REGISTERS16
#undef FASTLSTM_REGISTERS8
#undef FASTLSTM_D32
#undef FASTLSTM_D16
#undef FASTLSTM_D8
#undef FASTLSTM_D4

}  // namespace fastlstm::cuda

#endif  // FASTLSTM_EMULATE_CUDA
