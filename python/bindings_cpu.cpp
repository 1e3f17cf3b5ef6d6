// The module steppo_kernels._C_cpu: every operator of csrc/include/steppo/cpu_ops.inc.
#include "cast.h"
#include "steppo/cpu.h"

PYBIND11_MODULE(_C_cpu, m) {
  using steppo::binding::def;
  m.doc() = "CPU kernels of steppo_kernels on raw pointers; see csrc/include/steppo/cpu_ops.inc";
  m.def("isa", &steppo::cpu::isa);
  m.def("isas", &steppo::cpu::isas);
  m.def("multiplies_bf16", &steppo::cpu::multiplies_bf16);
  m.def("compiler", [] { return STEPPO_COMPILER; });
  def(m, "segment_mask", steppo::cpu::segment_mask);
  def(m, "segment_ids", steppo::cpu::segment_ids);
  def(m, "segment_rows", steppo::cpu::segment_rows);
  def(m, "mark_actions", steppo::cpu::mark_actions);
  def(m, "compact", steppo::cpu::compact);
  def(m, "broadcast_to_tokens", steppo::cpu::broadcast_to_tokens);
  def(m, "sum_over_steps", steppo::cpu::sum_over_steps);
  def(m, "step_gae", steppo::cpu::step_gae);
  def(m, "value_loss", steppo::cpu::value_loss);
  def(m, "policy_loss", steppo::cpu::policy_loss);
  def(m, "policy_loss_masked", steppo::cpu::policy_loss_masked);
  def(m, "token_log_probs", steppo::cpu::token_log_probs);
  def(m, "token_log_probs_backward", steppo::cpu::token_log_probs_backward);
  def(m, "head_logits", steppo::cpu::head_logits);
  def(m, "accumulate", steppo::cpu::accumulate);
}
