// The floating-point mode of a thread. Every kernel runs in the standard one, in which a number
// below the normal range is kept and results are rounded to nearest: what a caller sets for its own
// thread, such as torch.set_flush_denormal, must not decide which of its tasks round differently.
#pragma once

#include "steppo/types.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace steppo {

#if defined(__SSE__)
using FloatMode = unsigned;
constexpr FloatMode kStandardFloats = 0x1F80;
STEPPO_FN FloatMode float_mode() { return _mm_getcsr(); }
STEPPO_FN void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
using FloatMode = std::uint64_t;
constexpr FloatMode kStandardFloats = 0;
STEPPO_FN FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
STEPPO_FN void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatMode = int;
constexpr FloatMode kStandardFloats = 0;
STEPPO_FN FloatMode float_mode() { return kStandardFloats; }
STEPPO_FN void set_float_mode(FloatMode) {}
#endif

// The standard mode, for as long as this lives.
class StandardFloats {
 public:
  StandardFloats() : before_(float_mode()) { set_float_mode(kStandardFloats); }
  ~StandardFloats() { set_float_mode(before_); }
  StandardFloats(const StandardFloats&) = delete;
  StandardFloats& operator=(const StandardFloats&) = delete;

 private:
  FloatMode before_;
};

}  // namespace steppo
