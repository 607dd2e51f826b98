// Vectors of LANES numbers, by the compiler's own vector types. Included once a level, in its namespace.

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

// The larger; the second where the first is NaN.
KERNEL Floats larger(Floats x, Floats y) { return x > y ? x : y; }

KERNEL Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffff); }

KERNEL float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
}

KERNEL float largest(Floats x) {
    float top = x[0];
    for (int i = 1; i < LANES; ++i) top = x[i] > top ? x[i] : top;
    return top;
}

KERNEL bool has_nan(Floats x) {
    const Ints bad = x != x;
    int any = 0;
    for (int i = 0; i < LANES; ++i) any |= bad[i];
    return any != 0;
}
