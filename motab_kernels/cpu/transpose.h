// Transposes a square of LANES x LANES numbers. Included once per level, in its namespace, after vector.h.

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLES
#endif
#endif

#ifdef HAS_SHUFFLES
// Interleaves the first halves of two vectors, or the second halves.
#if LANES == 16
KERNEL Floats low(Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
KERNEL Floats high(Floats x, Floats y) {
    return __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif LANES == 8
KERNEL Floats low(Floats x, Floats y) { return __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11); }
KERNEL Floats high(Floats x, Floats y) { return __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
KERNEL Floats low(Floats x, Floats y) { return __builtin_shufflevector(x, y, 0, 4, 1, 5); }
KERNEL Floats high(Floats x, Floats y) { return __builtin_shufflevector(x, y, 2, 6, 3, 7); }
#endif

KERNEL void transpose(const float* in, int64_t stride, float* out, int64_t out_stride) {
    Floats rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) rows[i] = load(in + i * stride);
    // Each pass moves one more bit of the row's index to that of the column.
#pragma GCC unroll 4
    for (int width = LANES; width > 1; width /= 2) {
        Floats mixed[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; ++i) {
            mixed[2 * i] = low(rows[i], rows[i + LANES / 2]);
            mixed[2 * i + 1] = high(rows[i], rows[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) rows[i] = mixed[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) store(out + i * out_stride, rows[i]);
}
#undef HAS_SHUFFLES
#else
KERNEL void transpose(const float* in, int64_t stride, float* out, int64_t out_stride) {
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) out[j * out_stride + i] = in[i * stride + j];
}
#endif
