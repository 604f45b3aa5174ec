// The names of csrc/cuda/ptx.cuh and wgmma.cuh on top of fibers, so that kernel files compile and run as ordinary C++
// on the CPU.
//
// Every CUDA thread is a fiber. A scheduler picks the next warp, the length of its turn and the order of its lanes at
// random, stores to memory that CTAs share arrive late and out of order, and asynchronous copies and products take
// place at any moment the hardware may choose. All of it follows from one seed: a failure can be repeated, and many
// seeds go through many interleavings.
//
// Shows: wrong indices and layouts, missing barriers, protocols that rely on an order nobody promised, threads that
// wait for ever, stray writes beyond shared memory, reads of what was never written (memory starts as NaN).
// Does not show: races on global memory by ordinary loads and stores (these act at once), lanes that come to the same
// warp-wide operation from different places of the code, a loop without end that calls nothing from here, the rounding
// of the tensor cores' sums, speed.
//
// Kernels view the same bytes as several types, which CUDA permits: compile them with -fno-strict-aliasing.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <vector>

// ------------------------------------------------------------------------------------------------ CUDA's own words

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;  // ignored: whatever a stream is given has happened when the call returns

namespace fastlstm::cuda {

struct LaunchShape {
  int blocks, threads;
  size_t shared_bytes;
  bool cooperative;  // all blocks run at the same time; otherwise some may start only after others have ended
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of_bits(uint32_t x) {
  float f;
  std::memcpy(&f, &x, sizeof(f));
  return f;
}

namespace emulation {

// ------------------------------------------------------------------------------------------------ settings and results

struct Settings {
  uint64_t seed = 1;
  uint64_t launches = 0;  // so far: every launch has its own random numbers. Set it back to repeat a run.

  // A thing that happens "one in n" happens with probability 1 / n at each occasion. 0: drawn for every launch, so that
  // calm and hectic ones alternate.
  uint32_t yield_one_in = 0;    // occasion: relaxed accesses, waits for copies and barriers. The thread pauses.
  uint32_t deliver_one_in = 0;  // occasion: the same. A store in flight arrives.
  uint32_t copy_one_in = 0;     // occasion: the same, and copies. An asynchronous copy of the thread is performed.
  uint32_t longest_turn = 0;    // such occasions of a warp before another warp has its turn
};

struct Report {
  std::string error;      // empty: the launch went well
  uint64_t switches = 0;  // turns of a thread
  uint64_t polls = 0;     // relaxed loads and waits for copies
  uint64_t stores = 0;    // relaxed ones
  uint64_t products = 0;  // of tiles
};

// ------------------------------------------------------------------------------------------------ fibers

#if defined(__x86_64__)

// Keeps the registers that a call must preserve on the stack, puts the stack pointer into *save and goes on where the
// owner of the stack pointer `next` did the same. Nothing here involves the kernel, which swapcontext() would ask to
// change the signal mask.
[[gnu::naked, gnu::noinline, gnu::noipa]] inline void switch_stacks(void** /* save: rdi */, void* /* next: rsi */) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

class Context {
 public:
  // The first switch to this context calls entry(), which must not return.
  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    const uintptr_t top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
    // Six registers, the address of entry, and its caller's, which does not exist. After `ret` the stack pointer is 8
    // below a multiple of 16, as at the start of any function.
    uintptr_t* words = reinterpret_cast<uintptr_t*>(top) - 8;
    std::fill(words, words + 8, uintptr_t{0});
    words[6] = reinterpret_cast<uintptr_t>(entry);
    stack_pointer_ = words;
  }
  void switch_to(Context& next) { switch_stacks(&stack_pointer_, next.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};

#else

class Context {
 public:
  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& next) { swapcontext(&context_, &next.context_); }

 private:
  ucontext_t context_;
};

#endif

// Stacks of all fibers in one mapping that is kept from launch to launch. Only pages that were touched take memory.
class Stacks {
 public:
  // 64 KB and a few cache lines: at a distance of a power of two, the hot ends of all stacks would share few cache
  // sets.
  static constexpr size_t kBytes = 64 * 1024 + 13 * 64;

  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  void provide(size_t count) {
    if (count <= count_) return;
    release();
    void* memory =
        mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_NOHUGEPAGE
    madvise(memory, count * kBytes, MADV_NOHUGEPAGE);  // one huge page would make 32 stacks resident
#endif
    memory_ = static_cast<unsigned char*>(memory);
    count_ = count;
  }
  unsigned char* at(size_t i) const { return memory_ + i * kBytes; }

 private:
  void release() {
    if (memory_) munmap(memory_, count_ * kBytes);
    memory_ = nullptr;
    count_ = 0;
  }

  unsigned char* memory_ = nullptr;
  size_t count_ = 0;
};

// ------------------------------------------------------------------------------------------------ the machine

// Small and fast; what it is used for does not need more.
class Random {
 public:
  void seed(uint64_t seed, uint64_t stream) {
    std::seed_seq words{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(stream),
                        static_cast<uint32_t>(stream >> 32)};
    uint32_t state[2];
    words.generate(state, state + 2);
    state_ = uint64_t{state[0]} << 32 | state[1];
  }
  uint32_t bits() {
    state_ = state_ * 0x5851f42d4c957f2d + 0x14057b7ef767814f;
    return static_cast<uint32_t>(state_ >> 32);
  }
  uint32_t below(size_t n) { return static_cast<uint32_t>(uint64_t{bits()} * n >> 32); }
  bool one_in(uint32_t n) { return below(n) == 0; }
  uint32_t one_of(std::initializer_list<uint32_t> values) { return values.begin()[below(values.size())]; }

