// Products of the output head with the rows of the weight that are kept: see
// steppo_kernels/backends/kept_operators.py. Every number is a sum of its own, in an order that
// does not depend on threads. Rows are read as they come, so that the next ones are fetched early.
#include "row_lanes.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace steppo::cpu::STEPPO_ISA {
namespace {

// Rows against which one is multiplied at once, and pairs of vectors that a sum of rows has in
// registers.
constexpr int kDots = 4;
#if defined(__AVX512F__)
constexpr int kPairs = 12;
#else
constexpr int kPairs = 4;
#endif
// Multiplications that one task takes.
constexpr int64_t kWork = int64_t{1} << 18;
constexpr int64_t kLine = 64;

template <class T>
void fetch(const T* from, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(from);
  const int64_t size = count * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(bytes + i);
}

static inline double sum_of(double x) { return x; }
static inline float sum_of(RowLanes x) {
  constexpr int kCount = kPairSize<float> / 2;
  float sums[kCount];
  std::memcpy(sums, &x, sizeof sums);
  for (int width = kCount / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
  }
  return sums[0];
}

// The products of one row with `count` others.
template <int count, class In>
void multiply(const In* one, const In* const* others, int64_t size, RowValue<In>* products) {
  using Lanes = typename RowType<In>::Lanes;
  constexpr int64_t kStep = kPairSize<In>;
  Lanes a[count] = {}, b[count] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    const RowPair<In> x = load(one + i);
    for (int k = 0; k < count; ++k) {
      const RowPair<In> y = load(others[k] + i);
      a[k] += x.a * y.a;
      b[k] += x.b * y.b;
    }
  }
  if (const int64_t left = size - i; left > 0) {
    const RowPair<In> x = load(one + i, left);
    for (int k = 0; k < count; ++k) {
      const RowPair<In> y = load(others[k] + i, left);
      a[k] += x.a * y.a;
      b[k] += x.b * y.b;
    }
  }
  for (int k = 0; k < count; ++k) products[k] = sum_of(a[k] + b[k]);
}

// Calls take(i, product) with the products of one row and `count` others, row_at(i).
template <class In, class At, class Take>
void multiply_all(const In* one, int64_t count, int64_t size, At&& row_at, Take&& take) {
  const In* rows[kDots];
  RowValue<In> products[kDots];
  int64_t i = 0;
  for (; i + kDots <= count; i += kDots) {
    for (int k = 0; k < kDots; ++k) {
      rows[k] = row_at(i + k);
      if (i + k + kDots < count) fetch(row_at(i + k + kDots), size);
    }
    multiply<kDots>(one, rows, size, products);
    for (int k = 0; k < kDots; ++k) take(i + k, products[k]);
  }
  for (; i < count; ++i) {
    rows[0] = row_at(i);
    multiply<1>(one, rows, size, products);
    take(i, products[0]);
  }
}

// A sum of rows, each times a factor: `pairs` pairs of vectors of it, from a column on.
template <int pairs, class In>
struct Columns {
  RowPair<In> sums[pairs];
};

template <int pairs, class In>
Columns<pairs, In> add_rows(const In* const* rows, const RowValue<In>* factors, int64_t count,
                            int64_t column) {
  constexpr int64_t kStep = kPairSize<In>, kAhead = 4;
  Columns<pairs, In> found{};
  for (int64_t i = 0; i < count; ++i) {
    const In* from = rows[i] + column;
    if (i + kAhead < count) fetch(rows[i + kAhead] + column, pairs * kStep);
    for (int k = 0; k < pairs; ++k) {
      const RowPair<In> x = load(from + k * kStep);
      found.sums[k].a += factors[i] * x.a;
      found.sums[k].b += factors[i] * x.b;
    }
  }
  return found;
}

