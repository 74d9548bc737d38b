// A CUDA driver without a GPU: it notes what it is asked to launch. Built and read by fake_cuda.py.
#include <cuda.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_LAUNCHES 16
#define MAX_FUNCTIONS 64
#define MAX_PARAMETERS 128
#define FIRST_FUNCTION 0x3000

typedef struct {
  CUfunction function;
  CUstream stream;
  CUcontext context;
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  unsigned extended;  // through cuLaunchKernelEx
  unsigned bytes;     // of all parameters, one after the other
  unsigned char parameters[4096];
} Launch;

typedef struct {
  unsigned count;
  unsigned sizes[MAX_PARAMETERS];
} Function;

// Set by the test.
CUresult result = CUDA_SUCCESS;  // of a launch
CUcontext context = (CUcontext)0x1000;
Function functions[MAX_FUNCTIONS];  // what a driver reads from the binary
// Read by the test.
unsigned loaded = 0;
unsigned launches = 0;
Launch launched[MAX_LAUNCHES];  // the last ones
unsigned pushed = 0, popped = 0;

static CUresult note(CUfunction function, CUstream stream, const unsigned grid[3], const unsigned block[3],
                     unsigned shared_bytes, unsigned extended, void **parameters) {
  if (result != CUDA_SUCCESS) {
    return result;
  }
  Launch *launch = &launched[launches++ % MAX_LAUNCHES];
  launch->function = function;
  launch->stream = stream;
  launch->context = context;
  memcpy(launch->grid, grid, sizeof(launch->grid));
  memcpy(launch->block, block, sizeof(launch->block));
  launch->shared_bytes = shared_bytes;
  launch->extended = extended;
  launch->bytes = 0;
  const Function *known = &functions[(size_t)function - FIRST_FUNCTION];
  for (unsigned i = 0; i < known->count; ++i) {
    memcpy(launch->parameters + launch->bytes, parameters[i], known->sizes[i]);
    launch->bytes += known->sizes[i];
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared_bytes, CUstream stream, void **parameters, void **extra) {
  return note(f, stream, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared_bytes, 0, parameters);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
  return note(f, c->hStream, (unsigned[]){c->gridDimX, c->gridDimY, c->gridDimZ},
              (unsigned[]){c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes, 1, parameters);
}

// The map holds its arguments, so that two maps are equal where these are.
typedef struct {
  cuuint64_t address;
  cuuint64_t sizes[5];
  cuuint64_t strides[4];
  cuuint32_t box[5];
  unsigned char element_strides[5];
  unsigned char type, rank, interleave, swizzle, l2_promotion, fill;
} Map;
_Static_assert(sizeof(Map) <= sizeof(CUtensorMap), "the arguments fit into a map");

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2_promotion,
                                CUtensorMapFloatOOBfill fill) {
  if (!context) {
    return CUDA_ERROR_INVALID_CONTEXT;
  }
  if (rank < 1 || rank > 5 || (cuuint64_t)address % 16 || (cuuint64_t)map % 64) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  Map noted = {.address = (cuuint64_t)address, .type = type, .rank = rank, .interleave = interleave};
  noted.swizzle = swizzle, noted.l2_promotion = l2_promotion, noted.fill = fill;
  for (unsigned i = 0; i < rank; ++i) {
    noted.sizes[i] = sizes[i];
    noted.box[i] = box[i];
    noted.element_strides[i] = element_strides[i];
    if (i + 1 < rank) {
      noted.strides[i] = strides[i];
    }
  }
  memset(map, 0, sizeof(*map));
  memcpy(map, &noted, sizeof(noted));
  return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, CUstream stream) {
  memset((void *)address, value, count);
  return CUDA_SUCCESS;
}

CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream stream) {
  for (size_t i = 0; i < count; ++i) {
    ((unsigned *)address)[i] = value;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) { return *current = context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return context = current, CUDA_SUCCESS; }

static CUcontext below;

CUresult cuCtxPushCurrent(CUcontext pushed_context) {
  below = context, context = pushed_context, ++pushed;
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext *popped_context) {
  *popped_context = context, context = below, ++popped;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult code, const char **name) { return *name = "CUDA_ERROR_FAKE", CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult code, const char **text) { return *text = "a fake failure", CUDA_SUCCESS; }

// What else Triton calls to load and launch a kernel.
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)0x2000, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  return *f = (CUfunction)(FIRST_FUNCTION + (size_t)(loaded++ % MAX_FUNCTIONS)), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return *value = 227 * 1024, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
  return *retained = (CUcontext)0x1000, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  return *(CUdeviceptr *)value = address, CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) { return *version = 14000, CUDA_SUCCESS; }

// What Triton links with, and does not need here.
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr address) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

// --- streams: each a thread that does what is enqueued in order, while the host goes on ---------------------------------

#define MAX_STREAMS 16
#define MAX_EVENTS 4096
#define QUEUE 65536

typedef enum { WAIT_WORD, WRITE_WORD, COPY, RECORD, WAIT_RECORD } Kind;

typedef struct {
  Kind kind;
  unsigned char *target;
  const unsigned char *source;
  size_t bytes;
  unsigned value;
} Step;

typedef struct {
  CUstream name;
  pthread_t thread;
  Step steps[QUEUE];
  unsigned enqueued, done;
} Stream;

