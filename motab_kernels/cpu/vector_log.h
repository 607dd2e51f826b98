// log(u) for 0 < u <= 1, to 3e-7 relative, also where u is nearly 1, because 1 - u is given too; NaN for NaN. Included
// once per level, in its namespace.
//
// u = 2^k (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); log(1 + f) = 2 atanh(x), x = f / (2 + f), and
// 2 atanh(x) = x (2 + z Q(z)), z = x^2, by the Chebyshev series of Q, 3e-9 relative.

KERNEL Floats vector_log(Floats u, Floats one_less_u) {
    const Words root = (Words)all(0.70710678f), bits = (Words)magnitude(u);  // a NaN may have a sign
    const Ints k = (Ints)(bits - root) >> 23;
    const Floats m = (Floats)(bits - ((Words)k << 23));
    const Floats f = k >= 0 ? -one_less_u : m - 1.0f;  // k is above 0 for NaN only
    const Floats x = f / (f + 2.0f), z = x * x;
    const Floats q = (z * 0.2958099842071533f + 0.3998875021934509f) * z + 0.6666668653488159f;
    return __builtin_convertvector(k, Floats) * 0.69314718f + x * (z * q + 2.0f);
}
