#include "cuda_attention.h"
#include "kernels/kernels.h"
#include "launcher.h"
#include "ops.h"
#include "transport/stream_program.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cmath>

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

// --- attention, from Python to the dispatcher --------------------------------------------------------------------------

using para_kernels::AttentionOutputs;
using para_kernels::OptionalTensor;

constexpr std::int64_t kMaxHeadDim = 256;  // as MAX_HEAD_DIM in para_kernels/attention.py

// A torch.Tensor, no subclass, whose shape is known.
const at::Tensor* plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) {
    return nullptr;
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides() ? nullptr : &tensor;
}

bool is_valid_qkv(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, std::int64_t dims) {
  const auto dtype = q.scalar_type();
  if (q.dim() != dims || k.dim() != dims || k.sizes() != v.sizes() || (dims == 4 && q.size(0) != k.size(0))) {
    return false;
  }
  const bool needs_grad = at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  return q.size(-1) == k.size(-1) && q.size(-1) > 0 && q.size(-1) <= kMaxHeadDim && k.size(-2) > 0 &&
         q.size(-2) % k.size(-2) == 0 && (dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat) &&
         k.scalar_type() == dtype && v.scalar_type() == dtype && (q.is_cpu() || q.is_cuda()) &&
         k.device() == q.device() && v.device() == q.device() && q.stride(-1) == 1 && k.stride(-1) == 1 &&
         v.stride(-1) == 1 && !needs_grad;
}

bool is_valid_lens(const at::Tensor& lens, std::int64_t count, const at::Tensor& q) {
  return lens.dim() == 1 && lens.size(0) == count && lens.stride(0) == 1 && lens.scalar_type() == at::kInt &&
         lens.device() == q.device();
}

struct Checked {
  const at::Tensor* q = nullptr;
  const at::Tensor* k = nullptr;
  const at::Tensor* v = nullptr;
  double scale = 0;
};

// q, k, v and scale (a float or None) of a call, if they are known to be good.
std::optional<Checked> check(PyObject* const* qkv, PyObject* scale, std::int64_t dims) {
  const Checked checked{plain_tensor(qkv[0]), plain_tensor(qkv[1]), plain_tensor(qkv[2])};
  const auto& [q, k, v, unused] = checked;
  if (!q || !k || !v || at::impl::torch_function_mode_enabled() || !is_valid_qkv(*q, *k, *v, dims)) {
    return std::nullopt;
  }
  if (scale == Py_None) {
    return Checked{q, k, v, 1.0 / std::sqrt(static_cast<double>(q->size(-1)))};
  }
  const double value = PyFloat_CheckExact(scale) ? PyFloat_AS_DOUBLE(scale) : -1.0;
  return value >= 0 && std::isfinite(value) ? std::optional(Checked{q, k, v, value}) : std::nullopt;
}

// Calls the operator as torch.ops does, in a fraction of the time.
template <typename Operator, typename... Arguments>
PyObject* call(const Operator& op, const Arguments&... arguments) {
  AttentionOutputs outputs;
  {
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowAutograd no_autograd;  // no tensor needs a gradient
    outputs = op.call(arguments...);
  }
  return py::cast(std::move(outputs)).release().ptr();
}

PyObject* checked_attention(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "checked_attention takes q, k, v, kv_lens, q_lens and scale");
  const auto checked = check(arguments, arguments[5], 4);
  if (!checked) {
    Py_RETURN_NONE;
  }
  OptionalTensor lens[2];
  for (int i = 0; i < 2; ++i) {
    if (arguments[3 + i] != Py_None) {
      const at::Tensor* given = plain_tensor(arguments[3 + i]);
      if (!given || !is_valid_lens(*given, checked->q->size(0), *checked->q)) {
        Py_RETURN_NONE;
      }
      lens[i] = *given;
    }
  }
  using Operator = AttentionOutputs(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("para_kernels::flash_attention", "").typed<Operator>();
  return call(op, *checked->q, *checked->k, *checked->v, lens[0], lens[1], checked->scale);
  END_HANDLE_TH_ERRORS
}

std::optional<std::int64_t> as_length(PyObject* object) {
  const long long value = PyLong_CheckExact(object) ? PyLong_AsLongLong(object) : -1;
  PyErr_Clear();  // too large for 64 bits
  return value >= 0 ? std::optional<std::int64_t>(value) : std::nullopt;
}

PyObject* checked_varlen(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 8, "checked_varlen takes q, k, v, two cu_seqlens, two maximum lengths and scale");
  const auto checked = check(arguments, arguments[7], 3);
  const at::Tensor *starts_q = plain_tensor(arguments[3]), *starts_k = plain_tensor(arguments[4]);
  const auto max_q = as_length(arguments[5]), max_k = as_length(arguments[6]);
  if (!checked || !starts_q || !starts_k || starts_q->numel() == 0 || !max_q || !max_k ||
      !is_valid_lens(*starts_q, starts_q->numel(), *checked->q) ||
      !is_valid_lens(*starts_k, starts_q->numel(), *checked->q)) {
    Py_RETURN_NONE;
  }
  using Operator = AttentionOutputs(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::SymInt,
      c10::SymInt, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("para_kernels::flash_attention_varlen", "").typed<Operator>();
  return call(
      op, *checked->q, *checked->k, *checked->v, *starts_q, *starts_k, c10::SymInt(*max_q), c10::SymInt(*max_k),
      checked->scale);
  END_HANDLE_TH_ERRORS
}

