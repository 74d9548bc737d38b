#include "checks.h"
#include "kernels/kernels.h"
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace para_kernels {

namespace {

// Elements of `out` that make a task worth another thread.
constexpr int64_t kGrain = 32768;

void check_lse(const at::Tensor& lse, const char* name, const at::Tensor& out) {
  const bool packed = out.dim() == 3;
  TORCH_CHECK_VALUE(
      lse.scalar_type() == at::kFloat || (lse.scalar_type() == at::kDouble && out.scalar_type() == at::kDouble),
      name, ": got dtype ", lse.scalar_type(), ", must be Float, or Double where out_a is Double");
  const std::vector<int64_t> expected = packed ? std::vector<int64_t>{out.size(1), out.size(0)}
                                               : std::vector<int64_t>{out.size(0), out.size(2), out.size(1)};
  TORCH_CHECK_VALUE(
      lse.sizes() == at::IntArrayRef(expected),
      name, ": got shape ", lse.sizes(), ", must be ", at::IntArrayRef(expected), " for out_a of shape ", out.sizes());
}

void check_arguments(
    const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b, const at::Tensor& lse_b) {
  check_floating(out_a, "out_a");
  TORCH_CHECK_VALUE(
      out_a.dim() == 4 || out_a.dim() == 3,
      "out_a: got shape ", out_a.sizes(), ", must be (B, S, H, D) or (T, H, D)");
  check_same_dtype(out_b, "out_b", out_a, "out_a");
  check_same_shape(out_b, "out_b", out_a, "out_a");
  check_lse(lse_a, "lse_a", out_a);
  check_lse(lse_b, "lse_b", out_a);
  check_same_dtype(lse_b, "lse_b", lse_a, "lse_a");
}

// A state (B, S, H, D) with (B, H, S); a packed one is a batch of one.
struct State {
  at::Tensor out;
  at::Tensor lse;

  State(const at::Tensor& out_, const at::Tensor& lse_)
      : out(out_.dim() == 3 ? out_.unsqueeze(0) : out_), lse(out_.dim() == 3 ? lse_.unsqueeze(0) : lse_) {
    if (out.stride(-1) != 1) {
      out = out.contiguous();
    }
  }

  const char* out_row(int64_t b, int64_t s, int64_t h) const {
    const int64_t offset = b * out.stride(0) + s * out.stride(1) + h * out.stride(2);
    return static_cast<const char*>(out.const_data_ptr()) + offset * static_cast<int64_t>(out.element_size());
  }

  template <typename L>
  const L& lse_at(int64_t b, int64_t s, int64_t h) const {
    return lse.const_data_ptr<L>()[b * lse.stride(0) + h * lse.stride(1) + s * lse.stride(2)];
  }
};

// softmax over the two states, in double: one row of `out` costs far more than its two weights.
struct MergedWeights {
  double a;
  double b;
  double lse;

  MergedWeights(double lse_a, double lse_b) {
    const double ratio = std::exp(-std::abs(lse_a - lse_b));
    const double larger = 1 / (1 + ratio);
    const double smaller = ratio / (1 + ratio);
    a = lse_a < lse_b ? smaller : larger;
    b = lse_a < lse_b ? larger : smaller;
    lse = std::max(lse_a, lse_b) + std::log1p(ratio);
  }
};

template <typename L>
void merge(const State& a, const State& b, at::Tensor& out, at::Tensor& lse) {
  constexpr L kNoKeys = -std::numeric_limits<L>::infinity();
  const WeightedSumRow weighted_sum = kernel_table().weighted_sum_row(out.scalar_type());
  const int64_t S = a.out.size(1), H = a.out.size(2), D = a.out.size(3);
  const auto row_bytes = static_cast<size_t>(D) * out.element_size();
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  L* lse_data = lse.mutable_data_ptr<L>();

  const auto merge_row = [&](int64_t batch, int64_t s, int64_t h, char* out_row) -> L {
    const L lse_a = a.lse_at<L>(batch, s, h);
    const L lse_b = b.lse_at<L>(batch, s, h);
    // A side without keys is not read: what stands in its rows must not matter.
    if (lse_a == kNoKeys && lse_b == kNoKeys) {
      std::memset(out_row, 0, row_bytes);
      return kNoKeys;
    }
    if (lse_a == kNoKeys || lse_b == kNoKeys) {
      const State& only = lse_a == kNoKeys ? b : a;
      std::memcpy(out_row, only.out_row(batch, s, h), row_bytes);
      return only.lse_at<L>(batch, s, h);
    }
    const MergedWeights merged(lse_a, lse_b);
    weighted_sum(a.out_row(batch, s, h), merged.a, b.out_row(batch, s, h), merged.b, out_row, D);
    return static_cast<L>(merged.lse);
  };

  const int64_t rows = a.out.size(0) * S * H;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, D)), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t h = row % H, s = row / H % S, batch = row / H / S;
      lse_data[(batch * H + h) * S + s] = merge_row(batch, s, h, out_data + static_cast<size_t>(row) * row_bytes);
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> merge_states(
    const at::Tensor& out_a, const at::Tensor& lse_a, const at::Tensor& out_b, const at::Tensor& lse_b) {
  check_arguments(out_a, lse_a, out_b, lse_b);
  at::Tensor out = at::empty(out_a.sizes(), out_a.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor lse = at::empty(lse_a.sizes(), lse_a.options().memory_format(at::MemoryFormat::Contiguous));
  const State a(out_a, lse_a);
  const State b(out_b, lse_b);
  if (lse.scalar_type() == at::kDouble) {
    merge<double>(a, b, out, lse);
  } else {
    merge<float>(a, b, out, lse);
  }
  return {out, lse};
}

}  // namespace para_kernels
