#include <algorithm>

#include "kept_sets.h"

namespace small_calls {
namespace {

using namespace steppo;

using Numbers = std::vector<std::int64_t>;

// The pairs of sets in the order of their ids, in parts of up to `longest`.
struct Index {
  std::vector<std::int32_t> ids;
  Numbers pairs, tokens, parts{0}, part_ids, part_slots, long_ids, long_slots{0};

  Index(const KeptSets& kept, std::int64_t longest) {
    for (std::int64_t p = 0; p < kept.num_pairs(); ++p) pairs.push_back(p);
    const auto id_of = [&](std::int64_t pair) { return kept.ids[static_cast<std::size_t>(pair)]; };
    std::stable_sort(pairs.begin(), pairs.end(),
                     [&](std::int64_t a, std::int64_t b) { return id_of(a) < id_of(b); });
    for (const std::int64_t pair : pairs) {
      tokens.push_back(kept.tokens[static_cast<std::size_t>(pair)]);
    }
    for (std::size_t begin = 0, end; begin < pairs.size(); begin = end) {
      const std::int32_t id = id_of(pairs[begin]);
      for (end = begin; end < pairs.size() && id_of(pairs[end]) == id;) ++end;
      add(id, static_cast<std::int64_t>(end), longest);
    }
  }

  IdIndex index() const {
    return {ids.data(),      pairs.data(),      tokens.data(),    parts.data(),
            part_ids.data(), part_slots.data(), long_ids.data(),  long_slots.data(),
            length(ids),     length(pairs),     length(part_ids), length(long_ids)};
  }

 private:
  template <class T>
  static std::int64_t length(const std::vector<T>& x) {
    return static_cast<std::int64_t>(x.size());
  }

  // The next id, whose entries end there.
  void add(std::int32_t id, std::int64_t end, std::int64_t longest) {
    const bool is_long = end - parts.back() > longest;
    const std::int64_t number = length(ids);
    ids.push_back(id);
    std::int64_t slot = long_slots.back();
    while (parts.back() < end) {
      part_ids.push_back(number);
      part_slots.push_back(is_long ? slot++ : -1);
      parts.push_back(std::min(parts.back() + longest, end));
    }
    if (!is_long) return;
    long_ids.push_back(number);
    long_slots.push_back(slot);
  }
};

// Some ids have several parts, and sums have two slices.
constexpr std::int64_t kTokens = 300, kSize = 132, kWords = 6;

// More tokens than a block finds at once.
const Listed logits("kept_logits", [](Run& run) {
  const KeptSets kept(run, 200, kWords, kWords);
  const auto hidden = run.numbers(kept.num_tokens() * kSize), weight = run.numbers(kWords * kSize),
             bias = run.numbers(kWords);
  cuda::kept_logits({kFloat32, hidden.data(), weight.data(), kSize, bias.data(), kept.rows.data(),
                     kept.num_rows(), kSize, run.output<float>(kept.num_pairs())},
                    kept.sets(), {}, run.place());
});

// Rows of two blocks' widths, and sets of several parts, which a launch of their own joins.
void directions(Run& run, std::int64_t size) {
  const std::int64_t part = 3, words = 9;
  const KeptSets kept(run, 12, words, words);
  const auto hidden = run.numbers(kept.num_tokens() * size), weight = run.numbers(words * size);
  const std::int64_t slots = kept.num_pairs() / part + 1, rows = kept.num_rows();
  float* const logits = run.output<float>(kept.num_pairs());
  float* const found = run.output<float>(rows * size);
  std::vector<float> sums(static_cast<std::size_t>(slots * size));
  std::vector<double> tops(static_cast<std::size_t>(rows + slots)), totals = tops;
  cuda::kept_directions(
      {kFloat32, hidden.data(), weight.data(), size, nullptr, kept.rows.data(), rows, size, logits},
      {kFloat32, logits, kept.places.data(), kept.rows.data(), rows, nullptr, 0.7, 0}, kept.sets(),
      {found, part, sums.data(), tops.data(), totals.data()}, run.place());
  const auto grads = run.numbers(rows);
  cuda::scale_directions({kFloat32, found, grads.data(), kept.rows.data(), rows, size,
                          run.output<float>(kept.num_tokens() * size)},
                         run.place());
}
const Listed narrow("kept_directions", [](Run& run) { directions(run, kSize); });
const Listed wide("kept_directions_of_wide_rows", [](Run& run) { directions(run, 2060); });

const Listed of_hidden("kept_hidden_gradient", [](Run& run) {
  const KeptSets kept(run, 60, kWords, kWords);
  const auto grads = run.numbers(kept.num_pairs()), weight = run.numbers(kWords * kSize);
  cuda::kept_hidden_gradient(
      {kFloat32, kFloat32, grads.data(), weight.data(), kSize, kept.rows.data(), kept.num_rows(),
       kSize, run.output<float>(kept.num_tokens() * kSize)},
      kept.sets(), run.place());
});

// A launch of its own joins the parts of an id.
const Listed of_weight("kept_weight_gradient", [](Run& run) {
  const KeptSets kept(run, kTokens, kWords, kWords);
  const Index by_id(kept, 40);
  const auto grads = run.numbers(kept.num_pairs()), hidden = run.numbers(kTokens * kSize);
  const std::int64_t slots = by_id.long_slots.back();
  cuda::kept_weight_gradient(
      {kFloat32, grads.data(), hidden.data(), kSize, false, run.output<float>(slots * (kSize + 1)),
       kWords, run.output<float>(kWords * kSize), run.output<float>(kWords)},
      by_id.index(), run.place());
});

}  // namespace
}  // namespace small_calls
