// Vectors of a storage dtype opened into vectors of the dtype that the arithmetic is done in, and back.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <type_traits>

namespace para_kernels {
namespace CPU_CAPABILITY {

// bf16 and fp16 are computed in fp32, fp32 and fp64 in themselves.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr int kParts = sizeof(Compute<T>) / sizeof(T);

template <typename T>
using Wide = std::array<at::vec::Vectorized<Compute<T>>, kParts<T>>;

template <typename T>
inline Wide<T> widen(const at::vec::Vectorized<T>& packed) {
  if constexpr (kParts<T> == 1) {
    return {packed};
  } else {
    const auto [low, high] = at::vec::convert_to_float<T>(packed);
    return {low, high};
  }
}

template <typename T>
inline at::vec::Vectorized<T> narrow(const Wide<T>& wide) {
  if constexpr (kParts<T> == 1) {
    return wide[0];
  } else {
    return at::vec::convert_from_float<T>(wide[0], wide[1]);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace para_kernels
