// Checks of user input in C++: one line that names the argument, what was expected and what came.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastlstm {

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

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
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
inline void check_shape(const char* name, const char* symbols, const Tensor& tensor,
                        const std::vector<int64_t>& expected) {
  const auto sizes = tensor.sizes();
  FASTLSTM_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name, " must have shape ",
                 symbols, " = ", shape_text(expected), ", got ", shape_text(sizes));
}

}  // namespace fastlstm
