// Products of hidden states with the rows of the weight that their tokens keep: see
// steppo_kernels/backends/kept_operators.py.
#include "launch.h"
#include "rows.cuh"
#include "scan.cuh"
#include "steppo/cuda.h"

namespace steppo::cuda {
namespace {

// Tokens whose sets some blocks share, a thread each.
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
// Pairs of a block, if all of them are those of the call's tokens.
constexpr std::int64_t kPairs = 64;
// Loads of the weight that a lane has under way, and what one of them is of: 16 bytes or a number.
template <class In>
constexpr int kAtOnce = sizeof(In) == sizeof(double) ? 2 : 4;
template <class In, bool is_wide>
constexpr int kNumbers = is_wide ? kPack<In> : 1;

// The sets of the tokens of a tile, whose pairs are numbered through. `shifts` makes of such a
// number that of all pairs. Tokens are below 2^31.
struct Tile {
  std::int64_t ends[kThreads], shifts[kThreads];
  std::int32_t tokens[kThreads];
};

// Finds the sets of a tile, and returns how many pairs they have. All threads call it.
STEPPO_DEVICE std::int64_t read_tile(const KeptProduct& head, const Sets& sets, unsigned number,
                                     Tile& tile) {
  const std::int64_t row = std::int64_t{number} * kThreads + threadIdx.x;
  std::int64_t token = 0, first = 0, count = 0;
  if (row < head.num_rows) {
    token = head.rows[row];
    first = sets.offsets[token];
    count = sets.offsets[token + 1] - first;
  }
  const Scanned<std::int64_t> pairs = scan_block<kThreads, Sum>(count, std::int64_t{0});
  tile.ends[threadIdx.x] = pairs.before + count;
  tile.shifts[threadIdx.x] = first - pairs.before;
  tile.tokens[threadIdx.x] = static_cast<std::int32_t>(token);
  __syncthreads();
  return pairs.all;
}

// The token of a tile that has a pair.
STEPPO_DEVICE int owner_of(const Tile& tile, std::int64_t pair) {
  int owner = 0;
#pragma unroll
  for (int apart = kThreads / 2; apart > 0; apart /= 2) {
    if (tile.ends[owner + apart - 1] <= pair) owner += apart;
  }
  return owner;
}

// Adds products of numbers of two rows, of which `left` are left, to the sums of the even and of
// the odd ones. A row that is full goes on beyond what is loaded.
template <bool is_wide, int at_once, bool is_full, class In>
STEPPO_DEVICE void multiply(const In* weight, const In* hidden, int left, RowValue<In> (&sums)[2]) {
  constexpr int kCount = kNumbers<In, is_wide>, kApart = kWarp * kCount;
  using Numbers = Pack<In, kCount>;
  Numbers ours[at_once] = {}, others[at_once] = {};
#pragma unroll
  for (int k = 0; k < at_once; ++k) {
    const auto* const from = reinterpret_cast<const Numbers*>(weight + k * kApart);
    if (!is_full && k * kApart >= left) continue;
    if constexpr (is_wide) {
      ours[k] = load_past_l1(from);
    } else {
      ours[k] = *from;
    }
    others[k] = *reinterpret_cast<const Numbers*>(hidden + k * kApart);
  }
#pragma unroll
  for (int k = 0; k < at_once; ++k) {
    RowValue<In> x[kCount], y[kCount];
    unpack(ours[k], x);
    unpack(others[k], y);
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums[j % 2] += x[j] * y[j];
  }
}

// The product of two rows: the same number in all lanes. The row of a token, which all warps of a
// block read, is in L1 after the first.
template <bool is_wide, class In>
STEPPO_DEVICE RowValue<In> product_of(const In* weight, const In* hidden, std::int64_t size) {
  constexpr int kCount = kNumbers<In, is_wide>, kLast = kAtOnce<In> / 2;
  constexpr std::int64_t kApart = kWarp * kCount;
  const int first = threadIdx.x % kWarp * kCount;
  RowValue<In> sums[2] = {};
  std::int64_t i = 0;
#pragma unroll 1
  for (; i + kAtOnce<In> * kApart <= size; i += kAtOnce<In> * kApart) {
    multiply<is_wide, kAtOnce<In>, true>(weight + i + first, hidden + i + first, 0, sums);
  }
#pragma unroll 1
  for (; i < size; i += kLast * kApart) {
    multiply<is_wide, kLast, false>(weight + i + first, hidden + i + first,
                                    static_cast<int>(size - i) - first, sums);
  }
  return sum_of_lanes<kWarp>(sums[0] + sums[1]);
}

// The blocks of a tile share its pairs, so that a long set is not one block's alone. None of them
// has more than another, but for one.
template <class In, bool is_wide>
__global__ void __launch_bounds__(kThreads, 4)
    kept_logits_kernel(const KeptProduct head, const Sets sets, unsigned blocks_of_tile) {
  using Value = RowValue<In>;
  STEPPO_SHARED(Tile, tile);
  const std::int64_t all = read_tile(head, sets, blockIdx.x / blocks_of_tile, tile);
  const std::int64_t block = blockIdx.x % blocks_of_tile, each = all / blocks_of_tile,
                     more = all % blocks_of_tile;
  const std::int64_t begin = block * each + (block < more ? block : more);
  const std::int64_t end = begin + each + (block < more ? 1 : 0);
  const In* const hidden = static_cast<const In*>(head.hidden);
  const In* const weight = static_cast<const In*>(head.weight);
  const In* const bias = static_cast<const In*>(head.bias);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // A lane finds a pair, all lanes work out its product, and the lane writes it.
  for (std::int64_t first = begin + warp; first < end; first += kThreads) {
    const std::int64_t own = first + lane * kWarps;
    const bool has_own = own < end;
    const int owner = has_own ? owner_of(tile, own) : 0;
    const std::int32_t token = tile.tokens[owner];
    const std::int32_t id = has_own ? sets.ids[own + tile.shifts[owner]] : 0;
    Value mine = 0;
    const int count = __popc(__ballot_sync(kAllLanes, has_own));
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      const std::int64_t token_k = __shfl_sync(kAllLanes, token, k);
      const std::int64_t id_k = __shfl_sync(kAllLanes, id, k);
      const Value product = product_of<is_wide>(weight + id_k * head.weight_stride,
                                                hidden + token_k * head.size, head.size);
      if (k == lane) mine = product;
    }
    if (has_own) {
      if (bias != nullptr) mine += to_number(bias[id]);
      static_cast<Value*>(head.logits)[own + tile.shifts[owner]] = mine;
    }
  }
}

}  // namespace

void kept_logits(const KeptProduct& head, const Sets& sets, const IdIndex&, const Place& place) {
  const Launcher launch("kept_logits", place);
  const std::int64_t tiles = ceil_div(head.num_rows, kThreads);
  const std::int64_t blocks = tiles > 0 ? ceil_div(ceil_div(sets.num_pairs, kPairs), tiles) : 0;
  with_logits(head.dtype, [&](auto zero) {
    using In = decltype(zero);
    const bool wide = are_wide<In>(head.hidden, head.size, head.size) &&
                      are_wide<In>(head.weight, head.weight_stride, head.size);
    launch(wide ? listed<kept_logits_kernel<In, true>>() : listed<kept_logits_kernel<In, false>>(),
           tiles * blocks, kThreads, head, sets, static_cast<unsigned>(blocks));
  });
}

}  // namespace steppo::cuda
