// What one layer of a ring enqueues besides its kernels: waits, flags and copies, in one call without Python.
#pragma once

#include "../cuda_driver.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace para_kernels {

// The functions of the driver that order streams by words in memory, copy, and register host memory.
class StreamDriver : public CudaDriver {
 public:
  explicit StreamDriver(const std::string& library);

  int (*stream_wait_value)(void* stream, std::uint64_t address, std::uint32_t value, unsigned flags);
  int (*stream_write_value)(void* stream, std::uint64_t address, std::uint32_t value, unsigned flags);
  int (*copy)(std::uint64_t target, std::uint64_t source, std::size_t bytes, void* stream);
  int (*event_create)(void** event, unsigned flags);
  int (*event_destroy)(void* event);
  int (*event_record)(void* event, void* stream);
  int (*stream_wait_event)(void* stream, void* event, unsigned flags);
  int (*host_register)(void* address, std::size_t bytes, unsigned flags);
  int (*host_unregister)(void* address);
  int (*host_device_pointer)(std::uint64_t* device, void* host, unsigned flags);
};

// One operation in one of the streams of a run, given by its place among them.
struct StreamStep {
  enum class Kind {
    kWaitWord,    // until the word at `target` has reached epoch + value; both count modulo 2**32
    kWriteWord,   // epoch + value, to `target`, seen by all devices only after what stands before it in the stream
    kCopy,        // `bytes` from `source` to `target`; device, peer or registered host memory on either side
    kRecord,      // event number `value`
    kWaitRecord,  // for what event number `value` last recorded
  };

  Kind kind;
  unsigned stream;
  std::uint64_t target = 0;
  std::uint64_t source = 0;
  std::uint64_t bytes = 0;
  std::int32_t value = 0;
};

// A fixed list of steps, run once per layer with another epoch. Nothing here waits on the host.
class StreamProgram {
 public:
  // Belongs to the context that is current now. ValueError: a step with a stream or an event that there is not.
  StreamProgram(std::vector<StreamStep> steps, unsigned streams, unsigned events, const std::string& library);
  StreamProgram(const StreamProgram&) = delete;
  StreamProgram& operator=(const StreamProgram&) = delete;
  ~StreamProgram();

  // RuntimeError: the driver refused a step; the steps before it are enqueued.
  void run(const std::vector<std::uint64_t>& streams, std::uint32_t epoch) const;

  std::size_t size() const { return steps_.size(); }

 private:
  void run(const StreamStep& step, void* stream, std::uint32_t epoch) const;

  StreamDriver driver_;
  std::vector<StreamStep> steps_;
  unsigned streams_;
  std::vector<void*> events_;
  void* context_ = nullptr;
};

// Pins `bytes` of this process's memory for the copy engines and maps them into the devices' address space, until it is
// destroyed.
class RegisteredMemory {
 public:
  RegisteredMemory(std::uint64_t address, std::size_t bytes, const std::string& library);
  RegisteredMemory(const RegisteredMemory&) = delete;
  RegisteredMemory& operator=(const RegisteredMemory&) = delete;
  ~RegisteredMemory();

  std::uint64_t device_address() const { return device_address_; }

 private:
  StreamDriver driver_;
  void* address_;
  void* context_ = nullptr;
  std::uint64_t device_address_ = 0;
};

// A contiguous tensor over memory that a device reaches at `address` and that someone else keeps.
at::Tensor view_of_memory(
    std::uint64_t address, const std::vector<std::int64_t>& shape, at::ScalarType dtype, c10::Device device);

}  // namespace para_kernels
