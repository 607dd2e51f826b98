#include "level.h"

#include <atomic>

namespace motab {

static Level best() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return BASELINE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    return AVX2;
#else
    return BASELINE;
#endif
}

static std::atomic<Level> in_force{best()};

Level level() { return in_force.load(std::memory_order_relaxed); }

}  // namespace motab

// Uses no level above `limit` from now on, to test the others. Returns the level in use.
extern "C" int motab_limit_level(int limit) {
    const motab::Level best = motab::best();
    motab::in_force = limit < best ? static_cast<motab::Level>(limit) : best;
    return motab::in_force;
}
