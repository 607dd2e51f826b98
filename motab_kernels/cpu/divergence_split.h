// Sums, terms and gradient over a split of the vocabulary, for `divergence_loss`. Included once per level.
//
// p, q are the teacher's and the student's probabilities of a column, gap = log(p / q), w the larger of the two and
// less = 1 - e^-|gap|. The smaller of the two is w (1 - less), and m = lam p + (1 - lam) q is w u with
// u = 1 - share * less, where `share` is the smaller one's share in the mixture. log(p / m) and log(q / m) are exact to
// rounding even where p and q nearly agree, and nothing overflows. The formulas are in `reference/divergence`.

namespace motab {
namespace LEVEL {

#include "convert.h"
#include "vector.h"

#include "blocks.h"
#include "online_sums.h"
#include "vector_exp.h"
#include "vector_log.h"

template <int64_t KIND>
struct DivergenceSums {
    Floats z_t, g_t, z_s, g_s;

    template <bool MASKED>
    KERNEL_MEMBER void add(Floats, Floats x_t, Floats x_s) {
        const Floats w_t = vector_exp(x_t), w_s = vector_exp(x_s);
        z_t += w_t;
        z_s += w_s;
        if (KIND == FORWARD_KL) g_t += product<MASKED>(w_t, x_t - x_s);
        if (KIND == REVERSE_KL) g_s += product<MASKED>(w_s, x_t - x_s);
    }

    KERNEL_MEMBER void operator+=(const DivergenceSums& more) {
        z_t += more.z_t, g_t += more.g_t;
        z_s += more.z_s, g_s += more.g_s;
    }

    KERNEL_MEMBER void move(float d_t, float d_s) {
        const float f_t = std::exp(d_t), f_s = std::exp(d_s);
        g_t = moved(f_t, g_t, d_t - d_s, z_t);
        z_t *= f_t;
        g_s = moved(f_s, g_s, d_t - d_s, z_s);
        z_s *= f_s;
    }

