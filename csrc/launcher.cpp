#include "launcher.h"

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstddef>
#include <limits>
#include <new>
#include <numeric>
#include <optional>
#include <utility>

namespace para_kernels {

namespace {

using Kind = Parameter::Kind;

constexpr std::size_t kMaxRank = 5;
constexpr std::int64_t kAlignment = 16;  // bytes; Triton specialises pointers on it, and TMA requires it

constexpr int kNoInterleave = 0;
constexpr int kPromoteTo128Bytes = 2;
constexpr int kFillWithZeros = 0;

// CUtensorMapDataType
std::optional<int> tensor_map_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kChar:
    case at::kFloat8_e4m3fn:  // bytes: nothing is done to them on the way
      return 0;
    case at::kHalf:
      return 6;
    case at::kFloat:
      return 7;
    case at::kBFloat16:
      return 9;
    default:
      return std::nullopt;
  }
}

std::optional<std::int64_t> as_integer(PyObject* object) {
  if (!PyLong_CheckExact(object)) {  // a bool is another type to Triton
    return std::nullopt;
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow ? std::nullopt : std::optional<std::int64_t>(value);
}

bool fits_int32(std::int64_t value) {
  return value >= std::numeric_limits<std::int32_t>::min() && value <= std::numeric_limits<std::int32_t>::max();
}

// The integers of a tuple, at most kMaxRank.
std::optional<c10::SmallVector<std::int64_t, kMaxRank>> as_integers(PyObject* object) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) > static_cast<Py_ssize_t>(kMaxRank)) {
    return std::nullopt;
  }
  c10::SmallVector<std::int64_t, kMaxRank> values;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i) {
    const auto value = as_integer(PyTuple_GET_ITEM(object, i));
    if (!value) {
      return std::nullopt;
    }
    values.push_back(*value);
  }
  return values;
}

std::uint64_t address_of(const at::Tensor& tensor) {
  return reinterpret_cast<std::uint64_t>(tensor.data_ptr());
}

bool pass(Call& call, PyObject* argument) {
  if (THPVariable_Check(argument)) {
    return call.pass(THPVariable_Unpack(argument));
  }
  if (argument == Py_None) {
    return call.pass_none();
  }
  if (PyFloat_CheckExact(argument)) {
    return call.pass(PyFloat_AS_DOUBLE(argument));
  }
  if (!PyTuple_Check(argument)) {
    const auto value = as_integer(argument);
    return value && call.pass(*value);
  }
  if (PyTuple_GET_SIZE(argument) != 3 || !THPVariable_Check(PyTuple_GET_ITEM(argument, 0))) {
    return false;
  }
  const auto shape = as_integers(PyTuple_GET_ITEM(argument, 1)), strides = as_integers(PyTuple_GET_ITEM(argument, 2));
  return shape && strides && call.pass(THPVariable_Unpack(PyTuple_GET_ITEM(argument, 0)), *shape, *strides);
}

}  // namespace

std::vector<std::int64_t> Parameter::sizes() const {
  switch (kind) {
    case Kind::kAbsent:
      return {};
    case Kind::kInt32:
    case Kind::kFloat32:
      return {4};
    case Kind::kDescriptor: {
      std::vector<std::int64_t> sizes{sizeof(TensorMap)};
      sizes.insert(sizes.end(), box.size(), 4);
      sizes.insert(sizes.end(), box.size(), 8);
      return sizes;
    }
    default:
      return {8};
  }
}

KernelLauncher::KernelLauncher(
    std::uint64_t function, unsigned threads, unsigned shared_bytes, std::vector<Parameter> parameters,
    const std::vector<std::int64_t>& declared, c10::Device device, const std::string& library)
    : driver_(library),
      function_(reinterpret_cast<void*>(function)),
      threads_(threads),
      shared_bytes_(shared_bytes),
      parameters_(std::move(parameters)),
      device_(device) {
  std::vector<std::int64_t> expected;
  for (const Parameter& parameter : parameters_) {
    TORCH_CHECK_VALUE(
        parameter.kind != Kind::kDescriptor ||
            (tensor_map_type(parameter.dtype) && !parameter.box.empty() && parameter.box.size() <= kMaxRank),
        "parameters: got a descriptor of ", parameter.dtype, " with ", parameter.box.size(),
        " dimensions, allowed are Half, BFloat16 and Float, with 1 to ", kMaxRank);
    const auto sizes = parameter.sizes();
    expected.insert(expected.end(), sizes.begin(), sizes.end());
  }
  expected.insert(expected.end(), {8, 8});  // Triton's scratch memory: global, profile
  TORCH_CHECK_VALUE(
      declared == expected,
      "declared: got parameters of ", c10::IntArrayRef(declared), " bytes, must be ", c10::IntArrayRef(expected));
  // Aligning a parameter moves it by less than the alignment of a map.
  const std::int64_t bytes = std::accumulate(expected.begin(), expected.end(), std::int64_t{0});
  TORCH_CHECK_VALUE(
      expected.size() <= Call::kMaxParameters && bytes + alignof(TensorMap) * expected.size() <= Call::kMaxBytes,
      "parameters: got ", expected.size(), " of ", bytes, " bytes, allowed are ", Call::kMaxParameters + 0, " in ", Call::kMaxBytes + 0);
  driver_.check(driver_.get_current_context(&context_), "cuCtxGetCurrent");
  TORCH_CHECK(context_ != nullptr, "no CUDA context is current");
}

bool KernelLauncher::launch(const Grid& grid, std::uint64_t stream, PyObject* arguments) const {
  Call call(*this);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) {
    if (!pass(call, PyTuple_GET_ITEM(arguments, i))) {
      return false;
    }
  }
  return call.submit(grid, stream);
}

