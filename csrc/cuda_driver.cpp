#include "cuda_driver.h"

#include <c10/util/Exception.h>

#include <dlfcn.h>

namespace para_kernels {

namespace {

template <typename Function>
void find(void* library, const char* name, Function& function) {
  void* symbol = dlsym(library, name);
  TORCH_CHECK(symbol != nullptr, "the CUDA driver has no ", name);
  function = reinterpret_cast<Function>(symbol);
}

}  // namespace

CudaDriver::CudaDriver(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);  // stays open as long as the process
  TORCH_CHECK(handle != nullptr, "cannot open the CUDA driver: ", dlerror());
  find(handle, "cuLaunchKernel", launch_kernel);
  find(handle, "cuTensorMapEncodeTiled", tensor_map_encode_tiled);
  find(handle, "cuMemsetD8Async", set_bytes);
  find(handle, "cuMemsetD32Async", set_words);
  find(handle, "cuCtxGetCurrent", get_current_context);
  find(handle, "cuCtxPushCurrent_v2", push_current_context);
  find(handle, "cuCtxPopCurrent_v2", pop_current_context);
  find(handle, "cuGetErrorName", get_error_name_);
  find(handle, "cuGetErrorString", get_error_string_);
}

void CudaDriver::check(int result, const char* function) const {
  if (result == 0) {
    return;
  }
  const char* name = nullptr;
  const char* text = nullptr;
  get_error_name_(result, &name);
  get_error_string_(result, &text);
  TORCH_CHECK(false, function, ": ", name ? name : "unknown error", " (", result, "), ", text ? text : "no description");
}

}  // namespace para_kernels