    KERNEL_MEMBER Floats weighted() const { return g_t + g_s; }
};

template <int64_t KIND>
ENTRY void sums_of_kind(const Split& split, SplitSums& out) {
    DivergenceSums<KIND> sums = {};
    const Found found = sum_columns(sums, split);
    out = {found.top_t, sum(sums.z_t), sum(sums.g_t), found.top_s, sum(sums.z_s), sum(sums.g_s)};
}

ENTRY void split_sums(int64_t kind, const Split& split, SplitSums& out) {
    switch (kind) {
        case FORWARD_KL: return sums_of_kind<FORWARD_KL>(split, out);
        case REVERSE_KL: return sums_of_kind<REVERSE_KL>(split, out);
        default: return sums_of_kind<JSD>(split, out);  // the normalisers only
    }
}

// A row's normalisers in every lane.
struct Row {
    Floats c, top_t, top_s, reciprocal_t, reciprocal_s, offset;
};

KERNEL Row row_of(const Saved& saved, float c) {
    return {all(c), all(saved.top_t), all(saved.top_s), all(saved.reciprocal_t), all(saved.reciprocal_s),
            all((saved.top_t - saved.top_s) * c + saved.log_ratio)};
}

struct Pair {
    Floats w, e, less, gap;
    Ints p_leads;
};

// Where neither has probability, w is 0 and the gap finite. The gap is not log p - log q: where p and q nearly agree,
// the rounding of the two would exceed their difference.
KERNEL Pair pair_of(Floats s, Floats t, const Row& row) {
    Pair pair;
    pair.gap = (t == s ? Floats{} : t - s) * row.c - row.offset;
    pair.p_leads = pair.gap > 0.0f;
    const Floats x = pair.p_leads ? t - row.top_t : s - row.top_s;
    pair.w = vector_exp(x * row.c) * (pair.p_leads ? row.reciprocal_t : row.reciprocal_s);
    const Exponential e = split_exp(-magnitude(pair.gap));
    pair.e = value(e);
    pair.less = one_less(e);
    return pair;
}

// g up to a constant, and log(p / m), log(q / m) where the kind has a mixture m.
struct Slope {
    Floats g, log_p_m, log_q_m;
};

template <int64_t KIND>
KERNEL Slope slope_of(const Pair& pair, Shares in_m) {
    const Floats gap = pair.gap;
    if (KIND == TVD) {  // 0 at a tie; NaN stays NaN
        const Floats g = pair.p_leads ? all(-0.5f) : gap < 0.0f ? all(0.5f) : gap;
        return {g, g, g};
    }
    const Floats of_p = all(in_m.p), of_q = all(in_m.q);
    const Floats lead = pair.p_leads ? of_p : of_q, share = pair.p_leads ? of_q : of_p;
    const Floats lost = share * pair.less, u = lead + share * pair.e;
    const Floats log_u = vector_log(u, lost);
    // A probability that far below the other is 0 to rounding; the bound avoids 0 * inf = NaN.
    const Floats apart = magnitude(gap), down = apart > 200.0f ? all(-200.0f) : -apart;
    const Floats log_p_m = (pair.p_leads ? Floats{} : down) - log_u, log_q_m = (pair.p_leads ? down : Floats{}) - log_u;
    if (KIND == JSD) return {in_m.q * log_q_m, log_p_m, log_q_m};
    // p / m - 1 and q / m - 1, as g may lack a constant: lost / u for the larger of p and q.
    if (KIND == SKEW_FORWARD_KL)
        return {-in_m.q * ((pair.p_leads ? lost : lost - pair.less) / u), log_p_m, log_q_m};
    return {log_q_m - in_m.q * ((pair.p_leads ? lost - pair.less : lost) / u), log_p_m, log_q_m};
}

// Each column's terms of the divergence and of sum q g.
struct Terms {
    Floats divergence, centre;
};

template <int64_t KIND>
KERNEL Terms terms_of(const Pair& pair, Shares in_m) {
    const Slope slope = slope_of<KIND>(pair, in_m);
    const Floats lesser = pair.w * pair.e;
    const Floats p = pair.p_leads ? pair.w : lesser, q = pair.p_leads ? lesser : pair.w;
    const Floats apart = pair.w * pair.less, q_less_p = pair.p_leads ? -apart : apart;
    Floats term;
    if (KIND == TVD)
        term = 0.5f * apart;
    else if (KIND == JSD)
        term = in_m.p * p * slope.log_p_m + in_m.q * q * slope.log_q_m;
    else if (KIND == SKEW_FORWARD_KL)
        term = p * slope.log_p_m + in_m.q * q_less_p;
    else
        term = q * slope.log_q_m - in_m.p * q_less_p;
    return {term, q * slope.g};
}

template <int64_t KIND>
ENTRY void terms_of_kind(const Split& split, const Saved& saved, Shares in_m, SplitTerms& out) {
    alignas(64) float room_s[BLOCK], room_t[BLOCK];
    const Row row = row_of(saved, split.inverse_temperature);
    Floats divergence = {}, centre = {};
    for (int64_t start = 0; start < split.columns; start += BLOCK) {
        const Block block = block_of(split, start, room_s, room_t);
        for (int64_t i = 0; i < block.columns; i += LANES) {
            block.prefetch(i);
            const Terms terms = terms_of<KIND>(pair_of(load(block.s + i), load(block.t + i), row), in_m);
            divergence += terms.divergence;
            centre += terms.centre;
        }
    }
    out = {sum(divergence), sum(centre)};
}

ENTRY void split_terms(int64_t kind, const Split& split, const Saved& saved, Shares in_m, SplitTerms& out) {
    switch (kind) {
        case JSD: return terms_of_kind<JSD>(split, saved, in_m, out);
        case SKEW_FORWARD_KL: return terms_of_kind<SKEW_FORWARD_KL>(split, saved, in_m, out);
        case SKEW_REVERSE_KL: return terms_of_kind<SKEW_REVERSE_KL>(split, saved, in_m, out);
        default: return terms_of_kind<TVD>(split, saved, in_m, out);
    }
}

// `factor` times the derivative by the student's logit over the temperature; 0 where the student excludes the column.
template <int64_t KIND>
KERNEL Floats gradient_of(Floats s, Floats t, const Row& row, Floats centre, Shares in_m, Floats factor) {
    const Pair pair = pair_of(s, t, row);
    const Floats infinite = all(__builtin_inff());
    const Floats q = pair.p_leads ? pair.w * pair.e : pair.w;
    Floats result;
    if (KIND == FORWARD_KL)
        result = pair.w * (pair.p_leads ? -pair.less : pair.less);
    else if (KIND == REVERSE_KL)
        // An infinite loss makes each column's gradient infinite, not inf - inf = NaN; 0 where q rounds to 0.
        result = q == 0.0f ? Floats{} : q * (pair.gap == -infinite ? infinite : -pair.gap - centre);
    else
        result = q * (slope_of<KIND>(pair, in_m).g - centre);
    return s == -infinite ? Floats{} : result * factor;
}

template <int64_t KIND>
ENTRY void gradient_of_kind(
    const Split& split, const Saved& saved, Shares in_m, Upstream upstream, int64_t out_type, char* out) {
    alignas(64) float room_s[BLOCK], room_t[BLOCK], room_out[BLOCK];
    const Row row = row_of(saved, split.inverse_temperature);
    const Floats centre = all(saved.centre), factor = all(upstream.scale * split.inverse_temperature);
    for (int64_t start = 0; start < split.columns; start += BLOCK) {
        const Block block = block_of(split, start, room_s, room_t);
        char* target = out + start * bytes_of(out_type);
        // Written directly where `out` is float32 in whole vectors. `out` may be the student's own logits: each is read
        // before it is written.
        const bool at_once = out_type == FLOAT32 && block.columns % LANES == 0;
        float* room = at_once ? reinterpret_cast<float*>(target) : room_out;
        for (int64_t i = 0; i < block.columns; i += LANES) {
            block.prefetch(i);
            const Floats s = load(block.s + i), share = s * upstream.per_cap;
            const Floats by_logit = gradient_of<KIND>(s, load(block.t + i), row, centre, in_m, factor);
            store(room + i, upstream.per_cap ? by_logit * (1.0f - share * share) : by_logit);
        }
        if (!at_once) from_floats(out_type, room, block.columns, target);
    }
}

ENTRY void split_gradient(
    int64_t kind, const Split& split, const Saved& saved, Shares in_m, Upstream upstream, int64_t out_type, char* out) {
    switch (kind) {
        case FORWARD_KL: return gradient_of_kind<FORWARD_KL>(split, saved, in_m, upstream, out_type, out);
        case REVERSE_KL: return gradient_of_kind<REVERSE_KL>(split, saved, in_m, upstream, out_type, out);
        case JSD: return gradient_of_kind<JSD>(split, saved, in_m, upstream, out_type, out);
        case SKEW_FORWARD_KL: return gradient_of_kind<SKEW_FORWARD_KL>(split, saved, in_m, upstream, out_type, out);
        case SKEW_REVERSE_KL: return gradient_of_kind<SKEW_REVERSE_KL>(split, saved, in_m, upstream, out_type, out);
        default: return gradient_of_kind<TVD>(split, saved, in_m, upstream, out_type, out);
    }
}

}  // namespace LEVEL
}  // namespace motab
