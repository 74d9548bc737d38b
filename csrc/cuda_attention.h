// The attention operators on CUDA: a call like an earlier one is launched from what was kept of that one.
#pragma once

#include "launcher.h"

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace para_kernels {

using OptionalTensor = std::optional<at::Tensor>;
using AttentionOutputs = std::tuple<at::Tensor, at::Tensor>;

// Tensors as the operators take them; for packed samples q_lens and kv_lens are the cu_seqlens.
struct AttentionInputs {
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const OptionalTensor& q_lens;
  const OptionalTensor& kv_lens;
  double scale;
  std::optional<std::int64_t> packed_max_q;
};

// What a kernel of attention takes besides its tensors. Its arguments come in the order q, k, v, out, lse, perhaps
// scratch, q_lens, kv_lens, scale * log2(e), integers.
struct AttentionPlan {
  struct Source {  // of q, k, v: through a descriptor of this shape, or where `shape` is empty through a pointer
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;
  };
  struct Merge {  // a second kernel, of (scratch, out, lse, integers): the outputs of what the first one leaves in scratch
    pybind11::object owner;  // of the launcher
    const KernelLauncher* launcher;
    Grid grid;
    std::vector<std::int64_t> integers;
    std::int64_t scratch_elements;  // float32
  };

  pybind11::object owner;  // of the launcher
  const KernelLauncher* launcher;
  Grid grid;
  std::array<Source, 3> sources;
  bool has_scratch;        // a pointer to float32 memory, which the kernel follows only if there is a `merge`
  bool lens_are_pointers;  // lengths that are not given: pointers that the kernel does not follow, not None
  std::vector<std::int64_t> integers;
  std::optional<Merge> merge = std::nullopt;
};

// Empty and contiguous (out, lse): like q (B, S, H, D) and float32 (B, H, S); packed (T, H, D) and (H, T).
AttentionOutputs attention_outputs(const at::Tensor& q);

// Launches calls whose shapes, strides, types and alignments are those of `inputs` with `plan` from now on.
void keep_attention_plan(const AttentionInputs& inputs, AttentionPlan plan);

// Leaves such calls to cuDNN from now on: only those of whole (B, S, H, D) without lengths.
void keep_cudnn_plan(const AttentionInputs& inputs);

void forget_attention_plans();

// `stream_for(device_index)` gives the stream to launch in, or None while launches have to go through Triton.
// `forward(q, k, v, out, lse, q_lens, kv_lens, scale, packed_max_q)` launches what no plan has been kept for.
void use_stream_for(pybind11::object stream_for);
void use_attention_forward(pybind11::object forward);

AttentionOutputs cuda_attention(const AttentionInputs& inputs);

// torch's attention by cuDNN. RuntimeError where it cannot.
AttentionOutputs cudnn_attention(const AttentionInputs& inputs);

}  // namespace para_kernels
