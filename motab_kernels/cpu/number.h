// Logits of three types, one at a time; the compiler vectorises loops over them.
#pragma once

#include <cstdint>
#include <cstring>

namespace motab {

enum Type : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

inline int64_t bytes_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float from_bfloat16(uint16_t x) { return as_float(uint32_t(x) << 16); }

inline float from_float16(uint16_t x) {
    const uint32_t rest = x & 0x7fff, sign = uint32_t(x & 0x8000) << 16;
    const uint32_t normal = (rest << 13) + (112u << 23);
    // A subnormal half is a multiple of 2^-24: 2^-14 is added to make it a normal float, then subtracted.
    const uint32_t small = as_bits(as_float(normal + (1u << 23)) - 6.103515625e-05f);
    const uint32_t bits = rest < 0x0400 ? small : rest < 0x7c00 ? normal : normal + (112u << 23);
    return as_float(bits | sign);
}

// To the nearest, ties to even.
inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = as_bits(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return uint16_t((x != x ? 0x7fc00000 : rounded) >> 16);
}

inline uint16_t to_float16(float x) {
    const uint32_t bits = as_bits(x), rest = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    const uint32_t normal = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
    // The last bit of a float in [0.5, 1) is worth 2^-24, as that of a subnormal half.
    const uint32_t small = as_bits(as_float(rest) + 0.5f) - as_bits(0.5f);
    const uint32_t half = rest < 113u << 23 ? small : rest < 143u << 23 ? normal : rest > 0x7f800000 ? 0x7e00 : 0x7c00;
    return uint16_t(half | sign);
}

inline float number(int64_t type, const void* x) {
    if (type == FLOAT32) return *static_cast<const float*>(x);
    const uint16_t half = *static_cast<const uint16_t*>(x);
    return type == BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

}  // namespace motab
