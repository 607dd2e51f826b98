// Vectors of LANES numbers, by the compiler's own vector types. Included once per level, in its namespace.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

KERNEL Floats all(float x) { return x - Floats{}; }

KERNEL Floats load(const float* x) {
    Floats v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
}

KERNEL void store(float* x, Floats v) { __builtin_memcpy(x, &v, sizeof v); }

// The larger of two; the second where the first is NaN.
KERNEL Floats larger(Floats x, Floats y) { return x > y ? x : y; }

KERNEL Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffff); }

KERNEL float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
}

// Pairwise: short dependency chains.
KERNEL float largest(Floats x) {
    float tops[LANES];
    store(tops, x);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) tops[i] = tops[i] > tops[i + width] ? tops[i] : tops[i + width];
    return tops[0];
}

KERNEL bool any(Ints x) {
    uint64_t pairs[LANES / 2], bits = 0;
    __builtin_memcpy(pairs, &x, sizeof pairs);
    for (int i = 0; i < LANES / 2; ++i) bits |= pairs[i];
    return bits != 0;
}