// The last columns, fewer than a pair of vectors has.
template <class In>
RowPair<In> add_last(const In* const* rows, const RowValue<In>* factors, int64_t count,
                     int64_t column, int64_t width) {
  RowPair<In> sum{};
  for (int64_t i = 0; i < count; ++i) {
    const RowPair<In> x = load(rows[i] + column, width);
    sum.a += factors[i] * x.a;
    sum.b += factors[i] * x.b;
  }
  return sum;
}

// Element j of a pair.
template <class In>
RowValue<In> element(const RowPair<In>& x, int j) {
  constexpr int kHalf = kPairSize<In> / 2;
  RowValue<In> a[kHalf], b[kHalf];
  std::memcpy(a, &x.a, sizeof a);
  std::memcpy(b, &x.b, sizeof b);
  if constexpr (kIsInterleaved<In>) return j % 2 == 0 ? a[j / 2] : b[j / 2];
  return j < kHalf ? a[j] : b[j - kHalf];
}

// Writes the first `width` elements of a pair in its own type or, of a half precision, as fp32.
template <class In, class Out>
void write(Out* to, const RowPair<In>& x, int64_t width) {
  if constexpr (sizeof(In) == sizeof(Out)) {
    if (width == kPairSize<In>) {
      store(to, x);
    } else {
      store_from<In>(to, x, width);
    }
  } else {
    for (int j = 0; j < static_cast<int>(width); ++j) to[j] = element<In>(x, j);
  }
}

template <int pairs>
struct Width {
  static constexpr int value = pairs;
};

template <class In, class Out>
void sum_rows(const In* const* rows, const RowValue<In>* factors, int64_t count, int64_t size,
              Out* out) {
  constexpr int64_t kStep = kPairSize<In>;
  int64_t column = 0;
  const auto take = [&](auto wide) {
    constexpr int pairs = decltype(wide)::value;
    for (; column + pairs * kStep <= size; column += pairs * kStep) {
      const Columns<pairs, In> found = add_rows<pairs>(rows, factors, count, column);
      for (int k = 0; k < pairs; ++k) {
        write<In>(out + column + k * kStep, found.sums[k], kStep);
      }
    }
  };
  take(Width<kPairs>{});
  take(Width<kPairs / 4>{});
  take(Width<1>{});
  if (column < size) {
    write<In>(out + column, add_last(rows, factors, count, column, size - column), size - column);
  }
}

// Tasks of about kWork multiplications each, of `pairs` pairs in `count` parts.
template <class F>
void for_parts(int64_t count, int64_t pairs, int64_t size, int threads, F&& body) {
  const int64_t mean = (count > 0 ? pairs / count : 0) * size + 1;
  const int64_t block = mean < kWork ? kWork / mean : 1;
  parallel_blocks(count, block, worthwhile_threads(pairs * size, threads), body);
}

// The rows of a sum whose factor is not 0, `most` at most.
template <class In>
class Terms {
 public:
  explicit Terms(int64_t most) : rows_(most), factors_(most) {}
  void clear() { count_ = 0; }
  void add(const In* row, RowValue<In> factor) {
    if (factor == 0) return;
    rows_[count_] = row;
    factors_[count_++] = factor;
  }
  template <class Out>
  void sum(int64_t size, Out* out) {
    sum_rows(rows_.get(), factors_.get(), count_, size, out);
  }
  RowValue<In> sum_of_factors() {
    double sum = 0;
    for (int64_t i = 0; i < count_; ++i) sum += factors_[i];
    return static_cast<RowValue<In>>(sum);
  }

 private:
  Buffer<const In*> rows_;
  Buffer<RowValue<In>> factors_;
  int64_t count_ = 0;
};

// The longest of `count` spans [begin(i), end(i)).
template <class Length>
int64_t longest_of(int64_t count, Length&& length) {
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) longest = length(i) > longest ? length(i) : longest;
  return longest;
}

