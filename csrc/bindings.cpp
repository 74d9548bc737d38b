#include "kernels/kernels.h"
#include "ops.h"

#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cpu_capability"] = para_kernels::kernel_table().capability;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["torch"] = TORCH_VERSION;
  return info;
}

}  // namespace

TORCH_LIBRARY_IMPL(para_kernels, CPU, m) {
  m.impl("merge_states", &para_kernels::merge_states);
  m.impl("residual_diff", &para_kernels::residual_diff);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ CPU kernels of para_kernels. Importing it registers them with torch's dispatcher.";
  m.def("build_info", &build_info, "Compiler, CPU capability chosen at run time, whether the ops are parallel, and the torch compiled against.");
}