 private:
  uint64_t state_ = 0;
};

// Where a thread can be kept waiting.
enum class Operation {
  kBlockBarrier,
  kWarpBarrier,
  kBallot,
  kAll,
  kShuffle,
  kMmaBf16,
  kMmaFp16,
  kMmaTf32,
  kTranspose,
  kWarpgroupBarrier,
  kProductsBegin,
  kProduct,
  kProductsCommit,
  kProductsWait
};

inline const char* name(Operation operation) {
  switch (operation) {
    case Operation::kBlockBarrier: return "block_barrier";
    case Operation::kWarpBarrier: return "warp_barrier";
    case Operation::kBallot: return "warp_ballot";
    case Operation::kAll: return "warp_all";
    case Operation::kShuffle: return "warp_shuffle";
    case Operation::kMmaBf16: return "mma_bf16";
    case Operation::kMmaFp16: return "mma_fp16";
    case Operation::kMmaTf32: return "mma_tf32";
    case Operation::kTranspose: return "transpose_8x8";
    case Operation::kWarpgroupBarrier: return "warpgroup_barrier";
    case Operation::kProductsBegin: return "products_begin";
    case Operation::kProduct: return "a product of a warpgroup";
    case Operation::kProductsCommit: return "products_commit";
    case Operation::kProductsWait: return "products_wait";
  }
  return "?";
}

struct Warp;

struct Block {
  int index = 0;
  int live = 0, at_barrier = 0;  // threads
  int at_barrier_of_warpgroup[8] = {};
  Warp* warps = nullptr;
  std::vector<unsigned char> storage;
  unsigned char* shared = nullptr;
};

// A store_factor() that no fence has followed yet.
struct FactorStore {
  uint4* to;
  uint4 vector;
};

// Where the words of a factor in shared memory lie: see SharedFactor in wgmma.cuh.
struct FactorPlace {
  const uint4* first;
  int along_k, along_rows;

  uint32_t word(int row, int k) const {
    const uint4& vector = first[row / 8 * along_rows + k / 4 * along_k + row % 8];
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
    return words[k % 4];
  }
};

// A product that one warp has its part of under way: 16 rows of D.
struct Product {
  Operation element;  // kMmaBf16, kMmaFp16 or kMmaTf32
  float* d[32];       // [tiles][4] of each lane
  int tiles;
  bool accumulate, a_in_registers;
  uint32_t a[32][4];
  FactorPlace shared_a, b;  // shared_a from this warp's rows on
};

// A copy_async_16() that has not taken place yet.
struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
  uint64_t group;
};

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0, lane = 0;
  std::vector<Copy> copies;
  uint64_t group = 0;       // of copies: the one not closed yet
  bool group_used = false;  // whether it has copies
  std::vector<FactorStore> factors;
};

struct Warp {
  Block* block = nullptr;
  Fiber* lanes = nullptr;
  // One bit per lane. A live lane is ready to run, has arrived at `operation`, or is at the block's barrier.
  uint32_t live = 0, ready = 0, arrived = 0, at_barrier = 0, at_barrier_of_warpgroup = 0;
  Operation operation = Operation::kWarpBarrier;
  void* arguments[32] = {};
  std::vector<Product> products;  // under way, the oldest first
  size_t committed = 0;           // of them
  bool may_multiply = false;      // products_begin() came after the last wait
};

// A store on its way to memory that CTAs share: one word or, as a packet, four.
struct Store {
  unsigned char* to;
  uint32_t words[4];
  bool packet;
  int block;
  uint32_t arrives_one_in;  // occasions
  uint64_t order;

  uintptr_t line() const { return reinterpret_cast<uintptr_t>(to) / 16; }
  bool overlaps(const Store& other) const {
    return line() == other.line() && (packet || other.packet || to == other.to);
  }
};

// Stores in flight. They may arrive in any order, except that those of one block to one place keep theirs: its threads
// may have agreed on it by a barrier.
class InFlight {
 public:
  bool empty() const { return stores_.empty(); }
  size_t size() const { return stores_.size(); }
  void clear() {
    stores_.clear();
    std::fill(at_, at_ + kCounters, 0);
  }
  void add(Store store) {
    store.order = next_order_++;
    ++count(store);
    stores_.push_back(store);
  }
  // The store that must arrive before, or at the place of, the one numbered i.
  size_t first_before(size_t i) {
    if (count(stores_[i]) == 1) return i;
    size_t first = i;
    for (size_t j = 0; j < stores_.size(); ++j)
      if (stores_[j].order < stores_[first].order && stores_[j].block == stores_[i].block &&
          stores_[j].overlaps(stores_[i]))
        first = j;
    return first;
  }
  const Store& operator[](size_t i) const { return stores_[i]; }
  void deliver(size_t i) {
    const Store& store = stores_[i];
    std::memcpy(store.to, store.words, store.packet ? 16 : 4);
    --count(store);
    stores_[i] = stores_.back();
    stores_.pop_back();
  }

 private:
  static constexpr int kCounters = 8192;

  // Stores in flight to the same 16 bytes, or to others with the same number: mostly 1, which spares a search.
  uint32_t& count(const Store& store) { return at_[(store.line() * 0x9e3779b97f4a7c15u >> 40) % kCounters]; }

  std::vector<Store> stores_;
  uint32_t at_[kCounters] = {};
  uint64_t next_order_ = 0;
};

class Machine {
 public:
  Settings settings;
  Report report;
  cudaError_t last = cudaSuccess;

