// Sums under the softmaxes of a split of the vocabulary, read once. Included once per level, in its namespace.
//
// With t, s the logits at a position divided by the temperature, and m_t, m_s constants near their maxima, an op's Sums
// adds up what it needs from
//
//     x_t = t - m_t      w_t = e^x_t      x_s = s - m_s      w_s = e^x_s
//
// a block at a time, each lane on its own. m is the maximum of the blocks before, unless a block has logits far above
// it, so that a block is read once. The first pass over a block ignores 0 * inf: if a sum becomes NaN, the block is
// summed again with masks. At the end the sums are moved to the maxima.
//
// Sums have `template <bool MASKED> add(t, x_t, x_s)`, `move(d_t, d_s)` for constants that grow by -d, and
// `weighted()`, NaN where a sum of weighted values is.

constexpr float ROOM = 40;       // e^40 times any vocabulary is far below float32's maximum

// `weight * value`, and 0 for a weight of 0, whatever the value. A weight that is NaN is != 0, and the product NaN.
template <bool MASKED>
KERNEL Floats product(Floats weight, Floats value) {
    return MASKED ? (weight != Floats{} ? weight * value : Floats{}) : weight * value;
}

// A sum of w * x after x has grown by d and w by the factor f = e^d; 0 where f is 0, even if the sum was inf.
KERNEL Floats moved(float f, Floats total, float d, Floats z) { return f != 0 ? f * (total + d * z) : Floats{}; }

struct Tops {
    Floats s, t;
};

KERNEL Tops tops_of(const Block& block, Tops tops) {
    for (int64_t i = 0; i < block.columns; i += LANES) {
        tops.s = larger(load(block.s + i), tops.s);
        tops.t = larger(load(block.t + i), tops.t);
    }
    return tops;
}

template <bool MASKED, class Sums>
KERNEL void add_block(Sums& kept, Tops& kept_tops, const Block& block, float m_t, float m_s, float inverse_temperature) {
    Sums sums = kept;
    Tops tops = kept_tops;
    const Floats all_m_t = all(m_t), all_m_s = all(m_s), c = all(inverse_temperature);
    for (int64_t i = 0; i < block.columns; i += LANES) {
        const Floats t = load(block.t + i), s = load(block.s + i);
        block.prefetch(i);
        tops.t = larger(t, tops.t);
        tops.s = larger(s, tops.s);
        sums.template add<MASKED>(t, (t - all_m_t) * c, (s - all_m_s) * c);
    }
    kept = sums, kept_tops = tops;
}

struct Found {
    float top_t, top_s;
    int64_t top_block;  // first column of the first block that holds top_t
};

template <class Sums>
KERNEL Found sum_columns(Sums& sums, const Split& split) {
    alignas(64) float room_s[BLOCK], room_t[BLOCK];
    const float c = split.inverse_temperature;
    float m_t = LOWEST, m_s = LOWEST, top = LOWEST;
    int64_t top_block = 0;
    bool masked = false;
    Tops tops = {all(LOWEST), all(LOWEST)};
    for (int64_t start = 0; start < split.columns; start += BLOCK) {
        const Block block = block_of(split, start, room_s, room_t);
        bool fits = start > 0;
        for (;;) {
            if (!fits) {
                const Tops of_block = tops_of(block, tops);
                const float new_t = largest(of_block.t), new_s = largest(of_block.s);
                sums.move((m_t - new_t) * c, (m_s - new_s) * c);
                m_t = new_t, m_s = new_s;
            }
            const Sums before = sums;
            if (masked)
                add_block<true>(sums, tops, block, m_t, m_s, c);
            else
                add_block<false>(sums, tops, block, m_t, m_s, c);
            const float top_t = largest(tops.t), top_s = largest(tops.s);
            const bool low = (top_t - m_t) * c > ROOM || (top_s - m_s) * c > ROOM;
            const bool undefined = !masked && has_nan(sums.weighted());
            if (!low && !undefined) {
                if (top_t > top) top = top_t, top_block = start;
                break;
            }
            sums = before;
            fits = !low;
            masked = masked || undefined;
        }
    }
    const float top_t = largest(tops.t), top_s = largest(tops.s);
    sums.move((m_t - top_t) * c, (m_s - top_s) * c);
    return {top_t, top_s, top_block};
}
