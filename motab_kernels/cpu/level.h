// Which of the instruction sets that an op is compiled for is used.
#pragma once

namespace motab {

enum Level { BASELINE, AVX2, AVX512 };

Level level();

}  // namespace motab
