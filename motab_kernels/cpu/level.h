// Which of the compiled instruction sets is used.
#pragma once

namespace motab {

enum Level { BASELINE, AVX2, AVX512 };

Level level();

}  // namespace motab
