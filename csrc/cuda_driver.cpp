#include "cuda_driver.h"

#include <c10/util/Exception.h>

#include <dlfcn.h>

namespace para_kernels {

namespace {

template <typename Function>
void assign(Function& function, void* symbol) {
  function = reinterpret_cast<Function>(symbol);
}

}  // namespace

CudaDriver::CudaDriver(const std::string& library) {
  library_ = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);  // stays open as long as the process
  TORCH_CHECK(library_ != nullptr, "cannot open the CUDA driver: ", dlerror());
  assign(launch_kernel, find("cuLaunchKernel"));
  assign(tensor_map_encode_tiled, find("cuTensorMapEncodeTiled"));
  assign(set_bytes, find("cuMemsetD8Async"));
  assign(set_words, find("cuMemsetD32Async"));
  assign(get_current_context, find("cuCtxGetCurrent"));
  assign(push_current_context, find("cuCtxPushCurrent_v2"));
  assign(pop_current_context, find("cuCtxPopCurrent_v2"));
  assign(get_error_name_, find("cuGetErrorName"));
  assign(get_error_string_, find("cuGetErrorString"));
}

void* CudaDriver::find(const char* name) const {
  void* symbol = dlsym(library_, name);
  TORCH_CHECK(symbol != nullptr, "the CUDA driver has no ", name);
  return symbol;
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

ContextGuard::ContextGuard(const CudaDriver& driver, void* context) : driver_(driver) {
  void* current = nullptr;
  driver.check(driver.get_current_context(&current), "cuCtxGetCurrent");
  if (current != context) {
    driver.check(driver.push_current_context(context), "cuCtxPushCurrent");
    pushed_ = true;
  }
}

ContextGuard::~ContextGuard() {
  if (pushed_) {
    void* popped = nullptr;
    driver_.pop_current_context(&popped);
  }
}

}  // namespace para_kernels
