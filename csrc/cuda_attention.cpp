#include "cuda_attention.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace py = pybind11;

namespace para_kernels {

namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr std::uint32_t kMinusInfinity = 0xff800000;  // the bits of a float
constexpr std::size_t kMaxPlans = 4096;
constexpr std::uint64_t kAlignment = 16;  // bytes; kernels and the copy engine tell whether a tensor starts at a multiple

// The interpreter's lock guards all of this. It is never destroyed: at exit Python may be gone before it.
struct State {
  std::unordered_map<std::string, std::shared_ptr<const AttentionPlan>> plans;
  std::unordered_set<std::string> by_cudnn;
  py::object stream_for;
  py::object forward;
};

State& state() {
  static State& state = *new State;
  return state;
}

void append(std::string& key, std::int64_t value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// Everything but the addresses, the lengths and the scale.
std::string key_of(const AttentionInputs& inputs) {
  std::string key;
  key.reserve(256);
  std::uint64_t misaligned = 0;
  for (const at::Tensor* tensor : {&inputs.q, &inputs.k, &inputs.v}) {
    append(key, tensor->dim());
    for (std::int64_t i = 0; i < tensor->dim(); ++i) {
      append(key, tensor->sizes()[i]);
      append(key, tensor->strides()[i]);
    }
    misaligned = misaligned * 2 + (reinterpret_cast<std::uint64_t>(tensor->data_ptr()) % kAlignment != 0);
  }
  append(key, misaligned);
  append(key, static_cast<std::int64_t>(inputs.q.scalar_type()));
  append(key, inputs.q.device().index());
  append(key, inputs.q_lens ? inputs.q_lens->numel() : -1);
  append(key, inputs.kv_lens ? inputs.kv_lens->numel() : -1);
  append(key, inputs.packed_max_q.value_or(-1));
  return key;
}

bool pass_source(Call& call, const at::Tensor& tensor, const AttentionPlan::Source& source) {
  return source.shape.empty() ? call.pass(tensor) : call.pass(tensor, source.shape, source.strides);
}

bool pass_lens(Call& call, const OptionalTensor& lens, const AttentionPlan& plan, const at::Tensor& out) {
  if (lens) {
    return call.pass(*lens);
  }
  return plan.lens_are_pointers ? call.pass_unfollowed(out) : call.pass_none();
}

bool pass_integers(Call& call, const std::vector<std::int64_t>& integers) {
  return std::all_of(integers.begin(), integers.end(), [&](std::int64_t integer) { return call.pass(integer); });
}

at::Tensor scratch_of(const AttentionPlan& plan, const at::Tensor& out) {
  return plan.merge ? at::empty({plan.merge->scratch_elements}, out.options().dtype(at::kFloat)) : out;
}

bool pass_scratch(Call& call, const AttentionPlan& plan, const at::Tensor& scratch) {
  return plan.merge ? call.pass(scratch) : call.pass_unfollowed(scratch);
}

bool launch(
    const AttentionPlan& plan, const AttentionInputs& inputs, const at::Tensor& out, const at::Tensor& lse,
    std::uint64_t stream) {
  const at::Tensor scratch = scratch_of(plan, out);
  Call call(*plan.launcher);
  const bool fits = pass_source(call, inputs.q, plan.sources[0]) && pass_source(call, inputs.k, plan.sources[1]) &&
                    pass_source(call, inputs.v, plan.sources[2]) && call.pass(out) && call.pass(lse) &&
                    (!plan.has_scratch || pass_scratch(call, plan, scratch)) &&
                    pass_lens(call, inputs.q_lens, plan, out) && pass_lens(call, inputs.kv_lens, plan, out) &&
                    call.pass(inputs.scale * kLog2E) && pass_integers(call, plan.integers);
  if (fits && inputs.packed_max_q) {
    plan.launcher->fill(out, 0, stream);
    plan.launcher->fill(lse, kMinusInfinity, stream);
  }
  if (!plan.merge) {
    return fits && call.submit(plan.grid, stream);
  }
  Call merge(*plan.merge->launcher);
  return fits && merge.pass(scratch) && merge.pass(out) && merge.pass(lse) &&
         pass_integers(merge, plan.merge->integers) && call.submit(plan.grid, stream) &&
         merge.submit(plan.merge->grid, stream);
}

bool launch_as_planned(
    const std::string& key, const AttentionInputs& inputs, const at::Tensor& out, const at::Tensor& lse) {
  const auto found = state().plans.find(key);
  if (found == state().plans.end()) {
    return false;
  }
  const std::shared_ptr<const AttentionPlan> plan = found->second;  // a launch lets other threads run
  const py::object stream = state().stream_for(static_cast<int>(inputs.q.device().index()));
  return !stream.is_none() && launch(*plan, inputs, out, lse, stream.cast<std::uint64_t>());
}

}  // namespace

AttentionOutputs attention_outputs(const at::Tensor& q) {
  TORCH_CHECK_VALUE(q.dim() == 3 || q.dim() == 4, "q: got shape ", q.sizes(), ", must be (B, S, H, D) or (T, H, D)");
  const auto batch = q.sizes().slice(0, q.dim() - 3);
  c10::SmallVector<std::int64_t, 3> lse(batch.begin(), batch.end());
  lse.append({q.size(-2), q.size(-3)});
  return {at::empty(q.sizes(), q.options()), at::empty(lse, q.options().dtype(at::kFloat))};
}

void keep_attention_plan(const AttentionInputs& inputs, AttentionPlan plan) {
  if (state().plans.size() >= kMaxPlans) {
    forget_attention_plans();
  }
  state().plans.insert_or_assign(key_of(inputs), std::make_shared<const AttentionPlan>(std::move(plan)));
}

void keep_cudnn_plan(const AttentionInputs& inputs) {
  if (state().by_cudnn.size() >= kMaxPlans) {
    state().by_cudnn.clear();
  }
  state().by_cudnn.insert(key_of(inputs));
}

void forget_attention_plans() {
  state().by_cudnn.clear();
  const auto forgotten = std::exchange(state().plans, {});
}

void use_stream_for(py::object stream_for) {
  state().stream_for = std::move(stream_for);
}

void use_attention_forward(py::object forward) {
  state().forward = std::move(forward);
}

AttentionOutputs cudnn_attention(const AttentionInputs& inputs) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto result = at::_scaled_dot_product_cudnn_attention(
      inputs.q.transpose(1, 2), inputs.k.transpose(1, 2), inputs.v.transpose(1, 2), /*attn_bias=*/std::nullopt,
      /*compute_log_sumexp=*/true, /*dropout_p=*/0.0, /*is_causal=*/false, /*return_debug_mask=*/false, inputs.scale);
  // Both are laid out like this already, with a dimension of 1 behind lse in some versions.
  return {
      std::get<0>(result).transpose(1, 2).contiguous(),
      std::get<1>(result).contiguous().view({inputs.q.size(0), inputs.q.size(2), inputs.q.size(1)})};
}

AttentionOutputs cuda_attention(const AttentionInputs& inputs) {
  const py::gil_scoped_acquire gil;
  const std::string key = key_of(inputs);
  if (state().by_cudnn.count(key) != 0) {
    const py::gil_scoped_release released;
    return cudnn_attention(inputs);
  }
  const auto outputs = attention_outputs(inputs.q);
  const auto& [out, lse] = outputs;
  if (!launch_as_planned(key, inputs, out, lse)) {
    if (inputs.packed_max_q) {  // rows of no sample come back as on the CPU
      out.zero_();
      lse.fill_(-std::numeric_limits<float>::infinity());
    }
    TORCH_CHECK(state().forward, "para_kernels.ops has not been imported");
    state().forward(
        inputs.q, inputs.k, inputs.v, out, lse, inputs.q_lens, inputs.kv_lens, inputs.scale, inputs.packed_max_q);
  }
  return outputs;
}

}  // namespace para_kernels
