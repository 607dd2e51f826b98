// `divergence_loss`: its sums, terms and gradient, over splits of the vocabulary in parallel. What is done once a position
// is done in Python.
//
// B rows, T tokens, V shared vocabulary, R = B * T positions, S splits.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "arguments.h"
#include "splits.h"
#include "threads.h"

namespace motab {

enum Divergence : int64_t { FORWARD_KL, REVERSE_KL, JSD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, TVD };

// See `divergence_sums.py`.
struct SplitSums {
    float top_t, z_t, g_t, top_s, z_s, g_s;
};

struct SplitTerms {
    float divergence, centre;
};

// What a position saves for the backward pass.
struct Saved {
    float top_t, top_s, reciprocal_t, reciprocal_s, log_ratio, centre;
};

}  // namespace motab

#define KERNELS "divergence_split.h"
#include "levels.h"

namespace motab {

// The arguments, in the order of `cpu/divergence.py`; what a function does not need is null.
struct DivergenceCall {
    int64_t B, T, V, threads, kind;
    Logits student, teacher;
    Parameter temperature;
    const bool* keep;  // null: every position counts
    const Saved* saved;
    const float* scale;  // of each position's gradient
    Logits out;
};

// Calls body(position, split's index, Split) for each split, in parallel.
template <class Body>
static void for_each_split(const DivergenceCall& call, const Body& body) {
    const int64_t splits = splits_of(call.V);
    parallel_for(call.B * call.T * splits, call.threads, grain_of(call.V), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t position = item / splits, index = item % splits, b = position / call.T, i = position % call.T;
            const float c = call.temperature.inverse(b);
            body(position, index, split_at(call.student, call.teacher, b, i, index * SPLIT, call.V, c));
        }
    });
}

}  // namespace motab

using namespace motab;

// To (R, 6, S); those of a position that does not count stay as they are.
extern "C" void motab_divergence_sums(const DivergenceCall* call, float* sums) {
    const int64_t S = splits_of(call->V);
    const auto sums_of = AT_LEVEL(split_sums);
    for_each_split(*call, [&](int64_t position, int64_t index, const Split& split) {
        if (call->keep && !call->keep[position]) return;
        SplitSums of_split;
        sums_of(call->kind, split, of_split);
        float* out = sums + position * 6 * S + index;
        out[0] = of_split.top_t, out[S] = of_split.z_t, out[2 * S] = of_split.g_t;
        out[3 * S] = of_split.top_s, out[4 * S] = of_split.z_s, out[5 * S] = of_split.g_s;
    });
}

// To (R, 2, S); 0 of a position that does not count.
extern "C" void motab_divergence_terms(const DivergenceCall* call, float lam, float* terms) {
    const int64_t S = splits_of(call->V);
    const auto terms_of = AT_LEVEL(split_terms);
    for_each_split(*call, [&](int64_t position, int64_t index, const Split& split) {
        SplitTerms of_split = {0, 0};
        if (!call->keep || call->keep[position]) terms_of(call->kind, split, call->saved[position], lam, of_split);
        float* out = terms + position * 2 * S + index;
        out[0] = of_split.divergence, out[S] = of_split.centre;
    });
}

// To `out`, of any type; 0 where the position's scale is 0, whatever its logits.
extern "C" void motab_divergence_gradient(const DivergenceCall* call, float lam) {
    const auto gradient_of = AT_LEVEL(split_gradient);
    for_each_split(*call, [&](int64_t position, int64_t index, const Split& split) {
        char* out = call->out.at(position / call->T, position % call->T, index * SPLIT);
        const float scale = call->scale[position];
        if (scale == 0)
            std::memset(out, 0, split.columns * bytes_of(call->out.type));
        else
            gradient_of(call->kind, split, call->saved[position], lam, scale, call->out.type, out);
    });
}
