// Tests of emulation.h itself: an emulation that is more forgiving than the device would hide what it is there to show.
//
//   g++ -std=c++20 -O2 -fno-strict-aliasing -DFASTLSTM_EMULATE_CUDA -Icsrc/cuda -Itests/host_cuda
//       tests/host_cuda/test_emulation.cpp
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "ptx.cuh"

using namespace fastlstm::cuda;

namespace {

int failures = 0;

void check(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

void set_seed(uint64_t seed) {
  emulation::settings() = {};
  emulation::settings().seed = seed;
}

template <class Params>
std::string error_of(void (*kernel)(Params), int blocks, int threads, size_t shared_bytes, const Params& params) {
  const cudaError_t error = launch(kernel, {blocks, threads, shared_bytes, true}, nullptr, params);
  const std::string& text = emulation::last_error();
  check((error == cudaSuccess) == text.empty(), "an error comes with a text: " + text);
  return text;
}

template <class Params>
void expect_success(void (*kernel)(Params), int blocks, int threads, size_t shared_bytes, const Params& params) {
  const std::string error = error_of(kernel, blocks, threads, shared_bytes, params);
  check(error.empty(), "no error expected: " + error);
}

// The error must contain all the words.
template <class Params>
void expect_error(void (*kernel)(Params), int blocks, int threads, size_t shared_bytes, const Params& params,
                  std::initializer_list<const char*> words) {
  const std::string error = error_of(kernel, blocks, threads, shared_bytes, params);
  for (const char* word : words)
    check(error.find(word) != std::string::npos, std::string("error with \"") + word + "\" expected, got: " + error);
}

// In how many of the seeds the function is true.
template <class F>
int count_seeds(int seeds, const F& f) {
  int count = 0;
  for (int seed = 1; seed <= seeds; ++seed) {
    set_seed(static_cast<uint64_t>(seed));
    count += f() ? 1 : 0;
  }
  return count;
}

uint4 quad(uint32_t x) { return make_uint4(x, x, x, x); }
bool is_quad(uint4 v, uint32_t x) { return v.x == x && v.y == x && v.z == x && v.w == x; }

// ------------------------------------------------------------------------------------------------ arithmetic

enum class Type { kBf16, kFp16, kTf32 };

struct ProductParams {
  Type type;
  const uint32_t *a, *b;  // bits of the elements, A 16 x depth, B depth x 8, row by row
  float* d;               // 16 x 8
};

__global__ void product_kernel(ProductParams p) {
  const int lane = thread_index(), g = lane / 4, q = lane % 4;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = p.d[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  if (p.type == Type::kTf32) {
    const auto a = [&](int row, int column) { return p.a[row * 8 + column]; };
    mma_tf32(d, a(g, q), a(g + 8, q), a(g, q + 4), a(g + 8, q + 4), p.b[q * 8 + g], p.b[(q + 4) * 8 + g]);
  } else {
    const auto a = [&](int row, int column) { return p.a[row * 16 + column] | p.a[row * 16 + column + 1] << 16; };
    const auto b = [&](int row, int column) { return p.b[row * 8 + column] | p.b[(row + 1) * 8 + column] << 16; };
    const auto mma = p.type == Type::kBf16 ? mma_bf16 : mma_fp16;
    mma(d, a(g, 2 * q), a(g + 8, 2 * q), a(g, 2 * q + 8), a(g + 8, 2 * q + 8), b(2 * q, g), b(2 * q + 8, g));
  }
  for (int i = 0; i < 4; ++i) p.d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = d[i];
}

// By the definition of the format: sign, exponent, mantissa.
double value_of(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> (mantissa_bits + exponent_bits) & 1 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1u << mantissa_bits), exponent - bias - mantissa_bits);
}

void test_products() {
  std::mt19937 random(1);
  for (const Type type : {Type::kBf16, Type::kFp16, Type::kTf32})
    for (int round = 0; round < 20; ++round) {
      const int depth = type == Type::kTf32 ? 8 : 16;
      const auto element = [&] {
        const float x = std::uniform_real_distribution<float>(-2, 2)(random);
        if (type == Type::kTf32) return bits_of(x);  // low bits and all
        return (type == Type::kBf16 ? pack_bf16(x, 0) : pack_fp16(round % 2 ? x : x * 0x1p-15f, 0)) & 0xffff;
      };
      const auto value = [&](uint32_t bits) {
        if (type == Type::kTf32) return value_of(bits >> 13, 8, 10);
        return type == Type::kBf16 ? value_of(bits, 8, 7) : value_of(bits, 5, 10);
      };
      std::vector<uint32_t> a(16 * depth), b(depth * 8);
      std::vector<float> d(16 * 8), expected(16 * 8);
      for (uint32_t& x : a) x = element();
      for (uint32_t& x : b) x = element();
      for (float& x : d) x = std::uniform_real_distribution<float>(-2, 2)(random);
      if (round == 0) d[17] = std::numeric_limits<float>::quiet_NaN();
      for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
          float sum = d[row * 8 + column];
          for (int k = 0; k < depth; ++k)
            sum += static_cast<float>(value(a[row * depth + k]) * value(b[k * 8 + column]));
          expected[row * 8 + column] = sum;
        }
      set_seed(static_cast<uint64_t>(round));
      expect_success(product_kernel, 1, 32, 0, ProductParams{type, a.data(), b.data(), d.data()});
      int wrong = 0;
      for (int i = 0; i < 16 * 8; ++i)
        wrong += d[i] == expected[i] || (std::isnan(d[i]) && std::isnan(expected[i])) ? 0 : 1;
      check(wrong == 0,
            "mma of type " + std::to_string(static_cast<int>(type)) + ": " + std::to_string(wrong) + " wrong elements");
    }
}

