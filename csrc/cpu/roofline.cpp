#include "roofline.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <utility>

#include "../cell.h"
#include "runtime.h"

namespace fastlstm::cpu {

namespace {

using T = float;
using Kernel = std::function<void()>;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds of a call: the best of many, which is what the kernel can do, while others disturb the rest.
double best_time(const Kernel& kernel, double budget) {
  kernel();
  double best = 1e30;
  for (const double end = now() + budget; now() < end;) {
    const double start = now();
    kernel();
    best = std::min(best, now() - start);
  }
  return best;
}

// Values that are neither zero nor denormal, nor grow when they are multiplied.
struct Data {
  std::vector<std::unique_ptr<Buffer<T>>> buffers;
  T* make(int64_t size) {
    buffers.push_back(std::make_unique<Buffer<T>>(size));
    T* const data = buffers.back()->data();
    for (int64_t i = 0; i < size; ++i) data[i] = static_cast<T>((i * 37 & 255) - 127) / 1280;
    return data;
  }
};

// What a thread runs, on data of its own: a kernel at one size.
struct Case {
  std::string kernel, sizes;
  double multiply_adds, bytes;
  std::function<Kernel(Data&)> prepare;
};

std::string sizes_text(int64_t rows, int64_t K, int64_t columns) {
  return "rows " + std::to_string(rows) + ", K " + std::to_string(K) + ", columns " + std::to_string(columns);
}

// A layer with I = P = H and one step of B rows.
struct Layer {
  Schedule schedule;
  ForwardTask<T, T> forward = {};
  BackwardTask<T, T> backward = {};

