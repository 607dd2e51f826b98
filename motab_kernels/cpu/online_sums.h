// Sums under the softmaxes of a split of the vocabulary, read once. Included once per level, in its namespace.
//
// With t, s the logits at a position divided by the temperature, and m_t, m_s constants near their maxima, an op's Sums
// adds up what it needs from
//
//     x_t = t - m_t      w_t = e^x_t      x_s = s - m_s      w_s = e^x_s
//
// a block at a time, each lane on its own. m is the maximum of the blocks before, unless a block has logits more than
// ROOM above it, so that a block is read once. The first pass over a block ignores 0 * inf: if a sum becomes NaN, the
// block is summed again with masks. At the end the sums are moved to the maxima.
//
// Parts of a block have sums of their own, which are then added up: a long sum in float32 loses digits where the
// numbers are equal, or small beside the first.
//
// Sums have `template <bool MASKED> add(t, x_t, x_s)`, `+=` for other columns' sums, `move(d_t, d_s)` for constants
// that grow by -d, and `weighted()`, NaN where a sum of weighted values is.

constexpr int64_t PART = 32 * LANES;  // columns
constexpr float ROOM = 8;             // with more, one w x of e^x x would take the digits of its part's other columns

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
KERNEL Sums sums_of(
    const Block& block, const Sums& empty, Tops& kept_tops, float m_t, float m_s, float inverse_temperature) {
    Sums total = empty;
    Tops tops = kept_tops;
    const Floats all_m_t = all(m_t), all_m_s = all(m_s), c = all(inverse_temperature);
    for (int64_t first = 0; first < block.columns; first += PART) {
        const int64_t end = first + PART < block.columns ? first + PART : block.columns;
        Sums part = empty;
        for (int64_t i = first; i < end; i += LANES) {
            const Floats t = load(block.t + i), s = load(block.s + i);
            block.prefetch(i);
            tops.t = larger(t, tops.t);
            tops.s = larger(s, tops.s);
            part.template add<MASKED>(t, (t - all_m_t) * c, (s - all_m_s) * c);
        }
        total += part;
    }
    kept_tops = tops;
    return total;
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
    const Sums empty = sums;
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
            const Sums of_block = masked ? sums_of<true>(block, empty, tops, m_t, m_s, c)
                                         : sums_of<false>(block, empty, tops, m_t, m_s, c);
            const bool low = any(((tops.t - m_t) * c > ROOM) | ((tops.s - m_s) * c > ROOM));
            const Floats weighted = of_block.weighted();
            const bool undefined = !masked && any(weighted != weighted);
            if (!low && !undefined) {
                sums += of_block;
                if (any(tops.t > top)) top = largest(tops.t), top_block = start;
                break;
            }
            fits = !low;
            masked = masked || undefined;
        }
    }
    const float top_t = largest(tops.t), top_s = largest(tops.s);
    sums.move((m_t - top_t) * c, (m_s - top_s) * c);
    return {top_t, top_s, top_block};
}
