// Included once a level.

namespace motab {
namespace LEVEL {

#include "vector.h"

#include "vector_exp.h"

ENTRY void exp_loop(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        Floats v;
        __builtin_memcpy(&v, x + i, sizeof v);
        v = vector_exp(v);
        __builtin_memcpy(y + i, &v, sizeof v);
    }
}

}  // namespace LEVEL
}  // namespace motab