struct TransposeParams {
  const uint16_t* from;
  uint16_t* to;
};

__global__ void transpose_kernel(TransposeParams p) {
  const int row = thread_index() / 4, column = 2 * (thread_index() % 4);
  const uint32_t x = p.from[row * 8 + column] | uint32_t{p.from[row * 8 + column + 1]} << 16;
  const uint32_t y = transpose_8x8(x);
  p.to[row * 8 + column] = static_cast<uint16_t>(y);
  p.to[row * 8 + column + 1] = static_cast<uint16_t>(y >> 16);
}

void test_transpose() {
  std::vector<uint16_t> from(64), to(64);
  for (int i = 0; i < 64; ++i) from[i] = static_cast<uint16_t>(1000 * i + 7);
  set_seed(1);
  expect_success(transpose_kernel, 1, 32, 0, TransposeParams{from.data(), to.data()});
  for (int i = 0; i < 64; ++i) check(to[i] == from[i % 8 * 8 + i / 8], "transpose_8x8, element " + std::to_string(i));
}

// Every number of a 16-bit format comes back, and what lies between two goes to the nearer or the even one.
template <class Pack>
void test_rounding(const char* what, int exponent_bits, int mantissa_bits, const Pack& pack) {
  const float infinity = std::numeric_limits<float>::infinity();
  int wrong = 0;
  const auto expect = [&](float x, uint32_t bits) {
    wrong += pack(x) == bits ? 0 : 1;
    wrong += pack(-x) == (bits | 0x8000) ? 0 : 1;
  };
  const uint32_t infinite = ((1u << exponent_bits) - 1) << mantissa_bits;
  for (uint32_t bits = 0; bits < infinite; ++bits) {
    const auto x = static_cast<float>(value_of(bits, exponent_bits, mantissa_bits));
    expect(x, bits);
    // Beyond the largest number, the next one counts as if the exponent had room for it.
    const double next = bits + 1 == infinite ? std::ldexp(1.0, 1 << (exponent_bits - 1))
                                             : value_of(bits + 1, exponent_bits, mantissa_bits);
    const auto middle = static_cast<float>((static_cast<double>(x) + next) / 2);
    expect(middle, bits + bits % 2);
    expect(std::nextafter(middle, 0.f), bits);
    expect(std::nextafter(middle, infinity), bits + 1);
  }
  expect(infinity, infinite);
  expect(std::numeric_limits<float>::max(), infinite);
  for (const uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xffffffffu})
    wrong += pack(float_of_bits(nan)) == 0x7fff ? 0 : 1;
  check(wrong == 0, std::string(what) + ": " + std::to_string(wrong) + " values wrongly rounded");
}

