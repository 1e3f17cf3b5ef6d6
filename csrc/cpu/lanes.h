// Tokens that the arithmetic takes at once, as vectors of the compiler's own (GCC and Clang), which
// become vector instructions of any width. Steps are short, about 50 tokens, so that the remainder
// of a vectorised loop would be much of the work: here the last vector is filled up instead.
#pragma once

#if defined(__AVX512VL__)
#include <immintrin.h>
#endif

#include <limits>

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
  using Number = float;
  using Bits = B;
  STEPPO_FN ExpParts<L> exp_parts(L d) { return exp_parts_fp32(d); }
  STEPPO_FN L exp(L d) { return exp_fp32(d); }
};

}  // namespace cpu::STEPPO_ISA

template <>
struct Arithmetic<cpu::STEPPO_ISA::FloatLanes>
    : cpu::STEPPO_ISA::FloatArithmetic<cpu::STEPPO_ISA::FloatLanes, cpu::STEPPO_ISA::FloatMask,
                                       cpu::STEPPO_ISA::BitLanes> {};

template <>
struct Arithmetic<cpu::STEPPO_ISA::DoubleLanes>
    : cpu::STEPPO_ISA::Choice<cpu::STEPPO_ISA::DoubleLanes, cpu::STEPPO_ISA::DoubleMask> {
  using Number = double;
  using Lanes = cpu::STEPPO_ISA::DoubleLanes;
  STEPPO_FN Lanes exp(Lanes d) {
    for (int k = 0; k < cpu::STEPPO_ISA::kLanes<double>; ++k) d[k] = std::exp(d[k]);
    return d;
  }
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

// A sum of lanes of 0 and 1. Numbers of T count exactly up to the largest that it tells from the
// next.
template <class T>
class Count {
 public:
  void add(Lanes<T> ones) {
    sum_ += ones;
    if (++added_ == kMost) flush();
  }
  double total() {
    flush();
    return total_;
  }

 private:
  static constexpr int64_t kMost = int64_t{1} << 23;
  void flush() {
    for (int k = 0; k < kLanes<T>; ++k) total_ += static_cast<double>(sum_[k]);
    sum_ = Lanes<T>{};
    added_ = 0;
  }
  Lanes<T> sum_{};
  int64_t added_ = 0;
  double total_ = 0;
};

// The sum, the smallest and the largest of lanes.
template <class T>
class Extremes {
 public:
  // Of lanes where `present` is 0, nothing counts.
  void add(Lanes<T> x, Lanes<T> present) {
    using Choose = Arithmetic<Lanes<T>>;
    const auto is_there = present > T(0);
    // A NaN is smaller and larger than all, and stays.
    const Lanes<T> low = Choose::select(is_there, x, lowest_);
    const Lanes<T> high = Choose::select(is_there, x, largest_);
    lowest_ = Choose::select((low < lowest_) | (low != low), low, lowest_);
    largest_ = Choose::select((high > largest_) | (high != high), high, largest_);
    sum_.add(Choose::select(is_there, x, Lanes<T>{}));
  }
  double total() const { return sum_.total(); }
  double lowest() const {
    double found = lowest_[0];
    for (int k = 1; k < kLanes<T>; ++k) found = lesser(found, lowest_[k]);
    return found;
  }
  double largest() const {
    double found = largest_[0];
    for (int k = 1; k < kLanes<T>; ++k) found = greater(found, largest_[k]);
    return found;
  }

 private:
  Sum<T> sum_;
  Lanes<T> lowest_ = Lanes<T>{} + std::numeric_limits<T>::infinity();
  Lanes<T> largest_ = Lanes<T>{} - std::numeric_limits<T>::infinity();
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

// 1 in the lanes of tokens, 0 past the last of so many.
template <class T>
static inline Lanes<T> token_lanes(int64_t left) {
  if (left >= kLanes<T>) return Lanes<T>{} + T(1);
  Lanes<T> lanes{};
  for (int k = 0; k < static_cast<int>(left); ++k) lanes[k] = T(1);
  return lanes;
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
