// The second half of `fused_kl_boundary`: walks a row's tokens in order and updates its state, in float64. The rules
// are those of `walk` in reference/boundary.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace motab {

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr double INFINITE = std::numeric_limits<double>::infinity();

enum Score { TEACHER_VALUE, VALUE_RATIO, FORWARD_KL, REVERSE_KL, TEACHER_RANK };

struct Rule {
    Score score;
    double scale, theta;
    bool has_theta;
    int64_t window;
};

struct Statistics {
    float forward_kl, reverse_kl, student_logprob, teacher_logprob, student_entropy, teacher_entropy;
    int32_t rank;
};

// A row's state: the columns of BoundaryState's tensors, with the values of a fresh one.
struct Counters {
    int32_t tokens = 0, step_tokens = 0, steps = 0, fall_start = 0, breach = -1, rollback = -1;
};
struct Scores {
    double total = 0, score = 0, threshold = 0, safety = 0, fall = 0;
};

inline double contribution(const Statistics& at, Score score) {
    if (std::isnan(at.teacher_logprob)) return NOT_A_NUMBER;
    switch (score) {
        case TEACHER_VALUE: return at.teacher_logprob;
        case VALUE_RATIO: return double(at.teacher_logprob) - double(at.student_logprob);
        case FORWARD_KL: return at.forward_kl;
        case REVERSE_KL: return at.reverse_kl;
        default: return at.rank;
    }
}

inline double threshold_of(const Rule& rule, double doubt, const Counters& row, const double* history) {
    if (rule.has_theta) return rule.scale * std::exp(-rule.theta * doubt);
    if (!rule.window) return rule.scale;
    if (row.steps < rule.window) return INFINITE;
    double total = 0;
    for (int64_t i = 0; i < rule.window; ++i) total += history[i];
    return rule.scale * (total / double(rule.window));
}

// Adds one counted token; returns whether the step that ends with it strays.
inline bool walk(
    const Rule& rule, double brought, double doubt, bool ends, Counters& row, Scores& scores, double* history) {
    if (row.breach >= 0) return false;
    if (row.step_tokens == 0) scores.threshold = threshold_of(rule, doubt, row, history);
    ++row.tokens, ++row.step_tokens;
    const bool high_is_safe = rule.score == TEACHER_VALUE || rule.score == VALUE_RATIO;
    if (rule.score == TEACHER_RANK) {
        // Unlike a maximum, this comparison lets a NaN take over and stay.
        if (!(brought <= scores.total) && !std::isnan(scores.total)) scores.total = brought;
        scores.score = scores.total;
    } else {
        scores.total += brought;
        const double mean = scores.total / row.step_tokens;
        scores.score = high_is_safe ? std::exp(mean) : mean;
    }
    if (!ends) return false;

    const bool safe = high_is_safe                ? scores.score >= scores.threshold
                      : rule.score == TEACHER_RANK ? scores.score < scores.threshold
                                                   : scores.score <= scores.threshold;
    const double safety = high_is_safe ? scores.score : -scores.score;
    const double fall = std::isnan(safety) ? -INFINITE : safety == scores.safety ? 0 : safety - scores.safety;
    if (row.steps > 0 && (row.steps == 1 || fall < scores.fall)) {
        scores.fall = fall;
        row.fall_start = row.tokens - row.step_tokens;
    }
    if (!safe) {
        row.breach = row.tokens;
        row.rollback = row.fall_start;
        return true;
    }
    scores.safety = safety;
    if (rule.window) history[row.steps % rule.window] = scores.score;
    ++row.steps;
    row.step_tokens = 0;
    scores.total = 0;
    return false;
}

}  // namespace motab