void test_conversions() {
  test_rounding("pack_bf16", 8, 7, [](float x) { return pack_bf16(x, 1) & 0xffff; });
  test_rounding("pack_bf16", 8, 7, [](float x) { return pack_bf16(1, x) >> 16; });
  test_rounding("pack_fp16", 5, 10, [](float x) { return pack_fp16(x, 1) & 0xffff; });
  test_rounding("pack_fp16", 5, 10, [](float x) { return pack_fp16(1, x) >> 16; });
  int wrong = 0;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = float_of_fp16(static_cast<uint16_t>(bits));
    const auto expected = static_cast<float>(value_of(bits, 5, 10));
    wrong += std::isnan(expected) ? !std::isnan(x) : bits_of(x) != bits_of(expected);
  }
  check(wrong == 0, "float_of_fp16: " + std::to_string(wrong) + " wrong values");

  const auto rounds = [](uint32_t from, uint32_t to) {
    check(round_tf32(float_of_bits(from)) == to, "round_tf32 of " + std::to_string(from));
    check(round_tf32(float_of_bits(from | 0x80000000)) == (to | 0x80000000), "round_tf32 of -" + std::to_string(from));
  };
  rounds(0x3f800000, 0x3f800000);
  rounds(0x3f800fff, 0x3f800000);
  rounds(0x3f801000, 0x3f802000);  // a tie
  rounds(0x3f803000, 0x3f804000);  // another, which goes away from zero as well
  rounds(0x3fffffff, 0x40000000);
  rounds(0x00000fff, 0x00000000);
  rounds(0x00001000, 0x00002000);
  rounds(0x7f7fffff, 0x7f800000);
  rounds(0x7f800000, 0x7f800000);
  for (const uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu})
    check(std::isnan(float_of_bits(round_tf32(float_of_bits(nan)))), "round_tf32 of NaN");

  const float infinity = std::numeric_limits<float>::infinity();
  check(exp2_approx(3) == 8 && exp2_approx(-126) == 0x1p-126f && exp2_approx(-127) == 0, "exp2_approx");
  check(exp2_approx(-infinity) == 0 && exp2_approx(infinity) == infinity, "exp2_approx of infinity");
  check(reciprocal_approx(4) == 0.25f && reciprocal_approx(-infinity) == 0, "reciprocal_approx");
  check(reciprocal_approx(0x1p-127f) == infinity && reciprocal_approx(0x1p127f) == 0, "reciprocal_approx, subnormal");
  check(tanh_approx(0) == 0 && tanh_approx(50) == 1 && tanh_approx(-50) == -1, "tanh_approx");
}

// ------------------------------------------------------------------------------------------------ meeting others

struct VoteParams {
  uint32_t* results;  // of every thread: the ballot, and two votes
};

__global__ void vote_kernel(VoteParams p) {
  const int thread = thread_index(), lane = thread % 32;
  uint32_t* results = p.results + 3 * (block_index() * block_threads() + thread);
  results[0] = warp_ballot((lane * 7 + thread / 32) % 3 == 0);
  results[1] = warp_all(lane < 32);
  results[2] = warp_all(lane != 5);
}