// Adds up what the parts of a long id have left, `stride` apart, in their order.
template <class In>
void join_parts(const RowValue<In>* sums, int64_t stride, int64_t count, int64_t size, In* out) {
  constexpr int64_t kColumns = 256;
  RowValue<In> joined[kColumns];
  for (int64_t column = 0; column < size; column += kColumns) {
    const int64_t width = size - column < kColumns ? size - column : kColumns;
    fill(joined, 0, width, RowValue<In>(0));
    for (int64_t k = 0; k < count; ++k) {
      const RowValue<In>* from = sums + k * stride + column;
      for (int64_t j = 0; j < width; ++j) joined[j] += from[j];
    }
    for (int64_t j = 0; j < width; ++j) store_one(out + column + j, joined[j]);
  }
}

// Zeroes memory that is larger than the caches, past them: stores that go through them read it
// first, and take twice as long.
void clear(void* data, int64_t bytes, int threads) {
  constexpr int64_t kBytes = int64_t{1} << 22;
  const bool is_worthwhile = bytes > kBytes;
  parallel_blocks(bytes, kBytes, is_worthwhile ? threads : 1,
                  [&](int64_t, int64_t begin, int64_t end) {
                    char* at = static_cast<char*>(data) + begin;
                    char* const last = static_cast<char*>(data) + end;
#if defined(__SSE2__)
                    if (is_worthwhile) {
                      for (; at < last && reinterpret_cast<std::uintptr_t>(at) % kLine != 0; ++at)
                        *at = 0;
                      for (; last - at >= kLine; at += kLine) {
                        for (int i = 0; i < kLine; i += 16) {
                          _mm_stream_si128(reinterpret_cast<__m128i*>(at + i), _mm_setzero_si128());
                        }
                      }
                      _mm_sfence();
                    }
#endif
                    std::memset(at, 0, static_cast<size_t>(last - at));
                  });
}

}  // namespace

void kept_logits(const KeptProduct& head, const Sets& sets, const IdIndex& index,
                 const Place& place) {
  with_logits(head.dtype, [&](auto zero) {
    using In = decltype(zero);
    using Value = RowValue<In>;
    const In* const hidden = static_cast<const In*>(head.hidden);
    const In* const weight = static_cast<const In*>(head.weight);
    const In* const bias = static_cast<const In*>(head.bias);
    Value* const logits = static_cast<Value*>(head.logits);
    const auto plus_bias = [&](Value x, int64_t id) {
      return bias != nullptr ? x + to_float(bias[id]) : x;
    };
    if (index.num_parts > 0) {
      const auto multiply_part = [&](int64_t part) {
        const int64_t id = index.ids[index.part_ids[part]], first = index.parts[part];
        const int64_t* tokens = index.tokens + first;
        const int64_t* pairs = index.pairs + first;
        multiply_all(
            weight + id * head.weight_stride, index.parts[part + 1] - first, head.size,
            [&](int64_t i) { return hidden + tokens[i] * head.size; },
            [&](int64_t i, Value x) { logits[pairs[i]] = plus_bias(x, id); });
      };
      for_parts(index.num_parts, index.num_pairs, head.size, place.threads,
                [&](int64_t, int64_t begin, int64_t end) {
                  for (int64_t part = begin; part < end; ++part) {
                    if (part + 1 < end) {
                      const int64_t next = index.ids[index.part_ids[part + 1]];
                      fetch(weight + next * head.weight_stride, head.size);
                    }
                    multiply_part(part);
                  }
                });
      return;
    }
    for_parts(head.num_rows, sets.num_pairs, head.size, place.threads,
              [&](int64_t, int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                  const int64_t token = head.rows[i], first = sets.offsets[token];
                  const int32_t* ids = sets.ids + first;
                  multiply_all(
                      hidden + token * head.size, sets.offsets[token + 1] - first, head.size,
                      [&](int64_t k) { return weight + ids[k] * head.weight_stride; },
                      [&](int64_t k, Value x) { logits[first + k] = plus_bias(x, ids[k]); });
                }
              });
  });
}

