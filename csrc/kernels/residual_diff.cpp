#include "kernels.h"

#include "widen.h"

#include <algorithm>

namespace para_kernels {
namespace CPU_CAPABILITY {

namespace {

using at::vec::Vectorized;

// Vectors that one fp32 lane adds up before it goes into a double. Each of the 15 additions rounds by at most 2^-24 of
// the sum so far, so a sum of magnitudes is never wrong by more than 15 * 2^-24 < 1e-6 of itself, whatever the data.
constexpr int64_t kVectorsPerFlush = 16;

template <typename T>
double sum_lanes(const Vectorized<T>& lanes) {
  T values[Vectorized<T>::size()];
  lanes.store(values);
  double sum = 0;
  for (const T value : values) {
    sum += value;
  }
  return sum;
}

// At most kVectorsPerFlush fp32 vectors' worth of elements.
template <typename T, bool kHasPrevious>
inline void residual_diff_block(
    const T* hidden_in, const T* hidden_out, const T* previous, T* residual, int64_t n, AbsSums& sums) {
  using Packed = Vectorized<T>;
  Vectorized<Compute<T>> change(0);
  Vectorized<Compute<T>> reference(0);

  const auto step = [&](int64_t i, auto... count) {
    const Wide<T> in = widen<T>(Packed::loadu(hidden_in + i, count...));
    const Wide<T> out = widen<T>(Packed::loadu(hidden_out + i, count...));
    Wide<T> difference;
    for (int part = 0; part < kParts<T>; ++part) {
      difference[part] = out[part] - in[part];
    }
    const Packed rounded = narrow<T>(difference);
    rounded.store(residual + i, count...);
    if constexpr (kHasPrevious) {
      const Wide<T> old = widen<T>(Packed::loadu(previous + i, count...));
      const Wide<T> current = widen<T>(rounded);
      for (int part = 0; part < kParts<T>; ++part) {
        change = change + (old[part] - current[part]).abs();
        reference = reference + old[part].abs();
      }
    }
  };

  int64_t i = 0;
  for (; i + Packed::size() <= n; i += Packed::size()) {
    step(i);
  }
  if (i < n) {
    // A partial load fills the other lanes with zeros, which add nothing to either sum.
    step(i, n - i);
  }
  if constexpr (kHasPrevious) {
    sums.change += sum_lanes(change);
    sums.reference += sum_lanes(reference);
  }
}

template <typename T, bool kHasPrevious>
AbsSums residual_diff_typed(
    const T* hidden_in, const T* hidden_out, const T* previous, T* residual, int64_t n) {
  constexpr int64_t kBlock = kVectorsPerFlush * Vectorized<Compute<T>>::size();
  AbsSums sums;
  for (int64_t i = 0; i < n; i += kBlock) {
    residual_diff_block<T, kHasPrevious>(
        hidden_in + i, hidden_out + i, kHasPrevious ? previous + i : nullptr, residual + i, std::min(kBlock, n - i),
        sums);
  }
  return sums;
}

template <typename T>
AbsSums residual_diff_untyped(
    const void* hidden_in, const void* hidden_out, const void* previous, void* residual, int64_t n) {
  const auto run = previous ? &residual_diff_typed<T, true> : &residual_diff_typed<T, false>;
  return run(
      static_cast<const T*>(hidden_in), static_cast<const T*>(hidden_out), static_cast<const T*>(previous),
      static_cast<T*>(residual), n);
}

}  // namespace

ResidualDiffRun residual_diff_run(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return &residual_diff_untyped<float>;
    case c10::ScalarType::Double:
      return &residual_diff_untyped<double>;
    case c10::ScalarType::BFloat16:
      return &residual_diff_untyped<c10::BFloat16>;
    case c10::ScalarType::Half:
      return &residual_diff_untyped<c10::Half>;
    default:
      return nullptr;
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace para_kernels
