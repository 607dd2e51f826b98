// e^x for x <= 88, to 2e-7 relative; 0 below -87.68, just below the smallest normal number; NaN for NaN. Included once per
// level, in its namespace.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; 2^n is assembled from its bits; e^r = 1 + r + r^2 q(r), q minimax (3e-9).

struct Exponential {
    Floats power, rest;  // 2^n, and e^r - 1
};

KERNEL Exponential split_exp(Floats x) {
    x = larger(all(-88.0f), x);
    // The sum has the rounded number in its low bits, offset by the bias of an exponent.
    const Floats shift = all(12582912.0f + 127.0f);
    const Floats y = x * 1.44269504f + shift;
    const Floats n = y - shift;
    // The first part of ln 2 has 9 bits: its product with n is exact, even where there is no fused multiply-add.
    Floats r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats q = r * 0.0013814540579915047f + 0.00836874544620514f;
    q = q * r + 0.04166838899254799f;
    q = q * r + 0.1666652113199234f;
    q = q * r + 0.4999999403953552f;
    q = q * r + 1.0f;
    return {(Floats)((Words)y << 23), q * r};
}

// e^x
KERNEL Floats value(const Exponential& e) { return e.power * e.rest + e.power; }

// 1 - e^x for x <= 0, which keeps the difference where e^x is nearly 1.
KERNEL Floats one_less(const Exponential& e) { return (1.0f - e.power) - e.power * e.rest; }

KERNEL Floats vector_exp(Floats x) { return value(split_exp(x)); }
