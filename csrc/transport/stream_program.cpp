#include "stream_program.h"

#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <utility>

namespace para_kernels {

namespace {

using Kind = StreamStep::Kind;

constexpr unsigned kWaitUntilReached = 0;    // CU_STREAM_WAIT_VALUE_GEQ: (int32)(word - value) >= 0
constexpr unsigned kWriteAfterAll = 0;       // CU_STREAM_WRITE_VALUE_DEFAULT: a fence over the whole system comes first
constexpr unsigned kEventWithoutTiming = 2;  // CU_EVENT_DISABLE_TIMING
constexpr unsigned kPortableMapped = 1 | 2;  // CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP

template <typename Function>
void assign(Function& function, void* symbol) {
  function = reinterpret_cast<Function>(symbol);
}

}  // namespace

StreamDriver::StreamDriver(const std::string& library) : CudaDriver(library) {
  // The names without _v2 are of an older interface, which drivers keep switched off.
  assign(stream_wait_value, find("cuStreamWaitValue32_v2"));
  assign(stream_write_value, find("cuStreamWriteValue32_v2"));
  assign(copy, find("cuMemcpyAsync"));
  assign(event_create, find("cuEventCreate"));
  assign(event_destroy, find("cuEventDestroy_v2"));
  assign(event_record, find("cuEventRecord"));
  assign(stream_wait_event, find("cuStreamWaitEvent"));
  assign(host_register, find("cuMemHostRegister_v2"));
  assign(host_unregister, find("cuMemHostUnregister"));
  assign(host_device_pointer, find("cuMemHostGetDevicePointer_v2"));
}

StreamProgram::StreamProgram(
    std::vector<StreamStep> steps, unsigned streams, unsigned events, const std::string& library)
    : driver_(library), steps_(std::move(steps)), streams_(streams) {
  for (const StreamStep& step : steps_) {
    const bool uses_event = step.kind == Kind::kRecord || step.kind == Kind::kWaitRecord;
    TORCH_CHECK_VALUE(step.stream < streams, "steps: got stream ", step.stream, ", there are ", streams);
    TORCH_CHECK_VALUE(
        !uses_event || (step.value >= 0 && static_cast<unsigned>(step.value) < events), "steps: got event ", step.value,
        ", there are ", events);
  }
  driver_.check(driver_.get_current_context(&context_), "cuCtxGetCurrent");
  TORCH_CHECK(context_ != nullptr, "no CUDA context is current");
  for (unsigned i = 0; i < events; ++i) {
    void* event = nullptr;
    driver_.check(driver_.event_create(&event, kEventWithoutTiming), "cuEventCreate");
    events_.push_back(event);
  }
}

StreamProgram::~StreamProgram() {
  for (void* event : events_) {
    driver_.event_destroy(event);  // at exit the driver may be gone: nothing to do about it
  }
}

void StreamProgram::run(const std::vector<std::uint64_t>& streams, std::uint32_t epoch) const {
  TORCH_CHECK_VALUE(streams.size() == streams_, "streams: got ", streams.size(), ", must be ", streams_);
  const ContextGuard guard(driver_, context_);
  for (const StreamStep& step : steps_) {
    run(step, reinterpret_cast<void*>(streams[step.stream]), epoch);
  }
}

void StreamProgram::run(const StreamStep& step, void* stream, std::uint32_t epoch) const {
  const std::uint32_t value = epoch + static_cast<std::uint32_t>(step.value);
  switch (step.kind) {
    case Kind::kWaitWord:
      return driver_.check(
          driver_.stream_wait_value(stream, step.target, value, kWaitUntilReached), "cuStreamWaitValue32");
    case Kind::kWriteWord:
      return driver_.check(driver_.stream_write_value(stream, step.target, value, kWriteAfterAll), "cuStreamWriteValue32");
    case Kind::kCopy:
      return driver_.check(driver_.copy(step.target, step.source, step.bytes, stream), "cuMemcpyAsync");
    case Kind::kRecord:
      return driver_.check(driver_.event_record(events_[step.value], stream), "cuEventRecord");
    case Kind::kWaitRecord:
      return driver_.check(driver_.stream_wait_event(stream, events_[step.value], 0), "cuStreamWaitEvent");
  }
}

RegisteredMemory::RegisteredMemory(std::uint64_t address, std::size_t bytes, const std::string& library)
    : driver_(library), address_(reinterpret_cast<void*>(address)) {
  driver_.check(driver_.get_current_context(&context_), "cuCtxGetCurrent");
  TORCH_CHECK(context_ != nullptr, "no CUDA context is current");
  driver_.check(driver_.host_register(address_, bytes, kPortableMapped), "cuMemHostRegister");
  const int result = driver_.host_device_pointer(&device_address_, address_, 0);
  if (result != 0) {
    driver_.host_unregister(address_);
  }
  driver_.check(result, "cuMemHostGetDevicePointer");
}

RegisteredMemory::~RegisteredMemory() {
  void* current = nullptr;
  const bool pushed = driver_.get_current_context(&current) == 0 && current != context_ &&
                      driver_.push_current_context(context_) == 0;
  driver_.host_unregister(address_);
  if (pushed) {
    driver_.pop_current_context(&current);
  }
}

at::Tensor view_of_memory(
    std::uint64_t address, const std::vector<std::int64_t>& shape, at::ScalarType dtype, c10::Device device) {
  // With the device given, torch does not ask CUDA where the memory lies: host memory that is mapped passes.
  return at::for_blob(reinterpret_cast<void*>(address), shape)
      .options(at::TensorOptions().dtype(dtype).device(device))
      .target_device(device)
      .make_tensor();
}

}  // namespace para_kernels