// Set by the test: every step first takes a random time up to so many microseconds.
unsigned delay_us = 0;
// Read by the test.
unsigned steps_done = 0;
unsigned registered = 0;

static Stream *streams[MAX_STREAMS];
static unsigned stream_count = 0;
static unsigned event_count = 0;
static unsigned recorded[MAX_EVENTS], completed[MAX_EVENTS];
static pthread_mutex_t enqueueing = PTHREAD_MUTEX_INITIALIZER;

static unsigned load(const void *word) { return __atomic_load_n((const unsigned *)word, __ATOMIC_ACQUIRE); }

static void run(const Step *step) {
  switch (step->kind) {
    case WAIT_WORD:
      while ((int)(load(step->target) - step->value) < 0) {
        usleep(20);
      }
      break;
    case WRITE_WORD:
      __atomic_store_n((unsigned *)step->target, step->value, __ATOMIC_RELEASE);
      break;
    case COPY:  // in halves, so that a reader that does not wait sees one of them
      memcpy(step->target, step->source, step->bytes / 2);
      if (delay_us) {
        usleep(rand() % delay_us);
      }
      memcpy(step->target + step->bytes / 2, step->source + step->bytes / 2, step->bytes - step->bytes / 2);
      break;
    case RECORD:
      __atomic_store_n(&completed[step->bytes], step->value, __ATOMIC_RELEASE);
      break;
    case WAIT_RECORD:
      while ((int)(load(&completed[step->bytes]) - step->value) < 0) {
        usleep(20);
      }
  }
}

static void *work(void *argument) {
  Stream *stream = argument;
  for (;;) {
    while (load(&stream->enqueued) == stream->done) {
      usleep(20);
    }
    if (delay_us) {
      usleep(rand() % delay_us);
    }
    run(&stream->steps[stream->done % QUEUE]);
    __atomic_add_fetch(&steps_done, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&stream->done, stream->done + 1, __ATOMIC_RELEASE);
  }
  return NULL;
}

static Stream *stream_named(CUstream name) {
  for (unsigned i = 0; i < stream_count; ++i) {
    if (streams[i]->name == name) {
      return streams[i];
    }
  }
  if (stream_count == MAX_STREAMS) {
    return NULL;
  }
  Stream *stream = calloc(1, sizeof(Stream));
  stream->name = name;
  pthread_create(&stream->thread, NULL, work, stream);
  return streams[stream_count++] = stream;
}

static CUresult enqueue(CUstream name, Step step) {
  if (result != CUDA_SUCCESS) {
    return result;
  }
  pthread_mutex_lock(&enqueueing);
  Stream *stream = stream_named(name);
  if (stream && step.kind == RECORD) {
    step.value = ++recorded[step.bytes];
  } else if (stream && step.kind == WAIT_RECORD) {
    step.value = recorded[step.bytes];
  }
  if (stream) {
    stream->steps[stream->enqueued % QUEUE] = step;
    __atomic_store_n(&stream->enqueued, stream->enqueued + 1, __ATOMIC_RELEASE);
  }
  pthread_mutex_unlock(&enqueueing);
  return stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

// 1 once all that has been enqueued in a stream is done.
int stream_is_idle(CUstream name) {
  for (unsigned i = 0; i < stream_count; ++i) {
    if (streams[i]->name == name) {
      return load(&streams[i]->enqueued) == load(&streams[i]->done);
    }
  }
  return 1;
}

// How many steps a stream has been given so far.
unsigned steps_enqueued(CUstream name) {
  for (unsigned i = 0; i < stream_count; ++i) {
    if (streams[i]->name == name) {
      return load(&streams[i]->enqueued);
    }
  }
  return 0;
}

// How many of them it has done.
unsigned steps_finished(CUstream name) {
  for (unsigned i = 0; i < stream_count; ++i) {
    if (streams[i]->name == name) {
      return load(&streams[i]->done);
    }
  }
  return 0;
}

CUresult cuStreamWaitValue32(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags) {
  if (flags != CU_STREAM_WAIT_VALUE_GEQ || address % 4) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return enqueue(stream, (Step){.kind = WAIT_WORD, .target = (void *)address, .value = value});
}

CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags) {
  if (flags != CU_STREAM_WRITE_VALUE_DEFAULT || address % 4) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return enqueue(stream, (Step){.kind = WRITE_WORD, .target = (void *)address, .value = value});
}

CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
  return enqueue(stream, (Step){COPY, (void *)target, (void *)source, bytes, 0});
}

CUresult cuEventCreate(CUevent *event, unsigned flags) {
  if (event_count + 1 >= MAX_EVENTS) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  return *event = (CUevent)(size_t)++event_count, CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent event) { return CUDA_SUCCESS; }

CUresult cuEventRecord(CUevent event, CUstream stream) {
  return enqueue(stream, (Step){.kind = RECORD, .bytes = (size_t)event});
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  return enqueue(stream, (Step){.kind = WAIT_RECORD, .bytes = (size_t)event});
}

CUresult cuMemHostRegister(void *address, size_t bytes, unsigned flags) {
  if ((size_t)address % 4096 || flags != (CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return ++registered, CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void *address) { return --registered, CUDA_SUCCESS; }

CUresult cuMemHostGetDevicePointer(CUdeviceptr *device, void *host, unsigned flags) {
  return *device = (CUdeviceptr)host, CUDA_SUCCESS;
}
