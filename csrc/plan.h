// How a problem is computed, as data. Every heuristic of the library is in plan.cpp; kernels and drivers only obey.
//
// The functions here are pure functions of (problem, machine, constraints): they list the legal candidates,
// estimate the cycles of each and take the cheapest. `fastlstm.plan` and the benchmarks print the result.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "problem.h"

namespace fastlstm {

enum class Family {
  kStepwise,  // one library GEMM per time step, then the cell; accepts every legal problem
  kPacked,    // register tiles over weights packed for them, the cell fused behind each tile
  kUnpacked,  // dot products over the weights as they are stored: no packing, each weight is read once per step
};

// What threads divide among themselves.
enum class Split {
  kRows,   // batch rows and directions: each thread runs all steps of its rows, no synchronisation
  kUnits,  // hidden units: each thread keeps its slice of the weights in its cache, one fork-join per step
};

struct Machine {
  int threads;
  int vector_bytes;  // of the instruction set that will run
  bool fma;
  int64_t l2_bytes;  // per core
};

// What the user has forced (`fastlstm.force`); the planner chooses the rest.
struct Constraints {
  std::optional<Family> family;
  std::optional<Split> split;
  std::optional<bool> bulk_input;
};

// One pass (forward or backward) of a plan.
struct PassPlan {
  Family family = Family::kStepwise;
  Split split = Split::kRows;
  bool bulk_input = false;  // forward only: x W_ih^T is one library GEMM over all steps, not part of each step's tile
  double cycles = 0;        // estimate that won
};

struct Plan {
  PassPlan forward;
  std::optional<PassPlan> backward;  // training only
  std::string reason;
};

const char* family_name(Family family);
const char* split_name(Split split);
std::vector<Family> families();
std::vector<Split> splits();

// Each throws std::invalid_argument when nothing within the constraints can run the problem. A family without a
// backward pass of its own leaves the family of the backward pass to the planner.
PassPlan plan_forward(const Problem& problem, const Machine& machine, const Constraints& constraints);
PassPlan plan_backward(const Problem& problem, const Machine& machine, const Constraints& constraints);

// Both passes, with the reason in words.
Plan make_plan(const Problem& problem, const Machine& machine, const Constraints& constraints);

}  // namespace fastlstm
