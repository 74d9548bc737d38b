#include "checks.h"
#include "kernels/kernels.h"
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <vector>

namespace para_kernels {

namespace {

// Elements that one partial sum covers: large against the cost of a task, small enough for many tasks per thread. It is
// fixed, and the partial sums are added in order, so the result is the same for every number of threads.
constexpr int64_t kChunk = 32768;

// Rows shorter than this are gathered by a copy first: a kernel call per row would cost more.
constexpr int64_t kShortestRow = 32;

constexpr int kInputs = 3;

// One shape and the strides of the inputs, after every pair of dimensions that lies flat in all inputs became one.
struct RowLayout {
  c10::SmallVector<int64_t, 6> outer_sizes;  // innermost first
  std::array<c10::SmallVector<int64_t, 6>, kInputs> outer_strides;
  int64_t row = 1;

  explicit RowLayout(const std::array<at::Tensor, kInputs>& inputs) {
    const at::Tensor& first = inputs[0];
    for (int64_t dim = first.dim() - 1; dim >= 0; --dim) {
      if (first.size(dim) != 1) {
        prepend(first.size(dim), {inputs[0].stride(dim), inputs[1].stride(dim), inputs[2].stride(dim)});
      }
    }
  }

  // Element offset, in input `input`, of the row with index `index`.
  int64_t offset(int input, int64_t index) const {
    int64_t offset = 0;
    for (size_t dim = 0; dim < outer_sizes.size(); ++dim) {
      offset += index % outer_sizes[dim] * outer_strides[input][dim];
      index /= outer_sizes[dim];
    }
    return offset;
  }

 private:
  void prepend(int64_t size, const std::array<int64_t, kInputs>& strides) {
    const bool in_row = outer_sizes.empty();
    bool flat = true;
    for (int input = 0; input < kInputs; ++input) {
      flat &= strides[input] == (in_row ? row : outer_strides[input].back() * outer_sizes.back());
    }
    if (flat) {
      (in_row ? row : outer_sizes.back()) *= size;
      return;
    }
    outer_sizes.push_back(size);
    for (int input = 0; input < kInputs; ++input) {
      outer_strides[input].push_back(strides[input]);
    }
  }
};

at::Tensor with_flat_rows(const at::Tensor& tensor) {
  const bool flat = tensor.dim() > 0 && tensor.stride(-1) == 1 && tensor.size(-1) >= kShortestRow;
  return flat ? tensor : tensor.contiguous();
}

void check_arguments(
    const at::Tensor& hidden_in, const at::Tensor& hidden_out, const std::optional<at::Tensor>& previous) {
  check_floating(hidden_in, "hidden_in");
  check_same_dtype(hidden_out, "hidden_out", hidden_in, "hidden_in");
  check_same_shape(hidden_out, "hidden_out", hidden_in, "hidden_in");
  if (previous) {
    check_same_dtype(*previous, "previous", hidden_in, "hidden_in");
    check_same_shape(*previous, "previous", hidden_in, "hidden_in");
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> residual_diff(
    const at::Tensor& hidden_in, const at::Tensor& hidden_out, const std::optional<at::Tensor>& previous) {
  check_arguments(hidden_in, hidden_out, previous);
  at::Tensor residual = at::empty(hidden_in.sizes(), hidden_in.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor sums = at::empty({2}, hidden_in.options().dtype(at::kFloat));

  const at::Tensor flat_in = with_flat_rows(hidden_in);
  const std::array<at::Tensor, kInputs> inputs = {
      flat_in, with_flat_rows(hidden_out), previous ? with_flat_rows(*previous) : flat_in};
  const RowLayout layout(inputs);
  const ResidualDiffRun run = kernel_table().residual_diff_run(hidden_in.scalar_type());
  const auto element_size = static_cast<int64_t>(hidden_in.element_size());
  const std::array<const char*, kInputs> data = {
      static_cast<const char*>(inputs[0].const_data_ptr()), static_cast<const char*>(inputs[1].const_data_ptr()),
      static_cast<const char*>(inputs[2].const_data_ptr())};
  char* residual_data = static_cast<char*>(residual.mutable_data_ptr());

  const int64_t numel = hidden_in.numel();
  std::vector<AbsSums> partials((numel + kChunk - 1) / kChunk);

  const auto sum_chunk = [&](int64_t begin, int64_t end) {
    AbsSums sum;
    for (int64_t position = begin; position < end;) {
      const int64_t index = position / layout.row;
      const int64_t column = position % layout.row;
      const int64_t length = std::min(layout.row - column, end - position);
      const auto at = [&](int input) { return data[input] + (layout.offset(input, index) + column) * element_size; };
      const AbsSums part =
          run(at(0), at(1), previous ? at(2) : nullptr, residual_data + position * element_size, length);
      sum.change += part.change;
      sum.reference += part.reference;
      position += length;
    }
    return sum;
  };
  at::parallel_for(0, static_cast<int64_t>(partials.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      partials[chunk] = sum_chunk(chunk * kChunk, std::min((chunk + 1) * kChunk, numel));
    }
  });

  AbsSums total;
  for (const AbsSums& partial : partials) {
    total.change += partial.change;
    total.reference += partial.reference;
  }
  float* sums_data = sums.mutable_data_ptr<float>();
  sums_data[0] = static_cast<float>(total.change);
  sums_data[1] = static_cast<float>(total.reference);
  return {residual, sums};
}

}  // namespace para_kernels
