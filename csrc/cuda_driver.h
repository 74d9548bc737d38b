// The functions of the CUDA driver that a launch needs, looked up at run time: the extension is built without CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace para_kernels {

// CUtensorMap: what the driver encodes for the tensor memory accelerator (TMA). Opaque.
struct alignas(64) TensorMap {
  std::uint64_t words[16];
};

class CudaDriver {
 public:
  // Opens `library` (libcuda.so.1); RuntimeError where it or one of the functions is missing.
  explicit CudaDriver(const std::string& library);

  // RuntimeError with the driver's own words if `result`, a CUresult, is not success.
  void check(int result, const char* function) const;

  // Signatures as in cuda.h, with enums as int, CUdeviceptr and sizes as integers, and handles as pointers.
  int (*launch_kernel)(
      void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
      unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra);
  int (*tensor_map_encode_tiled)(
      TensorMap* map, int data_type, std::uint32_t rank, void* address, const std::uint64_t* sizes,
      const std::uint64_t* strides, const std::uint32_t* box, const std::uint32_t* element_strides, int interleave,
      int swizzle, int l2_promotion, int out_of_bounds_fill);
  int (*set_bytes)(std::uint64_t address, unsigned char value, std::size_t count, void* stream);
  int (*set_words)(std::uint64_t address, unsigned value, std::size_t count, void* stream);
  int (*get_current_context)(void** context);
  int (*push_current_context)(void* context);
  int (*pop_current_context)(void** context);

 protected:
  // The address of one of the driver's functions; RuntimeError where it has none of this name.
  void* find(const char* name) const;

 private:
  void* library_;
  int (*get_error_name_)(int result, const char** name);
  int (*get_error_string_)(int result, const char** text);
};

// Makes a context current for a scope, as torch's own operators do for the device of their tensors.
class ContextGuard {
 public:
  ContextGuard(const CudaDriver& driver, void* context);
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;
  ~ContextGuard();

 private:
  const CudaDriver& driver_;
  bool pushed_ = false;
};

}  // namespace para_kernels
