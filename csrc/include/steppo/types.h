// Numbers that Python and every kernel agree on. The Python side: steppo_kernels/config.py,
// outputs.py and backends/compiled/launch.py.
#pragma once

#include <cstdint>

// Functions of headers have internal linkage: the same header is compiled for several instruction
// sets, and a linker that merged the copies could keep one that this CPU cannot run.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define STEPPO_FN __host__ __device__ static inline
#else
#define STEPPO_FN __attribute__((always_inline)) static inline
#endif

namespace steppo {

// The last two are dtypes of logits only.
enum DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

enum Ratio : int { kGeometric = 0, kProduct = 1, kCentered = 2, kToken = 3 };

enum Surrogate : int { kClip = 0, kCispo = 1, kMask = 2, kSoft = 3, kQuadratic = 4, kTv = 5 };

enum Reduction : int { kStepMean = 0, kTrajectoryMean = 1, kTokenMean = 2, kSum = 3 };

enum KLEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2 };

// The entries after the number of tokens are not shown: see steppo_kernels/outputs.py.
enum PolicyMetric : int {
  kPolicyLoss,
  kKLLoss,
  kEntropy,
  kRatioMean,
  kRatioMin,
  kRatioMax,
  kClipFraction,
  kClipFractionLow,
  kClipFractionHigh,
  kTokenClipFraction,
  kApproxKL,
  kApproxKLK3,
  kDeadTokenFraction,
  kNumSteps,
  kNumTokens,
  kPolicyDenominator,
  kNumPolicyMetrics,
};

// The entries after the number of steps are not shown.
enum ValueMetric : int {
  kValueLoss,
  kValueClipFraction,
  kValueMean,
  kReturnMean,
  kExplainedVariance,
  kValueNumSteps,
  kValueDenominator,
  kReturnSquares,
  kResidualSquares,
  kNumValueMetrics,
};

// A number that a caller may have given: itself, or where it lies. One in the memory of a GPU is
// read there, so that nothing waits for it, and one in that of the host never is.
struct Number {
  const double* at;  // null: `value`
  double value;
  bool is_given;
};

STEPPO_FN double value_of(const Number& number) {
  return number.at != nullptr ? *number.at : number.value;
}

}  // namespace steppo
