// The vector kernels, and the choice among the capabilities that they were compiled for.
//
// Each .cpp file in this directory is compiled once per capability (setup.py holds the list), into the namespace that
// the macro CPU_CAPABILITY names. This header is all that the rest of csrc/ sees of them.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace para_kernels {

// change = sum |previous - residual|, reference = sum |previous|.
struct AbsSums {
  double change = 0;
  double reference = 0;
};

// residual = hidden_out - hidden_in over n contiguous elements. `previous` may be null: then both sums are zero.
using ResidualDiffRun =
    AbsSums (*)(const void* hidden_in, const void* hidden_out, const void* previous, void* residual, int64_t n);

// out = weight_a * a + weight_b * b over n contiguous elements.
using WeightedSumRow =
    void (*)(const void* a, double weight_a, const void* b, double weight_b, void* out, int64_t n);

#define PARA_KERNELS_DECLARE(CAPABILITY)                         \
  namespace CAPABILITY {                                         \
  ResidualDiffRun residual_diff_run(c10::ScalarType dtype);      \
  WeightedSumRow weighted_sum_row(c10::ScalarType dtype);        \
  }

PARA_KERNELS_DECLARE(DEFAULT)
#ifdef PARA_KERNELS_WITH_AVX2
PARA_KERNELS_DECLARE(AVX2)
#endif
#undef PARA_KERNELS_DECLARE

struct KernelTable {
  const char* capability;
  ResidualDiffRun (*residual_diff_run)(c10::ScalarType dtype);
  WeightedSumRow (*weighted_sum_row)(c10::ScalarType dtype);
};

// The table for this processor. It follows ATen's own choice, and with it the variable ATEN_CPU_CAPABILITY.
const KernelTable& kernel_table();

}  // namespace para_kernels
