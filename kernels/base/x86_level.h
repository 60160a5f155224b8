// The levels of x86-64 that the psABI names, asked of the processor this runs on. clang 14 knows
// features alone: a processor with those asked for has the level's rest, too.
#pragma once

namespace coppice {

#ifdef __clang__
inline bool HasX86V3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
inline bool HasX86V4() {
  return HasX86V3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#else
inline bool HasX86V3() { return __builtin_cpu_supports("x86-64-v3"); }
inline bool HasX86V4() { return __builtin_cpu_supports("x86-64-v4"); }
#endif

}  // namespace coppice
