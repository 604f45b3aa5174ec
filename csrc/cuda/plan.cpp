#include "plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <span>
#include <sstream>
#include <stdexcept>

#include "../cell.h"

namespace fastlstm::cuda {

namespace {

// The cost model's constants, in SM cycles unless they say otherwise: fitted to steps measured on an H200 in bfloat16
// (docs/cuda.md), so that they contain what the single parts of a step do to each other.
namespace cost {
// Of a step: in any case, for each cell tile of a CTA, for each cycle that its tensor cores are busy, and for each KB
// of states that it loads.
struct Step {
  double any, cell_tile, multiply, load_kb;
};
constexpr Step kForwardStep = {1990, 270, 0.8, 43};
constexpr Step kBackwardStep = {2270, 37, 3.5, 16};
// Of the warpgroup family, in any case, for each byte of an element of a cell tile of a CTA, for each cycle that its
// tensor cores are busy, for each KB of states that it loads, and for each round of loads but the first.
struct WarpgroupStep {
  double any, cell_tile_byte, multiply, load_kb, round;
};
constexpr WarpgroupStep kForwardWarpgroup = {1812, 53, 1.26, 28.4, 337};
constexpr WarpgroupStep kBackwardWarpgroup = {3736, 89, 0.45, 33.3, 158};
// The same of the resident family, for each octet of a warp.
constexpr Step kForwardResident = {110, 1050, 0.6, 0};
constexpr Step kBackwardResident = {380, 1700, 0.6, 0};
constexpr double kL2Bytes = 38;  // bytes per cycle and SM from L2
constexpr double kMma = 6.5;     // of one tensor core per MMA of 16 x 8 x 16 elements of 16 bits, 4 cores per SM
// Of products of 32 bytes of K by both warpgroups of a CTA, for each column tile; and at least.
constexpr double kWgmmaTile = 8, kWgmma = 26;
constexpr double kSharedBytes = 128;  // bytes per cycle and SM from shared memory
constexpr double kLaunch = 6;         // microseconds: weights into registers, launch, filling the exchange buffer
constexpr double kRunProducts = 8;    // microseconds that cutting a product over all steps costs, per run
constexpr double kLibraryStep = 16;   // microseconds of a step whose product is a library call: host time
// Of the tensor cores' peak, as kMma has it, that such a product reaches if it is large.
constexpr double kLibraryRate = 0.9;
constexpr double kMemoryBytes = 3e6;  // bytes per microsecond of device memory
constexpr double kStepLaunch = 3;     // microseconds from the end of a step's kernel to the next one's start
constexpr double kFoldingProducts = 3, kFoldingKernels = 3;        // that a pass with a folded projection has besides
constexpr double kForwardLatency = 2900, kBackwardLatency = 6500;  // of a kernel for one step
// What loading the factors of such a step takes, of what it would at kL2Bytes: if all CTAs run at once, and if not.
constexpr double kStreamedLoad = 1.8, kStreamedTurns = 2.7;
}  // namespace cost

bool has_mma(Element e) { return e != Element::kFp64; }

// Of one column tile: two per tile of weights and product of parts.
double mmas_per_warp(int m_tiles, int blocks, int parts) { return 2.0 * (2 * parts - 1) * m_tiles * blocks; }

// Cycles of a step of a team's CTA.
double team_step_cycles(const cost::Step& step, int m_tiles, const TeamShape& team, int blocks_of_k,
                        const Factors& factors) {
  const double load_kb = static_cast<double>(blocks_of_k) * kBlockBytes * kColumns * team.tiles / 1024;
  const double mmas = mmas_per_warp(m_tiles, team.blocks, factors.parts) * team.tiles * kTeamWarps;
  const double weights = static_cast<double>(kTeamWarps * shared_weight_bytes(m_tiles, team.blocks, factors)) *
                         team.tiles / cost::kSharedBytes;
  return step.any + step.cell_tile * team.octets * team.tiles +
         step.multiply * std::max(mmas * cost::kMma / 4, weights) + step.load_kb * load_kb;
}

// Cycles of a step of a CTA of the resident family.
double resident_step_cycles(const cost::Step& step, int m_tiles, int blocks, int parts, int warps, int octets) {
  const double mmas = mmas_per_warp(m_tiles, blocks, parts) * warps;
  return step.any + step.cell_tile * octets + step.multiply * mmas * cost::kMma / 4;
}

// Cycles of a step of a CTA of the warpgroup family.
double warpgroup_step_cycles(const cost::WarpgroupStep& step, const TeamShape& team, const WarpgroupPass& kernel,
                             int element_bytes) {
  const double load_kb = static_cast<double>(kWarpgroups) * team.blocks * kBlockBytes * kColumns * team.tiles / 1024;
  const double multiply = 2.0 * kernel.m_tiles * team.blocks * std::max(cost::kWgmma, cost::kWgmmaTile * team.tiles);
  return step.any + step.cell_tile_byte * team.octets * team.tiles * element_bytes + step.multiply * multiply +
         step.load_kb * load_kb + step.round * (ceil_div(team.blocks, kernel.round_blocks) - 1);
}

// Microseconds to read the recurrent weights anew in each step, of so many columns, if L2 does not hold them with what
// else a step takes.
double weights_from_memory(const Problem& p, int64_t columns, Element e, const Device& d) {
  const double bytes = static_cast<double>(4 * p.H * columns) * storage_bytes(e);
  return bytes > 0.7 * static_cast<double>(d.l2_bytes) ? bytes / cost::kMemoryBytes : 0;
}

// Of a library's product, per microsecond.
double multiply_adds(Element e, const Device& d) {
  const int of_sm = e == Element::kFp64 ? 64 : e == Element::kFp32 ? 128 : e == Element::kTf32 ? 512 : 1024;
  return d.sms * d.gigahertz * 1e3 * of_sm * cost::kLibraryRate;
}

double average_rows(const Problem& p) {
  return static_cast<double>(p.N) / static_cast<double>(std::max<int64_t>(p.T, 1));
}

// Microseconds per step of the stepwise family.
double stepwise_microseconds(const Problem& p, Element e, const Device& d) {
  const double rows = average_rows(p);
  const auto H = static_cast<double>(p.H), out = static_cast<double>(p.output_size());
  const double product = rows * (4 * H * out + (p.P > 0 ? H * out : 0)) / multiply_adds(e, d);
  const double bytes = rows * H * 12 * storage_bytes(e);
  const double products = p.P > 0 ? 2 : 1, kernels = 2 * products;
  const double of_gpu = kernels * cost::kStepLaunch + bytes / cost::kMemoryBytes +
                        std::max(product, weights_from_memory(p, p.output_size(), e, d));
  return static_cast<double>(p.directions) * std::max(products * cost::kLibraryStep, of_gpu);
}

// Microseconds per step that the projection takes of the others: its product with the recurrent weights, and what
// stepwise has in its steps, the products with it and (backward) with W_hh, of all rows at once.
double folding_microseconds(const Problem& p, Element e, const Device& d, bool backward) {
  if (p.P == 0) return 0;
  const auto H = static_cast<double>(p.H), P = static_cast<double>(p.P);
  const double of_rows = average_rows(p) * H * P * (backward ? 5 : 1) / multiply_adds(e, d);
  const double once = 4 * H * P * H / multiply_adds(e, d) + cost::kFoldingProducts * cost::kLibraryStep +
                      cost::kFoldingKernels * cost::kStepLaunch;
  return static_cast<double>(p.directions) * (of_rows + once / static_cast<double>(std::max<int64_t>(p.T, 1)));
}

using Variants = std::span<const TeamVariant>;

// Of those that hold all blocks, the smallest one of its octets: the others would multiply zeros.
bool is_smallest(const TeamVariant& variant, int blocks, Variants variants) {
  return variant.blocks >= blocks && std::ranges::none_of(variants, [&](const TeamVariant& other) {
           return other.octets == variant.octets && other.blocks >= blocks && other.blocks < variant.blocks;
         });
}

struct Pass {
  bool backward;
  Variants persistent, resident;
  std::span<const StreamedVariant> streamed;
  std::span<const TeamShape> warpgroup;