  // Runs a grid to its end.
  cudaError_t run(const LaunchShape& shape, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);  // one grid at a time, whichever host thread it comes from
    report = {};
    if (shape.blocks < 1 || shape.threads < 1 || shape.threads > kMostThreads ||
        shape.shared_bytes > kMostSharedBytes) {
      report.error = "no device can launch " + std::to_string(shape.blocks) + " blocks of " +
                     std::to_string(shape.threads) + " threads and " + std::to_string(shape.shared_bytes) +
                     " bytes of shared memory";
      return last = cudaErrorInvalidValue;
    }
    set_up(shape, kernel);
    schedule();
    while (!in_flight_.empty()) deliver_any();
    current_ = nullptr;
    kernel_ = nullptr;
    return last = failed() ? cudaErrorLaunchFailure : cudaSuccess;
  }

  // ---- What the functions of ptx.cuh need. To be called by fibers.

  Fiber& current() { return *current_; }
  const LaunchShape& shape() const { return shape_; }

  // Ends the grid. The other fibers are abandoned where they are.
  [[noreturn]] void fail(const std::string& what) {
    report.error = where(*current_) + ": " + what;
    for (;;) current_->context.switch_to(scheduler_);
  }

  // An occasion for others to act, and for what is under way to arrive.
  void occasion() {
    --turn_;
    if (!in_flight_.empty() && random_.one_in(deliver_one_in_)) deliver_some();
    perform_some();
    if (!current_->warp->products.empty() && random_.one_in(copy_one_in_)) perform_product(*current_->warp);
    if (random_.one_in(yield_one_in_)) suspend();
  }

  // Any number below n.
  uint32_t draw(uint32_t n) { return random_.below(n); }

  // A look at what others may change. Some kernels do nothing else for a while; all of them for ever is an error.
  void poll() {
    ++report.polls;
    if (++polls_ > kPatience * warps_.size()) {
      if (in_flight_.empty()) fail("livelock: every running thread waits for memory that nobody writes" + waiting());
      deliver_any();
    }
    occasion();
  }

  void check_alignment(const void* p, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
      fail(std::string(what) + ": address not aligned to " + std::to_string(bytes) + " bytes");
  }

  void store(void* to, const uint32_t* words, bool packet) {
    ++report.stores;
    progress();
    Store store = {};
    store.to = static_cast<unsigned char*>(to);
    std::memcpy(store.words, words, packet ? 16 : 4);
    store.packet = packet;
    store.block = current_->block->index;
    store.arrives_one_in = random_.one_in(kLateOneIn) ? kLate : 1;
    in_flight_.add(store);
    occasion();
  }

  void copy(void* to, const void* from, int bytes) {
    Fiber& me = *current_;
    unsigned char* const destination = static_cast<unsigned char*>(to);
    check_alignment(to, 16, "copy_async_16, destination");
    check_alignment(from, 16, "copy_async_16, source");
    if (bytes < 0 || bytes > 16) fail("copy_async_16 of " + std::to_string(bytes) + " bytes");
    const auto offset = reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(me.block->shared);
    if (offset + 16 > shape_.shared_bytes || offset > shape_.shared_bytes)
      fail("copy_async_16 to an address outside of shared memory");
    for (int i = 0; i < 16; ++i) destination[i] = i % 2 ? kUnderWay >> 8 : kUnderWay & 0xff;
    me.copies.push_back({destination, from, bytes, me.group});
    me.group_used = true;
    perform_some();
  }
  void commit_copies() {
    ++current_->group;
    current_->group_used = false;
    perform_some();
  }
  void wait_for_copies(uint64_t pending) {
    Fiber& me = *current_;
    poll();  // copies may be how a kernel looks at what others write
    for (size_t i = 0; i < me.copies.size();)
      if (me.copies[i].group + pending < me.group)
        perform(i);
      else
        ++i;
  }

  // Meets the other live lanes of the warp. The last to come calls action(arguments, lanes), lanes one bit for each.
  template <class Argument, class Action>
  void meet(Operation operation, Argument& argument, const Action& action) {
    Fiber& me = *current_;
    Warp& warp = *me.warp;
    if (warp.arrived != 0 && warp.operation != operation) {
      const Fiber& other = warp.lanes[__builtin_ctz(warp.arrived)];
      fail(std::string("is in ") + name(operation) + " while thread " + std::to_string(other.thread) +
           " of its warp waits in " + name(warp.operation));
    }
    warp.operation = operation;
    warp.arguments[me.lane] = &argument;
    warp.arrived |= bit(me);
    if (warp.arrived != warp.live) return block();
    action(warp.arguments, warp.live);
    warp.ready |= warp.arrived;
    warp.arrived = 0;
    --turn_;
  }
  // The same for operations of the tensor cores and the like, which take the whole warp.
  template <class Argument, class Action>
  void meet_all(Operation operation, Argument& argument, const Action& action) {
    if (current_->warp->live != 0xffffffff) fail(std::string(name(operation)) + " in a warp of less than 32 lanes");
    progress();
    meet(operation, argument, action);
  }
  void meet_warp() {
    int nothing = 0;
    meet(Operation::kWarpBarrier, nothing, [](void**, uint32_t) {});
    occasion();
  }

