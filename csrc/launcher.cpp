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

constexpr std::size_t kMaxBytes = 4096;  // what every GPU takes
constexpr std::size_t kMaxParameters = 128;
constexpr std::size_t kMaxRank = 5;
constexpr std::int64_t kAlignment = 16;  // bytes; Triton specialises pointers on it, and TMA requires it

constexpr int kNoInterleave = 0;
constexpr int kPromoteTo128Bytes = 2;
constexpr int kFillWithZeros = 0;

// CUtensorMapDataType
std::optional<int> tensor_map_type(at::ScalarType dtype) {
  switch (dtype) {
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

// `rank` integers of a tuple.
bool as_integers(PyObject* object, std::size_t rank, std::int64_t* values) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != static_cast<Py_ssize_t>(rank)) {
    return false;
  }
  for (std::size_t i = 0; i < rank; ++i) {
    const auto value = as_integer(PyTuple_GET_ITEM(object, i));
    if (!value) {
      return false;
    }
    values[i] = *value;
  }
  return true;
}

// The address of a tensor, if it is one of this dtype on this device.
std::optional<std::uint64_t> address_of(PyObject* object, at::ScalarType dtype, c10::Device device) {
  if (!THPVariable_Check(object)) {
    return std::nullopt;
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (tensor.scalar_type() != dtype || tensor.device() != device) {
    return std::nullopt;
  }
  return reinterpret_cast<std::uint64_t>(tensor.data_ptr());
}

// Makes a context current for a scope, as torch's own operators do for the device of their tensors.
class ContextGuard {
 public:
  ContextGuard(const CudaDriver& driver, void* context) : driver_(driver) {
    void* current = nullptr;
    driver.check(driver.get_current_context(&current), "cuCtxGetCurrent");
    if (current != context) {
      driver.check(driver.push_current_context(context), "cuCtxPushCurrent");
      pushed_ = true;
    }
  }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;
  ~ContextGuard() {
    if (pushed_) {
      void* popped = nullptr;
      driver_.pop_current_context(&popped);
    }
  }

 private:
  const CudaDriver& driver_;
  bool pushed_ = false;
};

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

// The values of the parameters, and the pointers to them that cuLaunchKernel takes.
class KernelLauncher::Block {
 public:
  template <typename T>
  T& add(T value) {
    used_ = (used_ + alignof(T) - 1) / alignof(T) * alignof(T);
    T* slot = new (bytes_ + used_) T(value);
    used_ += sizeof(T);
    pointers_[count_++] = slot;
    return *slot;
  }

  void** pointers() {
    return pointers_;
  }

 private:
  alignas(TensorMap) std::byte bytes_[kMaxBytes];
  void* pointers_[kMaxParameters];
  std::size_t used_ = 0;
  std::size_t count_ = 0;
};

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
      expected.size() <= kMaxParameters && bytes + alignof(TensorMap) * expected.size() <= kMaxBytes,
      "parameters: got ", expected.size(), " of ", bytes, " bytes, allowed are ", kMaxParameters, " in ", kMaxBytes);
  driver_.check(driver_.get_current_context(&context_), "cuCtxGetCurrent");
  TORCH_CHECK(context_ != nullptr, "no CUDA context is current");
}

bool KernelLauncher::launch(const Grid& grid, std::uint64_t stream, PyObject* arguments) const {
  if (PyTuple_GET_SIZE(arguments) != static_cast<Py_ssize_t>(parameters_.size())) {
    return false;
  }
  Block block;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (!pack(parameters_[i], PyTuple_GET_ITEM(arguments, i), block)) {
      return false;
    }
  }
  block.add<std::uint64_t>(0);
  block.add<std::uint64_t>(0);
  if (grid[0] != 0 && grid[1] != 0 && grid[2] != 0) {
    submit(grid, stream, block);
  }
  return true;
}

bool KernelLauncher::pack(const Parameter& parameter, PyObject* argument, Block& block) const {
  switch (parameter.kind) {
    case Kind::kAbsent:
      return argument == Py_None;
    case Kind::kPointer:
      return pack_pointer(parameter, argument, block);
    case Kind::kDescriptor:
      return pack_descriptor(parameter, argument, block);
    case Kind::kFloat32:
      if (!PyFloat_CheckExact(argument)) {
        return false;
      }
      block.add(static_cast<float>(PyFloat_AS_DOUBLE(argument)));
      return true;
    default:
      break;
  }
  const auto value = as_integer(argument);
  if (!value || fits_int32(*value) != (parameter.kind == Kind::kInt32)) {
    return false;
  }
  if (parameter.kind == Kind::kInt32) {
    block.add(static_cast<std::int32_t>(*value));
  } else {
    block.add(*value);
  }
  return true;
}

bool KernelLauncher::pack_pointer(const Parameter& parameter, PyObject* argument, Block& block) const {
  const auto address = address_of(argument, parameter.dtype, device_);
  if (!address || (parameter.aligned && *parameter.aligned != (*address % kAlignment == 0))) {
    return false;
  }
  block.add(*address);
  return true;
}

// `argument` is (tensor, shape, strides in elements), outermost dimension first.
bool KernelLauncher::pack_descriptor(const Parameter& parameter, PyObject* argument, Block& block) const {
  if (!PyTuple_Check(argument) || PyTuple_GET_SIZE(argument) != 3) {
    return false;
  }
  const std::size_t rank = parameter.box.size();
  std::int64_t shape[kMaxRank], strides[kMaxRank];
  const auto address = address_of(PyTuple_GET_ITEM(argument, 0), parameter.dtype, device_);
  if (!address || *address % kAlignment || !as_integers(PyTuple_GET_ITEM(argument, 1), rank, shape) ||
      !as_integers(PyTuple_GET_ITEM(argument, 2), rank, strides) || strides[rank - 1] != 1) {
    return false;
  }
  const std::int64_t element = c10::elementSize(parameter.dtype);
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
    map_box[i] = parameter.box[from];
    element_strides[i] = 1;
    if (i > 0) {
      map_strides[i - 1] = bytes;
    }
  }
  TensorMap& map = block.add(TensorMap{});
  driver_.check(
      driver_.tensor_map_encode_tiled(
          &map, *tensor_map_type(parameter.dtype), rank, reinterpret_cast<void*>(*address), map_sizes, map_strides,
          map_box, element_strides, kNoInterleave, parameter.swizzle, kPromoteTo128Bytes, kFillWithZeros),
      "cuTensorMapEncodeTiled");
  for (std::size_t i = 0; i < rank; ++i) {
    block.add(static_cast<std::int32_t>(shape[i]));
  }
  for (std::size_t i = 0; i < rank; ++i) {
    block.add(strides[i]);
  }
  return true;
}

void KernelLauncher::submit(const Grid& grid, std::uint64_t stream, Block& block) const {
  int result = 0;
  {
    const pybind11::gil_scoped_release no_gil;  // a full queue makes the driver wait
    const ContextGuard guard(driver_, context_);
    result = driver_.launch_kernel(
        function_, grid[0], grid[1], grid[2], threads_, 1, 1, shared_bytes_, reinterpret_cast<void*>(stream),
        block.pointers(), nullptr);
  }
  driver_.check(result, "cuLaunchKernel");
}

}  // namespace para_kernels
