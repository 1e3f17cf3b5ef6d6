// Long rows of any floating dtype, read and written as pairs of vectors as wide as the machine's.
#pragma once

#include <limits>

#include "lanes.h"
#include "steppo/halves.h"
#include "steppo/token_math.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace steppo {

namespace cpu::STEPPO_ISA {

#if defined(__AVX512F__)
constexpr int kRowBytes = 64;
#else
constexpr int kRowBytes = kVectorBytes;
#endif
typedef float RowLanes __attribute__((vector_size(kRowBytes)));
typedef std::uint32_t RowBits __attribute__((vector_size(kRowBytes)));
typedef std::int32_t RowMask __attribute__((vector_size(kRowBytes)));
#if defined(__AVX512F__)
// Masked forms of intrinsics are used throughout: GCC 12 warns that the plain forms read memory
// that nothing initialised.
constexpr __mmask16 kAll = 0xFFFF;
#endif

}  // namespace cpu::STEPPO_ISA

#if defined(__AVX512F__)
template <>
struct Arithmetic<cpu::STEPPO_ISA::RowLanes>
    : cpu::STEPPO_ISA::FloatArithmetic<cpu::STEPPO_ISA::RowLanes, cpu::STEPPO_ISA::RowMask,
                                       cpu::STEPPO_ISA::RowBits> {};
#endif