  void store_factor(uint4* to, const uint4& vector) {
    check_alignment(to, 16, "store_factor");
    const auto offset = reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(current_->block->shared);
    if (offset + 16 > shape_.shared_bytes || offset > shape_.shared_bytes)
      fail("store_factor to an address outside of shared memory");
    std::memset(to, 0xff, sizeof(*to));
    current_->factors.push_back({to, vector});
  }
  void fence_factors() {
    for (const FactorStore& store : current_->factors) std::memcpy(store.to, &store.vector, sizeof(store.vector));
    current_->factors.clear();
    occasion();
  }
  void meet_warpgroup(int warpgroup) {
    constexpr int kThreads = 128;
    Block& group = *current_->block;
    if (current_->thread / kThreads != warpgroup || (warpgroup + 1) * kThreads > shape_.threads)
      fail("warpgroup_barrier of warpgroup " + std::to_string(warpgroup) + ", which is another one or not whole");
    current_->warp->at_barrier_of_warpgroup |= bit(*current_);
    if (++group.at_barrier_of_warpgroup[warpgroup] < kThreads) {
      block();
    } else {
      for (Warp* warp = group.warps + 4 * warpgroup; warp < group.warps + 4 * (warpgroup + 1); ++warp) {
        warp->ready |= warp->at_barrier_of_warpgroup;
        warp->at_barrier_of_warpgroup = 0;
      }
      group.at_barrier_of_warpgroup[warpgroup] = 0;
      progress();
    }
    occasion();
  }
  void begin_products() {
    int nothing = 0;
    meet_all(Operation::kProductsBegin, nothing, [&](void**, uint32_t) { current_->warp->may_multiply = true; });
  }
  struct ProductOfLane {
    float* d;
    const uint32_t* a;  // of registers, or null
    FactorPlace shared_a, b;
  };
  void add_product(Operation element, int tiles, bool accumulate, ProductOfLane mine) {
    Warp& warp = *current_->warp;
    if (!warp.may_multiply) fail("a product of a warpgroup without products_begin");
    meet_all(Operation::kProduct, mine, [&](void* const* lanes, uint32_t) {
      Product product = {element, {}, tiles, accumulate, mine.a != nullptr, {}, mine.shared_a, mine.b};
      product.shared_a.first += current_->thread / 32 % 4 * 2 * mine.shared_a.along_rows;
      for (int lane = 0; lane < 32; ++lane) {
        const auto& of_lane = *static_cast<const ProductOfLane*>(lanes[lane]);
        product.d[lane] = of_lane.d;
        if (of_lane.a) std::copy_n(of_lane.a, 4, product.a[lane]);
      }
      warp.products.push_back(product);
    });
    occasion();
  }
  void commit_products() {
    int nothing = 0;
    meet_all(Operation::kProductsCommit, nothing,
             [&](void**, uint32_t) { current_->warp->committed = current_->warp->products.size(); });
  }
  void wait_for_products() {
    int nothing = 0;
    meet_all(Operation::kProductsWait, nothing, [&](void**, uint32_t) {
      Warp& warp = *current_->warp;
      while (warp.committed > 0) perform_product(warp);
      warp.may_multiply = false;
    });
    occasion();
  }

  void meet_block() {
    Block& group = *current_->block;
    current_->warp->at_barrier |= bit(*current_);
    if (++group.at_barrier < group.live)
      block();
    else
      open_barrier(group);
    occasion();
  }

 private:
  static constexpr int kMostThreads = 1024;
  static constexpr size_t kMostSharedBytes = 227 * 1024;
  static constexpr uint32_t kNever = UINT32_MAX;
  // Polls per warp before the grid counts as hung. A warp that could do something else than poll has its turn long
  // before: a turn makes few thousand polls.
  static constexpr uint64_t kPatience = 65536;
  static constexpr uint64_t kSlowPatience = 128;  // polls per warp before a block that lags behind goes on
  static constexpr uint32_t kLateOneIn = 64;      // stores
  static constexpr uint32_t kLate = 32;
  static constexpr size_t kGuardBytes = 512;
  static constexpr int kUnderWay = 0x7fed;  // pairs of bytes that are a NaN as fp16, bf16, fp32
  static constexpr size_t kStackReserve = 4096;
  static constexpr size_t kResidentThreads = 4096;

  static uint32_t bit(const Fiber& fiber) { return uint32_t{1} << fiber.lane; }
  static std::string where(const Fiber& fiber) {
    return "block " + std::to_string(fiber.block->index) + ", thread " + std::to_string(fiber.thread);
  }
  static unsigned char guard(size_t i) { return i % 2 ? 0xff : 0xe5; }  // a NaN in every type, too

  bool failed() const { return !report.error.empty(); }
  void progress() { polls_ = 0; }

  // ---- Fibers

  [[gnu::noinline]] void suspend() {  // its own frame tells how deep the stack is
    Fiber& me = *current_;
    if (static_cast<unsigned char*>(__builtin_frame_address(0)) < me.stack + kStackReserve) fail("stack overflow");
    me.context.switch_to(scheduler_);
    perform_some();
  }
  // Until somebody makes this fiber ready.
  void block() {
    current_->warp->ready &= ~bit(*current_);
    suspend();
  }

  void open_barrier(Block& group) {
    const int warps = (shape_.threads + 31) / 32;
    for (Warp* warp = group.warps; warp < group.warps + warps; ++warp) {
      warp->ready |= warp->at_barrier;
      warp->at_barrier = 0;
    }
    group.at_barrier = 0;
    progress();
  }

  static void enter();

  void run_thread() {
    kernel_();
    Fiber& me = *current_;
    Warp& warp = *me.warp;
    if (me.group_used) fail("ends without copy_async_commit after its last copy");
    while (!me.copies.empty()) perform(0);
    if (!me.factors.empty()) fail("ends without fence_factors after its last store_factor");
    if (!warp.products.empty()) fail("ends without products_wait after its last product");
    if (warp.arrived != 0)
      fail("ends while thread " + std::to_string(warp.lanes[__builtin_ctz(warp.arrived)].thread) +
           " of its warp waits for it in " + name(warp.operation));
    warp.live &= ~bit(me);
    warp.ready &= ~bit(me);
    progress();
    if (--me.block->live > 0 && me.block->at_barrier == me.block->live) open_barrier(*me.block);
    for (;;) me.context.switch_to(scheduler_);
  }

