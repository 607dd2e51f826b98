// Logits, BLOCK columns at a time, as float32 in whole vectors. Included once per level, in its namespace.

constexpr int64_t BLOCK = 1024;  // columns; they stay in L1

// The columns in place, or converted into `room` and padded to a whole vector with columns of no probability.
ENTRY const float* as_floats(int64_t type, const void* logits, int64_t columns, float* room) {
    if (type == FLOAT32 && columns % LANES == 0) return static_cast<const float*>(logits);
    to_floats(type, logits, columns, room);
    for (int64_t i = columns; i % LANES; ++i) room[i] = -__builtin_inff();
    return room;
}

struct Block {
    const float *s, *t;
    int64_t columns;
    const char *after_s, *after_t;  // the logits that follow in memory
    int64_t bytes_s, bytes_t;       // per logit

    // Prefetches beyond column i of the block: the hardware does not look that far ahead on two streams.
    KERNEL_MEMBER void prefetch(int64_t i) const {
        __builtin_prefetch(after_s + i * bytes_s);
        __builtin_prefetch(after_t + i * bytes_t);
    }
};

KERNEL Block block_of(const Split& split, int64_t start, float* room_s, float* room_t) {
    const int64_t columns = split.columns - start < BLOCK ? split.columns - start : BLOCK;
    const int64_t bytes_s = bytes_of(split.student_type), bytes_t = bytes_of(split.teacher_type);
    const char *s = split.student + start * bytes_s, *t = split.teacher + start * bytes_t;
    return {as_floats(split.student_type, s, columns, room_s), as_floats(split.teacher_type, t, columns, room_t),
            columns, s + columns * bytes_s, t + columns * bytes_t, bytes_s, bytes_t};
}
