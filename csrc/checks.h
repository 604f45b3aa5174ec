// Checks of user input in C++: one line that names the argument, what was expected and what came.
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastlstm {

// The sizes of a tensor of at most 4 dimensions. Not a std::vector: checking the arguments of one step of streaming
// inference would allocate a dozen of them.
class Sizes {
 public:
  Sizes() : count_(0) {}
  Sizes(std::initializer_list<int64_t> sizes) : count_(sizes.size()) {
    assert(count_ <= values_.size());
    std::copy(sizes.begin(), sizes.end(), values_.begin());
  }
  const int64_t* begin() const { return values_.data(); }
  const int64_t* end() const { return values_.data() + count_; }
  int64_t size() const { return static_cast<int64_t>(count_); }
  int64_t operator[](int64_t d) const { return values_[static_cast<size_t>(d)]; }
  const int64_t* data() const { return values_.data(); }

  Sizes then(int64_t last) const {
    Sizes longer = *this;
    assert(longer.count_ < values_.size());
    longer.values_[longer.count_++] = last;
    return longer;
  }
  Sizes after(int64_t first) const {
    Sizes longer = {first};
    for (const int64_t size : *this) longer = longer.then(size);
    return longer;
  }

 private:
  std::array<int64_t, 4> values_ = {};
  size_t count_;
};

// Throws std::runtime_error (RuntimeError in Python) with the parts joined unless `condition` holds. A macro, so that
// the parts are not evaluated when it does: a step of streaming inference passes dozens of checks.
#define FASTLSTM_CHECK(condition, ...)                       \
  do {                                                       \
    if (!(condition)) ::fastlstm::throw_joined(__VA_ARGS__); \
  } while (false)

template <class... Parts>
[[noreturn]] void throw_joined(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class SizeRange>
std::string shape_text(const SizeRange& sizes) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

// `tensor` has exactly these sizes; `symbols` says what they mean: "[L*D, B, H]".
template <class Tensor>
inline void check_shape(const char* name, const char* symbols, const Tensor& tensor, const Sizes& expected) {
  const auto sizes = tensor.sizes();
  FASTLSTM_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name, " must have shape ",
                 symbols, " = ", shape_text(expected), ", got ", shape_text(sizes));
}

}  // namespace fastlstm
