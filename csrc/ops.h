// The CPU implementations of the ops whose schemas para_kernels/ops.py defines.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace para_kernels {

// residual = hidden_out - hidden_in, rounded to their dtype, and float32 sums (sum |previous - residual|, sum |previous|).
// The sums do not depend on the number of threads.
std::tuple<at::Tensor, at::Tensor> residual_diff(
    const at::Tensor& hidden_in, const at::Tensor& hidden_out, const std::optional<at::Tensor>& previous);

// The attention over the union of two disjoint sets of keys, from the attention over each:
// out (B, S, H, D) with lse (B, H, S), or out (T, H, D) with lse (H, T).
std::tuple<at::Tensor, at::Tensor> merge_states(
    const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b, const at::Tensor& lse_b);

}  // namespace para_kernels