void test_votes() {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    constexpr int kThreads = 80;  // the last warp has 16 lanes
    std::vector<uint32_t> results(2 * kThreads * 3);
    set_seed(seed);
    expect_success(vote_kernel, 2, kThreads, 0, VoteParams{results.data()});
    for (int i = 0; i < 2 * kThreads; ++i) {
      const int warp = i % kThreads / 32, lanes = std::min(32, kThreads - 32 * warp);
      uint32_t expected = 0;
      for (int lane = 0; lane < lanes; ++lane)
        if ((lane * 7 + warp) % 3 == 0) expected |= uint32_t{1} << lane;
      check(results[3 * i] == expected, "warp_ballot");
      check(results[3 * i + 1] == 1 && results[3 * i + 2] == 0, "warp_all");
    }
  }
}

struct BarrierParams {
  bool barrier;
  int leave;  // threads from this number on leave early
  uint32_t* results;
};

__global__ void barrier_kernel(BarrierParams p) {
  auto* memory = reinterpret_cast<uint32_t*>(shared_memory());
  const int thread = thread_index();
  if (thread >= p.leave) return;
  for (uint32_t round = 0; round < 4; ++round) {
    memory[thread] = 100 * round + static_cast<uint32_t>(thread);
    if (p.barrier) block_barrier();
    p.results[round * block_threads() + thread] = memory[(thread + 37) % p.leave];
    if (p.barrier) block_barrier();
  }
}

void test_block_barrier() {
  for (const int leave : {96, 70}) {
    const auto wrong = [&](bool barrier) {
      std::vector<uint32_t> results(4 * 96);
      expect_success(barrier_kernel, 1, 96, 96 * 4, BarrierParams{barrier, leave, results.data()});
      bool any = false;
      for (int round = 0; round < 4; ++round)
        for (int i = 0; i < leave; ++i)
          any = any || results[round * 96 + i] != static_cast<uint32_t>(100 * round + (i + 37) % leave);
      return any;
    };
    check(count_seeds(20, [&] { return wrong(false); }) > 0, "a missing block_barrier is noticed");
    check(count_seeds(20, [&] { return wrong(true); }) == 0, "block_barrier blocks");
  }
}

struct NoParams {};

__global__ void deadlock_kernel(NoParams) {
  if (thread_index() == 37)
    warp_barrier();
  else
    block_barrier();
}

__global__ void leaving_lane_kernel(NoParams) {
  float d[4] = {};
  if (thread_index() != 45) mma_bf16(d, 0, 0, 0, 0, 0, 0);
}

__global__ void different_operations_kernel(NoParams) {
  if (thread_index() % 32 < 9)
    warp_ballot(true);
  else
    warp_all(true);
}

struct PollParams {
  uint4* memory;
};

// The last lane of a warp leaves when the others are already waiting for it.
__global__ void late_leaving_lane_kernel(PollParams p) {
  if (thread_index() == 31)
    for (int i = 0; i < 2000; ++i) load_relaxed(p.memory);
  else
    warp_ballot(true);
}

__global__ void livelock_kernel(PollParams p) {
  if (block_index() == 1 && thread_index() == 3) store_relaxed(&p.memory->y, 1);
  while (load_relaxed_packet(p.memory).x != 1) {
  }
}

// All that keeps these threads busy is a vote about what they have seen, which never changes.
__global__ void voting_livelock_kernel(PollParams p) {
  while (!warp_all(load_relaxed(p.memory).x == 1)) {
  }
}

__global__ void copying_livelock_kernel(PollParams p) {
  auto* memory = reinterpret_cast<volatile uint32_t*>(shared_memory() + 16 * thread_index());
  do {
    copy_async_16(shared_memory() + 16 * thread_index(), p.memory, 16);
    copy_async_commit();
    copy_async_wait<0>();
  } while (*memory != 1);
}

