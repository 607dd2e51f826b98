// Work shared among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace motab {

// Whether this process was forked. It does not have the OpenMP threads of its parent, and would wait for them for ever.
bool forked();

// Calls body(begin, end) on parts of [0, items), on at most `threads` threads with at least `grain` items each.
template <class Body>
void parallel_for(int64_t items, int64_t threads, int64_t grain, const Body& body) {
    threads = forked() ? 1 : std::min(threads, items / std::max<int64_t>(1, grain));
    if (threads <= 1) {
        body(0, items);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        body(items * part / parts, items * (part + 1) / parts);
    }
#else
    std::vector<std::thread> team;
    for (int64_t part = 1; part < threads; ++part)
        team.emplace_back([&, part] { body(items * part / threads, items * (part + 1) / threads); });
    body(0, items / threads);
    for (std::thread& member : team) member.join();
#endif
}

}  // namespace motab
