// `ragged_attention`: a thread takes some queries of one row and one head of keys at a time.
//
// b rows of queries, T new tokens, H_q and H heads of queries and of keys, D head size; pages of S slots.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "number.h"
#include "threads.h"

namespace motab {

constexpr float LOWEST = -std::numeric_limits<float>::max();  // where maxima start: minus -inf it is not NaN
constexpr int64_t TILE = 64;                                  // slots at a time
constexpr int64_t QUERIES = 64;                               // of a work item
constexpr int64_t WIDEST = 16;                                // most lanes of a vector

constexpr int64_t whole_vectors(int64_t D) { return (D + WIDEST - 1) / WIDEST * WIDEST; }

// (b, H, T, D), contiguous in D; strides in elements.
struct Heads {
    char* data;
    int64_t stride_b, stride_h, stride_t;

    char* at(int64_t type, int64_t i, int64_t h, int64_t t) const {
        return data + (i * stride_b + h * stride_h + t * stride_t) * bytes_of(type);
    }
};

// The arguments, in the order of `cpu/attention.py`.
struct AttentionCall {
    int64_t b, H_q, H, T, D, type, threads;
    Heads query, keys, values, out;
    const int64_t *lengths, *page_table;  // (b, pages); null: row i in page i
    const float* sinks;                   // null: none
    int64_t pages, page_size, window;
    double scale, softcap;  // softcap 0: none
};

// Keys or values of one row and head; the stride is in elements.
struct Slots {
    const char* data;
    int64_t type, stride;
};

// A query, the last slot that it sees, its largest score, and the sum of its weights relative to that, by lanes.
struct Query {
    int64_t head, t, last;
    float top, total[WIDEST];
};

// A thread's scratch memory. `width` is D rounded up to whole vectors.
struct AttentionRoom {
    float* slots;   // (TILE, width)
    float* turned;  // (width, TILE)
    float* q;       // (QUERIES, width)
    float* sums;    // (QUERIES, width)
    float* scores;  // (QUERIES, TILE)
    Query* queries;
};

}  // namespace motab

#define KERNELS "attention_block.h"
#include "levels.h"

// lengths and page_table are contiguous. Returns false if memory ran out.
extern "C" bool motab_ragged_attention(const motab::AttentionCall* call) {
    using namespace motab;
    const int64_t all = call->H_q / call->H * call->T, blocks = (all + QUERIES - 1) / QUERIES;
    const int64_t items = call->b * call->H * blocks, width = whole_vectors(call->D);
    int64_t slots = 0;
    for (int64_t i = 0; i < call->b; ++i) slots += std::min(call->lengths[i] + call->T, call->window);
    constexpr int64_t WORTH = 1 << 18;  // multiplications that are worth a thread
    const int64_t threads =
        std::min({call->threads, items, 1 + slots * call->H_q * call->T * call->D / WORTH});
    const int64_t most = std::min(all, QUERIES), tile = TILE * width, queries = most * width;
    const int64_t numbers = 2 * (tile + queries) + most * TILE;
    const std::unique_ptr<float[]> memory(new (std::nothrow) float[threads * numbers]);
    const std::unique_ptr<Query[]> running(new (std::nothrow) Query[threads * most]);
    if (!memory || !running) return false;
    // Rows differ in length: a thread that is done takes the next item.
    std::atomic<int64_t> next{0}, workers{0};
    parallel_for(threads, threads, 1, [&](int64_t, int64_t) {
        const int64_t worker = workers.fetch_add(1);
        float* const own = memory.get() + worker * numbers;
        float* const sums = own + 2 * tile + queries;
        const AttentionRoom room = {
            own, own + tile, own + 2 * tile, sums, sums + queries, running.get() + worker * most};
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            const int64_t begin = item % blocks * QUERIES;
            AT_LEVEL(attend)
            (*call, item / blocks / call->H, item / blocks % call->H, begin, std::min(all, begin + QUERIES), room);
        }
    });
    return true;
}
