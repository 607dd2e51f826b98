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

// The arguments, in the order of `cpu/sampling.py`.
struct SamplingCall {
    int64_t B, T, V, threads;
    Logits logits;
    const double* uniforms;
    int64_t* tokens;
    bool* valid;
    int64_t top_k;
    double temperature, top_p, min_p;
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
static float bound_of_weight(const SamplingCall& call, float top, double weight) {
    return top + float(call.temperature * (std::log(weight) - 1e-3)) - 1e-6f * std::fabs(top);
}

// A row whose tokens are filtered. The first filter bounds the logits that are looked at.
static int64_t draw_filtered(const SamplingCall& call, const Row& row, float top, double uniform, SamplingRoom& room) {
    const float c = float(1 / call.temperature);
    const bool by_k = call.top_k > 0, by_p = call.top_p < 1;
    std::vector<Candidate>&candidates = room.candidates, &ordered = room.ordered;
    double total = 0;
    float bound;
    if (by_k) {
        bound = bound_of_top_k(room.tops, call.top_k);
    } else if (by_p) {
        total = total_of(row, top, c, room);
        bound = bound_of_weight(call, top, (1 - call.top_p) * total / row.V);  // all below sum to less than may go
    } else {
        bound = bound_of_weight(call, top, call.min_p);
    }
    AT_LEVEL(collect)(row, top, c, bound, candidates);
    if (by_k && call.top_k < int64_t(candidates.size())) {
        ordered = candidates;
        const auto last = ordered.begin() + (call.top_k - 1);
        std::nth_element(ordered.begin(), last, ordered.end(), likelier);
        remove_below(candidates, last->logit);
    }
    if (by_p) {
        if (by_k) total = total_weight(candidates);
        ordered = candidates;
        remove_below(candidates, least_of_nucleus(ordered, call.top_p * total));
    }
    const auto unlikely = [&](const Candidate& x) { return x.weight < call.min_p; };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), unlikely), candidates.end());
    return draw(candidates, uniform);
}

// A row whose tokens all count: the piece in which the sum passes the target, then the column within it.
static int64_t draw_unfiltered(const SamplingCall& call, const Row& row, float top, double uniform, SamplingRoom& room) {
    const float c = float(1 / call.temperature);
    const double target = uniform * total_of(row, top, c, room);
    double before = 0;
    size_t piece = 0;
    while (before + room.sums[piece] <= target) before += room.sums[piece++];
    return AT_LEVEL(find)(row, top, c, int64_t(piece) * PIECE, target - before);
}

}  // namespace motab

// uniforms, tokens and valid are (B, T), contiguous. Returns 0, 1 if memory ran out, 2 if a number is out of range.
extern "C" int motab_sample_from_logits(const motab::SamplingCall* call) {
    using namespace motab;
    const bool is_filtered = call->top_k || call->top_p < 1 || call->min_p > 0;
    std::atomic<int> code{0};
    parallel_for(call->B * call->T, call->threads, 1 + (1 << 14) / call->V, [&](int64_t begin, int64_t end) {
        try {
            SamplingRoom room;
            const int64_t pieces = (call->V + PIECE - 1) / PIECE;
            room.sums.resize(pieces);
            room.tops.resize(pieces * PIECE / GROUP);
            for (int64_t item = begin; item < end; ++item) {
                const char* data = call->logits.at(item / call->T, item % call->T, 0);
                const Row row = {data, call->logits.type, call->V};
                const double uniform = call->uniforms[item];
                if (!(uniform >= 0 && uniform < 1)) {
                    code = 2;
                    continue;
                }
                float top;
                const bool valid = AT_LEVEL(find_top)(row, top, room.tops.data());
                call->valid[item] = valid;
                call->tokens[item] = 0;
                if (!valid) continue;
                call->tokens[item] = is_filtered ? draw_filtered(*call, row, top, uniform, room)
                                                 : draw_unfiltered(*call, row, top, uniform, room);
            }
        } catch (const std::bad_alloc&) {
            code = 1;
        }
    });
    return code;
}
