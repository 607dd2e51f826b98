// Vectors of LANES numbers, by the compiler's own vector types. Included once a level, in its namespace.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

KERNEL Floats all(float x) { return x - Floats{}; }

// The larger; the second where the first is NaN.
KERNEL Floats larger(Floats x, Floats y) { return x > y ? x : y; }

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