  // ---- Stores and copies under way

  void deliver(size_t i) {
    in_flight_.deliver(i);
    progress();
  }
  void deliver_any() { deliver(in_flight_.first_before(random_.below(in_flight_.size()))); }
  void deliver_some() {
    const size_t i = in_flight_.first_before(random_.below(in_flight_.size()));
    if (random_.one_in(in_flight_[i].arrives_one_in)) deliver(i);
  }

  void perform(size_t i) {
    std::vector<Copy>& copies = current_->copies;
    const Copy copy = copies[i];
    copies[i] = copies.back();
    copies.pop_back();
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    std::memset(copy.to + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
  }
  // The oldest of a warp: those that follow add to the same sums.
  static void perform_product(Warp& warp);
  void perform_some() {
    const size_t count = current_->copies.size();
    if (count > 0 && random_.one_in(copy_one_in_)) perform(random_.below(count));
  }

  // ---- The grid

  void set_up(const LaunchShape& shape, const std::function<void()>& kernel) {
    shape_ = shape;
    kernel_ = kernel;
    random_.seed(settings.seed, settings.launches++);
    const auto chosen = [&](uint32_t set, std::initializer_list<uint32_t> values) {
      const uint32_t drawn = random_.one_of(values);
      return set ? set : drawn;
    };
    yield_one_in_ = chosen(settings.yield_one_in, {2, 8, 32});
    deliver_one_in_ = chosen(settings.deliver_one_in, {1, 4, 16});
    copy_one_in_ = chosen(settings.copy_one_in, {1, 8, kNever});
    longest_turn_ = chosen(settings.longest_turn, {32, 256, 2048});
    in_flight_.clear();
    polls_ = 0;
    slow_ = nullptr;

    const auto threads = static_cast<size_t>(shape.threads), warps = (threads + 31) / 32;
    auto resident = static_cast<size_t>(shape.blocks);
    if (!shape.cooperative)
      resident = 1 + random_.below(std::min(resident, std::max(size_t{1}, kResidentThreads / threads)));
    stacks_.provide(resident * threads);
    blocks_.resize(resident);
    warps_.assign(resident * warps, Warp());
    fibers_.assign(resident * threads, Fiber());
    for (size_t b = 0; b < resident; ++b) {
      blocks_[b].warps = &warps_[b * warps];
      for (size_t t = 0; t < threads; ++t) {
        Warp& warp = warps_[b * warps + t / 32];
        Fiber& fiber = fibers_[b * threads + t];
        fiber.stack = stacks_.at(b * threads + t);
        fiber.block = warp.block = &blocks_[b];
        fiber.warp = &warp;
        fiber.thread = static_cast<int>(t);
        fiber.lane = static_cast<int>(t % 32);
        if (fiber.lane == 0) warp.lanes = &fiber;
      }
    }
    started_ = 0;
    running_ = 0;
    for (Block& block : blocks_) start(block);
  }

  // Runs the grid's next block in this place.
  void start(Block& block) {
    const size_t bytes = shape_.shared_bytes, threads = static_cast<size_t>(shape_.threads);
    block.index = started_++;
    ++running_;
    block.live = shape_.threads;
    block.at_barrier = 0;
    std::fill_n(block.at_barrier_of_warpgroup, std::size(block.at_barrier_of_warpgroup), 0);
    // Exactly as aligned as promised: 16 bytes after a multiple of more.
    block.storage.resize(2 * kGuardBytes + kAlignment + bytes);
    const uintptr_t address = reinterpret_cast<uintptr_t>(block.storage.data()) + kGuardBytes;
    block.shared = block.storage.data() + kGuardBytes + (kAlignment + 16 - address % kAlignment) % kAlignment;
    for_guards(block, [&](size_t i) { block.storage[i] = guard(i); });
    std::fill(block.shared, block.shared + bytes, static_cast<unsigned char>(0xff));
    Fiber* const fibers = block.warps->lanes;
    for (size_t t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.group = 0;
      fiber.group_used = false;
      fiber.factors.clear();
      fiber.context.prepare(fiber.stack, Stacks::kBytes, enter);
      fiber.warp->live |= bit(fiber);
      fiber.warp->ready |= bit(fiber);
    }
  }

  // f(i) for every byte before and after the block's shared memory, counted from the start of the storage.
  template <class F>
  void for_guards(const Block& block, const F& f) const {
    const auto begin = static_cast<size_t>(block.shared - block.storage.data());
    for (size_t i = 0; i < begin; ++i) f(i);
    for (size_t i = begin + shape_.shared_bytes; i < block.storage.size(); ++i) f(i);
  }

  void end(Block& block) {
    for_guards(block, [&](size_t i) {
      if (block.storage[i] == guard(i) || failed()) return;
      report.error = "block " + std::to_string(block.index) + ": some thread wrote to byte " +
                     std::to_string(block.storage.data() + i - block.shared) + " of shared memory, which has " +
                     std::to_string(shape_.shared_bytes);
    });
    --running_;
    if (started_ < shape_.blocks) start(block);
  }

  void schedule() {
    while (running_ > 0 && !failed()) {
      // At any time one block may lag behind: until the others can do nothing but wait for it.
      if (random_.one_in(32)) slow_ = random_.one_in(2) ? nullptr : &blocks_[random_.below(blocks_.size())];
      Warp* const warp = choose();
      if (!warp) {
        report.error = "deadlock" + waiting();
        return;
      }
      turn_ = 1 + random_.below(longest_turn_);
      while (turn_ > 0 && warp->ready != 0 && !failed()) {
        --turn_;
        run_lanes(*warp);
      }
      if (warp->block->live == 0) end(*warp->block);
    }
  }

  // A warp with lanes that can run, if there is one.
  Warp* choose() {
    const size_t count = warps_.size(), first = random_.below(count);
    const bool patient = polls_ < kSlowPatience * warps_.size();
    Warp* other = nullptr;
    for (size_t i = 0; i < count; ++i) {
      Warp& warp = warps_[first + i < count ? first + i : first + i - count];
      if (warp.ready == 0) continue;
      if (!patient || warp.block != slow_) return &warp;
      other = &warp;
    }
    return other;
  }

  // Lets every ready lane run until it pauses, waits or ends.
  void run_lanes(Warp& warp) {
    const uint32_t first = random_.bits(), stride = random_.bits() | 1;
    for (uint32_t i = 0; i < 32 && !failed(); ++i) {
      const uint32_t lane = (first + i * stride) % 32;  // an odd stride meets every lane
      if ((warp.ready >> lane & 1) == 0) continue;
      current_ = &warp.lanes[lane];
      ++report.switches;
      scheduler_.switch_to(current_->context);
    }
  }

  // Who waits where: the first thread of every warp and operation, but not too many.
  std::string waiting() const {
    std::string text;
    int told = 0;
    for (const Warp& warp : warps_)
      for (const uint32_t lanes : {warp.at_barrier, warp.at_barrier_of_warpgroup, warp.arrived}) {
        if (lanes == 0) continue;
        if (told++ == kMostTold) return text + "; ...";
        const Operation operation = lanes == warp.arrived                   ? warp.operation
                                    : lanes == warp.at_barrier_of_warpgroup ? Operation::kWarpgroupBarrier
                                                                            : Operation::kBlockBarrier;
        text += (told > 1 ? "; " : ": ") + where(warp.lanes[__builtin_ctz(lanes)]) + " waits in " + name(operation);
        const int count = __builtin_popcount(lanes);
        if (count > 1) text += " with " + std::to_string(count - 1) + " more of its warp";
      }
    return text;
  }

  static constexpr int kMostTold = 6;
  static constexpr uintptr_t kAlignment = 256;

  std::mutex mutex_;
  Random random_;
  LaunchShape shape_ = {};
  std::function<void()> kernel_;
  uint32_t yield_one_in_ = 1, deliver_one_in_ = 1, copy_one_in_ = 1, longest_turn_ = 1;  // of this launch

  Stacks stacks_;
  std::vector<Block> blocks_;  // those that run at the same time
  std::vector<Warp> warps_;
  std::vector<Fiber> fibers_;
  int started_ = 0, running_ = 0;  // blocks

  Context scheduler_;
  Fiber* current_ = nullptr;
  int64_t turn_ = 0;    // occasions left to the warp
  uint64_t polls_ = 0;  // since something else happened
  const Block* slow_ = nullptr;

  InFlight in_flight_;
};

inline Machine machine;

inline void Machine::enter() { machine.run_thread(); }

inline Settings& settings() { return machine.settings; }
// Of the last launch, which was wrong if its error is not empty.
inline const Report& last_report() { return machine.report; }
inline const std::string& last_error() { return machine.report.error; }

// ------------------------------------------------------------------------------------------------ warp arithmetic

inline uint32_t bf16_of(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t fp16_of(float x) {
  constexpr uint32_t kRebias = (127 - 15) << 10;
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, bits = bits_of(x) & 0x7fffffff;
  if (bits > 0x7f800000) return 0x7fff;
  if (bits >= bits_of(65520)) return sign | 0x7c00;  // half way to the number after the largest, and beyond
  // The last place of 0.5f is the smallest number of fp16: the addition rounds to subnormal numbers.
  if (bits < bits_of(0x1p-14f)) return sign | (bits_of(float_of_bits(bits) + 0.5f) - bits_of(0.5f));
  return sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - kRebias);
}

inline float float_of_fp16_bits(uint32_t x) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t exponent = x >> 10 & 31, mantissa = x & 0x3ff;
  uint32_t bits = ((x & 0x7fff) << 13) + kRebias;
  if (exponent == 31) bits += kRebias;  // to the exponent of infinity and NaN
  if (exponent == 0) bits = bits_of(static_cast<float>(mantissa) * 0x1p-24f);
  return float_of_bits(bits | (x & 0x8000) << 16);
}

