// Tokens that the arithmetic takes at once, as vectors of the compiler's own (GCC and Clang), which
// become vector instructions of any width. Steps are short, about 50 tokens, so that the remainder
// of a vectorised loop would be much of the work: here the last vector is filled up instead.
#pragma once

#if defined(__AVX512VL__)
#include <immintrin.h>
#endif

#include "kernel.h"
#include "steppo/step_math.h"

namespace steppo {

namespace cpu::STEPPO_ISA {

// 32 bytes with AVX-512 too: longer vectors would leave more of the last one of a step empty.
#if defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

typedef float FloatLanes __attribute__((vector_size(kVectorBytes)));
typedef double DoubleLanes __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t BitLanes __attribute__((vector_size(kVectorBytes)));

typedef std::int32_t FloatMask __attribute__((vector_size(kVectorBytes)));
typedef std::int64_t DoubleMask __attribute__((vector_size(kVectorBytes)));

}  // namespace cpu::STEPPO_ISA

// Choices are made with bits: compilers take a vector ?: apart.
namespace cpu::STEPPO_ISA {

template <class L, class M>
struct Choice {
  using Mask = M;
  STEPPO_FN L select(M mask, L yes, L no) { return (L)((mask & (M)yes) | (~mask & (M)no)); }
};

// What vectors of fp32 of one width do.
template <class L, class M, class B>
struct FloatArithmetic : Choice<L, M> {
  using Bits = B;
  STEPPO_FN ExpParts<L> exp_parts(L d) { return exp_parts_fp32(d); }
};

}  // namespace cpu::STEPPO_ISA

template <>
struct Arithmetic<cpu::STEPPO_ISA::FloatLanes>
    : cpu::STEPPO_ISA::FloatArithmetic<cpu::STEPPO_ISA::FloatLanes, cpu::STEPPO_ISA::FloatMask,
                                       cpu::STEPPO_ISA::BitLanes> {};

template <>
struct Arithmetic<cpu::STEPPO_ISA::DoubleLanes>
    : cpu::STEPPO_ISA::Choice<cpu::STEPPO_ISA::DoubleLanes, cpu::STEPPO_ISA::DoubleMask> {
  using Lanes = cpu::STEPPO_ISA::DoubleLanes;
  STEPPO_FN ExpParts<Lanes> exp_parts(Lanes d) {
    ExpParts<Lanes> parts{};
    for (int k = 0; k < cpu::STEPPO_ISA::kLanes<double>; ++k) {
      const ExpParts<double> one = exp_parts_fp64(d[k]);
      parts.scale[k] = one.scale;
      parts.r[k] = one.r;
      parts.tail[k] = one.tail;
    }
    return parts;
  }
};

namespace cpu::STEPPO_ISA {

template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
  using Type = FloatLanes;
  typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
};
template <>
struct LanesOf<double> {
  using Type = DoubleLanes;
  using Wide = DoubleLanes;
};
template <class T>
using Lanes = typename LanesOf<T>::Type;

// A sum of lanes in fp64.
template <class T>
class Sum {
 public:
  void add(Lanes<T> x) { sum_ += widen(x); }
  double total() const {
    double total = 0;
    for (int k = 0; k < kLanes<T>; ++k) total += sum_[k];
    return total;
  }

 private:
  using Wide = typename LanesOf<T>::Wide;
  static Wide widen(Lanes<T> x) { return __builtin_convertvector(x, Wide); }
  Wide sum_{};
};

// Where the tokens of a step lie: side by side, or through an index.
struct Contiguous {
  int64_t first;
  int64_t operator()(int64_t i) const { return first + i; }
};
struct Gathered {
  const int64_t* index;
  int64_t operator()(int64_t i) const { return index[i]; }
};

// Whether the positions of a step follow each other. Its first and last one do not tell alone: a
// step of several rows may hold these in any order.
static inline bool follow_each_other(const int64_t* index, int64_t length) {
  const int64_t first = index[0];
  int64_t apart = 0;
  for (int64_t i = 0; i < length; ++i) apart |= index[i] ^ (first + i);
  return apart == 0;
}

// The values from `at(i)` on; past `length`, zeros.
template <class T>
static inline Lanes<T> load(const T* values, Contiguous at, int64_t i, int64_t length) {
  Lanes<T> lanes{};
  if (length - i >= kLanes<T>) {
    std::memcpy(&lanes, values + at(i), sizeof lanes);
  } else {
#if defined(__AVX512VL__)
    if constexpr (sizeof(T) == 4 && sizeof(lanes) == 32) {
      const auto mask = static_cast<unsigned char>((1u << (length - i)) - 1);
      return (Lanes<T>)_mm256_maskz_loadu_ps(mask, values + at(i));
    }
#endif
    std::memcpy(&lanes, values + at(i), sizeof(T) * static_cast<size_t>(length - i));
  }
  return lanes;
}
template <class T>
static inline Lanes<T> load(const T* values, Gathered at, int64_t i, int64_t length) {
  Lanes<T> lanes{};
  const int count = length - i >= kLanes<T> ? kLanes<T> : static_cast<int>(length - i);
  for (int k = 0; k < count; ++k) lanes[k] = values[at(i + k)];
  return lanes;
}

template <class T>
static inline void store(T* values, Contiguous at, int64_t i, int64_t length, Lanes<T> lanes) {
  if (length - i >= kLanes<T>) {
    std::memcpy(values + at(i), &lanes, sizeof lanes);
  } else {
    std::memcpy(values + at(i), &lanes, sizeof(T) * static_cast<size_t>(length - i));
  }
}
template <class T>
static inline void store(T* values, Gathered at, int64_t i, int64_t length, Lanes<T> lanes) {
  const int count = length - i >= kLanes<T> ? kLanes<T> : static_cast<int>(length - i);
  for (int k = 0; k < count; ++k) values[at(i + k)] = lanes[k];
}

}  // namespace cpu::STEPPO_ISA
}  // namespace steppo