void test_hanging() {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    set_seed(seed);
    uint4 memory = quad(0);
    const PollParams poll = {&memory};
    expect_error(deadlock_kernel, 2, 64, 0, NoParams{}, {"deadlock", "block 0, thread 37", "block_barrier"});
    expect_error(leaving_lane_kernel, 1, 64, 0, NoParams{}, {"block 0", "mma_bf16"});
    expect_error(different_operations_kernel, 1, 32, 0, NoParams{}, {"warp_ballot", "warp_all", "block 0, thread "});
    expect_error(late_leaving_lane_kernel, 1, 32, 0, poll, {"block 0, thread 31", "warp_ballot"});
    expect_error(livelock_kernel, 2, 64, 0, poll, {"livelock"});
    check(memory.y == 1, "a store arrives although the grid hangs");
    expect_error(voting_livelock_kernel, 2, 64, 0, poll, {"livelock"});
    expect_error(copying_livelock_kernel, 1, 32, 32 * 16, poll, {"livelock"});
    check(cudaGetLastError() == cudaErrorLaunchFailure && cudaGetLastError() == cudaSuccess, "cudaGetLastError");
    expect_success(transpose_kernel, 1, 32, 0,  // the next launch starts afresh
                   TransposeParams{std::vector<uint16_t>(64).data(), std::vector<uint16_t>(64).data()});
  }
}

// ------------------------------------------------------------------------------------------------ memory that CTAs
// share

struct TearParams {
  uint4* memory;
  bool whole_stores, whole_loads;
  int* torn;
};

__global__ void tear_kernel(TearParams p) {
  if (thread_index() != 0) return;
  if (block_index() == 0) {
    for (uint32_t i = 1; i <= 20; ++i) {
      if (p.whole_stores)
        store_relaxed_packet(p.memory, quad(i));
      else
        for (int word = 0; word < 4; ++word) store_relaxed(&p.memory->x + word, i);
    }
  } else {
    uint32_t last = 0;
    for (;;) {
      const uint4 v = p.whole_loads ? load_relaxed_packet(p.memory) : load_relaxed(p.memory);
      if (!is_quad(v, v.x)) ++*p.torn;
      if (v.x < last) *p.torn += 1000000;  // older than what this thread has seen at the same address
      last = v.x;
      if (is_quad(v, 20)) return;
    }
  }
}

void test_tearing() {
  const auto torn = [](bool whole_stores, bool whole_loads) {
    uint4 memory = quad(0);
    int count = 0;
    expect_success(tear_kernel, 2, 32, 0, TearParams{&memory, whole_stores, whole_loads, &count});
    check(count < 1000000, "stores of one thread to one address arrive in order");
    return count > 0;
  };
  check(count_seeds(50, [&] { return torn(true, false); }) > 5, "load_relaxed may be torn");
  check(count_seeds(50, [&] { return torn(false, true); }) > 5, "single words arrive one by one");
  check(count_seeds(50, [&] { return torn(true, true); }) == 0, "load_relaxed_packet is never torn");
}

struct OrderParams {
  uint32_t* data;  // two, 64 bytes apart
  uint4* flag;
  int* early;
};

__global__ void order_kernel(OrderParams p) {
  if (block_index() == 0) {
    store_relaxed(p.data, 1);
    store_relaxed(&p.flag->x, 1);
  } else {
    while (load_relaxed_packet(p.flag).x != 1) {
    }
    if (load_relaxed_packet(reinterpret_cast<uint4*>(p.data)).x != 1) ++*p.early;
  }
}

struct SameAddressParams {
  uint4* memory;
};

// The barrier orders the stores of two threads of a block, though both may still be on their way.
__global__ void same_address_kernel(SameAddressParams p) {
  for (uint32_t i = 0; i < 64; ++i) {
    if (i % 64 == static_cast<uint32_t>(thread_index())) {
      if (i % 3 == 0)
        store_relaxed_packet(p.memory, quad(i));
      else
        store_relaxed(&p.memory->y, i);
    }
    block_barrier();
  }
}