void kept_hidden_gradient(const KeptHiddenGradient& head, const Sets& sets, const Place& place) {
  with_sum(head.dtype, head.grad_dtype, [&](auto zero, auto grad_zero) {
    using In = decltype(zero);
    using Out = decltype(grad_zero);
    using Value = RowValue<In>;
    const In* const weight = static_cast<const In*>(head.weight);
    const Value* const grad_logits = static_cast<const Value*>(head.grad_logits);
    const int64_t longest = longest_of(head.num_rows, [&](int64_t i) {
      return sets.offsets[head.rows[i] + 1] - sets.offsets[head.rows[i]];
    });
    for_parts(head.num_rows, sets.num_pairs, head.size, place.threads,
              [&](int64_t, int64_t begin, int64_t end) {
                Terms<In> terms(longest);
                for (int64_t i = begin; i < end; ++i) {
                  const int64_t token = head.rows[i], first = sets.offsets[token];
                  const int64_t last = sets.offsets[token + 1];
                  terms.clear();
                  for (int64_t p = first; p < last; ++p) {
                    terms.add(weight + sets.ids[p] * head.weight_stride, grad_logits[p]);
                  }
                  terms.sum(head.size, static_cast<Out*>(head.grad_hidden) + token * head.size);
                }
              });
  });
}

void kept_weight_gradient(const KeptWeightGradient& head, const IdIndex& index,
                          const Place& place) {
  with_logits(head.dtype, [&](auto zero) {
    using In = decltype(zero);
    using Value = RowValue<In>;
    const In* const hidden = static_cast<const In*>(head.hidden);
    const Value* const grad_logits = static_cast<const Value*>(head.grad_logits);
    Value* const sums = static_cast<Value*>(head.sums);
    In* const grad_weight = static_cast<In*>(head.grad_weight);
    Value* const grad_bias = static_cast<Value*>(head.grad_bias);
    const auto row_of = [&](int64_t id) {
      return head.compact ? id : static_cast<int64_t>(index.ids[id]);
    };
    const auto add_part = [&](Terms<In>& terms, int64_t part) {
      const int64_t first = index.parts[part], last = index.parts[part + 1];
      terms.clear();
      for (int64_t i = first; i < last; ++i) {
        terms.add(hidden + index.tokens[i] * head.size, grad_logits[index.pairs[i]]);
      }
    };
    const int64_t stride = head.size + 1, rows = head.num_rows;
    if (!head.compact) {
      clear(grad_weight, rows * head.size * static_cast<int64_t>(sizeof(In)), place.threads);
      if (grad_bias != nullptr) fill(grad_bias, 0, rows, Value(0));
    }
    const int64_t longest = longest_of(
        index.num_parts, [&](int64_t part) { return index.parts[part + 1] - index.parts[part]; });
    for_parts(index.num_parts, index.num_pairs, head.size, place.threads,
              [&](int64_t, int64_t begin, int64_t end) {
                Terms<In> terms(longest);
                for (int64_t part = begin; part < end; ++part) {
                  add_part(terms, part);
                  if (const int64_t slot = index.part_slots[part]; slot >= 0) {
                    terms.sum(head.size, sums + slot * stride);
                    sums[slot * stride + head.size] = terms.sum_of_factors();
                    continue;
                  }
                  const int64_t row = row_of(index.part_ids[part]);
                  terms.sum(head.size, grad_weight + row * head.size);
                  if (grad_bias != nullptr) grad_bias[row] = terms.sum_of_factors();
                }
              });
    parallel_for(index.num_long, place.threads, [&](int64_t x) {
      const int64_t first = index.long_slots[x], count = index.long_slots[x + 1] - first;
      const int64_t row = row_of(index.long_ids[x]);
      const Value* const from = sums + first * stride;
      join_parts(from, stride, count, head.size, grad_weight + row * head.size);
      if (grad_bias != nullptr) {
        join_parts(from + head.size, stride, count, 1, grad_bias + row);
      }
    });
  });
}

}  // namespace steppo::cpu::STEPPO_ISA
