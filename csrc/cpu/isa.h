// The instruction sets the recurrent kernels are compiled for, which of them this CPU has and which one runs.
#pragma once

#include <optional>
#include <vector>

#include "../plan.h"
#include "kernels.h"

namespace fastlstm::cpu {

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16 };  // in order of preference, best last

const char* isa_name(Isa isa);
std::vector<Isa> compiled_isas();
std::vector<Isa> available_isas();  // compiled and supported by this CPU, best last

// What `fastlstm.force` has set, for the whole process.
struct Forced {
  Constraints plan;
  std::optional<Isa> isa;
};
Forced forced();
void set_forced(const Forced& forced);

Isa selected_isa();                 // the forced one, else the best available
Machine this_machine(int threads);  // as the planner sees it, with selected_isa()

// The kernels of one instruction set, for (T, A) of kernels.h: (float, float), (float, Bf16Pair) or (double, double).
template <class T, class A>
const Kernels<T, A>& kernels(Isa isa);

}  // namespace fastlstm::cpu