// A number of a 32-bit word of operands: element i of those of 16 bits, of which there are two.
inline float number_of(Operation element, uint32_t word, int i) {
  switch (element) {
    case Operation::kMmaBf16: return float_of_bits(i ? word & 0xffff0000 : word << 16);
    case Operation::kMmaFp16: return float_of_fp16_bits(word >> 16 * i & 0xffff);
    default: return float_of_bits(word & 0xffffe000);  // the multipliers do not see the low 13 bits
  }
}

struct Operands {
  float* d;
  uint32_t a[4], b[2];
};

// D += A B for 16 x Depth times Depth x 8. A register of an operand holds Depth / 8 numbers that follow each other
// along the depth, and a second one those half the depth later.
template <Operation Element, int Depth>
void multiply(void* const* arguments) {
  constexpr int kEach = Depth / 8;
  typedef float Four __attribute__((vector_size(4 * sizeof(float))));  // in a register everywhere
  float a[16][Depth];
  Four b[Depth][2], d[16][2];
  for (int lane = 0; lane < 32; ++lane) {
    const Operands& x = *static_cast<const Operands*>(arguments[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < kEach; ++i) {
        const int k = Depth / 2 * half + kEach * q + i;
        a[g][k] = number_of(Element, x.a[2 * half], i);
        a[g + 8][k] = number_of(Element, x.a[2 * half + 1], i);
        b[k][g / 4][g % 4] = number_of(Element, x.b[half], i);
      }
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][q / 2][2 * (q % 2) + i % 2] = x.d[i];
  }
  // Products of two such numbers are exact in float32.
  for (int row = 0; row < 16; ++row) {
    Four left = d[row][0], right = d[row][1];
    for (int k = 0; k < Depth; ++k) {
      left += a[row][k] * b[k][0];
      right += a[row][k] * b[k][1];
    }
    d[row][0] = left;
    d[row][1] = right;
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const to = static_cast<const Operands*>(arguments[lane])->d;
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) to[i] = d[g + i / 2 * 8][q / 2][2 * (q % 2) + i % 2];
  }
  ++machine.report.products;
}

