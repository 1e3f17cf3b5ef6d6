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

enum Ratio : int { kGeometric = 0, kProduct = 1, kCentered = 2 };

enum Reduction : int { kStepMean = 0, kTrajectoryMean = 1, kTokenMean = 2, kSum = 3 };

enum KLEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2 };

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
  kNumPolicyMetrics,
};

enum ValueMetric : int {
  kValueLoss,
  kValueClipFraction,
  kValueMean,
  kReturnMean,
  kExplainedVariance,
  kValueNumSteps,
  kNumValueMetrics,
};

// Hyper-parameters of the policy loss: StepPOConfig in steppo_kernels/config.py.
struct PolicyConfig {
  Ratio ratio;
  double clip_low;
  double clip_high;
  double dual_clip;  // 0 is off
  double log_ratio_max;
  Reduction reduction;
  double kl_coef;
  KLEstimator kl_estimator;
  double entropy_coef;
};

// A PolicyConfig from numbers as they cross from Python.
STEPPO_FN PolicyConfig policy_config(int ratio, double clip_low, double clip_high, double dual_clip,
                                     double log_ratio_max, int reduction, double kl_coef,
                                     int kl_estimator, double entropy_coef) {
  return {static_cast<Ratio>(ratio),
          clip_low,
          clip_high,
          dual_clip,
          log_ratio_max,
          static_cast<Reduction>(reduction),
          kl_coef,
          static_cast<KLEstimator>(kl_estimator),
          entropy_coef};
}

}  // namespace steppo
