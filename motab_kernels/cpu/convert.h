// Conversion of three types from and to float32. Included once per level, in its namespace.

ENTRY void to_floats(int64_t type, const void* in, int64_t count, float* out) {
    const auto* x = static_cast<const uint16_t*>(in);
    if (type == FLOAT32)
        std::memcpy(out, in, count * sizeof(float));
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(x[i]);
    else
        for (int64_t i = 0; i < count; ++i) out[i] = from_float16(x[i]);
}

[[maybe_unused]] ENTRY void from_floats(int64_t type, const float* in, int64_t count, void* out) {
    auto* y = static_cast<uint16_t*>(out);
    if (type == FLOAT32)
        std::memcpy(out, in, count * sizeof(float));
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; ++i) y[i] = to_bfloat16(in[i]);
    else
        for (int64_t i = 0; i < count; ++i) y[i] = to_float16(in[i]);
}
