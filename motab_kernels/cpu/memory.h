// Memory that is about to be written for the first time.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace motab {

// Asks for pages of 2 MiB where the system has them: page faults of 4 KiB take longer than the computation of what is
// written there (filling 300 MB of new memory took 57 ms, and 9 ms this way). Advice only: it affects only speed.
inline void prefer_large_pages(char* begin, char* end) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t WORTH = 4 << 20;
    if (end - begin < WORTH) return;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(end) - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)end;
#endif
}

}  // namespace motab
