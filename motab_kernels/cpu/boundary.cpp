// `fused_kl_boundary`: sums over splits of the vocabulary in parallel, then one walk per row.
//
// B rows, T tokens, V shared vocabulary, S splits of it. The splits depend on V only and are combined in order, so that
// a row's numbers depend neither on its batch nor on the number of threads.

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "arguments.h"
#include "boundary_walk.h"
#include "splits.h"
#include "threads.h"

namespace motab {

// Sums over a split, relative to the maxima m_t and m_s: see boundary_split.h.
struct Partial {
    float m_t, z_t, a_t, g_t, m_s, z_s, a_s, g_s;
    int32_t top_block;  // first column of the first block that holds m_t
    int32_t above;      // number of teacher logits above the token's
};

}  // namespace motab

#define KERNELS "boundary_split.h"
#include "levels.h"

namespace motab {

// The arguments, in the order of `cpu/boundary.py`.
struct BoundaryCall {
    int64_t B, T, V, threads;
    Logits student, teacher;
    const int64_t* tokens;
    int64_t token_stride_b, token_stride_t;
    const bool* ends;
    int64_t ends_stride_b, ends_stride_t;
    Parameter temperature, scale, theta;
    const float* doubt;
    int64_t score, window;
    Counters* counters;  // null, as the next two, where no state is kept; window is 0 then
    Scores* scores;
    double* history;
    float *forward_kl, *reverse_kl, *student_logprob, *teacher_logprob, *student_entropy, *teacher_entropy;
    int32_t* rank;
    int64_t* argmax;
    float *score_out, *threshold;
    bool* stray;

    int64_t token(int64_t b, int64_t i) const { return tokens[b * token_stride_b + i * token_stride_t]; }
};

static void sum_splits(const BoundaryCall& call, int64_t splits, int64_t begin, int64_t end, Partial* partials) {
    const auto sum_split = AT_LEVEL(sum_split);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t position = item / splits, first = item % splits * SPLIT;
        const int64_t b = position / call.T, i = position % call.T, token = call.token(b, i);
        if (token == -1) continue;  // padding: its sums are never read
        const Split split = split_at(call.student, call.teacher, b, i, first, call.V, call.temperature.inverse(b));
        sum_split(split, call.teacher.logit(b, i, token), partials[item]);
    }
}

// Of what is negative by rounding only; NaN stays.
static float not_negative(double x) { return x < 0 ? 0 : float(x); }

// Combine the splits of a position in order.
static Statistics combine(const BoundaryCall& call, int64_t b, int64_t i, const Partial* parts, int64_t splits, int64_t& argmax) {
    const double inverse = call.temperature.inverse(b);
    double m_t = LOWEST, m_s = LOWEST, z_t = 0, a_t = 0, g_t = 0, z_s = 0, a_s = 0, g_s = 0;
    const Partial* best = parts;
    int64_t above = 0;
    for (const Partial* part = parts; part < parts + splits; ++part) {
        m_t = std::max(m_t, double(part->m_t)), m_s = std::max(m_s, double(part->m_s));
        if (part->m_t > best->m_t) best = part;
        above += part->above;
    }
    for (const Partial* part = parts; part < parts + splits; ++part) {
        const double d_t = (part->m_t - m_t) * inverse, d_s = (part->m_s - m_s) * inverse;
        const double f_t = std::exp(d_t), f_s = std::exp(d_s);
        z_t += part->z_t * f_t, z_s += part->z_s * f_s;
        a_t += moved(f_t, part->a_t, d_t, part->z_t), a_s += moved(f_s, part->a_s, d_s, part->z_s);
        g_t += moved(f_t, part->g_t, d_t - d_s, part->z_t), g_s += moved(f_s, part->g_s, d_t - d_s, part->z_s);
    }
    const float none = std::numeric_limits<float>::quiet_NaN();
    argmax = -1;
    // A side without a softmax: NaN or +inf makes z NaN, no finite logit makes it 0.
    if (!(z_t > 0 && z_s > 0)) return {none, none, none, none, none, none, -1};

    argmax = (best - parts) * SPLIT + best->top_block;
    while (call.teacher.logit(b, i, argmax) != best->m_t) ++argmax;
    const double log_z_t = std::log(z_t), log_z_s = std::log(z_s), log_z_gap = log_z_t - log_z_s;
    const int64_t token = call.token(b, i);
    return {
        not_negative(g_t / z_t - log_z_gap),
        not_negative(log_z_gap - g_s / z_s),
        -not_negative(log_z_s - (call.student.logit(b, i, token) - m_s) * inverse),
        -not_negative(log_z_t - (call.teacher.logit(b, i, token) - m_t) * inverse),
        not_negative(log_z_s - a_s / z_s),
        not_negative(log_z_t - a_t / z_t),
        int32_t(above),
    };
}

