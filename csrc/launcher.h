// Launches of a compiled Triton kernel without Python in between.
#pragma once

#include "cuda_driver.h"

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace para_kernels {

// What a kernel was compiled to take for one argument. An argument that differs in any of this needs another variant.
struct Parameter {
  enum class Kind { kAbsent, kPointer, kDescriptor, kInt32, kInt64, kFloat32 };

  Kind kind;
  at::ScalarType dtype = at::ScalarType::Undefined;  // pointers and descriptors
  std::optional<bool> aligned = std::nullopt;        // pointers: compiled for multiples of 16 bytes, for others, for all
  int swizzle = 0;                                   // descriptors: CUtensorMapSwizzle
  std::vector<std::uint32_t> box = {};               // descriptors: elements per copy, outermost dimension first

  // Absent arguments (None) and constants have no place in the kernel; a descriptor has one for its map, its shape and
  // its strides.
  std::vector<std::int64_t> sizes() const;
};

using Grid = std::array<unsigned, 3>;

class KernelLauncher {
 public:
  // `function` is a CUfunction of the context that is current now. `declared` are the sizes of the parameters as the
  // kernel's assembly declares them: ValueError if they are not those of `parameters` and Triton's two scratch pointers.
  KernelLauncher(
      std::uint64_t function, unsigned threads, unsigned shared_bytes, std::vector<Parameter> parameters,
      const std::vector<std::int64_t>& declared, c10::Device device, const std::string& library);

  // `arguments` is a tuple: tensors, integers, floats and None, and for a descriptor (tensor, shape, strides).
  // True: the kernel is in the stream. False: an argument is not what it was compiled for, and nothing was done.
  // RuntimeError: the driver refused.
  bool launch(const Grid& grid, std::uint64_t stream, PyObject* arguments) const;

  // Fills a contiguous tensor with a 32-bit pattern, in the stream: torch's own fill takes twice as long on the host.
  void fill(const at::Tensor& tensor, std::uint32_t pattern, std::uint64_t stream) const;

 private:
  friend class Call;

  void submit(const Grid& grid, std::uint64_t stream, void** parameters) const;

  CudaDriver driver_;
  void* function_;
  void* context_ = nullptr;
  unsigned threads_;
  unsigned shared_bytes_;
  std::vector<Parameter> parameters_;
  c10::Device device_;
};

// The arguments of one launch, passed in the kernel's order. A pass of what the kernel was not compiled for gives false.
class Call {
 public:
  explicit Call(const KernelLauncher& launcher) : launcher_(launcher) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  bool pass_none();
  bool pass(const at::Tensor& tensor);
  // The start of any tensor on the device, for a pointer that the kernel will not follow.
  bool pass_unfollowed(const at::Tensor& tensor);
  // For a descriptor: outermost dimension first, strides in elements.
  bool pass(const at::Tensor& tensor, c10::IntArrayRef shape, c10::IntArrayRef strides);
  bool pass(std::int64_t value);
  bool pass(double value);

  // False, and nothing is launched, if there are fewer arguments than the kernel has. Needs the GIL, which it releases.
  bool submit(const Grid& grid, std::uint64_t stream);

 private:
  static constexpr std::size_t kMaxBytes = 4096;  // what every GPU takes
  static constexpr std::size_t kMaxParameters = 128;
  friend class KernelLauncher;

  const Parameter* next();
  template <typename T>
  T& add(T value);

  const KernelLauncher& launcher_;
  alignas(TensorMap) std::byte bytes_[kMaxBytes];
  void* pointers_[kMaxParameters];
  std::size_t used_ = 0;
  std::size_t count_ = 0;
  std::size_t argument_ = 0;
};

}  // namespace para_kernels
