// Runs of ones in a mask, 64 tokens at a time: the bits of a word show where runs begin and end.
//
// A mask is read as bytes, and what is not 0 is one of the ones.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernel.h"

namespace steppo::cpu::STEPPO_ISA {

struct Run {
  int64_t begin, end;
};

// Whether token i is one of the ones.
static inline bool is_set(const bool* mask, int64_t i) {
  unsigned char byte;
  std::memcpy(&byte, mask + i, 1);
  return byte != 0;
}

// The first 64 bytes of a mask as bits, the first one lowest.
static inline std::uint64_t mask_word(const bool* mask) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_loadu_si512(mask);
  return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
  const auto half = [](const bool* at) {
    __m256i bytes;
    std::memcpy(&bytes, at, sizeof bytes);
    const __m256i zeros = _mm256_cmpeq_epi8(bytes, _mm256_setzero_si256());
    return ~static_cast<std::uint32_t>(_mm256_movemask_epi8(zeros));
  };
  return half(mask) | static_cast<std::uint64_t>(half(mask + 32)) << 32;
#else
  std::uint64_t bits = 0;
  for (int k = 0; k < 8; ++k) {
    std::uint64_t bytes;
    std::memcpy(&bytes, mask + 8 * k, sizeof bytes);
    // The highest bit of each byte becomes that of a byte that is not 0, and then the lowest one.
    constexpr std::uint64_t kLow = 0x7F7F7F7F7F7F7F7Fu;
    bytes = ((((bytes & kLow) + kLow) | bytes) & ~kLow) >> 7;
    // The product moves the lowest bit of byte i to bit 56 + i.
    bits |= bytes * 0x0102040810204080u >> 56 << 8 * k;
  }
  return bits;
#endif
}

// Calls body(at, bits, borders) for the words of [begin, end), the first token of each at `at`. A
// bit of `borders` says that the token differs from the one before it; `open` is what comes before
// the first.
template <class F>
static inline void for_words(const bool* mask, int64_t begin, int64_t end, bool open, F&& body) {
  std::uint64_t before = open;
  int64_t at = begin;
  for (; at + 64 <= end; at += 64) {
    const std::uint64_t bits = mask_word(mask + at);
    body(at, bits, bits ^ (bits << 1 | before));
    before = bits >> 63;
  }
  if (at < end) {
    bool rest[64] = {};
    std::memcpy(rest, mask + at, static_cast<size_t>(end - at));
    const std::uint64_t bits = mask_word(rest);
    const std::uint64_t wanted = (std::uint64_t{1} << (end - at)) - 1;
    body(at, bits, (bits ^ (bits << 1 | before)) & wanted);
  }
}

struct RunCounts {
  int64_t runs = 0, tokens = 0;
};

// Counts the runs that begin in [begin, end), and its ones.
static inline RunCounts count_runs(const bool* mask, int64_t begin, int64_t end, bool open) {
  RunCounts counts;
  for_words(mask, begin, end, open, [&](int64_t, std::uint64_t bits, std::uint64_t borders) {
    counts.runs += __builtin_popcountll(borders & bits);
    counts.tokens += __builtin_popcountll(bits);
  });
  return counts;
}

// Calls on_run(run) and on_gap(first, last) for the ones and the zeros of [begin, end), in order
// and none of them empty. With `open`, the first run is the rest of one that began before.
template <class OnRun, class OnGap>
static inline void for_runs(const bool* mask, int64_t begin, int64_t end, bool open, OnRun&& on_run,
                            OnGap&& on_gap) {
  int64_t since = begin;
  bool inside = open;
  const auto close = [&](int64_t at) {
    if (since == at) return;
    if (inside) {
      on_run(Run{since, at});
    } else {
      on_gap(since, at);
    }
    since = at;
  };
  for_words(mask, begin, end, open, [&](int64_t at, std::uint64_t, std::uint64_t borders) {
    for (; borders != 0; borders &= borders - 1) {
      close(at + __builtin_ctzll(borders));
      inside = !inside;
    }
  });
  close(end);
}

// The first byte of [begin, limit) that equals `wanted`; `limit` if none does.
static inline int64_t find_byte(const bool* mask, int wanted, int64_t begin, int64_t limit) {
  if (begin >= limit) return limit;
  const void* found = std::memchr(mask + begin, wanted, static_cast<size_t>(limit - begin));
  return found == nullptr ? limit : static_cast<const bool*>(found) - mask;
}

}  // namespace steppo::cpu::STEPPO_ISA
