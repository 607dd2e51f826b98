// The exponential of the kernels, for the test of its error.

#include <cstdint>

#define KERNELS "exp_loop.h"
#include "levels.h"

// y[i] = e^x[i], for a count that is a multiple of 16.
extern "C" void motab_exp(const float* x, float* y, int64_t count) { AT_LEVEL(exp_loop)(x, y, count); }