void KernelLauncher::submit(const Grid& grid, std::uint64_t stream, void** parameters) const {
  int result = 0;
  {
    const pybind11::gil_scoped_release no_gil;  // a full queue makes the driver wait
    const ContextGuard guard(driver_, context_);
    result = driver_.launch_kernel(
        function_, grid[0], grid[1], grid[2], threads_, 1, 1, shared_bytes_, reinterpret_cast<void*>(stream),
        parameters, nullptr);
  }
  driver_.check(result, "cuLaunchKernel");
}

void KernelLauncher::fill(const at::Tensor& tensor, std::uint32_t pattern, std::uint64_t stream) const {
  const pybind11::gil_scoped_release no_gil;  // a full queue makes the driver wait
  const ContextGuard guard(driver_, context_);
  const auto address = reinterpret_cast<std::uint64_t>(tensor.data_ptr());
  auto* const queue = reinterpret_cast<void*>(stream);
  if (tensor.nbytes() == 0) {
    return;
  }
  if (pattern == 0) {  // of any number of bytes
    driver_.check(driver_.set_bytes(address, 0, tensor.nbytes(), queue), "cuMemsetD8Async");
  } else {
    driver_.check(driver_.set_words(address, pattern, tensor.nbytes() / sizeof(pattern), queue), "cuMemsetD32Async");
  }
}

const Parameter* Call::next() {
  const auto& parameters = launcher_.parameters_;
  return argument_ < parameters.size() ? &parameters[argument_++] : nullptr;
}

template <typename T>
T& Call::add(T value) {
  used_ = (used_ + alignof(T) - 1) / alignof(T) * alignof(T);
  T* slot = new (bytes_ + used_) T(value);
  used_ += sizeof(T);
  pointers_[count_++] = slot;
  return *slot;
}

bool Call::pass_none() {
  const Parameter* parameter = next();
  return parameter && parameter->kind == Kind::kAbsent;
}

bool Call::pass(const at::Tensor& tensor) {
  const Parameter* parameter = next();
  if (!parameter || parameter->kind != Kind::kPointer || tensor.scalar_type() != parameter->dtype ||
      tensor.device() != launcher_.device_) {
    return false;
  }
  const std::uint64_t address = address_of(tensor);
  if (parameter->aligned && *parameter->aligned != (address % kAlignment == 0)) {
    return false;
  }
  add(address);
  return true;
}

bool Call::pass_unfollowed(const at::Tensor& tensor) {
  const Parameter* parameter = next();
  if (!parameter || parameter->kind != Kind::kPointer || tensor.device() != launcher_.device_) {
    return false;
  }
  add(address_of(tensor));
  return true;
}

bool Call::pass(const at::Tensor& tensor, c10::IntArrayRef shape, c10::IntArrayRef strides) {
  const Parameter* parameter = next();
  if (!parameter || parameter->kind != Kind::kDescriptor || tensor.scalar_type() != parameter->dtype ||
      tensor.device() != launcher_.device_) {
    return false;
  }
  const std::size_t rank = parameter->box.size();
  const std::uint64_t address = address_of(tensor);
  if (address % kAlignment || shape.size() != rank || strides.size() != rank || strides[rank - 1] != 1) {
    return false;
  }
  const std::int64_t element = c10::elementSize(parameter->dtype);
  // The driver counts dimensions from the innermost, which has no stride, and strides in bytes.
  std::uint64_t map_sizes[kMaxRank], map_strides[kMaxRank];
  std::uint32_t map_box[kMaxRank], element_strides[kMaxRank];
  for (std::size_t i = 0; i < rank; ++i) {
    const std::size_t from = rank - 1 - i;
    const std::int64_t bytes = strides[from] * element;
    if (shape[from] <= 0 || !fits_int32(shape[from]) || (i > 0 && (bytes < 0 || bytes % kAlignment))) {
      return false;
    }
    map_sizes[i] = shape[from];
    map_box[i] = parameter->box[from];
    element_strides[i] = 1;
    if (i > 0) {
      map_strides[i - 1] = bytes;
    }
  }
  TensorMap& map = add(TensorMap{});
  const CudaDriver& driver = launcher_.driver_;
  const ContextGuard guard(driver, launcher_.context_);  // a new thread has none
  driver.check(
      driver.tensor_map_encode_tiled(
          &map, *tensor_map_type(parameter->dtype), rank, reinterpret_cast<void*>(address), map_sizes, map_strides,
          map_box, element_strides, kNoInterleave, parameter->swizzle, kPromoteTo128Bytes, kFillWithZeros),
      "cuTensorMapEncodeTiled");
  for (const std::int64_t size : shape) {
    add(static_cast<std::int32_t>(size));
  }
  for (const std::int64_t stride : strides) {
    add(stride);
  }
  return true;
}

bool Call::pass(std::int64_t value) {
  const Parameter* parameter = next();
  if (parameter && parameter->kind == Kind::kInt32 && fits_int32(value)) {
    add(static_cast<std::int32_t>(value));
    return true;
  }
  if (parameter && parameter->kind == Kind::kInt64 && !fits_int32(value)) {
    add(value);
    return true;
  }
  return false;
}

bool Call::pass(double value) {
  const Parameter* parameter = next();
  if (!parameter || parameter->kind != Kind::kFloat32) {
    return false;
  }
  add(static_cast<float>(value));
  return true;
}

bool Call::submit(const Grid& grid, std::uint64_t stream) {
  if (argument_ != launcher_.parameters_.size()) {
    return false;
  }
  add<std::uint64_t>(0);  // Triton's scratch memory: global, profile
  add<std::uint64_t>(0);
  if (grid[0] != 0 && grid[1] != 0 && grid[2] != 0) {
    launcher_.submit(grid, stream, pointers_);
  }
  return true;
}

}  // namespace para_kernels
