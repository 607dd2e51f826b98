// How the vocabulary is cut. The splits depend on V only, and their sums are combined in order, so that a row's numbers
// depend neither on its batch nor on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "arguments.h"

namespace motab {

constexpr float LOWEST = -std::numeric_limits<float>::max();  // where maxima start: unlike -inf, minus itself it is 0
constexpr int64_t SPLIT = 4096;                               // columns that one thread sums

// Some columns of both sides' logits at a position.
struct Split {
    int64_t student_type, teacher_type;
    const char *student, *teacher;
    int64_t columns;
    float inverse_temperature;
};

inline int64_t splits_of(int64_t V) { return (V + SPLIT - 1) / SPLIT; }

// A sum of w * x over a split after x has grown by d and w by the factor f = e^d; 0 where f is 0, even if it was inf.
inline double moved(double f, double total, double d, double z) { return f != 0 ? f * (total + d * z) : 0; }

// Splits that are worth a thread.
inline int64_t grain_of(int64_t V) { return 1 + (1 << 14) / std::min(V, SPLIT); }

inline Split split_at(const Logits& student, const Logits& teacher, int64_t b, int64_t i, int64_t first, int64_t V, float c) {
    return {student.type, teacher.type, student.at(b, i, first), teacher.at(b, i, first), std::min(SPLIT, V - first), c};
}

}  // namespace motab
