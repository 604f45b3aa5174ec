// What one warp knows of its part of a layer: a few octets of hidden units by one column tile, and a run of steps.
#pragma once

#include "elements.cuh"
#include "layout.h"
#include "sequences.cuh"

namespace fastlstm::cuda {

template <class Run, int Octets>
class Tile {
 protected:
  __device__ __forceinline__ Tile(const LaunchParams<Run>& params, const Run& run, int first_unit, int first_column,
                                  int lane, unsigned char* memory)
      : p_(params),
        run_(run),
        order_{run.reverse},
        lane_(lane),
        first_unit_(first_unit),
        first_column_(first_column),
        memory_(memory) {
#pragma unroll
    for (int e = 0; e < 2; ++e) length_[e] = length_of(p_.sequences, column(e));
  }

  // The unit and the columns of this thread.
  __device__ __forceinline__ int unit(int o) const { return first_unit_ + o * kOctet + lane_ / 4; }
  __device__ __forceinline__ int column(int e) const { return first_column_ + 2 * (lane_ % 4) + e; }
  __device__ __forceinline__ bool has_state(int o, int e) const {
    return unit(o) < p_.hidden && column(e) < p_.sequences.batch;
  }
  // Its element of a state whose rows have `stride` elements.
  __device__ __forceinline__ int64_t state_index(int o, int e, int stride) const {
    return static_cast<int64_t>(column(e)) * stride + unit(o);
  }

  // The length of another column of the tile, 0 <= i < 8, which other lanes have: registers are scarce.
  __device__ __forceinline__ int length_of_column(int i) const {
    const int even = warp_shuffle(length_[0], i / 2), odd = warp_shuffle(length_[1], i / 2);
    return i % 2 == 0 ? even : odd;
  }

  // The column whose inputs this lane copies, eight units at a time.
  __device__ __forceinline__ int copied_column() const { return first_column_ + lane_ % kColumns; }
  __device__ __forceinline__ int copied_length() const { return length_of_column(lane_ % kColumns); }
  // The column that it stores elements of 16 bits of, two units at a time.
  __device__ __forceinline__ int stored_column() const { return first_column_ + lane_ / 4; }
  __device__ __forceinline__ int stored_length() const { return length_of_column(lane_ / 4); }

  // Where this warp stores what its lanes have of an octet at a step, in tensors with a row for each step of a column.
  class Rows {
   public:
    __device__ __forceinline__ Rows(const Tile& tile, int t, int o)
        : lane_(tile.lane_),
          aligned_(tile.p_.aligned),
          first_(o * kOctet),
          left_(tile.p_.hidden - tile.first_unit_ - first_) {
      const Sequences& s = tile.p_.sequences;
      stored_ = t < tile.stored_length() && lane_ % 4 * 2 < left_;
      stored_row_ = row_of_few(s, t, tile.stored_column());
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        exists_[e] = t < tile.length_[e] && lane_ / 4 < left_;
        rows_[e] = row_of_few(s, t, tile.column(e));
      }
    }

    // A tensor, as its address is best used.
    template <class T>
    static __device__ __forceinline__ T* tensor(void* p) {
      return static_cast<T*>(p);
    }
    // values[e] of unit(o) and column(e), into a tensor whose rows have `width` elements. `first`: the element of row 0
    // for the first unit of the warp. Elements of 16 bits are transposed, so that a lane stores those of two units at
    // once.
    template <class E>
    __device__ __forceinline__ void store(typename E::Storage* first, uint32_t width, const float (&values)[2]) const {
      using Storage = typename E::Storage;
      if constexpr (Words<E>::kHalf) {
        const uint32_t word = transpose_8x8(E::pack(values[0], values[1]));
        const int unit = lane_ % 4 * 2;
        Storage* const to = first + static_cast<uint64_t>(stored_row_) * width + first_ + unit;
        if (stored_ && aligned_) *reinterpret_cast<uint32_t*>(to) = word;
        if (stored_ && !aligned_) {
          to[0] = static_cast<Storage>(word);
          if (unit + 1 < left_) to[1] = static_cast<Storage>(word >> 16);
        }
      } else {
        store_floats(first, width, values);
      }
    }
    __device__ __forceinline__ void store_floats(float* first, uint32_t width, const float (&values)[2]) const {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (exists_[e]) first[static_cast<uint64_t>(rows_[e]) * width + first_ + lane_ / 4] = values[e];
    }

   private:
    const int lane_;
    const bool aligned_;
    const int first_, left_;  // the octet's first unit, and the units from there on, of those of the warp
    bool stored_, exists_[2];
    uint32_t stored_row_, rows_[2];
  };

  // The same of whole octets in tensors whose rows are aligned, in fewer instructions. stored_length: that of
  // stored_column().
  class AlignedRows {
   public:
    __device__ __forceinline__ AlignedRows(const Tile& tile, int t, int o, int stored_length)
        : lane_(tile.lane_), first_(o * kOctet), first_row_(row_of_few(tile.p_.sequences, t, tile.first_column_)) {
      const bool has_octet = tile.first_unit_ + first_ < tile.p_.hidden;
      stored_ = has_octet && t < stored_length;
#pragma unroll
      for (int e = 0; e < 2; ++e) exists_[e] = has_octet && t < tile.length_[e];
    }
    template <class T>
    static __device__ __forceinline__ T* tensor(void* p) {
      return opaque(static_cast<T*>(p));  // or addresses for all steps would take registers from the weights
    }
    template <class E>
    __device__ __forceinline__ void store(typename E::Storage* first, uint32_t width, const float (&values)[2]) const {
      if constexpr (Words<E>::kHalf) {
        const uint32_t word = transpose_8x8(E::pack(values[0], values[1]));
        if (stored_) *reinterpret_cast<uint32_t*>(first + place(lane_ / 4, width) + lane_ % 4 * 2) = word;
      } else {
        store_floats(first, width, values);
      }
    }
    __device__ __forceinline__ void store_floats(float* first, uint32_t width, const float (&values)[2]) const {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (exists_[e]) first[place(lane_ % 4 * 2 + e, width) + lane_ / 4] = values[e];
    }

   private:
    __device__ __forceinline__ uint64_t place(int column, uint32_t width) const {
      return static_cast<uint64_t>(first_row_ + column) * width + first_;
    }
    const int lane_, first_;
    const uint32_t first_row_;
    bool stored_, exists_[2];
  };

  const LaunchParams<Run>& p_;
  const Run& run_;
  const Order order_;
  const int lane_, first_unit_, first_column_;
  unsigned char* const memory_;
  int length_[2];  // of column(e)
};

}  // namespace fastlstm::cuda
