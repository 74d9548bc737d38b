// Argument checks shared by the CPU ops. Each raises Python's ValueError, naming the argument, what it was and what is allowed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace para_kernels {

inline void check_floating(const at::Tensor& tensor, const char* name) {
  const auto dtype = tensor.scalar_type();
  const bool allowed = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
  TORCH_CHECK_VALUE(allowed, name, ": got dtype ", dtype, ", allowed are Float, Double, BFloat16 and Half");
}

inline void check_same_dtype(
    const at::Tensor& tensor, const char* name, const at::Tensor& reference, const char* reference_name) {
  TORCH_CHECK_VALUE(
      tensor.scalar_type() == reference.scalar_type(),
      name, ": got dtype ", tensor.scalar_type(), ", must be that of ", reference_name, ", ", reference.scalar_type());
}

inline void check_same_shape(
    const at::Tensor& tensor, const char* name, const at::Tensor& reference, const char* reference_name) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == reference.sizes(),
      name, ": got shape ", tensor.sizes(), ", must be that of ", reference_name, ", ", reference.sizes());
}

}  // namespace para_kernels
