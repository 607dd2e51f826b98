// `sample_from_logits`: a thread draws the tokens of whole rows.
//
// B rows, T tokens, V vocabulary.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <vector>

#include "arguments.h"
#include "threads.h"

namespace motab {

constexpr int64_t PIECE = 1024;  // columns that are converted and summed at a time; they stay in L1
constexpr int64_t GROUP = 16;    // columns, a vector apart, of which the largest logit is kept

// How a row is drawn from.
struct Settings {
    double temperature, top_k, top_p, min_p;

    bool by_k(int64_t V) const { return top_k > 0 && top_k < V; }
    bool by_p() const { return top_p < 1; }
    bool is_filtered(int64_t V) const { return by_k(V) || by_p() || min_p > 0; }
    bool in_range() const {  // the bounds of a temperature are those of DIVISORS, as any dtype rounds them
        return (temperature == 0 || (temperature >= 0.99e-30 && temperature <= 1.01e30)) && top_k >= 0 && top_p > 0 &&
               top_p <= 1 && min_p >= 0 && min_p <= 1;
    }
};

// The arguments, in the order of `cpu/sampling.py`.
struct SamplingCall {
    int64_t B, T, V, threads;
    Logits logits;
    const double* uniforms;
    int64_t* tokens;
    bool* valid;
    const Settings* rows;  // null: all rows are alike
    Settings all;
};

struct Row {
    const char* data;
    int64_t type, V;

    const char* at(int64_t column) const { return data + column * bytes_of(type); }
    int64_t columns(int64_t start) const { return std::min(PIECE, V - start); }
};

// A token that the filters may keep; its weight is relative to the likeliest token's.
struct Candidate {
    float logit, weight;
    int64_t column;
};

inline bool likelier(const Candidate& x, const Candidate& y) { return x.logit > y.logit; }

// A thread's scratch memory; it grows to what the longest row needs.
struct SamplingRoom {
    std::vector<double> sums;           // of the weights of each piece
    std::vector<float> tops;            // the largest logit of each group
    std::vector<Candidate> candidates;  // in the vocabulary's order
    std::vector<Candidate> ordered;     // the same in another order
};

}  // namespace motab

#define KERNELS "sampling_row.h"
#include "levels.h"

namespace motab {

// The least logit of the fewest likeliest candidates whose weights sum to `target`, or of all of them. Halves are taken
// apart until one candidate is left.
static float least_of_nucleus(std::vector<Candidate>& ordered, double target) {
    auto begin = ordered.begin(), end = ordered.end();
    while (end - begin > 1) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, likelier);
        double likeliest = 0;
        for (auto it = begin; it != middle; ++it) likeliest += it->weight;
        if (likeliest >= target)
            end = middle;
        else
            target -= likeliest, begin = middle;
    }
    return begin->logit;
}

// A lower bound of the k-th largest logit: the k-th of the groups' largest, each of which is one of the row's.
static float bound_of_top_k(std::vector<float>& tops, int64_t k) {
    if (k > int64_t(tops.size())) return -std::numeric_limits<float>::infinity();
    std::nth_element(tops.begin(), tops.begin() + (k - 1), tops.end(), std::greater<float>());
    return tops[k - 1];
}

static void remove_below(std::vector<Candidate>& candidates, float least) {
    const auto below = [&](const Candidate& x) { return x.logit < least; };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), below), candidates.end());
}

static double total_weight(const std::vector<Candidate>& candidates) {
    double total = 0;
    for (const Candidate& x : candidates) total += x.weight;
    return total;
}

// The first candidate at which the sum of weights is beyond the number's share of it all.
static int64_t draw(const std::vector<Candidate>& candidates, double uniform) {
    const double target = uniform * total_weight(candidates);
    double sum = 0;
    for (const Candidate& x : candidates)
        if ((sum += x.weight) > target) return x.column;
    return candidates.back().column;  // not reached: the same sum, of which the target is less
}

// The sum of all weights; those of the pieces are left in the room.
static double total_of(const Row& row, float top, float c, SamplingRoom& room) {
    AT_LEVEL(piece_sums)(row, top, c, room.sums.data());
    double total = 0;
    for (const double sum : room.sums) total += sum;
    return total;
}

