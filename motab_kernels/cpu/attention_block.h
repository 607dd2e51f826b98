// Some queries of one head of keys over the slots that they see, for `ragged_attention`. Included once a level.
//
// Scores are computed with one slot per lane, from a transposed tile of keys; values are summed with one column per
// lane. Tiles begin at multiples of TILE, and a tile that a query does not see leaves its sums unchanged, so that a
// query's numbers do not depend on its batch.

namespace motab {
namespace LEVEL {

#include "convert.h"
#include "vector.h"

#include "transpose.h"
#include "vector_exp.h"

constexpr int64_t GROUP = 4;  // queries in registers at a time
#define AT_MOST_4(name, count) ((count) > 3 ? name<4> : (count) == 3 ? name<3> : (count) == 2 ? name<2> : name<1>)

// The first `count` slots as float32, `stride` apart: in place, or converted into `room`, which is padded with 0 to
// whole vectors and to `rows` slots.
ENTRY const float* slots_as_floats(
    const Slots& slots, int64_t count, int64_t rows, int64_t D, float* room, int64_t& stride) {
    const int64_t width = whole_vectors(D);
    if (slots.type == FLOAT32 && D == width && count == rows) {
        stride = slots.stride;
        return reinterpret_cast<const float*>(slots.data);
    }
    stride = width;
    for (int64_t n = 0; n < count; ++n) {
        float* row = room + n * width;
        to_floats(slots.type, slots.data + n * slots.stride * bytes_of(slots.type), D, row);
        for (int64_t d = D; d < width; ++d) row[d] = 0;
    }
    std::memset(room + count * width, 0, (rows - count) * width * sizeof(float));
    return room;
}

// QUERIES x 2 vectors of scores: rows of q times columns of transposed keys.
template <int QUERIES>
KERNEL void score(const float* q, int64_t width, const float* turned, float* scores) {
    Floats sums[QUERIES][2] = {};
    for (int64_t d = 0; d < width; ++d) {
        const Floats k0 = load(turned + d * TILE), k1 = load(turned + d * TILE + LANES);
        for (int i = 0; i < QUERIES; ++i) {
            sums[i][0] += q[i * width + d] * k0;
            sums[i][1] += q[i * width + d] * k1;
        }
    }
    for (int i = 0; i < QUERIES; ++i) {
        store(scores + i * TILE, sums[i][0]);
        store(scores + i * TILE + LANES, sums[i][1]);
    }
}

// The same from keys as stored, a slot at a time: for few queries a transposition costs more than it saves.
template <int QUERIES>
ENTRY void score_slots(const float* q, int64_t width, const float* keys, int64_t stride, int64_t count, float* scores) {
    for (int64_t n = 0; n < count; ++n) {
        Floats sums[QUERIES] = {};
        for (int64_t d = 0; d < width; d += LANES) {
            const Floats k = load(keys + n * stride + d);
            for (int i = 0; i < QUERIES; ++i) sums[i] += load(q + i * width + d) * k;
        }
        for (int i = 0; i < QUERIES; ++i) scores[i * TILE + n] = sum(sums[i]);
    }
}

// QUERIES rows of sums, `COLUMNS` vectors wide, grow by weights (QUERIES, TILE) times values.
template <int QUERIES, int COLUMNS>
KERNEL void add_values(const float* weights, int64_t count, const float* values, int64_t stride, float* sums, int64_t width) {
    Floats total[QUERIES][COLUMNS];
    for (int i = 0; i < QUERIES; ++i)
        for (int j = 0; j < COLUMNS; ++j) total[i][j] = load(sums + i * width + j * LANES);
    for (int64_t n = 0; n < count; ++n) {
        Floats v[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) v[j] = load(values + n * stride + j * LANES);
        for (int i = 0; i < QUERIES; ++i)
            for (int j = 0; j < COLUMNS; ++j) total[i][j] += weights[i * TILE + n] * v[j];
    }
    for (int i = 0; i < QUERIES; ++i)
        for (int j = 0; j < COLUMNS; ++j) store(sums + i * width + j * LANES, total[i][j]);
}

// Transposes keys (TILE, width) to (width, TILE).
ENTRY void turn(const float* keys, int64_t stride, int64_t width, float* turned) {
    for (int64_t n = 0; n < TILE; n += LANES)
        for (int64_t d = 0; d < width; d += LANES)
            transpose(keys + n * stride + d, stride, turned + d * TILE + n, TILE);
}

template <int QUERIES>
ENTRY void score_tile(const float* q, int64_t width, const float* turned, float* scores) {
    for (int64_t n = 0; n < TILE; n += 2 * LANES) score<QUERIES>(q, width, turned + n, scores + n);
}

template <int QUERIES>
ENTRY void add_tile(const float* weights, int64_t count, const float* values, int64_t stride, float* sums, int64_t width) {
    int64_t d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES)
        add_values<QUERIES, 2>(weights, count, values + d, stride, sums + d, width);
    if (d < width) add_values<QUERIES, 1>(weights, count, values + d, stride, sums + d, width);
}

// cap tanh(x / cap), with all digits also where that is nearly x
KERNEL Floats capped(Floats x, float cap) {
    const Exponential e = split_exp(-magnitude(x) * (2 / cap));
    const Floats y = cap * (one_less(e) / (value(e) + 1.0f));
    return x < 0.0f ? -y : y;
}

// Turns a query's scores of the tile that begins at `start` into weights relative to its maximum; rescales its sums.
ENTRY void weigh(const AttentionCall& call, int64_t start, Query& query, float* scores, float* sums) {
    const int64_t first = query.last - call.window + 1;
    const bool is_whole = start >= first && start + TILE - 1 <= query.last;
    Floats x[TILE / LANES], top = all(query.top);
    for (int j = 0; j < TILE / LANES; ++j) {
        x[j] = load(scores + j * LANES);
        if (call.softcap > 0) x[j] = capped(x[j], float(call.softcap));
        if (!is_whole)
            for (int i = 0; i < LANES; ++i) {
                const int64_t slot = start + j * LANES + i;
                if (slot < first || slot > query.last) x[j][i] = -__builtin_inff();
            }
        top = larger(x[j], top);
    }
    const float now = largest(top);
    if (now > query.top) {
        const float f = std::exp(query.top - now);
        for (int i = 0; i < LANES; ++i) query.total[i] *= f;
        for (int64_t d = 0; d < whole_vectors(call.D); d += LANES) store(sums + d, load(sums + d) * f);
        query.top = now;
    }
    Floats total = load(query.total);
    for (int j = 0; j < TILE / LANES; ++j) {
        const Floats weight = vector_exp(x[j] - query.top);
        store(scores + j * LANES, weight);
        total += weight;
    }
    store(query.total, total);
}

// Queries [begin, end) of row i that read head h. A token's queries are adjacent: later queries see later slots.
ENTRY void attend(const AttentionCall& call, int64_t i, int64_t h, int64_t begin, int64_t end, const AttentionRoom& room) {
    const int64_t heads = call.H_q / call.H, M = end - begin;
    const int64_t type = call.type, D = call.D, width = whole_vectors(D);
    for (int64_t m = 0; m < M; ++m) {
        const int64_t t = (begin + m) / heads, head = h * heads + (begin + m) % heads;
        float* q = room.q + m * width;
        to_floats(type, call.query.at(type, i, head, t), D, q);
        for (int64_t d = 0; d < width; ++d) q[d] = d < D ? q[d] * float(call.scale) : 0;
        room.queries[m] = {head, t, call.lengths[i] + t, LOWEST, {}};
    }
    std::memset(room.sums, 0, M * width * sizeof(float));
    const int64_t first = std::max<int64_t>(0, room.queries[0].last - call.window + 1);
    for (int64_t start = first / TILE * TILE; start <= room.queries[M - 1].last; start += TILE) {
        const int64_t count = std::min(TILE, room.queries[M - 1].last + 1 - start);
        const int64_t skip = std::max<int64_t>(0, first - start);
        // A tile lies in one page: page sizes are multiples of TILE, or the row has one page.
        const int64_t place = start / call.page_size, slot = start % call.page_size;
        const int64_t page = call.page_table ? call.page_table[i * call.pages + place] : i;
        const Slots keys = {call.keys.at(type, page, h, slot), type, call.keys.stride_t};
        const Slots values = {call.values.at(type, page, h, slot), type, call.values.stride_t};
        int64_t stride;
        const float* k = slots_as_floats(keys, count, M > GROUP ? TILE : count, D, room.slots, stride);
        if (M > GROUP) {
            turn(k, stride, width, room.turned);
            for (int64_t m = 0; m < M; m += GROUP)
                AT_MOST_4(score_tile, M - m)(room.q + m * width, width, room.turned, room.scores + m * TILE);
        } else {
            AT_MOST_4(score_slots, M)(room.q, width, k, stride, count, room.scores);
        }
        for (int64_t m = 0; m < M; ++m) {
            Query& query = room.queries[m];
            float* scores = room.scores + m * TILE;
            if (start > query.last || start + TILE <= query.last - call.window + 1)
                std::memset(scores, 0, TILE * sizeof(float));
            else
                weigh(call, start, query, scores, room.sums + m * width);
        }
        const float* v = slots_as_floats(values, count, count, D, room.slots, stride) + skip * stride;
        for (int64_t m = 0; m < M; m += GROUP)
            AT_MOST_4(add_tile, M - m)
            (room.scores + m * TILE + skip, count - skip, v, stride, room.sums + m * width, width);
    }
    for (int64_t m = 0; m < M; ++m) {
        const Query& query = room.queries[m];
        const float sink = call.sinks ? call.sinks[query.head] : -__builtin_inff();
        const float top = query.top > sink ? query.top : sink, f = std::exp(query.top - top);
        const float share = f / (f * sum(load(query.total)) + std::exp(sink - top));
        float* sums = room.sums + m * width;
        for (int64_t d = 0; d < D; ++d) sums[d] *= share;
        from_floats(type, sums, D, call.out.at(type, i, query.head, query.t));
    }
}

#undef AT_MOST_4

}  // namespace LEVEL
}  // namespace motab
