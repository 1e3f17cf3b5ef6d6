// What kernels are written with. The only file that knows whether it is compiled for a GPU or, by
// tests, for the host (tests/cuda/cuda_on_host.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "steppo/halves.h"

#if defined(STEPPO_CUDA_ON_HOST)
#include "cuda_on_host.h"
#define STEPPO_DEVICE static inline
#define STEPPO_MEMBER inline
#define STEPPO_SHARED(type, name) auto& name = cuda_on_host::shared<type>([] {})
#else
#define STEPPO_DEVICE __device__ __forceinline__ static
#define STEPPO_MEMBER __device__ __forceinline__
#define STEPPO_SHARED(type, name) \
  using name##_type = type;       \
  __shared__ name##_type name
#endif

namespace steppo::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Numbers that are moved together.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  T at[count];
};

// Loads numbers that begin at a multiple of 16 bytes.
template <class N, int count>
STEPPO_DEVICE void load_wide(const N* from, N (&to)[count]) {
  constexpr int kTogether = 16 / sizeof(N);
  static_assert(count % kTogether == 0, "one load is of 16 bytes");
#pragma unroll
  for (int part = 0; part < count; part += kTogether) {
    const auto pack = *reinterpret_cast<const Pack<N, kTogether>*>(from + part);
#pragma unroll
    for (int k = 0; k < kTogether; ++k) to[part + k] = pack.at[k];
  }
}

// Stores numbers from a multiple of 16 bytes on.
template <class N, int count>
STEPPO_DEVICE void store_wide(N* to, const N (&from)[count]) {
  constexpr int kTogether = 16 / sizeof(N);
  static_assert(count % kTogether == 0, "one store is of 16 bytes");
#pragma unroll
  for (int part = 0; part < count; part += kTogether) {
    Pack<N, kTogether> pack;
#pragma unroll
    for (int k = 0; k < kTogether; ++k) pack.at[k] = from[part + k];
    *reinterpret_cast<Pack<N, kTogether>*>(to + part) = pack;
  }
}

// A pack of 16 bytes, of memory that is read or written once: the caches need not keep it. One that
// is shared is read by other processors as well: their common cache keeps it, and their own do not.
#if defined(STEPPO_CUDA_ON_HOST)
template <class P>
STEPPO_DEVICE P load_once(const P* from) {
  return *from;
}
template <class P>
STEPPO_DEVICE P load_past_l1(const P* from) {
  return *from;
}
template <class P>
STEPPO_DEVICE void store_once(P* to, const P& pack) {
  *to = pack;
}
#else
template <class P>
STEPPO_DEVICE P pack_of(const uint4& words) {
  static_assert(sizeof(P) == 16, "one load is of 16 bytes");
  P pack;
  memcpy(&pack, &words, sizeof pack);
  return pack;
}
template <class P>
STEPPO_DEVICE P load_once(const P* from) {
  return pack_of<P>(__ldcs(reinterpret_cast<const uint4*>(from)));
}
template <class P>
STEPPO_DEVICE P load_past_l1(const P* from) {
  return pack_of<P>(__ldcg(reinterpret_cast<const uint4*>(from)));
}
template <class P>
STEPPO_DEVICE void store_once(P* to, const P& pack) {
  static_assert(sizeof(P) == 16, "one store is of 16 bytes");
  uint4 words;
  memcpy(&words, &pack, sizeof pack);
  __stcs(reinterpret_cast<uint4*>(to), words);
}
#endif

// Keeps a pack of 16 bytes as it is. What a compiler has made of it before it makes anew, instead
// of keeping that, which takes up to twice as many registers.
template <class P>
STEPPO_DEVICE void keep_packed([[maybe_unused]] P& pack) {
#if !defined(STEPPO_CUDA_ON_HOST)
  static_assert(sizeof(P) == 16, "a pack is of 16 bytes");
  uint4 words;
  memcpy(&words, &pack, sizeof pack);
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
  memcpy(&pack, &words, sizeof pack);
#endif
}