void test_order() {
  const auto early = [] {
    std::vector<uint4> memory(8, quad(0));
    int count = 0;
    expect_success(order_kernel, 2, 1, 0, OrderParams{&memory[0].x, &memory[4], &count});
    check(memory[0].x == 1 && memory[4].x == 1, "all stores arrive in the end");
    return count > 0;
  };
  const int seeds = count_seeds(100, early);
  check(seeds > 5 && seeds < 95, "stores to two addresses arrive in either order");
  check(count_seeds(20,
                    [] {
                      uint4 memory = quad(0);
                      expect_success(same_address_kernel, 1, 64, 0, SameAddressParams{&memory});
                      return memory.y != 63 || memory.x != 63;
                    }) == 0,
        "stores of a block to one address arrive in order");

  // The same seed gives the same run; the launches of one seed differ from each other.
  std::vector<uint64_t> first, second;
  for (std::vector<uint64_t>* const runs : {&first, &second}) {
    set_seed(77);
    for (int i = 0; i < 8; ++i) {
      early();
      runs->push_back(emulation::last_report().switches << 32 | emulation::last_report().polls);
    }
  }
  check(first == second, "a seed repeats a run");
  check(std::any_of(first.begin(), first.end(), [&](uint64_t x) { return x != first[0]; }), "launches differ");
}

// ------------------------------------------------------------------------------------------------ asynchronous copies

constexpr int kCopies = 4;

struct CopyParams {
  const uint32_t* from;  // 4 words for every copy of every thread
  int early, wrong;      // results: how often the copy had been performed before the wait, and not after it
  int not_garbage;       //          and neither garbage nor data were seen
};

__global__ void copy_kernel(CopyParams* p) {
  const int thread = thread_index();
  auto* memory = reinterpret_cast<uint32_t*>(shared_memory());
  const auto slot = [&](int i, int of) { return memory + 4 * (i * block_threads() + of); };
  const auto source = [&](int i, int of) { return p->from + 4 * (i * block_threads() + of); };
  const auto is_copied = [&](int i, int of) {
    const int bytes = (of * 4 + i) % 17;
    unsigned char expected[16] = {};
    std::memcpy(expected, source(i, of), static_cast<size_t>(bytes));
    return std::memcmp(expected, slot(i, of), 16) == 0;
  };
  const auto is_garbage = [&](int i) {
    for (int word = 0; word < 4; ++word)
      if (!std::isnan(float_of_bits(slot(i, thread)[word]))) return false;
    return true;
  };
  for (int i = 0; i < kCopies; ++i) {
    copy_async_16(slot(i, thread), source(i, thread), (thread * 4 + i) % 17);
    copy_async_commit();
  }
  for (int i = 0; i < kCopies; ++i) {
    if (is_copied(i, thread))
      ++p->early;
    else if (!is_garbage(i))
      ++p->not_garbage;
  }
  copy_async_wait<1>();
  for (int i = 0; i < kCopies - 1; ++i) p->wrong += is_copied(i, thread) ? 0 : 1;
  copy_async_commit();  // an empty group counts
  copy_async_wait<1>();
  p->wrong += is_copied(kCopies - 1, thread) ? 0 : 1;
  block_barrier();
  for (int i = 0; i < kCopies; ++i) p->wrong += is_copied(i, (thread + 40) % block_threads()) ? 0 : 1;
}

struct BadCopyParams {
  const unsigned char* from;
  int to_offset, from_offset, bytes;
  bool commit;
};

__global__ void bad_copy_kernel(BadCopyParams p) {
  if (thread_index() != 2) return;
  copy_async_16(shared_memory() + p.to_offset, p.from + p.from_offset, p.bytes);
  if (p.commit) copy_async_commit();
}

