#include "plan.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

#include "cpu/blocking.h"

namespace fastlstm {

namespace {

// The cost model's constants, in core cycles. They rank candidates; they need not predict times.
// Fitted on two cores of an AMD EPYC 7003 (AVX2, 512 KB L2) with torch 2.13.
namespace cost {
constexpr double kForkJoin = 8000;         // torch's parallel_for, both threads awake
constexpr double kMeeting = 1000;          // threads in lockstep meet ...
constexpr double kWaiting = 0.02;          // ... and have waited this part of their work for the slowest
constexpr double kLibraryCall = 12000;     // one small GEMM through aten
constexpr double kLibraryStepRate = 0.55;  // of the FMA peak: a library GEMM with as many rows as a batch ...
constexpr double kLibraryFewRate = 0.30;   // ... with fewer than 8
constexpr double kTileRate = 0.92;         // packed register tiles of 5 or 6 rows ...
constexpr double kTileRate4 = 0.86;        // ... of 4 ...
constexpr double kNarrowTileRate = 0.70;   // ... and of 1 to 3
constexpr double kDotRate = 0.75;          // dot products; each ends in a sum over lanes ...
constexpr double kDotOverhead = 64;        // ... that costs as much as this many more terms
constexpr double kL2Bytes = 26;            // bytes per cycle and core from L2 ...
constexpr double kL3Bytes = 20;            // ... and from L3
constexpr double kStoredRate = 0.50;       // products with k-major weights in place ...
constexpr double kStoredBytes = 15;        // ... which are read in pieces of rows
constexpr double kExposedL2 = 0.05;        // part of the smaller of (multiply, read) that the larger does not hide:
constexpr double kExposedL3 = 0.20;        // reading from L2, and from L3
constexpr double kPackPerElement = 0.8;    // transposing
constexpr double kCopyPerElement = 0.5;    // packing a matrix that is already k-major
constexpr double kLeftPerElement = 0.4;    // packing rows that are multiplied, by each thread that multiplies them
constexpr double kForeignBytes = 4;        // bytes per cycle of what another core has just packed, from its cache
constexpr double kCellPerVector = 55;      // one vector of units of one row: five exponentials and as many divisions
constexpr double kNormPerVector = 45;      // the same vector's part of normalising what the cell reads and makes
constexpr int64_t kPackedRows = 10;        // rows of a bulk product from which on packing its weights pays
}  // namespace cost

struct Candidate {
  Family family;
  Split split;
  bool bulk_input;
  Products products;
};

struct Shape {  // one layer and one direction
  double rows;  // average rows of a step
  double steps, I, H, P;
};

double lanes(const Problem& p, const Machine& m) { return static_cast<double>(m.vector_bytes) / p.compute_bytes; }

// Bytes of a factor of the products.
double factor_bytes(Products products, const Problem& p) {
  return products == Products::kBf16 ? 2 : static_cast<double>(p.compute_bytes);
}

// Multiply-adds per cycle of one core: two FMA pipes, or separate multiplies and adds.
double peak(const Problem& p, const Machine& m) { return lanes(p, m) * (m.fma ? 2 : 1); }

// Part of the weights that a core cannot keep in its L2 from one step to the next; all of them in a single step.
double l3_part(double bytes, const Problem& p, const Machine& m) {
  return p.T == 1 ? 1 : std::max(0.0, 1 - 0.8 * static_cast<double>(m.l2_bytes) / bytes);
}

// Cycles to read this many weight bytes once by one core.
double read_cycles(double bytes, const Problem& p, const Machine& m) {
  const double from_l3 = l3_part(bytes, p, m);
  return bytes * (from_l3 / cost::kL3Bytes + (1 - from_l3) / cost::kL2Bytes);
}

// Parts that the rows of a direction are cut in where threads divide rows: as the driver cuts them.
double row_parts(double rows, const Problem& p, const Machine& m) {
  return std::clamp(std::floor(static_cast<double>(m.threads) / static_cast<double>(p.directions)), 1.0,
                    std::max(rows, 1.0));
}

// Rows and hidden units that the busiest thread has in each step.
struct Share {
  double rows, units;
};

Share share_of(const Shape& s, Split split, const Problem& p, const Machine& m) {
  const auto directions = static_cast<double>(p.directions), threads = static_cast<double>(m.threads);
  if (split == Split::kUnits) return {s.rows, directions * s.H / threads};
  const double parts = row_parts(s.rows, p, m), turns = std::ceil(directions * parts / threads);
  return {std::ceil(s.rows / parts) * turns, s.H};
}

// Bytes of the weights that the busiest thread reads in each step, K terms in each product.
double weight_bytes(const Candidate& c, const Share& share, double K, const Problem& p) {
  return share.units * 4 * K * factor_bytes(c.products, p);
}

// Part of the peak that register tiles reach, which share these rows evenly.
double tile_rate(double rows) {
  const double of_a_tile = rows / std::ceil(rows / 6);
  return of_a_tile > 4 ? cost::kTileRate : of_a_tile > 3 ? cost::kTileRate4 : cost::kNarrowTileRate;
}

// Cycles of the cell of one step on the busiest thread. Normalised rows are not divided, whatever the split.
double cell_cycles(const Candidate& c, const Shape& s, const Share& share, const Problem& p, const Machine& m) {
  if (!p.layer_norm) return share.rows * std::ceil(share.units / lanes(p, m)) * cost::kCellPerVector;
  const double rows =
      c.split == Split::kRows ? share.rows : std::ceil(static_cast<double>(p.directions) * s.rows / m.threads);
  return rows * std::ceil(s.H / lanes(p, m)) * (cost::kCellPerVector + cost::kNormPerVector);
}

// Cycles of the products and the cell of one step on one core; pass_rows meet the weights together.
double step_cycles(const Candidate& c, const Shape& s, const Share& share, double K, int64_t pass_rows,
                   const Problem& p, const Machine& m) {
  const bool dots = c.family == Family::kUnpacked;
  const double outputs = share.rows * share.units * 4, bf16 = c.products == Products::kBf16 ? 2 : 1;
  const double rate = bf16 * peak(p, m) * (dots ? cost::kDotRate : tile_rate(share.rows));
  const double bytes = weight_bytes(c, share, K, p);
  const double passes = std::ceil(share.rows / static_cast<double>(pass_rows));
  const double read = passes * read_cycles(bytes, p, m);
  const double exposed = cost::kExposedL2 + (cost::kExposedL3 - cost::kExposedL2) * l3_part(bytes, p, m);
  const double multiply = outputs * K / rate;
  return std::max(multiply, read) + exposed * std::min(multiply, read) +
         (dots ? outputs * cost::kDotOverhead / rate : 0) + cell_cycles(c, s, share, p, m);
}

// Cycles of one library GEMM: `rows` rows against a weight matrix of K x columns.
double library_cycles(double rows, double K, double columns, const Problem& p, const Machine& m) {
  const double rate = rows >= 8 ? cost::kLibraryStepRate : cost::kLibraryFewRate;
  const double bytes = K * columns * static_cast<double>(p.compute_bytes);
  const double readers = rows >= 8 ? m.threads : 1;  // matrix-vector products run on one thread
  return std::max(rows * K * columns / (m.threads * peak(p, m) * rate), read_cycles(bytes / readers, p, m)) +
         cost::kLibraryCall;
}

// Cycles of the library GEMMs of one step: h W_hh^T (or d_gates W_hh), and the projection.
double library_step_cycles(const Shape& s, const Problem& p, const Machine& m) {
  double step = library_cycles(s.rows, s.P, 4 * s.H, p, m);
  if (p.P > 0) step += library_cycles(s.rows, s.H, s.P, p, m);
  const double per_vector = cost::kCellPerVector + (p.layer_norm ? cost::kNormPerVector : 0);
  const double cell = s.rows * s.H / lanes(p, m) * per_vector / std::min<double>(m.threads, std::max(s.rows, 1.0));
  return static_cast<double>(p.directions) * (step + cell) + cost::kForkJoin;
}

// Cycles that the threads of a pass spend on starting together and on waiting for each other in every phase of a step,
// which takes step_cycles without that.
double synchronisation_cycles(const Candidate& c, const Shape& s, double phases, double step_cycles, const Problem& p,
                              const Machine& m) {
  if (m.threads == 1) return 0;
  if (c.split == Split::kUnits)
    return cost::kForkJoin + s.steps * phases * cost::kMeeting + (s.steps - 1) * cost::kWaiting * step_cycles;
  return static_cast<double>(p.directions) * row_parts(s.rows, p, m) > 1 ? cost::kForkJoin : 0;
}

// Cycles of packing the weights of a layer, `elements` of each direction, and of fetching what other threads packed.
double packing_cycles(const Candidate& c, double elements, double per_element, const Problem& p, const Machine& m) {
  const auto directions = static_cast<double>(p.directions), threads = static_cast<double>(m.threads);
  const double foreign = c.split == Split::kRows ? elements * (1 - 1 / threads) : 0;
  return directions * elements * per_element / threads + foreign * factor_bytes(c.products, p) / cost::kForeignBytes +
         cost::kForkJoin;
}

double forward_cycles(const Candidate& c, const Shape& s, const Problem& p, const Machine& m) {
  const auto directions = static_cast<double>(p.directions);
  const double rows = s.rows * s.steps;
  const double through_memory = rows * 4 * s.H * static_cast<double>(p.compute_bytes) / (4.0 * m.threads);
  const double weights = 4 * s.H * s.I;
  const double bulk =
      directions * (weights * (rows / (peak(p, m) * cost::kTileRate) + cost::kPackPerElement) / m.threads +
                    2 * cost::kForkJoin + through_memory);
  if (c.family == Family::kStepwise) return bulk + s.steps * library_step_cycles(s, p, m);
  const Share share = share_of(s, c.split, p, m);
  const double K = s.P + (c.bulk_input ? 0 : s.I);
  const int64_t pass_rows = cpu::rows_per_pass(static_cast<int64_t>(weight_bytes(c, share, K, p)));
  double step = step_cycles(c, s, share, K, pass_rows, p, m), packing = 0;
  if (c.family == Family::kPacked) {
    step += share.rows * K * cost::kLeftPerElement;
    packing = packing_cycles(c, 4 * s.H * K, cost::kPackPerElement, p, m);
  }
  return s.steps * step + packing + (c.bulk_input ? bulk : 0) +
         synchronisation_cycles(c, s, 1 + (p.P > 0 ? 1 : 0) + (p.layer_norm ? 1 : 0), step, p, m);
}

double backward_cycles(const Candidate& c, const Shape& s, const Problem& p, const Machine& m) {
  if (c.family == Family::kStepwise) return s.steps * library_step_cycles(s, p, m);
  const Share share = share_of(s, c.split, p, m);
  double step, packing = 0;
  if (c.family == Family::kPacked) {
    step = step_cycles(c, s, share, s.P, cpu::kBlockRows, p, m) + share.rows * 4 * s.H * cost::kLeftPerElement;
    packing = packing_cycles(c, 4 * s.H * s.P, cost::kCopyPerElement, p, m);
  } else {
    const double outputs = share.rows * share.units * 4,
                 readings = std::ceil(share.rows / static_cast<double>(cpu::kStoredRows));
    const double bytes = share.units * 4 * s.P * static_cast<double>(p.compute_bytes);
    step = std::max(outputs * s.P / (peak(p, m) * cost::kStoredRate), readings * bytes / cost::kStoredBytes) +
           cell_cycles(c, s, share, p, m);
  }
  const double phases = (p.P > 0 ? 3 : 1) + (p.layer_norm ? 1 : 0);
  return s.steps * step + packing + synchronisation_cycles(c, s, phases, step, p, m);
}

// The limits of the families: the only place that states them.
std::vector<Candidate> candidates(const Problem& p, bool backward) {
  constexpr Products kFull = Products::kFull, kBf16 = Products::kBf16;
  // Where x W_ih^T is normalised it is a product by itself.
  const bool bulk_only = p.layer_norm && !backward;
  std::vector<Candidate> all;
  all.reserve(11);  // as many as there can be: this runs at every call
  all.push_back({Family::kStepwise, Split::kRows, !backward, kFull});
  for (const Split split : {Split::kRows, Split::kUnits}) {
    if (!bulk_only) all.push_back({Family::kPacked, split, false, kFull});
    // Both products of a bfloat16 step go through its tiles if they can: there is no other variant.
    if (p.bf16_allowed && p.compute_bytes == 4) all.push_back({Family::kPacked, split, bulk_only, kBf16});
    if (!backward) all.push_back({Family::kPacked, split, true, kFull});
    // Products with weights as they are stored have no projection of their own.
    if (p.P == 0 && !bulk_only) all.push_back({Family::kUnpacked, split, false, kFull});
    if (p.P == 0 && !backward) all.push_back({Family::kUnpacked, split, true, kFull});
  }
  return all;
}

// Legal everywhere, bfloat16 products are worth considering only where an instruction takes them.
bool allowed(const Candidate& c, const Constraints& constraints, const Machine& m) {
  return c.family == constraints.family.value_or(c.family) && c.split == constraints.split.value_or(c.split) &&
         c.bulk_input == constraints.bulk_input.value_or(c.bulk_input) &&
         (constraints.products ? c.products == *constraints.products : c.products == Products::kFull || m.bf16);
}

// The cheapest candidate within the constraints.
PassPlan choose(const Problem& p, const Machine& m, const Constraints& constraints, bool backward) {
  // Later layers read D * P features: the plan is for the stack, so sizes are averaged over layers.
  const double input =
      (static_cast<double>(p.I) + static_cast<double>((p.layers - 1) * p.directions * p.output_size())) /
      static_cast<double>(p.layers);
  const Shape shape = {p.T > 0 ? static_cast<double>(p.N) / static_cast<double>(p.T) : 0, static_cast<double>(p.T),
                       input, static_cast<double>(p.H), static_cast<double>(p.output_size())};
  std::optional<PassPlan> best;
  for (const Candidate& c : candidates(p, backward)) {
    if (!allowed(c, constraints, m)) continue;
    const double cycles =
        static_cast<double>(p.layers) * (backward ? backward_cycles(c, shape, p, m) : forward_cycles(c, shape, p, m));
    if (!best || cycles < best->cycles) best = PassPlan{c.family, c.split, c.bulk_input, c.products, false, cycles};
  }
  if (best) return *best;
  std::ostringstream message;
  message << "the forced plan cannot run this problem: ";
  if (constraints.family == Family::kUnpacked && p.P > 0)
    message << "'unpacked' does not support proj_size > 0";
  else if (constraints.products == Products::kBf16 && !p.bf16_allowed)
    message << "products='bf16' needs bfloat16 tensors, or float32 and torch's permission "
               "(torch.backends.mkldnn.rnn.fp32_precision = 'bf16')";
  else if (p.layer_norm && constraints.bulk_input == false)
    message << "layer_norm needs bulk_input=True: it normalises the product of the input by itself";
  else if (constraints.products == Products::kBf16)
    message << "products='bf16' needs the plan 'packed' without bulk_input (with layer_norm: with bulk_input)";
  else
    message << "'stepwise' has no variant but split='rows' with bulk_input=True";
  throw std::invalid_argument(message.str());
}

}  // namespace

const char* family_name(Family family) {
  switch (family) {
    case Family::kPacked: return "packed";
    case Family::kUnpacked: return "unpacked";
    default: return "stepwise";
  }
}

const char* split_name(Split split) { return split == Split::kRows ? "rows" : "units"; }

const char* products_name(Products products) { return products == Products::kFull ? "full" : "bf16"; }

std::vector<Family> families() { return {Family::kStepwise, Family::kPacked, Family::kUnpacked}; }

std::vector<Split> splits() { return {Split::kRows, Split::kUnits}; }

std::vector<Products> all_products() { return {Products::kFull, Products::kBf16}; }

PassPlan plan_forward(const Problem& problem, const Machine& machine, const Constraints& constraints) {
  // Streaming inference asks the same again and again, and its steps are hardly longer than the search.
  struct Last {
    Problem problem = {};
    Machine machine = {};
    Constraints constraints;
    PassPlan plan;
  };
  thread_local Last last;
  if (!(problem == last.problem && machine == last.machine && constraints == last.constraints)) {
    last = {problem, machine, constraints, choose(problem, machine, constraints, false)};
    last.plan.pack_input = problem.N >= cost::kPackedRows || last.plan.family != Family::kUnpacked;
  }
  return last.plan;
}

PassPlan plan_backward(const Problem& problem, const Machine& machine, const Constraints& constraints) {
  Constraints backward = constraints;
  backward.bulk_input.reset();  // says nothing about a backward pass
  PassPlan plan = choose(problem, machine, backward, true);
  // bfloat16 products have no other form than the packed one.
  plan.pack_input = problem.N >= cost::kPackedRows || plan.products == Products::kBf16;
  return plan;
}

Plan make_plan(const Problem& problem, const Machine& machine, const Constraints& constraints) {
  Plan plan = {plan_forward(problem, machine, constraints), std::nullopt, {}};
  if (problem.training) plan.backward = plan_backward(problem, machine, constraints);
  const bool free = !constraints.family && !constraints.split && !constraints.bulk_input && !constraints.products;
  std::ostringstream reason;
  reason << (free ? "cheapest of all legal variants" : "cheapest of what is forced") << ": forward "
         << std::llround(plan.forward.cycles / 1000) << "k cycles estimated";
  if (plan.backward) reason << ", backward recurrence " << std::llround(plan.backward->cycles / 1000) << "k";
  plan.reason = reason.str();
  return plan;
}

}  // namespace fastlstm