static void decide_row(const BoundaryCall& call, int64_t b, const Partial* partials, int64_t splits) {
    const bool has_theta = call.theta.data != nullptr;
    const Rule rule = {Score(call.score), call.scale[b], has_theta ? call.theta[b] : 0, has_theta, call.window};
    Counters fresh_counters;
    Scores fresh_scores;
    Counters& counters = call.counters ? call.counters[b] : fresh_counters;
    Scores& scores = call.scores ? call.scores[b] : fresh_scores;
    for (int64_t i = 0; i < call.T; ++i) {
        const int64_t position = b * call.T + i;
        const bool counted = call.token(b, i) != -1;
        Statistics at = {0, 0, 0, 0, 0, 0, -1};
        int64_t argmax = -1;
        bool stray = false;
        if (counted) {
            at = combine(call, b, i, partials + position * splits, splits, argmax);
            const double doubt = call.doubt ? call.doubt[position] : at.teacher_entropy;
            const bool ends = !call.ends || call.ends[b * call.ends_stride_b + i * call.ends_stride_t];
            stray = walk(
                rule, contribution(at, rule.score), doubt, ends, counters, scores, call.history + b * call.window);
        }
        call.forward_kl[position] = at.forward_kl;
        call.reverse_kl[position] = at.reverse_kl;
        call.student_logprob[position] = at.student_logprob;
        call.teacher_logprob[position] = at.teacher_logprob;
        call.student_entropy[position] = at.student_entropy;
        call.teacher_entropy[position] = at.teacher_entropy;
        call.rank[position] = at.rank;
        call.argmax[position] = argmax;
        call.score_out[position] = counted ? float(scores.score) : 0;
        call.threshold[position] = counted ? float(scores.threshold) : 0;
        call.stray[position] = stray;
    }
}

enum Code { DONE, NO_MEMORY, OUT_OF_RANGE };

static bool in_range(const BoundaryCall& call) {
    for (int64_t b = 0; b < call.B; ++b) {
        // The bounds of DIVISORS, as any dtype rounds them.
        if (call.temperature.data && !(call.temperature[b] >= 0.99e-30 && call.temperature[b] <= 1.01e30)) return false;
        for (int64_t i = 0; i < call.T; ++i)
            if (call.token(b, i) < -1 || call.token(b, i) >= call.V) return false;
    }
    return true;
}

}  // namespace motab

// If the code is not DONE, nothing has been changed.
extern "C" int motab_fused_kl_boundary(const motab::BoundaryCall* call) {
    using namespace motab;
    if (!in_range(*call)) return OUT_OF_RANGE;
    const int64_t splits = splits_of(call->V), items = call->B * call->T * splits;
    const std::unique_ptr<Partial[]> partials(new (std::nothrow) Partial[items]);
    if (!partials) return NO_MEMORY;
    parallel_for(items, call->threads, grain_of(call->V), [&](int64_t begin, int64_t end) {
        sum_splits(*call, splits, begin, end, partials.get());
    });
    parallel_for(call->B, call->threads, 1 + 512 / (call->T * splits), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) decide_row(*call, b, partials.get(), splits);
    });
    return DONE;
}