  int blocks_of_k(int hidden, int bytes) const {
    return backward ? backward_blocks(hidden, bytes) : forward_blocks(hidden, bytes);
  }
  int m_tiles(int octets) const { return backward ? backward_m_tiles(octets) : forward_m_tiles(octets); }
  size_t resident_bytes(int hidden, int octets, int bytes) const {
    return resident_shared_bytes(hidden, octets, blocks_of_k(hidden, bytes),
                                 backward ? backward_tile_bytes(bytes) : forward_tile_bytes(bytes));
  }
  size_t shared_bytes(const TeamShape& team, const Factors& f) const {
    return backward ? backward_shared_bytes(team, f) : forward_shared_bytes(team, f);
  }
  size_t streamed_bytes(const StreamedVariant& variant) const {
    return streamed_shared_bytes(variant, backward ? 1 : kGates);
  }
  WarpgroupPass warpgroup_pass(const TeamShape& team, int bytes) const {
    return backward ? warpgroup_backward_pass(team, bytes) : warpgroup_forward_pass(team, bytes);
  }
};

template <int Parts>
Pass pass_with(bool backward) {
  std::span<const TeamShape> warpgroup;
  if (Parts == 1 && backward) warpgroup = kWarpgroupBackwardVariants;
  if (Parts == 1 && !backward) warpgroup = kWarpgroupForwardVariants;
  if (backward)
    return {backward, kBackwardVariants<Parts>, kResidentBackwardVariants<Parts>, kStreamedBackwardVariants<Parts>,
            warpgroup};
  return {backward, kForwardVariants<Parts>, kResidentForwardVariants<Parts>, kStreamedForwardVariants<Parts>,
          warpgroup};
}

Pass pass_of(Element e, bool backward) {
  return factors_of(e).parts == 1 ? pass_with<1>(backward) : pass_with<2>(backward);
}

PassPlan streamed_plan(const Problem& p, Element e, const Device& d, const StreamedVariant& variant, const Pass& pass) {
  const Factors f = factors_of(e);
  const int hidden = static_cast<int>(p.H), column_tiles = static_cast<int>((p.B + kColumns - 1) / kColumns);
  const int m_tiles = pass.m_tiles(variant.octets), blocks = pass.blocks_of_k(hidden, f.bytes);
  PassPlan plan;
  plan.family = Family::kStreamed;
  plan.team = {variant.octets, 0, variant.tiles};
  plan.groups = ceil_div(column_tiles, variant.tiles);
  plan.ctas = team_ctas(hidden, variant.octets) * plan.groups;
  plan.shared_bytes = pass.streamed_bytes(variant);
  plan.waves = 1;
  const double turns = ceil_div(plan.ctas, d.sms), rows = 16.0 * m_tiles + kColumns * variant.tiles;
  const double load = turns * rows * blocks * kBlockBytes / cost::kL2Bytes *
                      (turns > 1 ? cost::kStreamedTurns : cost::kStreamedLoad),
               multiply = turns * mmas_per_warp(m_tiles, blocks, f.parts) * variant.tiles * cost::kMma / 4;
  plan.microseconds =
      static_cast<double>(p.directions) *
      (cost::kStepLaunch + (pass.backward ? cost::kBackwardLatency : cost::kForwardLatency) / (d.gigahertz * 1e3) +
       std::max(std::max(load, multiply) / (d.gigahertz * 1e3), weights_from_memory(p, p.H, e, d)));
  return plan;
}

// Launches that a run of steps takes.
int launches(const PassPlan& plan, const Problem& p) {
  return plan.waves * (plan.both_directions ? 1 : static_cast<int>(p.directions));
}

// Adds the plan for each number of layers that can run at the same time, with so many steps per run that the time at
// the ends of a pass, when not all layers are busy, costs as much as the launches between runs. Layers of two
// directions have to wait for each other; and if one layer takes the whole GPU, there is nothing to share.
//
// shape(layers): the plan but for these two, with the time that a step of all these layers takes.
template <class Shape>
void add_with_layers(std::vector<PassPlan>& plans, const Problem& p, const Constraints& constraints,
                     const Shape& shape) {
  const auto T = static_cast<double>(std::max<int64_t>(p.T, 1));
  const int most = p.directions == 1 ? static_cast<int>(std::min<int64_t>(p.layers, kMaxRuns)) : 1;
  for (int layers = 1; layers <= most; ++layers) {
    std::optional<PassPlan> plan = shape(layers);
    if (!plan || (layers > 1 && plan->waves > 1)) return;
    const double step = plan->microseconds, launch = cost::kLaunch * launches(*plan, p);
    double steps = layers == 1 ? T : std::sqrt(T * (launch + cost::kRunProducts) / ((layers - 1) * step));
    if (layers > 1) steps = std::min(steps, T / 2);
    if (constraints.run_steps) steps = *constraints.run_steps;
    plan->layers = layers;
    plan->run_steps = static_cast<int>(std::min(T, std::ceil(steps / kRunStepMultiple) * kRunStepMultiple));
    if (layers > 1 && plan->run_steps == p.T) return;  // nothing happens at the same time
    double total = 0;
    for (int64_t first = 0; first < p.layers; first += layers) {
      const int count = static_cast<int>(std::min<int64_t>(layers, p.layers - first));
      const double steps_of_run = run_steps(*plan, count, p.T), runs = std::ceil(T / steps_of_run) + count - 1;
      total += runs * (steps_of_run * step + launch + (runs > 1 ? cost::kRunProducts : 0));
    }
    plan->microseconds = total / (T * static_cast<double>(p.layers));
    plans.push_back(*plan);
  }
}

// Of the families whose kernels take the recurrent products: those of W_hh, or of W_hh W_hr.
std::vector<PassPlan> own_products(const Problem& p, Element e, const Device& d, const Constraints& constraints,
                                   const Pass& pass) {
  std::vector<PassPlan> plans;
  for (const StreamedVariant& variant : pass.streamed) {
    PassPlan plan = streamed_plan(p, e, d, variant, pass);
    if (plan.shared_bytes <= static_cast<size_t>(d.shared_bytes)) plans.push_back(plan);
  }
  if (p.H > 4096 || p.N > std::numeric_limits<int32_t>::max()) return plans;  // rows are counted in 32 bits
  const Factors factors = factors_of(e);
  const int hidden = static_cast<int>(p.H), bytes = factors.bytes, directions = static_cast<int>(p.directions);
  const int blocks_of_k = pass.blocks_of_k(hidden, bytes), blocks_per_warp = ceil_div(blocks_of_k, kTeamWarps);
  const int column_tiles = static_cast<int>((p.B + kColumns - 1) / kColumns);
  for (const TeamVariant& variant : pass.resident) {
    const int warps = resident_warps(hidden, variant.octets);
    if (warps > kTeamWarps || !is_smallest(variant, blocks_of_k, pass.resident) ||
        pass.resident_bytes(hidden, variant.octets, bytes) > static_cast<size_t>(d.shared_bytes))
      continue;
    add_with_layers(plans, p, constraints, [&](int layers) -> std::optional<PassPlan> {
      PassPlan plan;
      plan.family = Family::kResident;
      plan.team = {variant.octets, variant.blocks, 1};
      plan.groups = column_tiles;
      plan.both_directions = directions == 2;
      plan.ctas = directions * layers * column_tiles;
      if (layers > 1 && plan.ctas > d.sms) return std::nullopt;
      plan.shared_bytes = pass.resident_bytes(hidden, variant.octets, bytes);
      plan.waves = 1;
      plan.microseconds =
          ceil_div(plan.ctas, d.sms) *
          resident_step_cycles(pass.backward ? cost::kBackwardResident : cost::kForwardResident,
                               pass.m_tiles(variant.octets), variant.blocks, factors.parts, warps, variant.octets) /
          (d.gigahertz * 1e3);
      return plan;
    });
  }
  // Teams of this kind, as many as fit, whose CTAs take so many cycles for a step.
  const auto add_teams = [&](const PassPlan& kind, double step_cycles) {
    if (kind.shared_bytes > static_cast<size_t>(d.shared_bytes)) return;
    add_with_layers(plans, p, constraints, [&](int layers) -> std::optional<PassPlan> {
      PassPlan plan = kind;
      const int tiles = plan.team.tiles;
      plan.both_directions = directions == 2 && 2 * plan.team_ctas <= d.sms;
      const int at_once = plan.both_directions ? 2 : layers;
      const int teams = d.sms / (plan.team_ctas * at_once);
      if (teams == 0) return std::nullopt;
      plan.groups = std::min(teams, ceil_div(column_tiles, tiles));
      if (constraints.groups) plan.groups = std::min(plan.groups, *constraints.groups);
      plan.ctas = at_once * plan.groups * plan.team_ctas;
      plan.waves = ceil_div(column_tiles, plan.groups * tiles);
      plan.microseconds = launches(plan, p) * step_cycles / (d.gigahertz * 1e3);
      return plan;
    });
  };
  for (const TeamVariant& variant : pass.persistent) {
    if (!is_smallest(variant, blocks_per_warp, pass.persistent)) continue;
    for (int tiles = 1; tiles <= kTeamWarps / variant.octets; tiles *= 2) {
      PassPlan kind;
      kind.family = Family::kPersistent;
      kind.team = {variant.octets, variant.blocks, tiles};
      kind.team_ctas = team_ctas(hidden, variant.octets);
      kind.exchange_bytes = exchange_bytes(blocks_of_k, tiles);
      kind.shared_bytes = pass.shared_bytes(kind.team, factors);
      add_teams(kind, team_step_cycles(pass.backward ? cost::kBackwardStep : cost::kForwardStep,
                                       pass.m_tiles(variant.octets), kind.team, blocks_of_k, factors));
    }
  }
  if (!d.warpgroups || p.H % kOctet != 0) return plans;
  const int parts = kWarpgroups * (pass.backward ? kPartsOfK : 1);  // of K
  for (const TeamShape& team : pass.warpgroup) {
    const auto holds = [&](const TeamShape& t) {
      return t.octets == team.octets && t.tiles == team.tiles && t.blocks * parts >= blocks_of_k;
    };
    if (!holds(team) ||
        std::ranges::any_of(pass.warpgroup, [&](const TeamShape& t) { return holds(t) && t.blocks < team.blocks; }))
      continue;
    const WarpgroupPass kernel = pass.warpgroup_pass(team, bytes);
    PassPlan kind;
    kind.family = Family::kWarpgroup;
    kind.team = team;
    kind.team_ctas = pass.backward ? warpgroup_backward_ctas(hidden) : team_ctas(hidden, team.octets);
    kind.exchange_bytes = exchange_bytes(blocks_of_k, team.tiles);
    if (pass.backward) kind.exchange_bytes += exchanged_sums_bytes(hidden, team.tiles);
    kind.shared_bytes = kernel.shared_bytes;
    add_teams(kind, warpgroup_step_cycles(pass.backward ? cost::kBackwardWarpgroup : cost::kForwardWarpgroup, team,
                                          kernel, bytes));
  }
  return plans;
}

std::vector<PassPlan> candidates(const Problem& p, Element e, const Device& d, const Constraints& constraints,
                                 const Pass& pass) {
  PassPlan stepwise;
  stepwise.microseconds = stepwise_microseconds(p, e, d);
  std::vector<PassPlan> plans = {stepwise};
  // A norm needs a whole row, and what else a step can have is stepwise's.
  if (!has_mma(e) || p.step_extras || p.layer_norm || p.B == 0) return plans;
  for (PassPlan& plan : own_products(p, e, d, constraints, pass)) {
    plan.microseconds += folding_microseconds(p, e, d, pass.backward);
    plans.push_back(plan);
  }
  return plans;
}

PassPlan choose(const Problem& p, Element e, const Device& d, const Constraints& constraints, const Pass& pass) {
  std::optional<PassPlan> best;
  for (const PassPlan& plan : candidates(p, e, d, constraints, pass)) {
    const auto fits = [](const auto& constraint, const auto& value) { return !constraint || *constraint == value; };
    if (!fits(constraints.family, plan.family)) continue;
    if (plan.family != Family::kStepwise &&
        !(fits(constraints.octets, plan.team.octets) && fits(constraints.tiles, plan.team.tiles)))
      continue;
    if (keeps_weights(plan.family) && !fits(constraints.layers, plan.layers)) continue;
    if (!best || plan.microseconds < best->microseconds) best = plan;
  }
  if (best) return *best;
  std::ostringstream message;
  message << "the forced plan cannot run this problem: ";
  if (constraints.family) message << "'" << family_name(*constraints.family) << "' ";
  if (!has_mma(e)) {
    message << "multiplies on tensor cores, which do not support float64";
  } else if (p.layer_norm) {
    message << "does not support layer_norm";
  } else if (p.step_extras) {
    message << "does not support reset_hx, recurrent_dropout, zoneout or gradients of cell states";
  } else if (constraints.octets || constraints.tiles || constraints.layers) {
    message << "has no shape with the forced";
    if (constraints.octets) message << " octets = " << *constraints.octets;
    if (constraints.tiles) message << " tiles = " << *constraints.tiles;
    if (constraints.layers) message << " layers = " << *constraints.layers;
    message << " for hidden_size " << p.H << ", num_layers " << p.layers << " and " << p.T << " time steps";
  } else if (constraints.family == Family::kWarpgroup && !d.warpgroups) {
    message << "needs products of warpgroups, which GPUs of compute capability 9.0 have, and a build for 9.0a";
  } else if (constraints.family == Family::kWarpgroup && pass.warpgroup.empty()) {
    message << "multiplies factors of bfloat16, float16 or TF32, not of float32";
  } else if (constraints.family == Family::kWarpgroup && p.H % kOctet != 0) {
    message << "needs a hidden_size that is a multiple of " << kOctet << ", got " << p.H;
  } else {
    message << "cannot hold weights of hidden_size " << p.H << " in the registers of ";
    if (constraints.family == Family::kResident)
      message << "one SM";
    else
      message << d.sms << " SMs";
  }
  throw std::invalid_argument(message.str());
}

}  // namespace

const char* element_name(Element e) {
  switch (e) {
    case Element::kBf16: return "bfloat16";
    case Element::kFp16: return "float16";
    case Element::kTf32: return "tf32";
    case Element::kFp32: return "float32";
    default: return "float64";
  }
}

std::vector<Element> elements() {
  return {Element::kBf16, Element::kFp16, Element::kTf32, Element::kFp32, Element::kFp64};
}

const char* family_name(Family family) {
  switch (family) {
    case Family::kStepwise: return "stepwise";
    case Family::kResident: return "resident";
    case Family::kPersistent: return "persistent";
    case Family::kStreamed: return "streamed";
    default: return "warpgroup";
  }
}

std::vector<Family> families() {
  return {Family::kStepwise, Family::kResident, Family::kPersistent, Family::kStreamed, Family::kWarpgroup};
}

std::vector<CompiledKernel> compiled_kernels() {
  std::vector<CompiledKernel> kernels;
  for (const bool backward : {false, true})
    for (const Element e : elements()) {
      if (!has_mma(e)) continue;
      const Factors factors = factors_of(e);
      const Pass pass = pass_of(e, backward);
      for (const TeamVariant& v : pass.resident) {
        const int units = v.blocks * kBlockBytes / factors.bytes / (backward ? kGates : 1);
        const size_t bytes =
            pass.resident_bytes(std::min(units, kTeamWarps * v.octets * kOctet), v.octets, factors.bytes);
        kernels.push_back({Family::kResident, backward, e, {v.octets, v.blocks}, bytes, bytes});
      }
      for (const TeamVariant& v : pass.persistent) {
        const auto bytes = [&](int tiles) { return pass.shared_bytes({v.octets, v.blocks, tiles}, factors); };
        kernels.push_back(
            {Family::kPersistent, backward, e, {v.octets, v.blocks}, bytes(1), bytes(kTeamWarps / v.octets)});
      }
      for (const StreamedVariant& v : pass.streamed) {
        const size_t bytes = pass.streamed_bytes(v);
        kernels.push_back({Family::kStreamed, backward, e, {v.octets, v.tiles}, bytes, bytes});
      }
      for (const TeamShape& v : pass.warpgroup) {
        const size_t bytes = pass.warpgroup_pass(v, factors.bytes).shared_bytes;
        kernels.push_back({Family::kWarpgroup, backward, e, {v.octets, v.blocks, v.tiles}, bytes, bytes});
      }
    }
  return kernels;
}

int run_steps(const PassPlan& plan, int count, int64_t steps) {
  return count < plan.layers && count == 1 ? static_cast<int>(steps) : plan.run_steps;
}

PassPlan plan_forward(const Problem& problem, Element element, const Device& device, const Constraints& constraints) {
  return choose(problem, element, device, constraints, pass_of(element, false));
}

PassPlan plan_backward(const Problem& problem, Element element, const Device& device, const Constraints& constraints) {
  return choose(problem, element, device, constraints, pass_of(element, true));
}

namespace {

std::mutex forced_mutex;
Constraints forced_constraints;

}  // namespace

Constraints forced() {
  const std::lock_guard lock(forced_mutex);
  return forced_constraints;
}

void set_forced(const Constraints& constraints) {
  const std::lock_guard lock(forced_mutex);
  forced_constraints = constraints;
}

std::string describe(const PassPlan& plan, const Problem& problem) {
  std::ostringstream text;
  text << family_name(plan.family);
  if (plan.family == Family::kStepwise) return text.str();
  const int teams = plan.groups * (plan.both_directions ? 2 : plan.layers);
  if (has_teams(plan.family))
    text << " (" << teams << (teams == 1 ? " team of " : " teams of ") << plan.team_ctas << " CTAs";
  else
    text << " (" << plan.ctas << (plan.ctas == 1 ? " CTA" : " CTAs");
  text << ", " << plan.team.tiles * kColumns << " rows each";
  if (plan.waves > 1) text << ", " << plan.waves << " times";
  if (plan.layers > 1)
    text << ", " << plan.layers << " layers at a time, " << plan.run_steps << " steps apart";
  else if (plan.family != Family::kStreamed && plan.run_steps < problem.T)
    text << ", " << plan.run_steps << " steps per launch";
  if (folds_projection(problem, plan)) text << ", projection in the recurrent weights";
  text << ")";
  return text.str();
}

}  // namespace fastlstm::cuda
