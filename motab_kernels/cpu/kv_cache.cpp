// Rows of left-padded key-value caches, cut and end-aligned again: see `realign_` in reference/kv_cache.py.
//
// B rows, H heads, S slots of D numbers.

#include <cstdint>
#include <cstring>

#include "threads.h"

namespace motab {

// Keys or values (B, H, S, D) of a layer, contiguous in D; sizes and strides in bytes.
struct Storage {
    char* data;
    int64_t stride_b, stride_h, stride_s, heads, slot;
};

// A head's slots [start, start + length) move to end at slot `width`.
static void move(char* head, const Storage& storage, int64_t start, int64_t length, int64_t width, bool clear_padding) {
    const int64_t padding = width - length, stride = storage.stride_s;
    const bool in_one_piece = stride == storage.slot;
    if (start != padding && in_one_piece) {
        std::memmove(head + padding * stride, head + start * stride, length * stride);
    } else if (start != padding) {
        for (int64_t i = 0; i < length; ++i) {
            // Rightward moves begin at the end, so that no source is overwritten before it is read.
            const int64_t token = start < padding ? length - 1 - i : i;
            std::memcpy(head + (padding + token) * stride, head + (start + token) * stride, storage.slot);
        }
    }
    if (!clear_padding) return;
    for (int64_t i = 0; i < padding; ++i) std::memset(head + i * stride, 0, storage.slot);
}

}  // namespace motab

// Every storage has B rows; starts and lengths are (B,).
extern "C" void motab_realign(
    const motab::Storage* storages, int64_t count, const int64_t* starts, const int64_t* lengths, int64_t B, int64_t width,
    int64_t clear_padding, int64_t threads) {
    motab::parallel_for(count * B, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const motab::Storage& storage = storages[item / B];
            const int64_t b = item % B;
            for (int64_t h = 0; h < storage.heads; ++h) {
                char* head = storage.data + b * storage.stride_b + h * storage.stride_h;
                motab::move(head, storage, starts[b], lengths[b], width, clear_padding);
            }
        }
    });
}
