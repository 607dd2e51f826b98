#include "threads.h"

#include <pthread.h>

#include <atomic>

namespace motab {

static std::atomic<bool> is_child{false};
static const int registered = pthread_atfork(nullptr, nullptr, [] { is_child = true; });

bool forked() { return is_child.load(std::memory_order_relaxed); }

}  // namespace motab
