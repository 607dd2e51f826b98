// Passes over a row of logits, a piece at a time. Included once per level, in its namespace.

namespace motab {
namespace LEVEL {

#include "vector.h"

#include "convert.h"
#include "vector_exp.h"

// PIECE columns as floats, those beyond the row's end without weight.
KERNEL const float* piece_at(const Row& row, int64_t start, float* room) {
    const int64_t columns = row.columns(start);
    if (row.type == FLOAT32 && columns == PIECE) return reinterpret_cast<const float*>(row.at(start));
    to_floats(row.type, row.at(start), columns, room);
    std::fill(room + columns, room + PIECE, -__builtin_inff());
    return room;
}

KERNEL Floats weights(const float* x, float top, float c) { return vector_exp((load(x) - top) * c); }

// The largest logit, and in `tops` those of groups. Returns whether tokens can be drawn.
ENTRY bool find_top(const Row& row, float& top, float* tops) {
    alignas(64) float room[PIECE];
    Floats of_lanes = all(-__builtin_inff());
    Ints undefined = {};
    for (int64_t start = 0; start < row.V; start += PIECE) {
        const float* x = piece_at(row, start, room);
        for (int64_t i = 0; i < PIECE; i += GROUP * LANES) {
            Floats of_groups = all(-__builtin_inff());
            for (int64_t j = i; j < i + GROUP * LANES; j += LANES) {
                const Floats v = load(x + j);
                undefined |= v != v;
                of_groups = larger(v, of_groups);
            }
            store(tops + (start + i) / GROUP, of_groups);
            of_lanes = larger(of_groups, of_lanes);
        }
    }
    top = largest(of_lanes);
    return !any(undefined) && top - top == 0;
}

// The sum of the weights of each piece.
ENTRY void piece_sums(const Row& row, float top, float c, double* sums) {
    alignas(64) float room[PIECE];
    for (int64_t start = 0; start < row.V; start += PIECE) {
        const float* x = piece_at(row, start, room);
        Floats total = {};
        for (int64_t i = 0; i < row.columns(start); i += LANES) total += weights(x + i, top, c);
        sums[start / PIECE] = sum(total);
    }
}

// The first column from `start` on, within its piece, at which the sum of weights is beyond the target, or the last one
// with a weight: the sum here may round to less than that of `piece_sums`.
ENTRY int64_t find(const Row& row, float top, float c, int64_t start, double target) {
    alignas(64) float room[PIECE], of_piece[PIECE];
    const float* x = piece_at(row, start, room);
    const int64_t columns = row.columns(start);
    for (int64_t i = 0; i < columns; i += LANES) store(of_piece + i, weights(x + i, top, c));
    double sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < columns; ++i) {
        if (of_piece[i] > 0) last = i;
        if ((sum += of_piece[i]) > target) return start + i;
    }
    return start + last;
}

// The tokens whose logits are at least the bound, with their weights.
ENTRY void collect(const Row& row, float top, float c, float bound, std::vector<Candidate>& candidates) {
    alignas(64) float room[PIECE], of_lanes[LANES];
    candidates.clear();
    for (int64_t start = 0; start < row.V; start += PIECE) {
        const float* x = piece_at(row, start, room);
        const int64_t columns = row.columns(start);
        for (int64_t i = 0; i < columns; i += LANES) {
            if (!any(load(x + i) >= bound)) continue;
            store(of_lanes, weights(x + i, top, c));
            for (int64_t j = i; j < i + LANES; ++j)
                if (x[j] >= bound) candidates.push_back({x[j], of_lanes[j - i], start + j});
        }
    }
}

}  // namespace LEVEL
}  // namespace motab
