// How the vocabulary is cut. The splits follow from V alone, and their sums are combined in order, so that a row's numbers
// depend neither on its batch nor on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace motab {

constexpr float LOWEST = -std::numeric_limits<float>::max();  // where maxima start: unlike -inf, less itself it is 0
constexpr int64_t SPLIT = 4096;                               // columns that one thread sums

inline int64_t splits_of(int64_t V) { return (V + SPLIT - 1) / SPLIT; }

// Splits that are worth a thread.
inline int64_t grain_of(int64_t V) { return 1 + (1 << 14) / std::min(V, SPLIT); }

}  // namespace motab
