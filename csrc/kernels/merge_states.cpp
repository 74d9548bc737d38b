#include "kernels.h"

#include "widen.h"

namespace para_kernels {
namespace CPU_CAPABILITY {

namespace {

using at::vec::Vectorized;

template <typename T>
void weighted_sum_typed(const void* a, double weight_a, const void* b, double weight_b, void* out, int64_t n) {
  using Packed = Vectorized<T>;
  const Vectorized<Compute<T>> scale_a(static_cast<Compute<T>>(weight_a));
  const Vectorized<Compute<T>> scale_b(static_cast<Compute<T>>(weight_b));

  const auto step = [&](int64_t i, auto... count) {
    const Wide<T> wide_a = widen<T>(Packed::loadu(static_cast<const T*>(a) + i, count...));
    const Wide<T> wide_b = widen<T>(Packed::loadu(static_cast<const T*>(b) + i, count...));
    Wide<T> merged;
    for (int part = 0; part < kParts<T>; ++part) {
      merged[part] = at::vec::fmadd(wide_a[part], scale_a, wide_b[part] * scale_b);
    }
    narrow<T>(merged).store(static_cast<T*>(out) + i, count...);
  };

  int64_t i = 0;
  for (; i + Packed::size() <= n; i += Packed::size()) {
    step(i);
  }
  if (i < n) {
    step(i, n - i);
  }
}

}  // namespace

WeightedSumRow weighted_sum_row(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return &weighted_sum_typed<float>;
    case c10::ScalarType::Double:
      return &weighted_sum_typed<double>;
    case c10::ScalarType::BFloat16:
      return &weighted_sum_typed<c10::BFloat16>;
    case c10::ScalarType::Half:
      return &weighted_sum_typed<c10::Half>;
    default:
      return nullptr;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace para_kernels
