#include "kernels/kernels.h"

#include <ATen/Version.h>

#include <string>

namespace para_kernels {

namespace {

KernelTable choose_kernel_table() {
#ifdef PARA_KERNELS_WITH_AVX2
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX2" || capability == "AVX512") {
    return {"AVX2", &AVX2::residual_diff_run, &AVX2::weighted_sum_row};
  }
#endif
  return {"DEFAULT", &DEFAULT::residual_diff_run, &DEFAULT::weighted_sum_row};
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = choose_kernel_table();
  return table;
}

}  // namespace para_kernels
