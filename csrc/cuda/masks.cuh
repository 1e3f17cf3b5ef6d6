// Masks as kernels read them: bytes, of which those that are not 0 are the ones.
#pragma once

#include "device.cuh"

namespace steppo::cuda {

STEPPO_DEVICE bool is_set(const bool* mask, std::int64_t i) {
  return reinterpret_cast<const unsigned char*>(mask)[i] != 0;
}

// Tokens whose bits a thread reads together: 16 bytes of a mask.
constexpr int kMaskBits = 16;

// The bits of 4 bytes, one for each that is not 0.
STEPPO_DEVICE unsigned bits_of(unsigned bytes) {
  // The highest bit of each byte becomes that of a byte that is not 0, and then the lowest one.
  constexpr unsigned kLow = 0x7F7F7F7Fu;
  bytes = ((((bytes & kLow) + kLow) | bytes) & ~kLow) >> 7;
  // The product moves the lowest bit of byte k to bit 24 + k, and nothing into those bits.
  return bytes * 0x01020408u >> 24;
}

// The bits of kMaskBits tokens, of which the first lies at a multiple of 16 bytes.
STEPPO_DEVICE unsigned wide_bits(const bool* mask) {
  unsigned words[kMaskBits / 4], bits = 0;
  load_wide(reinterpret_cast<const unsigned*>(mask), words);
#pragma unroll
  for (int k = 0; k < kMaskBits / 4; ++k) bits |= bits_of(words[k]) << 4 * k;
  return bits;
}

// The bits of kMaskBits tokens from `first` on; those outside of [begin, end) are 0.
STEPPO_DEVICE unsigned mask_bits(const bool* mask, std::int64_t first, std::int64_t begin,
                                 std::int64_t end, bool wide) {
  if (wide && first >= begin && first + kMaskBits <= end) return wide_bits(mask + first);
  unsigned bits = 0;
  const auto take = [&](int k) {
    const std::int64_t t = first + k;
    if (t >= begin && t < end) bits |= unsigned{is_set(mask, t)} << k;
  };
  if (wide) {
    // They are at an end, which few are: their code is short.
#pragma unroll 1
    for (int k = 0; k < kMaskBits; ++k) take(k);
  } else {
#pragma unroll
    for (int k = 0; k < kMaskBits; ++k) take(k);
  }
  return bits;
}

}  // namespace steppo::cuda
