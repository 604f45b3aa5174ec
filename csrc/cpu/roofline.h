// The kernels one by one, timed against what the machine can do: `benchmarks/roofline.py`.
#pragma once

#include <string>
#include <vector>

#include "isa.h"

namespace fastlstm::cpu {

// One kernel at one size, run by all threads at once, each on data of its own.
struct KernelTiming {
  std::string kernel, sizes;
  double multiply_adds;  // of one thread and call
  double bytes;          // that it has to read and write at least
  double seconds;        // of one call of the slowest thread
};

// float32 kernels of one instruction set. The first entries are the roofs: "multiply_add", and "read" for footprints
// from the first-level cache to memory.
std::vector<KernelTiming> time_kernels(Isa isa, int threads, double seconds_each);

}  // namespace fastlstm::cpu