void test_copies() {
  constexpr int kThreads = 64;
  std::vector<uint4> from(kCopies * kThreads);
  for (size_t i = 0; i < from.size(); ++i) from[i] = quad(0x3f800000 + static_cast<uint32_t>(i));
  int seeds_early = 0, seeds_late = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    set_seed(seed);
    CopyParams params = {&from[0].x, 0, 0, 0};
    expect_success(copy_kernel, 1, kThreads, kCopies * kThreads * 16, &params);
    check(params.wrong == 0, "a copy is there after the wait");
    check(params.not_garbage == 0, "before a copy is there, its place holds garbage");
    seeds_early += params.early > 0 ? 1 : 0;
    seeds_late += params.early < kCopies * kThreads ? 1 : 0;
  }
  check(seeds_early > 0 && seeds_late > 0, "copies take place early in some runs and late in others");

  const auto* bytes = reinterpret_cast<const unsigned char*>(from.data());
  set_seed(1);
  expect_success(bad_copy_kernel, 1, 32, 64, BadCopyParams{bytes, 48, 16, 16, true});
  expect_error(bad_copy_kernel, 1, 32, 64, BadCopyParams{bytes, 8, 0, 16, true}, {"thread 2", "aligned"});
  expect_error(bad_copy_kernel, 1, 32, 64, BadCopyParams{bytes, 0, 4, 16, true}, {"thread 2", "aligned"});
  expect_error(bad_copy_kernel, 1, 32, 64, BadCopyParams{bytes, 0, 0, 17, true}, {"thread 2", "17 bytes"});
  expect_error(bad_copy_kernel, 1, 32, 64, BadCopyParams{bytes, 0, 0, -1, true}, {"thread 2", "-1 bytes"});
  expect_error(bad_copy_kernel, 1, 32, 60, BadCopyParams{bytes, 48, 0, 16, true}, {"thread 2", "outside"});
  expect_error(bad_copy_kernel, 1, 32, 64, BadCopyParams{bytes, 0, 0, 16, false}, {"thread 2", "copy_async_commit"});
}

// ------------------------------------------------------------------------------------------------ shared memory,
// launches

struct SharedParams {
  int offset;    // of a byte to write to
  int* not_nan;  // bytes that were not 0xff at the start
};

__global__ void shared_kernel(SharedParams p) {
  unsigned char* memory = shared_memory();
  if (thread_index() != 0) return;
  for (int i = 0; i < 100; ++i) *p.not_nan += memory[i] == 0xff ? 0 : 1;
  if (reinterpret_cast<uintptr_t>(memory) % 16 != 0) *p.not_nan += 1000;
  for (int i = 0; i < 100; ++i) memory[i] = 0;
  if (block_index() == 1) memory[p.offset] = 0;
}

__global__ void count_kernel(PollParams p) {
  block_barrier();
  if (thread_index() == 0) p.memory[block_index()].x += static_cast<uint32_t>(grid_blocks());
}

// Waits for the last block, which must therefore run at the same time.
__global__ void last_block_kernel(PollParams p) {
  store_relaxed(&p.memory[block_index()].x, 1);
  while (load_relaxed_packet(p.memory + grid_blocks() - 1).x != 1) {
  }
}

__global__ void deep_kernel(NoParams) {
  volatile unsigned char large[62 * 1024];
  large[0] = 1;
  block_barrier();
  large[0] = large[0] + 1;
}