// What a GPU loads at least of its memory, for all that lies there.
constexpr int kBytesOfLine = 128;

// Asks for the line that lies at an address. Nothing waits for it.
STEPPO_DEVICE void prefetch(const void* at) {
#if defined(STEPPO_CUDA_ON_HOST)
  cuda_on_host::touch(at);
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at)));
#endif
}

STEPPO_DEVICE float to_number(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

// Single instructions.
#if defined(STEPPO_CUDA_ON_HOST)
STEPPO_DEVICE float larger(float x, float low) { return x < low ? low : x; }
STEPPO_DEVICE float fast_exp2(float x) { return cuda_on_host::approximate_exp2(x); }
STEPPO_DEVICE float fast_reciprocal(float x) { return cuda_on_host::approximate_reciprocal(x); }
STEPPO_DEVICE float to_number(Half x) {
  return half_to_float<float>(static_cast<std::uint32_t>(x.bits));
}
STEPPO_DEVICE std::uint32_t two_numbers(Half, float low, float high) {
  return half_bits<std::uint32_t>(low) | half_bits<std::uint32_t>(high) << 16;
}
STEPPO_DEVICE std::uint32_t two_numbers(BFloat16, float low, float high) {
  const auto rounded = [](float x) -> std::uint32_t {
    std::uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}
template <class In>
STEPPO_DEVICE std::uint32_t larger_halves(In, std::uint32_t a, std::uint32_t b) {
  const auto larger_half = [](std::uint32_t x, std::uint32_t y) -> std::uint32_t {
    const float of_x = to_number(In{static_cast<std::uint16_t>(x)});
    const float of_y = to_number(In{static_cast<std::uint16_t>(y)});
    return (of_x > of_y || of_y != of_y ? x : y) & 0xFFFFu;
  };
  return larger_half(a, b) | larger_half(a >> 16, b >> 16) << 16;
}
#else
// The larger one; x if that is NaN.
STEPPO_DEVICE float larger(float x, float low) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(low));
  return larger;
}
// 2^x, wrong by 2 units of the last place at most; 0 below the normal range.
STEPPO_DEVICE float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
// 1 / x, wrong by a unit of the last place at most; 0 below the normal range.
STEPPO_DEVICE float fast_reciprocal(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}
STEPPO_DEVICE float to_number(Half x) {
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(x.bits));
  return number;
}
// Two numbers of the type of the first argument, to nearest, ties to even.
STEPPO_DEVICE std::uint32_t two_numbers(Half, float low, float high) {
  std::uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
STEPPO_DEVICE std::uint32_t two_numbers(BFloat16, float low, float high) {
  std::uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
// Of two words of two halves each, the larger ones; where one is NaN, the other.
STEPPO_DEVICE std::uint32_t larger_halves(Half, std::uint32_t a, std::uint32_t b) {
  std::uint32_t both;
  asm("max.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
  return both;
}
STEPPO_DEVICE std::uint32_t larger_halves(BFloat16, std::uint32_t a, std::uint32_t b) {
  std::uint32_t both;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
  return both;
}
#endif

// Counts a counter up, from `last` to 0, and returns what it was. What the thread wrote before, or
// saw in order before, is there for whoever counts later, and what those before have written is
// seen after.
STEPPO_DEVICE unsigned take_ticket(unsigned* counter, unsigned last) {
#if defined(STEPPO_CUDA_ON_HOST)
  __threadfence();
  const unsigned ticket = atomicInc(counter, last);
  __threadfence();
#else
  unsigned ticket;
  // Two fences around it would be those of a single order of all memory, which take longer.
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(ticket)
               : "l"(__cvta_generic_to_global(counter)), "r"(last)
               : "memory");
#endif
  return ticket;
}

// The sum over `lanes` neighbouring lanes, a power of 2; each of them gets it. The order of the
// additions is fixed.
template <int lanes, class T>
STEPPO_DEVICE T sum_of_lanes(T value) {
#pragma unroll
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, apart, lanes);
  }
  return value;
}

}  // namespace steppo::cuda
