// Logits of three types, read LANES at a time as float32. Included once a level, in its namespace.

struct Float32 {
    using Number = float;
    static constexpr Number LOWEST = -__builtin_inff();
    static KERNEL_MEMBER Floats load(const Number* logits) {
        Floats x;
        __builtin_memcpy(&x, logits, sizeof x);
        return x;
    }
};

struct BFloat16 {
    using Number = uint16_t;
    static constexpr Number LOWEST = 0xff80;  // -inf
    static KERNEL_MEMBER Floats load(const Number* logits) {
        Halves x;
        __builtin_memcpy(&x, logits, sizeof x);
        return (Floats)(__builtin_convertvector(x, Words) << 16);
    }
};

struct Float16 {
    using Number = uint16_t;
    static constexpr Number LOWEST = 0xfc00;  // -inf
    static KERNEL_MEMBER Floats load(const Number* logits) {
        Halves half;
        __builtin_memcpy(&half, logits, sizeof half);
        const Words word = __builtin_convertvector(half, Words);
        const Words exponent = word & 0x7c00, zero = {};
        Words bits = ((word & 0x7fff) << 13) + (112u << 23);
        bits = exponent == 0x7c00 ? bits + (112u << 23) : bits;
        // A subnormal half is a multiple of 2^-24: made 2^-14 larger it is a float, and 2^-14 are taken off again.
        const Floats small = (Floats)(bits + (1u << 23)) - 6.103515625e-05f;
        bits = exponent == zero ? (Words)small : bits;
        return (Floats)(bits | ((word & 0x8000) << 16));
    }
};

// The last columns of a row, followed by some without probability.
template <class Type>
KERNEL Floats load_tail(const typename Type::Number* logits, int64_t columns) {
    typename Type::Number padded[LANES];
    for (int i = 0; i < LANES; ++i) padded[i] = i < columns ? logits[i] : Type::LOWEST;
    return Type::load(padded);
}
