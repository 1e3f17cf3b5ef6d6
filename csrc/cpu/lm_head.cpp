// Logits of bf16 hidden states and a bf16 head in fp32, where the CPU multiplies bf16 and adds up
// in fp32 (AVX512_BF16). Libraries round such a product to bf16, which costs log-probs two digits.
#include "row_lanes.h"

#if defined(__AVX512F__) && __has_include(<avx512bf16intrin.h>)
#define STEPPO_DOTS_BF16 1
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#else
#define STEPPO_DOTS_BF16 0
#endif

namespace steppo::cpu::STEPPO_ISA {

#if STEPPO_DOTS_BF16
namespace {

// One instruction more than the rest of this instruction set; the launcher asks for it.
#define STEPPO_BF16 __attribute__((target("avx512bf16")))

// A product of bf16 adds two neighbours: words of two are the unit, and a size is a number of
// words. A panel of kColumns rows of the weight is turned, kDepth words of them at a time, so that
// a vector holds the same word of 16 rows; kRows rows of hidden states against it fill the
// registers.
constexpr int kColumns = 64, kRows = 6, kLane = 16;
constexpr int64_t kDepth = 256, kRowBlock = 84 * kRows, kPanels = 16;

struct alignas(64) Line {
  std::uint32_t words[16];
};

STEPPO_BF16 void turn(const std::uint32_t* in, int64_t stride, std::uint32_t* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * stride);
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * kColumns, a[i]);
}

// Turns `depth` words of `columns` rows of the weight; what the panel has more is 0.
STEPPO_BF16 void turn_panel(const std::uint32_t* weight, int64_t stride, int64_t columns,
                            int64_t depth, std::uint32_t* panel) {
  for (int64_t j = 0; j < kColumns; j += kLane) {
    for (int64_t k = 0; k < depth; k += kLane) {
      const int64_t height = columns - j < kLane ? columns - j : kLane;
      const int64_t width = depth - k < kLane ? depth - k : kLane;
      const std::uint32_t* from = weight + j * stride + k;
      if (height == kLane && width == kLane) {
        turn(from, stride, panel + k * kColumns + j);
        continue;
      }
      Line part[kLane] = {};
      for (int64_t i = 0; i < height; ++i) {
        std::memcpy(part[i].words, from + i * stride,
                    sizeof(std::uint32_t) * static_cast<size_t>(width));
      }
      turn(part[0].words, kLane, panel + k * kColumns + j);
    }
  }
}

// Adds the products of `rows` hidden states and a panel to `sums`.
template <int rows>
STEPPO_BF16 void multiply(const std::uint32_t* hidden, int64_t stride, const std::uint32_t* panel,
                          int64_t depth, float* sums, bool is_first) {
  __m512 sum[rows][4];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < 4; ++j) {
      sum[i][j] = is_first ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * kColumns + j * kLane);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    __m512bh column[4];
    for (int j = 0; j < 4; ++j) {
      column[j] = (__m512bh)_mm512_load_si512(panel + k * kColumns + j * kLane);
    }
    for (int i = 0; i < rows; ++i) {
      const __m512bh word = (__m512bh)_mm512_set1_epi32(static_cast<int>(hidden[i * stride + k]));
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], word, column[j]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < 4; ++j) _mm512_store_ps(sums + i * kColumns + j * kLane, sum[i][j]);
  }
}

void write_rows(const float* sums, int64_t rows, int64_t columns, const float* bias, float* logits,
                int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = sums + i * kColumns;
    float* to = logits + i * stride;
    for (int64_t j = 0; j < columns; ++j) to[j] = bias != nullptr ? from[j] + bias[j] : from[j];
  }
}

}  // namespace

void head_logits(const HeadProduct& head, const Place& place) {
  const int64_t num_rows = head.num_rows, vocabulary = head.vocabulary;
  const int64_t words = head.size / 2, stride = head.weight_stride / 2;
  const auto* rows = reinterpret_cast<const std::uint32_t*>(head.hidden);
  const auto* columns = reinterpret_cast<const std::uint32_t*>(head.weight);
  parallel_blocks(
      vocabulary, kPanels * kColumns, place.threads, [&](int64_t, int64_t begin, int64_t end) {
        const int64_t block = num_rows < kRowBlock ? num_rows : kRowBlock;
        Buffer<Line> panel_lines(kDepth * kColumns / kLane), sum_lines(block * kColumns / kLane);
        std::uint32_t* panel = panel_lines[0].words;
        float* sums = reinterpret_cast<float*>(sum_lines[0].words);
        for (int64_t first = begin; first < end; first += kColumns) {
          const int64_t width = end - first < kColumns ? end - first : kColumns;
          for (int64_t top = 0; top < num_rows; top += block) {
            const int64_t height = num_rows - top < block ? num_rows - top : block;
            for (int64_t k = 0; k < words; k += kDepth) {
              const int64_t depth = words - k < kDepth ? words - k : kDepth;
              turn_panel(columns + first * stride + k, stride, width, depth, panel);
              for (int64_t i = 0; i < height; i += kRows) {
                const std::uint32_t* from = rows + (top + i) * words + k;
                float* to = sums + i * kColumns;
                switch (height - i < kRows ? height - i : kRows) {
                  case 1:
                    multiply<1>(from, words, panel, depth, to, k == 0);
                    break;
                  case 2:
                    multiply<2>(from, words, panel, depth, to, k == 0);
                    break;
                  case 3:
                    multiply<3>(from, words, panel, depth, to, k == 0);
                    break;
                  case 4:
                    multiply<4>(from, words, panel, depth, to, k == 0);
                    break;
                  case 5:
                    multiply<5>(from, words, panel, depth, to, k == 0);
                    break;
                  default:
                    multiply<6>(from, words, panel, depth, to, k == 0);
                    break;
                }
              }
            }
            write_rows(sums, height, width, head.bias == nullptr ? nullptr : head.bias + first,
                       head.logits + top * vocabulary + first, vocabulary);
          }
        }
      });
}

#else

// Never called: multiplies_bf16() is false.
void head_logits(const HeadProduct&, const Place&) {}

#endif

namespace {

template <class In>
void add(const In* product, bool is_first, int64_t begin, int64_t end, float* total) {
  constexpr int64_t kStep = sizeof(RowLanes) / sizeof(float);
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    RowLanes sum = widened(product + i), before;
    if (!is_first) {
      std::memcpy(&before, total + i, sizeof before);
      sum += before;
    }
    std::memcpy(total + i, &sum, sizeof sum);
  }
  for (; i < end; ++i) {
    total[i] = (is_first ? 0.0f : total[i]) + to_float(product[i]);
  }
}

}  // namespace

void accumulate(const Accumulation& sum, const Place& place) {
  const int threads = worthwhile_threads(sum.count, place.threads);
  parallel_blocks(sum.count, kBlock, threads, [&](int64_t, int64_t begin, int64_t end) {
    if (sum.dtype == kBFloat16) {
      add(static_cast<const BFloat16*>(sum.product), sum.is_first, begin, end, sum.total);
    } else {
      add(static_cast<const Half*>(sum.product), sum.is_first, begin, end, sum.total);
    }
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
