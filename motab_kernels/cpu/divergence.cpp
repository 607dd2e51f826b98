// `divergence_loss`: its sums, terms and gradient over splits of the vocabulary in parallel; the losses from the sums.
//
// B rows, T tokens, V shared vocabulary, R = B * T positions, S splits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "arguments.h"
#include "memory.h"
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

// Of p and q in the mixture m. Both come from the host: in float32 1 - (1 - 1e-9) would be 0.
struct Shares {
    float p, q;
};

// What a position's gradient is multiplied by, and 1 / softcap: 0 for none.
struct Upstream {
    float scale, per_cap;
};

// Saved at each position for the backward pass.
struct Saved {
    float top_t, top_s, reciprocal_t, reciprocal_s, log_ratio, centre;
};

}  // namespace motab

#define KERNELS "divergence_split.h"
#include "levels.h"

namespace motab {

// The arguments, in the order of `cpu/divergence.py`; an argument that a function does not need is null.
struct DivergenceCall {
    int64_t B, T, V, threads, kind;
    Logits student, teacher;
    Parameter temperature;
    const bool* keep;  // null: every position counts
    Saved* saved;
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

// Combines the sums of a position's S splits, in order, to its loss (of the KL kinds only) and what is saved.
static float finish(const DivergenceCall& call, int64_t position, const float* sums, int64_t S) {
    const double c = call.temperature.inverse(position / call.T);
    const float *top_t = sums, *z_t = sums + S, *g_t = sums + 2 * S, *top_s = sums + 3 * S, *z_s = sums + 4 * S,
                *g_s = sums + 5 * S;
    const float all_t = *std::max_element(top_t, top_t + S), all_s = *std::max_element(top_s, top_s + S);
    double sum_t = 0, sum_s = 0, gap_t = 0, gap_s = 0;
    for (int64_t i = 0; i < S; ++i) {
        const double d_t = (double(top_t[i]) - all_t) * c, d_s = (double(top_s[i]) - all_s) * c;
        const double f_t = std::exp(d_t), f_s = std::exp(d_s);
        sum_t += f_t * z_t[i], gap_t += moved(f_t, g_t[i], d_t - d_s, z_t[i]);
        sum_s += f_s * z_s[i], gap_s += moved(f_s, g_s[i], d_t - d_s, z_s[i]);
    }
    // A side without a softmax: NaN or +inf makes z NaN, no finite logit makes it 0.
    const bool exists = sum_t > 0 && sum_s > 0;
    const double log_ratio = exists ? std::log(sum_t / sum_s) : std::numeric_limits<double>::quiet_NaN();
    const double loss = call.kind == FORWARD_KL ? gap_t / sum_t - log_ratio : log_ratio - gap_s / sum_s;
    const float rounded = loss < 0 ? 0 : float(loss);
    call.saved[position] = {all_t, all_s, float(1 / sum_t), float(1 / sum_s), float(log_ratio), rounded};
    return rounded;
}

}  // namespace motab

using namespace motab;

// To (R, 6, S); the sums of a position that does not count are not written.
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

// From (R, 6, S) to the losses (R,), 0 where a position does not count.
extern "C" void motab_divergence_finish(const DivergenceCall* call, const float* sums, int64_t S, float* loss) {
    parallel_for(call->B * call->T, call->threads, 1 + 2048 / S, [&](int64_t begin, int64_t end) {
        for (int64_t position = begin; position < end; ++position) {
            const bool counts = !call->keep || call->keep[position];
            loss[position] = counts ? finish(*call, position, sums + position * 6 * S, S) : 0;
        }
    });
}

// To (R, 2, S); 0 for a position that does not count.
extern "C" void motab_divergence_terms(const DivergenceCall* call, float lam, float rest, float* terms) {
    const int64_t S = splits_of(call->V);
    const auto terms_of = AT_LEVEL(split_terms);
    for_each_split(*call, [&](int64_t position, int64_t index, const Split& split) {
        SplitTerms of_split = {0, 0};
        if (!call->keep || call->keep[position]) terms_of(call->kind, split, call->saved[position], {lam, rest}, of_split);
        float* out = terms + position * 2 * S + index;
        out[0] = of_split.divergence, out[S] = of_split.centre;
    });
}

// To `out`, of any type; 0 where the position's scale is 0, whatever its logits. per_cap is 1 / softcap, 0 for none.
extern "C" void motab_divergence_gradient(const DivergenceCall* call, float lam, float rest, float per_cap) {
    const auto gradient_of = AT_LEVEL(split_gradient);
    prefer_large_pages(call->out.at(0, 0, 0), call->out.at(call->B - 1, call->T - 1, call->V));
    for_each_split(*call, [&](int64_t position, int64_t index, const Split& split) {
        char* out = call->out.at(position / call->T, position % call->T, index * SPLIT);
        const float scale = call->scale[position];
        if (scale == 0)
            std::memset(out, 0, split.columns * bytes_of(call->out.type));
        else
            gradient_of(call->kind, split, call->saved[position], {lam, rest}, {scale, per_cap}, call->out.type, out);
    });
}
