// Which of the mistakes of mutations.py is active. Included by the files that have some, in the copy where they are
// planted.
#pragma once

namespace fastlstm {

inline int active_mutation = -1;
inline bool mutated(int number) { return active_mutation == number; }

}  // namespace fastlstm

extern "C" __attribute__((visibility("default"), used)) inline void emulated_mutate(int number) {
  fastlstm::active_mutation = number;
}
