// Sums over a split of the vocabulary, for `fused_kl_boundary`. Included once a level.
//
// With t, s the logits at a position over the temperature, and m_t, m_s constants near their maxima,
//
//     z_t = sum w_t      a_t = sum w_t x_t      g_t = sum w_t (x_t - x_s)      x_t = t - m_t      w_t = e^x_t
//     z_s = sum w_s      a_s = sum w_s x_s      g_s = sum w_s (x_t - x_s)      x_s = s - m_s      w_s = e^x_s
//
// are taken over a block at a time. m is the maximum of the blocks before unless a block has logits far above it; so a
// block is read once. Each lane keeps its sums. The first try at a block knows no 0 * inf: where its sums come out NaN,
// it is summed again with masks.

namespace motab {
namespace LEVEL {

#include "vector.h"

#include "logits.h"
#include "vector_exp.h"

struct Sums {
    Floats z_t, a_t, g_t, z_s, a_s, g_s, top_t, top_s;
    Ints above;
};

struct Scale {
    Floats m_t, m_s, inverse_temperature, token_logit;
};

template <bool MASKED>
KERNEL void add(Sums& sums, const Scale& scale, Floats t, Floats s) {
    sums.top_t = larger(t, sums.top_t);
    sums.top_s = larger(s, sums.top_s);
    sums.above -= t > scale.token_logit;
    const Floats x_t = (t - scale.m_t) * scale.inverse_temperature;
    const Floats x_s = (s - scale.m_s) * scale.inverse_temperature;
    const Floats w_t = vector_exp(x_t), w_s = vector_exp(x_s), gap = x_t - x_s;
    sums.z_t += w_t;
    sums.z_s += w_s;
    if (MASKED) {  // a weight that is NaN is != 0, and stays
        const Floats zero = {};
        sums.a_t += w_t != zero ? w_t * x_t : zero;
        sums.g_t += w_t != zero ? w_t * gap : zero;
        sums.a_s += w_s != zero ? w_s * x_s : zero;
        sums.g_s += w_s != zero ? w_s * gap : zero;
    } else {
        sums.a_t += w_t * x_t;
        sums.g_t += w_t * gap;
        sums.a_s += w_s * x_s;
        sums.g_s += w_s * gap;
    }
}

template <bool MASKED, class Student, class Teacher>
KERNEL void add_block(
    Sums& kept, const Scale& scale, const typename Student::Number* s, const typename Teacher::Number* t, int64_t columns) {
    Sums sums = kept;
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) add<MASKED>(sums, scale, Teacher::load(t + i), Student::load(s + i));
    if (i < columns)
        add<MASKED>(sums, scale, load_tail<Teacher>(t + i, columns - i), load_tail<Student>(s + i, columns - i));
    kept = sums;
}

template <class Type>
KERNEL float top_of_block(const typename Type::Number* logits, int64_t columns) {
    Floats top = all(LOWEST);
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) top = larger(Type::load(logits + i), top);
    if (i < columns) top = larger(load_tail<Type>(logits + i, columns - i), top);
    return largest(top);
}

// A sum of w * x after x has grown by d and w by f = e^d; nothing is left where f is 0, not even of inf.
KERNEL Floats moved(float f, Floats total, float d, Floats z) { return f != 0 ? f * (total + d * z) : Floats{}; }

KERNEL void move(Sums& sums, float d_t, float d_s) {
    const float f_t = std::exp(d_t), f_s = std::exp(d_s);
    sums.a_t = moved(f_t, sums.a_t, d_t, sums.z_t);
    sums.g_t = moved(f_t, sums.g_t, d_t - d_s, sums.z_t);
    sums.z_t *= f_t;
    sums.a_s = moved(f_s, sums.a_s, d_s, sums.z_s);
    sums.g_s = moved(f_s, sums.g_s, d_t - d_s, sums.z_s);
    sums.z_s *= f_s;
}

template <class Student, class Teacher>
ENTRY void sum_split(
    const void* student, const void* teacher, int64_t columns, float token_logit, float inverse_temperature, Partial& out) {
    const auto* s = static_cast<const typename Student::Number*>(student);
    const auto* t = static_cast<const typename Teacher::Number*>(teacher);
    float m_t = LOWEST, m_s = LOWEST, top = LOWEST;
    int64_t top_block = 0;
    bool masked = false;
    Sums sums = {};
    sums.top_t = sums.top_s = all(LOWEST);
    for (int64_t start = 0; start < columns; start += BLOCK) {
        const int64_t size = columns - start < BLOCK ? columns - start : BLOCK;
        bool fits = start > 0;
        for (;;) {
            if (!fits) {
                const float top_t = top_of_block<Teacher>(t + start, size), top_s = top_of_block<Student>(s + start, size);
                const float new_t = top_t > m_t ? top_t : m_t, new_s = top_s > m_s ? top_s : m_s;
                move(sums, (m_t - new_t) * inverse_temperature, (m_s - new_s) * inverse_temperature);
                m_t = new_t, m_s = new_s;
            }
            const Sums before = sums;
            const Scale scale = {all(m_t), all(m_s), all(inverse_temperature), all(token_logit)};
            if (masked)
                add_block<true, Student, Teacher>(sums, scale, s + start, t + start, size);
            else
                add_block<false, Student, Teacher>(sums, scale, s + start, t + start, size);
            const float top_t = largest(sums.top_t), top_s = largest(sums.top_s);
            const bool low = (top_t - m_t) * inverse_temperature > ROOM || (top_s - m_s) * inverse_temperature > ROOM;
            const bool undefined = !masked && has_nan(sums.a_t + sums.g_t + sums.a_s + sums.g_s);
            if (!low && !undefined) {
                if (top_t > top) top = top_t, top_block = start;
                break;
            }
            sums = before;
            fits = !low;
            masked = masked || undefined;
        }
    }
    out = {m_t, sum(sums.z_t), sum(sums.a_t), sum(sums.g_t), m_s, sum(sums.z_s), sum(sums.a_s), sum(sums.g_s), top,
           static_cast<int32_t>(top_block), 0};
    for (int i = 0; i < LANES; ++i) out.above += sums.above[i];
}

using SumSplit = void (*)(const void*, const void*, int64_t, float, float, Partial&);

template <class Student>
ENTRY SumSplit sum_split_of(int64_t teacher) {
    return teacher == FLOAT32    ? sum_split<Student, Float32>
           : teacher == BFLOAT16 ? sum_split<Student, BFloat16>
                                 : sum_split<Student, Float16>;
}

ENTRY SumSplit sum_split_for(int64_t student, int64_t teacher) {
    return student == FLOAT32    ? sum_split_of<Float32>(teacher)
           : student == BFLOAT16 ? sum_split_of<BFloat16>(teacher)
                                 : sum_split_of<Float16>(teacher);
}

[[maybe_unused]] ENTRY float logit(int64_t kind, const void* x) {
    if (kind == FLOAT32) return *static_cast<const float*>(x);
    const auto* half = static_cast<const uint16_t*>(x);
    return kind == BFLOAT16 ? load_tail<BFloat16>(half, 1)[0] : load_tail<Float16>(half, 1)[0];
}

}  // namespace LEVEL
}  // namespace motab
