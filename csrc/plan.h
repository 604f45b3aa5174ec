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
  kUnpacked,  // products with the recurrent weights as they are stored, each read once per step and few rows
};

// What threads divide among themselves.
enum class Split {
  kRows,   // batch rows and directions: each thread runs all steps of its rows, no synchronisation
  kUnits,  // hidden units: each thread keeps its slice of the weights in its cache, the threads meet after every phase
           // of a step
};

// What the factors of the recurrent products are rounded to; sums are float32 or float64 always.
enum class Products {
  kFull,  // nothing: they stay float32 or float64
  kBf16,  // bfloat16; packed family only
};

struct Machine {
  int threads;
  int vector_bytes;  // of the instruction set that will run
  bool fma;
  bool bf16;         // it multiplies bfloat16, at twice the rate of float32
  int64_t l2_bytes;  // per core

  bool operator==(const Machine&) const = default;
};

// What the user has forced (`fastlstm.force`); the planner chooses the rest.
struct Constraints {
  std::optional<Family> family;
  std::optional<Split> split;
  std::optional<bool> bulk_input;
  std::optional<Products> products;

  bool operator==(const Constraints&) const = default;
};

// One pass (forward or backward) of a plan.
struct PassPlan {
  Family family = Family::kStepwise;
  Split split = Split::kRows;
  bool bulk_input = false;  // forward only: x W_ih^T is one product over all steps, not part of each step's tile
  Products products = Products::kFull;
  // W_ih is packed for the product of all steps (forward with bulk_input, and d_x), rather than read as it is stored.
  bool pack_input = false;
  double cycles = 0;  // estimate that won
};

struct Plan {
  PassPlan forward;
  std::optional<PassPlan> backward;  // training only
  std::string reason;
};

const char* family_name(Family family);
const char* split_name(Split split);
const char* products_name(Products products);
std::vector<Family> families();
std::vector<Split> splits();
std::vector<Products> all_products();

// Each throws std::invalid_argument when nothing within the constraints can run the problem.
PassPlan plan_forward(const Problem& problem, const Machine& machine, const Constraints& constraints);
PassPlan plan_backward(const Problem& problem, const Machine& machine, const Constraints& constraints);

// Both passes, with the reason in words.
Plan make_plan(const Problem& problem, const Machine& machine, const Constraints& constraints);

}  // namespace fastlstm