void append(std::string& key, std::int64_t value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// What checks of a call look at, in one key: the checks themselves take over 100 microseconds in Python.
PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (at::impl::torch_function_mode_enabled()) {
    Py_RETURN_NONE;
  }
  std::string key;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (arguments[i] == Py_None) {
      append(key, -1);
      continue;
    }
    const at::Tensor* tensor = plain_tensor(arguments[i]);
    if (!tensor || tensor->layout() != at::kStrided) {
      Py_RETURN_NONE;
    }
    append(key, tensor->dim());
    append(key, static_cast<std::int64_t>(tensor->scalar_type()));
    append(key, static_cast<std::int64_t>(tensor->device().type()));
    append(key, tensor->device().index());
    append(key, at::GradMode::is_enabled() && tensor->requires_grad());
    for (std::int64_t d = 0; d < tensor->dim(); ++d) {
      append(key, tensor->size(d));
      append(key, tensor->stride(d));
    }
  }
  return PyBytes_FromStringAndSize(key.data(), static_cast<Py_ssize_t>(key.size()));
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
py::object plain_function(const char* name, const char* doc) {
  static PyMethodDef method = {
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}

// --- attention on CUDA -------------------------------------------------------------------------------------------------

AttentionOutputs flash_attention_cuda(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& kv_lens,
    const OptionalTensor& q_lens, double scale) {
  return para_kernels::cuda_attention({q, k, v, q_lens, kv_lens, scale, std::nullopt});
}

AttentionOutputs flash_attention_varlen_cuda(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens_q,
    const at::Tensor& cu_seqlens_k, std::int64_t max_seqlen_q, std::int64_t max_seqlen_k, double scale) {
  return para_kernels::cuda_attention(
      {q, k, v, OptionalTensor(cu_seqlens_q), OptionalTensor(cu_seqlens_k), scale, max_seqlen_q});
}

using Source = std::optional<std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>>>;

// (kernel_launcher, grid, integers, elements of the scratch memory)
using Merge = std::optional<std::tuple<py::object, para_kernels::Grid, std::vector<std::int64_t>, std::int64_t>>;

const para_kernels::KernelLauncher* launcher_of(const py::object& launch) {
  TORCH_CHECK_TYPE(PyCFunction_Check(launch.ptr()), "launch: must come from kernel_launcher");
  const auto* launcher =
      static_cast<para_kernels::KernelLauncher*>(PyCapsule_GetPointer(PyCFunction_GET_SELF(launch.ptr()), nullptr));
  if (launcher == nullptr) {
    throw py::error_already_set();
  }
  return launcher;
}

void keep_attention_plan(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& q_lens,
    const OptionalTensor& kv_lens, std::optional<std::int64_t> packed_max_q, py::object launch,
    const para_kernels::Grid& grid, const std::array<Source, 3>& sources, bool has_scratch, bool lens_are_pointers,
    std::vector<std::int64_t> integers, Merge merge) {
  const auto* launcher = launcher_of(launch);
  para_kernels::AttentionPlan plan{std::move(launch), launcher, grid, {}, has_scratch, lens_are_pointers, std::move(integers)};
  for (std::size_t i = 0; i < sources.size(); ++i) {
    if (sources[i]) {
      plan.sources[i] = {sources[i]->first, sources[i]->second};
    }
  }
  if (merge) {
    auto& [launch_merge, merge_grid, merge_integers, scratch_elements] = *merge;
    const auto* merge_launcher = launcher_of(launch_merge);
    plan.merge = {std::move(launch_merge), merge_launcher, merge_grid, std::move(merge_integers), scratch_elements};
  }
  para_kernels::keep_attention_plan({q, k, v, q_lens, kv_lens, 0.0, packed_max_q}, std::move(plan));
}

void bind_attention(py::module_& m) {
  m.attr("checked_attention") = plain_function<&checked_attention>(
      "checked_attention",
      "(q, k, v, kv_lens, q_lens, scale): the operator flash_attention, or None where the arguments are not known to be "
      "good: then the checks in Python have the word.");
  m.attr("checked_varlen") = plain_function<&checked_varlen>(
      "checked_varlen", "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale): likewise for packed samples.");
  m.attr("signature") = plain_function<&signature>(
      "signature",
      "(*tensors): shapes, strides, dtypes, devices and need of a gradient, as bytes; a tensor may be None. None where one "
      "is of a subclass, or its shape is not known.");
  m.def(
      "attention_outputs", &para_kernels::attention_outputs, py::arg("q"), py::call_guard<py::gil_scoped_release>(),
      "Empty and contiguous (out, lse): like q (B, S, H, D) and float32 (B, H, S); packed (T, H, D) and (H, T).");
  m.def(
      "cuda_attention",
      [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& q_lens,
         const OptionalTensor& kv_lens, double scale, std::optional<std::int64_t> packed_max_q) {
        return para_kernels::cuda_attention({q, k, v, q_lens, kv_lens, scale, packed_max_q});
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_lens"), py::arg("kv_lens"), py::arg("scale"),
      py::arg("packed_max_q") = py::none(), py::call_guard<py::gil_scoped_release>(),
      "What both operators run on CUDA.");
  m.def(
      "keep_attention_plan", &keep_attention_plan, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
      py::arg("q_lens"), py::arg("kv_lens"), py::arg("packed_max_q"), py::arg("launch"), py::arg("grid"),
      py::arg("sources"), py::arg("has_scratch"), py::arg("lens_are_pointers"), py::arg("integers"),
      py::arg("merge") = py::none(),
      "Launch calls like this one, whatever their addresses, lengths and scale, without Python from now on.");
  m.def(
      "keep_cudnn_plan",
      [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
        para_kernels::keep_cudnn_plan({q, k, v, std::nullopt, std::nullopt, 0.0, std::nullopt});
      },
      py::arg("q"), py::arg("k"), py::arg("v"), "Leave calls like this one, without lengths, to cuDNN from now on.");
  m.def("forget_attention_plans", &para_kernels::forget_attention_plans);
  m.def("use_stream_for", &para_kernels::use_stream_for, py::arg("stream_for"));
  m.def("use_attention_forward", &para_kernels::use_attention_forward, py::arg("forward"));
}

// --- the streams of a ring ---------------------------------------------------------------------------------------------

void bind_transport(py::module_& m) {
  using para_kernels::RegisteredMemory;
  using para_kernels::StreamProgram;
  using para_kernels::StreamStep;
  using Kind = StreamStep::Kind;
  py::class_<StreamStep>(m, "StreamStep", "One operation of a StreamProgram.")
      .def_static(
          "wait", [](unsigned stream, std::uint64_t address, std::int32_t value) {
            return StreamStep{Kind::kWaitWord, stream, address, 0, 0, value};
          },
          py::arg("stream"), py::arg("address"), py::arg("value") = 0)
      .def_static(
          "write", [](unsigned stream, std::uint64_t address, std::int32_t value) {
            return StreamStep{Kind::kWriteWord, stream, address, 0, 0, value};
          },
          py::arg("stream"), py::arg("address"), py::arg("value") = 0)
      .def_static(
          "copy", [](unsigned stream, std::uint64_t target, std::uint64_t source, std::uint64_t bytes) {
            return StreamStep{Kind::kCopy, stream, target, source, bytes};
          },
          py::arg("stream"), py::arg("target"), py::arg("source"), py::arg("size"))
      .def_static(
          "record", [](unsigned stream, std::int32_t event) {
            return StreamStep{Kind::kRecord, stream, 0, 0, 0, event};
          },
          py::arg("stream"), py::arg("event"))
      .def_static(
          "wait_record", [](unsigned stream, std::int32_t event) {
            return StreamStep{Kind::kWaitRecord, stream, 0, 0, 0, event};
          },
          py::arg("stream"), py::arg("event"));
  py::class_<StreamProgram>(m, "StreamProgram", "A fixed list of steps, run once per layer with another epoch.")
      .def(
          py::init<std::vector<StreamStep>, unsigned, unsigned, const std::string&>(), py::arg("steps"),
          py::arg("streams"), py::arg("events"), py::arg("library") = "libcuda.so.1")
      .def(
          "run", py::overload_cast<const std::vector<std::uint64_t>&, std::uint32_t>(&StreamProgram::run, py::const_),
          py::arg("streams"), py::arg("epoch"), py::call_guard<py::gil_scoped_release>())
      .def("__len__", &StreamProgram::size);
  py::class_<RegisteredMemory>(m, "RegisteredMemory", "Memory of this process, pinned and mapped into the devices' address space.")
      .def(
          py::init<std::uint64_t, std::size_t, const std::string&>(), py::arg("address"), py::arg("size"),
          py::arg("library") = "libcuda.so.1", py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("device_address", &RegisteredMemory::device_address);
  m.def(
      "view_of_memory", &para_kernels::view_of_memory, py::arg("address"), py::arg("shape"), py::arg("dtype"),
      py::arg("device"), "A contiguous tensor over memory that a device reaches at `address` and that someone else keeps.");
}

}  // namespace

TORCH_LIBRARY_IMPL(para_kernels, CUDA, m) {
  m.impl("flash_attention", &flash_attention_cuda);
  m.impl("flash_attention_varlen", &flash_attention_varlen_cuda);
}

TORCH_LIBRARY_IMPL(para_kernels, CPU, m) {
  m.impl("merge_states", &para_kernels::merge_states);
  m.impl("residual_diff", &para_kernels::residual_diff);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ CPU kernels of para_kernels, which importing registers with torch's dispatcher, and the CUDA launcher.";
  m.def("build_info", &build_info, "Compiler, CPU capability chosen at run time, whether the ops are parallel, and the torch compiled against.");
  bind_launcher(m);
  bind_attention(m);
  bind_transport(m);
}