template <Operation Element, int Depth>
void mma(Operands mine) {
  machine.meet_all(Element, mine, [](void* const* arguments, uint32_t) { multiply<Element, Depth>(arguments); });
}

inline void Machine::perform_product(Warp& warp) {
  constexpr int kWords = 8;  // of K
  const Product product = warp.products.front();
  warp.products.erase(warp.products.begin());
  if (warp.committed > 0) --warp.committed;
  const int of_word = product.element == Operation::kMmaTf32 ? 1 : 2;
  for (int lane = 0; lane < 32; ++lane)
    for (int tile = 0; tile < product.tiles; ++tile)
      for (int i = 0; i < 4; ++i) {
        const int g = lane / 4, row = g + i / 2 * 8, column = tile * 8 + 2 * (lane % 4) + i % 2;
        float sum = product.accumulate ? product.d[lane][tile * 4 + i] : 0.f;
        for (int k = 0; k < kWords; ++k) {
          // Of a row, lane 4 g + q has words q and q + 4.
          const uint32_t a = product.a_in_registers ? product.a[4 * g + k % 4][k / 4 * 2 + i / 2]
                                                    : product.shared_a.word(row, k),
                         b = product.b.word(column, k);
          for (int j = 0; j < of_word; ++j) sum += number_of(product.element, a, j) * number_of(product.element, b, j);
        }
        product.d[lane][tile * 4 + i] = sum;
      }
  ++machine.report.products;
}

inline float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

}  // namespace emulation

// ------------------------------------------------------------------------------------------------ threads

inline int thread_index() { return emulation::machine.current().thread; }
inline int block_index() { return emulation::machine.current().block->index; }
inline int block_threads() { return emulation::machine.shape().threads; }
inline int grid_blocks() { return emulation::machine.shape().blocks; }

inline unsigned char* shared_memory() { return emulation::machine.current().block->shared; }

inline void block_barrier() { emulation::machine.meet_block(); }
inline void warp_barrier() { emulation::machine.meet_warp(); }

inline uint32_t warp_ballot(bool predicate) {
  struct Vote {
    bool predicate;
    uint32_t result;
  } mine = {predicate, 0};
  emulation::machine.meet(emulation::Operation::kBallot, mine, [](void* const* votes, uint32_t lanes) {
    uint32_t result = 0;
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      if (static_cast<const Vote*>(votes[lane])->predicate) result |= uint32_t{1} << lane;
    }
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1)
      static_cast<Vote*>(votes[__builtin_ctz(rest)])->result = result;
  });
  return mine.result;
}
inline bool warp_all(bool predicate) {
  struct Vote {
    bool predicate, result;
  } mine = {predicate, false};
  emulation::machine.meet(emulation::Operation::kAll, mine, [](void* const* votes, uint32_t lanes) {
    bool result = true;
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1)
      result = result && static_cast<const Vote*>(votes[__builtin_ctz(rest)])->predicate;
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1)
      static_cast<Vote*>(votes[__builtin_ctz(rest)])->result = result;
  });
  return mine.result;
}

inline bool warp_any(bool predicate) { return !warp_all(!predicate); }

template <class T>
T warp_shuffle(T value, int from) {
  struct Exchange {
    T value;
    int from;
    T result;
  } mine = {value, from, T()};
  emulation::machine.meet_all(emulation::Operation::kShuffle, mine, [](void* const* exchanges, uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* const to = static_cast<Exchange*>(exchanges[lane]);
      to->result = static_cast<const Exchange*>(exchanges[to->from])->value;
    }
  });
  return mine.result;
}

template <class T>
T* opaque(T* p) {
  return p;
}

// ------------------------------------------------------------------------------------------------ arithmetic

inline void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulation::mma<emulation::Operation::kMmaBf16, 16>({d, {a0, a1, a2, a3}, {b0, b1}});
}
inline void mma_fp16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulation::mma<emulation::Operation::kMmaFp16, 16>({d, {a0, a1, a2, a3}, {b0, b1}});
}
inline void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  emulation::mma<emulation::Operation::kMmaTf32, 8>({d, {a0, a1, a2, a3}, {b0, b1}});
}

// ---- Of warpgroups: a product takes place at any moment between its start and the wait, one after the other. What it
// reads of a factor is NaN until the thread that stored it has made a fence.

inline void warpgroup_barrier(int warpgroup) { emulation::machine.meet_warpgroup(warpgroup); }

class SharedFactor {
 public:
  SharedFactor(const uint4* first, int along_k, int along_rows) : place_{first, along_k, along_rows} {}
  SharedFactor from(int vectors) const {
    return SharedFactor(place_.first + vectors, place_.along_k, place_.along_rows);
  }
  const emulation::FactorPlace& place() const { return place_; }

 private:
  emulation::FactorPlace place_;
};

inline void store_factor(uint4* to_shared, const uint4& vector) { emulation::machine.store_factor(to_shared, vector); }
inline void fence_factors() { emulation::machine.fence_factors(); }
inline void products_begin() { emulation::machine.begin_products(); }
inline void products_commit() { emulation::machine.commit_products(); }
inline void products_wait() { emulation::machine.wait_for_products(); }