  Layer(const Kernels<T, T>& k, Data& data, int64_t B, int64_t H, bool save) {
    schedule.offsets = {0, B};
    forward.schedule = backward.schedule = &schedule;
    forward.I = forward.H = forward.P = backward.H = backward.P = H;
    forward.x = data.make(B * H);
    forward.w_ih = data.make(kGates * H * H);
    forward.w_hh = data.make(kGates * H * H);
    forward.packed = data.make(packed_gates_size(k, H, 2 * H));
    forward.bias = data.make(unit_blocks(k, H) * kGates * k.lanes);
    forward.h_0 = data.make(B * H);
    forward.c = data.make(B * H);
    forward.y = data.make(B * H);
    forward.y_stride = H;
    forward.h = {forward.y, H, 0, 0};
    T* const gates = data.make(B * kGates * H);
    T* const cells = data.make(B * H);
    if (save) forward.gates = gates, forward.cells = cells;
    backward.gates = gates;
    backward.cells = cells;
    backward.c_0 = data.make(B * H);
    backward.d_y = data.make(B * H);
    backward.d_y_stride = H;
    backward.d_h = data.make(B * H);
    backward.d_c = data.make(B * H);
    backward.d_gates = data.make(B * kGates * H);
  }
};

std::vector<Case> cases(const Kernels<T, T>& k) {
  std::vector<Case> all;
  constexpr int64_t kRounds = 1 << 16;
  T once[2] = {0.5f, 0.0f};
  const int64_t per_round = k.multiply_add(1, once);
  all.push_back({"multiply_add", "registers", static_cast<double>(kRounds * per_round), 0, [&k](Data& data) {
                   T* const sink = data.make(2);
                   return [&k, sink] { k.multiply_add(kRounds, sink); };
                 }});
  for (const int64_t kilobytes : {16, 256, 1024, 4096, 8192, 65536}) {
    const int64_t n = kilobytes * 1024 / static_cast<int64_t>(sizeof(T)),
                  repeats = std::max<int64_t>(1, 4096 / kilobytes);
    all.push_back({"read", std::to_string(kilobytes) + " KB", 0, static_cast<double>(n * repeats) * sizeof(T),
                   [&k, n, repeats](Data& data) {
                     const T* const values = data.make(n);
                     T* const sink = data.make(1);
                     return [&k, values, sink, n, repeats] {
                       for (int64_t i = 0; i < repeats; ++i) *sink += k.sum(values, n);
                     };
                   }});
  }
  const auto add = [&](const char* kernel, const std::string& sizes, double multiply_adds, double values,
                       std::function<Kernel(Data&)> prepare) {
    all.push_back({kernel, sizes, multiply_adds, values * sizeof(T), std::move(prepare)});
  };
  // A forward step by packed tiles, products of x and h with the cell behind them; by dot products; a backward step's
  // cell. As a thread of two has them: half of the rows, or half of the units.
  for (const auto& [B, H] : {std::pair<int64_t, int64_t>{16, 128}, {4, 64}, {8, 256}, {16, 512}, {1, 512}}) {
    const auto rows = static_cast<double>(B), units = static_cast<double>(H);
    const std::string sizes = "B " + std::to_string(B) + ", H " + std::to_string(H);
    const auto step = [&k, B = B, H = H](GateProduct product) {
      return [&k, B, H, product](Data& data) {
        const auto layer = std::make_shared<Layer>(k, data, B, H, false);
        T* const workspace = data.make(k.forward_workspace(B, H, H));
        return [&k, layer, B, H, product, workspace] {
          k.forward_cells(layer->forward, product, 0, {0, B}, {0, unit_blocks(k, H)}, workspace);
        };
      };
    };
    const double products = 8 * rows * units * units, weights = 8 * units * units;
    add("forward step, packed", sizes, products, weights + 4 * rows * units, step(GateProduct::kPacked));
    add("forward step, unpacked", sizes, products, weights + 4 * rows * units, step(GateProduct::kUnpacked));
    add("forward cell, training", sizes, 0, 14 * rows * units, [&k, B = B, H = H](Data& data) {
      const auto layer = std::make_shared<Layer>(k, data, B, H, true);
      layer->forward.gates_x = layer->forward.gates;
      return [&k, layer, B, H] {
        k.forward_cells(layer->forward, GateProduct::kDone, 0, {0, B}, {0, unit_blocks(k, H)}, nullptr);
      };
    });
    add("backward cell", sizes, 0, 15 * rows * units, [&k, B = B, H = H](Data& data) {
      const auto layer = std::make_shared<Layer>(k, data, B, H, true);
      return [&k, layer, B, H] { k.backward_cells(layer->backward, 0, {0, B}, {0, column_panels(k, H)}); };
    });
  }
  // Bulk products of T = 100 steps, as a thread of two has them: half of the rows, or half of the gate columns.
  for (const auto& [N, H] : {std::pair<int64_t, int64_t>{3200, 128}, {800, 256}, {3200, 512}, {1, 256}}) {
    const int64_t columns = kGates * H, rows = std::max<int64_t>(N / 2, 1);
    const auto weights = static_cast<double>(columns * H);
    if (N > 1) {
      const auto bulk = [&](const char* kernel, int64_t K, int64_t width) {
        add(kernel, sizes_text(rows, K, width), static_cast<double>(rows) * weights,
            weights + static_cast<double>(rows * (K + width)), [&k, rows, K, width](Data& data) {
              const T* const a = data.make(rows * K);
              const T* const packed = data.make(packed_columns_size(k, K, width));
              T* const out = data.make(rows * width);
              T* const buffer = data.make(k.block_buffer(rows, K));
              return [=, &k] {
                const Range panels = {0, column_panels(k, width)};
                k.multiply_rows(a, K, {0, rows}, packed, K, width, panels, out, width, false, buffer);
              };
            });
      };
      bulk("x W_ih^T", H, columns);
      bulk("d_gates W", columns, H);
    } else {
      add("d_gates W, stored", sizes_text(1, columns, H), weights, weights, [&k, H = H, columns](Data& data) {
        const T* const d_gates = data.make(columns);
        const T* const w = data.make(columns * H);
        T* const out = data.make(H);
        return [=, &k] { k.multiply_stored(d_gates, columns, 1, w, columns, H, {0, H}, out, H, false); };
      });
    }
    const int64_t depth = std::min<int64_t>(N, 1024);
    add("weight gradients", sizes_text(columns / 2, depth, 2 * H), static_cast<double>(depth) * weights,
        weights + static_cast<double>(depth * columns / 2 + 2 * depth * H), [&k, H = H, columns, depth](Data& data) {
          const T* const left = data.make(depth * columns);
          const T* const right = data.make(packed_columns_size(k, depth, 2 * H));
          T* const out = data.make(columns * 2 * H);
          T* const sums = data.make(columns);
          T* const buffer = data.make(k.block_buffer(columns / 2, depth));
          const std::vector<Gradient<T, T>> gradients = {{right, 2 * H, out}};
          return [=, &k] { k.add_gradients(left, columns, depth, {0, columns / 2}, buffer, gradients, sums, false); };
        });
    if (N == 1) continue;  // has been packed above
    add("packing W_hh", sizes_text(columns, H, 1), 0, 2 * weights, [&k, H = H, columns](Data& data) {
      const T* const w = data.make(columns * H);
      T* const packed = data.make(packed_gates_size(k, H, H));
      return [&k, H, w, packed] { k.pack_gates(w, H, H, packed, H, {0, unit_blocks(k, H)}); };
    });
  }
  return all;
}

}  // namespace

std::vector<KernelTiming> time_kernels(Isa isa, int threads, double seconds_each) {
  FASTLSTM_CHECK(threads >= 1 && threads <= thread_count(), "threads must be in [1, torch's number of threads] = [1, ",
                 thread_count(), "], got ", threads);
  std::vector<KernelTiming> timings;
  for (const Case& c : cases(kernels<T, T>(isa))) {
    std::vector<double> seconds(threads, 0.0);
    parallel(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Data data;
        seconds[i] = best_time(c.prepare(data), seconds_each);
      }
    });
    timings.push_back({c.kernel, c.sizes, c.multiply_adds, c.bytes, *std::max_element(seconds.begin(), seconds.end())});
  }
  return timings;
}

}  // namespace fastlstm::cpu
