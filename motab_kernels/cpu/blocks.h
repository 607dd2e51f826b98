// Logits BLOCK columns at a time, as float32 in whole vectors. Included once a level, in its namespace.

constexpr int64_t BLOCK = 1024;  // columns; what stays in L1

// The columns where they lie, or converted into `room`; then some without probability, up to a whole vector.
ENTRY const float* as_floats(int64_t type, const void* logits, int64_t columns, float* room) {
    if (type == FLOAT32) {
        if (columns % LANES == 0) return static_cast<const float*>(logits);
        std::memcpy(room, logits, columns * sizeof(float));
    } else {
        const auto* x = static_cast<const uint16_t*>(logits);
        if (type == BFLOAT16)
            for (int64_t i = 0; i < columns; ++i) room[i] = from_bfloat16(x[i]);
        else
            for (int64_t i = 0; i < columns; ++i) room[i] = from_float16(x[i]);
    }
    for (int64_t i = columns; i % LANES; ++i) room[i] = -__builtin_inff();
    return room;
}

struct Block {
    const float *s, *t;
    int64_t columns;
};

KERNEL Block block_of(const Split& split, int64_t start, float* room_s, float* room_t) {
    const int64_t columns = split.columns - start < BLOCK ? split.columns - start : BLOCK;
    return {
        as_floats(split.student_type, split.student + start * bytes_of(split.student_type), columns, room_s),
        as_floats(split.teacher_type, split.teacher + start * bytes_of(split.teacher_type), columns, room_t), columns};
}

// Write the columns in `room` to where they belong.
[[maybe_unused]] ENTRY void from_floats(int64_t type, const float* room, int64_t columns, void* out) {
    auto* y = static_cast<uint16_t*>(out);
    if (type == FLOAT32)
        std::memcpy(out, room, columns * sizeof(float));
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < columns; ++i) y[i] = to_bfloat16(room[i]);
    else
        for (int64_t i = 0; i < columns; ++i) y[i] = to_float16(room[i]);
}
