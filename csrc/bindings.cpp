#include "kernels/kernels.h"
#include "launcher.h"
#include "ops.h"

#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
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

std::tuple<at::Tensor, at::Tensor> attention_outputs(const at::Tensor& q) {
  TORCH_CHECK_VALUE(q.dim() == 3 || q.dim() == 4, "q: got shape ", q.sizes(), ", must be (B, S, H, D) or (T, H, D)");
  const auto batch = q.sizes().slice(0, q.dim() - 3);
  c10::SmallVector<int64_t, 3> lse(batch.begin(), batch.end());
  lse.append({q.size(-2), q.size(-3)});
  return {at::empty(q.sizes(), q.options()), at::empty(lse, q.options().dtype(at::kFloat))};
}

// A launch is a plain C function of Python: pybind11's calls take about a microsecond to match their arguments.
PyObject* launch(PyObject* launcher, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 3 && PyTuple_Check(arguments[0]) && PyTuple_GET_SIZE(arguments[0]) == 3 &&
          PyLong_Check(arguments[1]) && PyTuple_Check(arguments[2]),
      "launch takes a grid (x, y, z), a stream and a tuple of arguments");
  para_kernels::Grid grid{};
  for (Py_ssize_t i = 0; i < 3; ++i) {
    PyObject* size = PyTuple_GET_ITEM(arguments[0], i);
    const long long blocks = PyLong_Check(size) ? PyLong_AsLongLong(size) : -1;
    TORCH_CHECK_VALUE(blocks >= 0 && blocks <= INT32_MAX, "grid: a dimension must lie in 0 ... 2**31 - 1");
    grid[i] = static_cast<unsigned>(blocks);
  }
  const auto* self = static_cast<para_kernels::KernelLauncher*>(PyCapsule_GetPointer(launcher, nullptr));
  return PyBool_FromLong(self->launch(grid, PyLong_AsUnsignedLongLong(arguments[1]), arguments[2]));
  END_HANDLE_TH_ERRORS
}

PyMethodDef launch_method = {
    "launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&launch)), METH_FASTCALL,
    "launch(grid, stream, arguments): False if an argument is not what the kernel was compiled for."};

template <typename... Arguments>
py::object kernel_launcher(Arguments... arguments) {
  const py::capsule self(
      new para_kernels::KernelLauncher(arguments...),
      [](void* launcher) { delete static_cast<para_kernels::KernelLauncher*>(launcher); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&launch_method, self.ptr()));
}

void bind_launcher(py::module_& m) {
  using para_kernels::Parameter;
  using Kind = Parameter::Kind;
  py::class_<Parameter>(m, "Parameter", "What a kernel was compiled to take for one argument.")
      .def_static("absent", [] { return Parameter{Kind::kAbsent}; })
      .def_static("int32", [] { return Parameter{Kind::kInt32}; })
      .def_static("int64", [] { return Parameter{Kind::kInt64}; })
      .def_static("float32", [] { return Parameter{Kind::kFloat32}; })
      .def_static(
          "pointer", [](at::ScalarType dtype, bool aligned) { return Parameter{Kind::kPointer, dtype, aligned}; },
          py::arg("dtype"), py::arg("aligned"))
      .def_static(
          "any_pointer", [](at::ScalarType dtype) { return Parameter{Kind::kPointer, dtype}; }, py::arg("dtype"))
      .def_static(
          "descriptor",
          [](at::ScalarType dtype, std::vector<std::uint32_t> box, int swizzle) {
            return Parameter{Kind::kDescriptor, dtype, true, swizzle, std::move(box)};
          },
          py::arg("dtype"), py::arg("box"), py::arg("swizzle"));
  m.def(
      "kernel_launcher",
      &kernel_launcher<
          std::uint64_t, unsigned, unsigned, std::vector<Parameter>, std::vector<std::int64_t>, at::Device, std::string>,
      py::arg("function"), py::arg("threads"), py::arg("shared_bytes"), py::arg("parameters"), py::arg("declared"),
      py::arg("device"), py::arg("library") = "libcuda.so.1",
      "launch(grid, stream, arguments) for a CUfunction of the current context. ValueError: `declared`, the sizes of the "
      "parameters in the kernel's assembly, are not those of `parameters`.");
}

}  // namespace

TORCH_LIBRARY_IMPL(para_kernels, CPU, m) {
  m.impl("merge_states", &para_kernels::merge_states);
  m.impl("residual_diff", &para_kernels::residual_diff);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ CPU kernels of para_kernels, which importing registers with torch's dispatcher, and the CUDA launcher.";
  m.def("build_info", &build_info, "Compiler, CPU capability chosen at run time, whether the ops are parallel, and the torch compiled against.");
  m.def(
      "attention_outputs", &attention_outputs, py::arg("q"), py::call_guard<py::gil_scoped_release>(),
      "Empty and contiguous (out, lse): like q (B, S, H, D) and float32 (B, H, S); packed (T, H, D) and (H, T).");
  bind_launcher(m);
}
