// Included once per level.

namespace motab {
namespace LEVEL {

#include "vector.h"

#include "vector_exp.h"
#include "vector_log.h"

ENTRY void exp_loop(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(y + i, vector_exp(load(x + i)));
}

ENTRY void one_less_exp_loop(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(y + i, one_less(split_exp(load(x + i))));
}

ENTRY void log_loop(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(y + i, vector_log(1.0f - load(x + i), load(x + i)));
}

}  // namespace LEVEL
}  // namespace motab
