// Sums over a split of the vocabulary, for `fused_kl_boundary`: see online_sums.h. Included once per level.
//
//     z_t = sum w_t      a_t = sum w_t x_t      g_t = sum w_t (x_t - x_s)
//     z_s = sum w_s      a_s = sum w_s x_s      g_s = sum w_s (x_t - x_s)

namespace motab {
namespace LEVEL {

#include "convert.h"
#include "vector.h"

#include "blocks.h"
#include "online_sums.h"
#include "vector_exp.h"

struct BoundarySums {
    Floats z_t, a_t, g_t, z_s, a_s, g_s, token_logit;
    Ints above;

    template <bool MASKED>
    KERNEL_MEMBER void add(Floats t, Floats x_t, Floats x_s) {
        const Floats w_t = vector_exp(x_t), w_s = vector_exp(x_s), gap = x_t - x_s;
        above -= t > token_logit;
        z_t += w_t;
        z_s += w_s;
        a_t += product<MASKED>(w_t, x_t);
        g_t += product<MASKED>(w_t, gap);
        a_s += product<MASKED>(w_s, x_s);
        g_s += product<MASKED>(w_s, gap);
    }

    KERNEL_MEMBER void operator+=(const BoundarySums& more) {
        z_t += more.z_t, a_t += more.a_t, g_t += more.g_t;
        z_s += more.z_s, a_s += more.a_s, g_s += more.g_s;
        above += more.above;
    }

    KERNEL_MEMBER void move(float d_t, float d_s) {
        const float f_t = std::exp(d_t), f_s = std::exp(d_s);
        a_t = moved(f_t, a_t, d_t, z_t);
        g_t = moved(f_t, g_t, d_t - d_s, z_t);
        z_t *= f_t;
        a_s = moved(f_s, a_s, d_s, z_s);
        g_s = moved(f_s, g_s, d_t - d_s, z_s);
        z_s *= f_s;
    }

    KERNEL_MEMBER Floats weighted() const { return a_t + g_t + a_s + g_s; }
};

ENTRY void sum_split(const Split& split, float token_logit, Partial& out) {
    BoundarySums sums = {};
    sums.token_logit = all(token_logit);
    const Found found = sum_columns(sums, split);
    out = {found.top_t, sum(sums.z_t), sum(sums.a_t), sum(sums.g_t), found.top_s, sum(sums.z_s), sum(sums.a_s),
           sum(sums.g_s), static_cast<int32_t>(found.top_block), 0};
    for (int i = 0; i < LANES; ++i) out.above += sums.above[i];
}

}  // namespace LEVEL
}  // namespace motab
