// The kernels' vector functions, exported so that tests measure their error. `count` is a multiple of 16.

#include <cstdint>

#define KERNELS "functions_loops.h"
#include "levels.h"

// y[i] = e^x[i]
extern "C" void motab_exp(const float* x, float* y, int64_t count) { AT_LEVEL(exp_loop)(x, y, count); }

// y[i] = 1 - e^x[i]
extern "C" void motab_one_less_exp(const float* x, float* y, int64_t count) { AT_LEVEL(one_less_exp_loop)(x, y, count); }

// y[i] = log(1 - x[i])
extern "C" void motab_log(const float* x, float* y, int64_t count) { AT_LEVEL(log_loop)(x, y, count); }
