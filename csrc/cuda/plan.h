// How a problem is computed on a GPU, as data: the counterpart of ../plan.h. Pure functions of (problem, element,
// device, constraints), compiled on every machine, so that the plans for any GPU can be asked for and tested without
// it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../problem.h"
#include "layout.h"

namespace fastlstm::cuda {

const char* element_name(Element e);  // that of a dtype, or "tf32"
std::vector<Element> elements();

enum class Family {
  kStepwise,    // a library's products and an elementwise kernel per time step; accepts every legal problem
  kResident,    // a CTA keeps all recurrent weights of a direction and runs 8 rows of the batch
  kPersistent,  // teams of CTAs keep the recurrent weights and exchange states through L2
  kStreamed,    // one kernel per time step, products and cells, reads the weights anew
  kWarpgroup,   // as persistent, with products of warpgroups, on GPUs that have these
};

// What a kernel can count on. Of the device that runs, or of any other for which a plan is asked.
struct Device {
  int sms;
  int shared_bytes;  // of one block at most
  int64_t l2_bytes;
  double gigahertz;  // clock of the SMs
  bool warpgroups;   // it has products of warpgroups, and the build kernels with them

  bool operator==(const Device&) const = default;
};

// What the user has forced (`fastlstm.force`); the planner chooses the rest.
struct Constraints {
  std::optional<Family> family;
  std::optional<int> octets, tiles;              // of all families but stepwise
  std::optional<int> groups, layers, run_steps;  // of the families that keep weights in CTAs

  bool operator==(const Constraints&) const = default;
};

struct PassPlan {
  Family family = Family::kStepwise;
  // Of all families but stepwise:
  TeamShape team = {};
  int groups = 0;                // of column tiles, which split the batch among teams of a direction or layer
  bool both_directions = false;  // at the same time
  int ctas = 0;                  // of a launch
  int team_ctas = 0;             // of each team, if CTAs have teams; and then
  size_t exchange_bytes = 0;     // what these exchange states through
  size_t shared_bytes = 0;       // of each
  int waves = 0;                 // launches, one after the other, that it takes to get through the batch
  int layers = 1;                // that run at the same time, each some steps behind the one that it reads
  int run_steps = 0;             // so many: those of one launch
  double microseconds = 0;       // estimated, per time step of one layer on average, both directions
};

// Steps of a run of `count` layers, the last of a stack, of which the plan would run more: one has nobody to wait for.
int run_steps(const PassPlan& plan, int count, int64_t steps);

// Of a family: whether CTAs keep the weights for a run of steps.
constexpr bool keeps_weights(Family family) {
  return family == Family::kResident || family == Family::kPersistent || family == Family::kWarpgroup;
}
// Whether teams of CTAs exchange states while they run.
constexpr bool has_teams(Family family) { return family == Family::kPersistent || family == Family::kWarpgroup; }

// Whether the recurrence multiplies by W_hh W_hr, has h before its projection W_hr, and knows of none.
constexpr bool folds_projection(const Problem& problem, const PassPlan& plan) {
  return problem.P > 0 && plan.family != Family::kStepwise;
}

const char* family_name(Family family);
std::vector<Family> families();

// A kernel that takes products, as it is compiled.
struct CompiledKernel {
  Family family;
  bool backward;
  Element element;
  std::vector<int> sizes;  // octets, then blocks of K or (streamed) column tiles, or (warpgroup) both
  // Dynamic shared memory: with one column tile in a team, and with as many as it can have.
  size_t least_shared_bytes, most_shared_bytes;
};
std::vector<CompiledKernel> compiled_kernels();

// Each throws std::invalid_argument when nothing within the constraints can run the problem.
PassPlan plan_forward(const Problem& problem, Element element, const Device& device, const Constraints& constraints);
PassPlan plan_backward(const Problem& problem, Element element, const Device& device, const Constraints& constraints);

// What is forced, for the whole process.
Constraints forced();
void set_forced(const Constraints& constraints);

// In one line, for people.
std::string describe(const PassPlan& plan, const Problem& problem);

}  // namespace fastlstm::cuda