// A lower bound of the logits of this weight or more, beyond what rounding may do.
static float bound_of_weight(double temperature, float top, double weight) {
    return top + float(temperature * (std::log(weight) - 1e-3)) - 1e-6f * std::fabs(top);
}

// A row whose tokens are filtered. The first filter bounds the logits that are looked at.
static int64_t draw_filtered(const Settings& by, const Row& row, float top, double uniform, SamplingRoom& room) {
    const float c = float(1 / by.temperature);
    const int64_t k = by.by_k(row.V) ? int64_t(by.top_k) : 0;
    std::vector<Candidate>&candidates = room.candidates, &ordered = room.ordered;
    double total = 0;
    float bound;
    if (k) {
        bound = bound_of_top_k(room.tops, k);
    } else if (by.by_p()) {
        total = total_of(row, top, c, room);
        bound = bound_of_weight(by.temperature, top, (1 - by.top_p) * total / row.V);  // all below: less than may go
    } else {
        bound = bound_of_weight(by.temperature, top, by.min_p);
    }
    AT_LEVEL(collect)(row, top, c, bound, candidates);
    if (k && k < int64_t(candidates.size())) {
        ordered = candidates;
        const auto last = ordered.begin() + (k - 1);
        std::nth_element(ordered.begin(), last, ordered.end(), likelier);
        remove_below(candidates, last->logit);
    }
    if (by.by_p()) {
        if (k) total = total_weight(candidates);
        ordered = candidates;
        remove_below(candidates, least_of_nucleus(ordered, by.top_p * total));
    }
    const auto unlikely = [&](const Candidate& x) { return x.weight < by.min_p; };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), unlikely), candidates.end());
    return draw(candidates, uniform);
}

// A row whose tokens all count: the piece in which the sum passes the target, then the column within it.
static int64_t draw_unfiltered(const Settings& by, const Row& row, float top, double uniform, SamplingRoom& room) {
    const float c = float(1 / by.temperature);
    const double target = uniform * total_of(row, top, c, room);
    double before = 0;
    size_t piece = 0;
    while (before + room.sums[piece] <= target) before += room.sums[piece++];
    return AT_LEVEL(find)(row, top, c, int64_t(piece) * PIECE, target - before);
}

// The first of the likeliest tokens.
static int64_t likeliest(const Row& row, float top, SamplingRoom& room) {
    AT_LEVEL(collect)(row, top, 1, top, room.candidates);
    return room.candidates.front().column;
}

}  // namespace motab

// uniforms, tokens and valid are (B, T), rows is (B,), contiguous. Returns 0, 1 if memory ran out, 2 if a number or a
// setting is out of range.
extern "C" int motab_sample_from_logits(const motab::SamplingCall* call) {
    using namespace motab;
    std::atomic<int> code{0};
    parallel_for(call->B * call->T, call->threads, 1 + (1 << 14) / call->V, [&](int64_t begin, int64_t end) {
        try {
            SamplingRoom room;
            const int64_t pieces = (call->V + PIECE - 1) / PIECE;
            room.sums.resize(pieces);
            room.tops.resize(pieces * PIECE / GROUP);
            for (int64_t item = begin; item < end; ++item) {
                const int64_t b = item / call->T;
                const Settings& by = call->rows ? call->rows[b] : call->all;
                const char* data = call->logits.at(b, item % call->T, 0);
                const Row row = {data, call->logits.type, call->V};
                const double uniform = call->uniforms[item];
                if (!(uniform >= 0 && uniform < 1) || !by.in_range()) {
                    code = 2;
                    continue;
                }
                float top;
                const bool valid = AT_LEVEL(find_top)(row, top, room.tops.data());
                call->valid[item] = valid;
                call->tokens[item] = 0;
                if (!valid) continue;
                const auto draw_row = by.is_filtered(row.V) ? draw_filtered : draw_unfiltered;
                call->tokens[item] =
                    by.temperature == 0 ? likeliest(row, top, room) : draw_row(by, row, top, uniform, room);
            }
        } catch (const std::bad_alloc&) {
            code = 1;
        }
    });
    return code;
}