namespace cpu::STEPPO_ISA {

// What the logits of a dtype are computed in: one number, and as many as the machine takes at once.
template <class In>
struct RowType {
  using Value = float;
  using Lanes = RowLanes;
};
template <>
struct RowType<double> {
  using Value = double;
  using Lanes = double;
};
template <class In>
using RowValue = typename RowType<In>::Value;

// Two vectors are read and written at once. Those of bf16 are the even and the odd elements: then
// no element changes its place in its word.
template <class L>
struct VectorPair {
  L a, b;
};
template <class In>
using RowPair = VectorPair<typename RowType<In>::Lanes>;
template <class In>
constexpr int kPairSize =
    2 * static_cast<int>(sizeof(typename RowType<In>::Lanes) / sizeof(typename RowType<In>::Value));

// Whether a pair has the even and the odd elements, and not those of one half and of the other.
template <class In>
constexpr bool kIsInterleaved = false;
template <>
constexpr bool kIsInterleaved<BFloat16> = true;
#if !defined(__AVX512F__) && !defined(__F16C__)
template <>
constexpr bool kIsInterleaved<Half> = true;
#endif

// The larger one, for finite or infinite `low`; x if that is NaN.
static inline RowLanes larger(RowLanes x, RowLanes low) {
#if defined(__AVX512F__)
  return (RowLanes)_mm512_maskz_max_ps(kAll, (__m512)low, (__m512)x);
#elif defined(__AVX__)
  return (RowLanes)_mm256_max_ps((__m256)low, (__m256)x);
#else
  return Arithmetic<RowLanes>::select(x < low, low, x);
#endif
}
static inline double larger(double x, double low) { return x < low ? low : x; }

static inline double total(RowLanes x) {
  double total = 0;
  for (int k = 0; k < kPairSize<float> / 2; ++k) total += x[k];
  return total;
}
static inline double total(double x) { return x; }

static inline double largest_of(RowLanes x) {
  double largest = x[0];
  for (int k = 1; k < kPairSize<float> / 2; ++k) largest = x[k] > largest ? x[k] : largest;
  return largest;
}
static inline double largest_of(double x) { return x; }

static inline float to_float(const float& x) { return x; }
static inline double to_float(const double& x) { return x; }
static inline float to_float(const Half& x) {
  return half_to_float<float>(static_cast<std::uint32_t>(x.bits));
}
static inline float to_float(const BFloat16& x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline void store_one(float* to, double x) { *to = static_cast<float>(x); }
static inline void store_one(double* to, double x) { *to = x; }
static inline void store_one(Half* to, double x) {
  to->bits = static_cast<std::uint16_t>(half_bits<std::uint32_t>(static_cast<float>(x)));
}
static inline void store_one(BFloat16* to, double x) {
  const auto bits = bfloat_bits<std::uint32_t>(static_cast<float>(x));
  to->bits = static_cast<std::uint16_t>(bits >> 16);
}

template <class L, class In>
static inline VectorPair<L> load_plain(const In* from) {
  VectorPair<L> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
static inline RowPair<float> load(const float* from) { return load_plain<RowLanes>(from); }
static inline RowPair<double> load(const double* from) { return load_plain<double>(from); }
static inline RowPair<BFloat16> load(const BFloat16* from) {
  RowBits words;
  std::memcpy(&words, from, sizeof words);
  return {(RowLanes)(words << 16), (RowLanes)(words & 0xFFFF0000u)};
}

static inline void store(float* to, const RowPair<float>& x) { std::memcpy(to, &x, sizeof x); }
static inline void store(double* to, const RowPair<double>& x) { std::memcpy(to, &x, sizeof x); }
static inline void store(BFloat16* to, const RowPair<BFloat16>& x) {
  const RowBits words =
      (bfloat_bits<RowBits>(x.a) >> 16) | (bfloat_bits<RowBits>(x.b) & 0xFFFF0000u);
  std::memcpy(to, &words, sizeof words);
}

#if defined(__AVX512F__)
static inline RowPair<Half> load(const Half* from) {
  const auto* at = reinterpret_cast<const __m256i*>(from);
  return {(RowLanes)_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(at)),
          (RowLanes)_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(at + 1))};
}
static inline void store(Half* to, const RowPair<Half>& x) {
  auto* at = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(at, _mm512_maskz_cvtps_ph(kAll, (__m512)x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(at + 1, _mm512_maskz_cvtps_ph(kAll, (__m512)x.b, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
static inline RowPair<Half> load(const Half* from) {
  const auto* at = reinterpret_cast<const __m128i*>(from);
  return {(RowLanes)_mm256_cvtph_ps(_mm_loadu_si128(at)),
          (RowLanes)_mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}
static inline void store(Half* to, const RowPair<Half>& x) {
  auto* at = reinterpret_cast<__m128i*>(to);
  _mm_storeu_si128(at, _mm256_cvtps_ph((__m256)x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(at + 1, _mm256_cvtps_ph((__m256)x.b, _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline RowPair<Half> load(const Half* from) {
  RowBits words;
  std::memcpy(&words, from, sizeof words);
  return {half_to_float<RowLanes>(RowBits(words & 0xFFFFu)),
          half_to_float<RowLanes>(RowBits(words >> 16))};
}
static inline void store(Half* to, const RowPair<Half>& x) {
  const RowBits words = half_bits<RowBits>(x.a) | (half_bits<RowBits>(x.b) << 16);
  std::memcpy(to, &words, sizeof words);
}
#endif

// Between fp32 and a half precision, with elements side by side as those of fp32 are.
typedef std::uint16_t NarrowBits __attribute__((vector_size(kRowBytes / 2)));
static inline RowLanes widened(const BFloat16* from) {
  NarrowBits halves;
  std::memcpy(&halves, from, sizeof halves);
  return (RowLanes)(__builtin_convertvector(halves, RowBits) << 16);
}
static inline RowLanes widened(const Half* from) {
  NarrowBits halves;
  std::memcpy(&halves, from, sizeof halves);
  return half_to_float<RowLanes>(__builtin_convertvector(halves, RowBits));
}
static inline void store_rounded(BFloat16* to, const RowPair<float>& x) {
  const NarrowBits halves[2] = {
      __builtin_convertvector(bfloat_bits<RowBits>(x.a) >> 16, NarrowBits),
      __builtin_convertvector(bfloat_bits<RowBits>(x.b) >> 16, NarrowBits)};
  std::memcpy(to, halves, sizeof halves);
}
static inline void store_rounded(Half* to, const RowPair<float>& x) {
  const NarrowBits halves[2] = {__builtin_convertvector(half_bits<RowBits>(x.a), NarrowBits),
                                __builtin_convertvector(half_bits<RowBits>(x.b), NarrowBits)};
  std::memcpy(to, halves, sizeof halves);
}

// Writes what was computed from logits of type In as Out, which is In or, of fp32, a half
// precision.
template <class In, class Out>
static inline void store_from(Out* to, const RowPair<In>& x) {
  if constexpr (sizeof(In) == sizeof(Out)) {
    store(to, x);
  } else {
    store_rounded(to, x);
  }
}

// Fewer than a pair holds: the rest is 0, and nothing is read or written beyond.
template <class In>
static inline RowPair<In> load(const In* from, int64_t count) {
  In all[kPairSize<In>] = {};
  std::memcpy(all, from, sizeof(In) * static_cast<size_t>(count));
  return load(all);
}
template <class In, class Out>
static inline void store_from(Out* to, const RowPair<In>& x, int64_t count) {
  Out all[kPairSize<In>];
  store_from<In>(all, x);
  std::memcpy(to, all, sizeof(Out) * static_cast<size_t>(count));
}

// The first `count` elements of a pair, the others (which are finite) -inf.
template <class In>
static inline RowPair<In> only_first(const RowPair<In>& x, int64_t count) {
  In added[kPairSize<In>];
  for (int k = 0; k < kPairSize<In>; ++k) {
    store_one(&added[k], k < count ? 0.0 : -std::numeric_limits<double>::infinity());
  }
  const RowPair<In> more = load(added);
  return {x.a + more.a, x.b + more.b};
}

}  // namespace cpu::STEPPO_ISA
}  // namespace steppo