void test_launches() {
  set_seed(1);
  int not_nan = 0;
  for (const int offset : {0, 99}) expect_success(shared_kernel, 3, 32, 100, SharedParams{offset, &not_nan});
  check(not_nan == 0, "shared memory starts as NaN, aligned to 16");
  expect_error(shared_kernel, 3, 32, 100, SharedParams{100, &not_nan}, {"block 1", "byte 100 "});
  expect_error(shared_kernel, 3, 32, 100, SharedParams{-1, &not_nan}, {"block 1", "byte -1 "});

  std::vector<uint4> memory(300, quad(0));
  const PollParams params = {memory.data()};
  for (const bool cooperative : {false, true})
    check(launch(count_kernel, {300, 64, 0, cooperative}, nullptr, params) == cudaSuccess, "300 blocks");
  for (const uint4& x : memory) check(x.x == 600, "every block runs once");
  memory.assign(300, quad(0));
  check(launch(last_block_kernel, {300, 64, 0, true}, nullptr, params) == cudaSuccess, "blocks run at the same time");
  memory.assign(300, quad(0));
  check(launch(last_block_kernel, {300, 64, 0, false}, nullptr, params) == cudaErrorLaunchFailure,
        "blocks that wait for each other must ask to run at the same time");

  expect_error(deep_kernel, 1, 32, 0, NoParams{}, {"block 0", "stack"});
  for (const LaunchShape& shape :
       {LaunchShape{0, 32, 0, false}, {1, 0, 0, false}, {1, 1025, 0, false}, {1, 32, 227 * 1024 + 1, false}})
    check(launch(count_kernel, shape, nullptr, params) == cudaErrorInvalidValue, "an impossible launch");
}

// ------------------------------------------------------------------------------------------------ speed

constexpr int kBlocks = 8, kThreads = 64, kSteps = 5;

struct RecurrenceParams {
  uint4* packets;  // two steps, one packet for every thread of the grid
  float* results;
};

// What a layer does: in every step each thread publishes a packet, waits for 16 of the others' and multiplies.
__global__ void recurrence_kernel(RecurrenceParams p) {
  constexpr int kAll = kBlocks * kThreads;
  const int me = block_index() * kThreads + thread_index();
  uint32_t state = static_cast<uint32_t>(me);
  float d[4] = {};
  for (uint32_t step = 1; step <= kSteps; ++step) {
    uint4* packets = p.packets + step % 2 * kAll;
    store_relaxed_packet(packets + me, make_uint4(step, state, state, state));
    uint32_t sum = 0;
    for (int i = 0; i < 16; ++i) {
      const uint4* from = packets + (thread_index() + i * kThreads) % kAll;
      uint4 v = load_relaxed_packet(from);
      while (v.x != step) v = load_relaxed_packet(from);
      sum += v.y + v.w;
    }
    for (int i = 0; i < 16; ++i) mma_bf16(d, 0x3f803f80, 0, 0, 0x3f803f80, 0x3f803f80, sum & 0x00010001);
    state = sum * 31 + step;
    block_barrier();
  }
  p.results[me] = d[0] + static_cast<float>(state % 1000);
}

void test_speed() {
  std::vector<uint4> packets(2 * kBlocks * kThreads);
  std::vector<float> results(kBlocks * kThreads), first;
  double seconds = 0, longest = 0;
  uint64_t switches = 0, polls = 0;
  constexpr int kRuns = 50;
  for (int run = 0; run < kRuns; ++run) {
    set_seed(static_cast<uint64_t>(run));
    packets.assign(packets.size(), quad(0));
    const std::clock_t begin = std::clock();  // of this process: others may share its core
    expect_success(recurrence_kernel, kBlocks, kThreads, 0, RecurrenceParams{packets.data(), results.data()});
    const double took = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    seconds += took;
    longest = std::max(longest, took);
    switches += 2 * emulation::last_report().switches;
    polls += emulation::last_report().polls;
    if (run == 0) first = results;
    check(results == first, "a correct protocol gives the same results in every order");
  }
  std::printf(
      "8 blocks x 64 threads x 5 steps: mean %.2f ms, longest %.2f ms; %.1f million switches and %.1f million "
      "polls per second\n",
      1e3 * seconds / kRuns, 1e3 * longest, 1e-6 * static_cast<double>(switches) / seconds,
      1e-6 * static_cast<double>(polls) / seconds);
}

}  // namespace

int main() {
  test_products();
  test_transpose();
  test_conversions();
  test_votes();
  test_block_barrier();
  test_hanging();
  test_tearing();
  test_order();
  test_copies();
  test_launches();
  test_speed();
  if (failures == 0) std::printf("all tests passed\n");
  return failures == 0 ? 0 : 1;
}
