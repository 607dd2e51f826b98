// Tensors as the ops receive them. Every member has 8 bytes; the order is that of `cpu/arguments.py`.
#pragma once

#include <cstdint>

#include "number.h"

namespace motab {

// A parameter of each row, float32 or float64. stride 0: one for all rows; data null: absent.
struct Parameter {
    const void* data;
    int64_t stride, is_double;

    double operator[](int64_t row) const {
        const int64_t i = row * stride;
        return is_double ? static_cast<const double*>(data)[i] : double(static_cast<const float*>(data)[i]);
    }
    // 1 / temperature; an absent temperature is 1.
    float inverse(int64_t row) const { return data ? float(1 / (*this)[row]) : 1.0f; }
};

// Logits (B, T, V), contiguous in V.
struct Logits {
    char* data;
    int64_t type, stride_b, stride_t;

    char* at(int64_t b, int64_t i, int64_t column) const {
        return data + (b * stride_b + i * stride_t + column) * bytes_of(type);
    }
    float logit(int64_t b, int64_t i, int64_t column) const { return number(type, at(b, i, column)); }
};

}  // namespace motab