namespace emulation {
template <int Tiles>
void wgmma(Operation element, float (&d)[Tiles][4], const uint32_t (&a)[4], const SharedFactor& b, bool accumulate) {
  machine.add_product(element, Tiles, accumulate, {d[0], a, {}, b.place()});
}
template <int Tiles>
void wgmma(Operation element, float (&d)[Tiles][4], const SharedFactor& a, const SharedFactor& b, bool accumulate) {
  machine.add_product(element, Tiles, accumulate, {d[0], nullptr, a.place(), b.place()});
}
}  // namespace emulation
template <int Tiles, class A>
void wgmma_bf16(float (&d)[Tiles][4], const A& a, const SharedFactor& b, bool accumulate) {
  emulation::wgmma(emulation::Operation::kMmaBf16, d, a, b, accumulate);
}
template <int Tiles, class A>
void wgmma_fp16(float (&d)[Tiles][4], const A& a, const SharedFactor& b, bool accumulate) {
  emulation::wgmma(emulation::Operation::kMmaFp16, d, a, b, accumulate);
}
template <int Tiles, class A>
void wgmma_tf32(float (&d)[Tiles][4], const A& a, const SharedFactor& b, bool accumulate) {
  emulation::wgmma(emulation::Operation::kMmaTf32, d, a, b, accumulate);
}

inline uint32_t transpose_8x8(uint32_t x) {
  struct Pair {
    uint32_t from, to;
  } mine = {x, 0};
  emulation::machine.meet_all(emulation::Operation::kTranspose, mine, [](void* const* pairs, uint32_t) {
    uint32_t columns[8][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i)
        columns[2 * (lane % 4) + i][lane / 4] = static_cast<const Pair*>(pairs[lane])->from >> 16 * i & 0xffff;
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t* two = &columns[lane / 4][2 * (lane % 4)];
      static_cast<Pair*>(pairs[lane])->to = two[0] | two[1] << 16;
    }
  });
  return mine.to;
}

inline uint32_t pack_bf16(float low, float high) { return emulation::bf16_of(low) | emulation::bf16_of(high) << 16; }
inline uint32_t pack_fp16(float low, float high) { return emulation::fp16_of(low) | emulation::fp16_of(high) << 16; }
inline float float_of_fp16(uint16_t bits) { return emulation::float_of_fp16_bits(bits); }
inline uint32_t round_tf32(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fffffff;
  return magnitude == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

// More exact than the device's.
inline float exp2_approx(float x) { return emulation::flush_subnormal(std::exp2(x)); }
inline float reciprocal_approx(float x) { return emulation::flush_subnormal(1 / emulation::flush_subnormal(x)); }
inline float tanh_approx(float x) { return std::tanh(x); }  // the device's keeps subnormal numbers, too

// ------------------------------------------------------------------------------------------------ memory that CTAs
// share
//
// Weaker than the device in one point: a thread may not see its own store until that has arrived.

// Word by word, in some order: others may act between two.
inline uint4 load_relaxed(const uint4* p) {
  emulation::Machine& machine = emulation::machine;
  machine.check_alignment(p, 16, "load_relaxed");
  machine.poll();
  uint32_t words[4];
  const uint32_t order = machine.draw(4);
  for (uint32_t i = 0; i < 4; ++i) {
    std::memcpy(words + (i ^ order), reinterpret_cast<const unsigned char*>(p) + 4 * (i ^ order), 4);
    if (i < 3) machine.occasion();
  }
  return {words[0], words[1], words[2], words[3]};
}
inline void store_relaxed(uint32_t* p, uint32_t v) {
  emulation::machine.check_alignment(p, 4, "store_relaxed");
  emulation::machine.store(p, &v, false);
}
inline uint4 load_relaxed_packet(const uint4* p) {
  emulation::machine.check_alignment(p, 16, "load_relaxed_packet");
  emulation::machine.poll();
  uint4 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store_relaxed_packet(uint4* p, uint4 v) {
  emulation::machine.check_alignment(p, 16, "store_relaxed_packet");
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  emulation::machine.store(p, words, true);
}

// ------------------------------------------------------------------------------------------------ asynchronous copies

// The destination holds NaN until the copy has taken place: at any moment before the wait that covers it has ended.
inline void copy_async_16(void* to_shared, const void* from, int bytes) {
  emulation::machine.copy(to_shared, from, bytes);
}
inline void copy_async_commit() { emulation::machine.commit_copies(); }
template <int Pending>
void copy_async_wait() {
  static_assert(Pending >= 0);
  emulation::machine.wait_for_copies(Pending);
}

// ------------------------------------------------------------------------------------------------ waiting

// The machine notices by itself when waiting cannot end.
class SpinLimit {
 public:
  void tick() {}
};

// ------------------------------------------------------------------------------------------------ launching

template <class Params>
cudaError_t launch(void (*kernel)(Params), const LaunchShape& shape, cudaStream_t, const Params& params) {
  return emulation::machine.run(shape, [=] { kernel(params); });
}

}  // namespace fastlstm::cuda

// ------------------------------------------------------------------------------------------------ CUDA's runtime

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(p, value, bytes);
  return cudaSuccess;
}
// Reports an error once.
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = fastlstm::cuda::emulation::machine.last;
  fastlstm::cuda::emulation::machine.last = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "success";
  const std::string& text = fastlstm::cuda::emulation::last_error();
  if (!text.empty()) return text.c_str();
  return error == cudaErrorInvalidValue ? "a value that is not allowed" : "a launch that went wrong";
}
