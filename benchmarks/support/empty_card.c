/* The part of CUDA, cuBLAS and cuDNN that ONNX Runtime's CUDA provider calls, for a card that computes nothing.

   Memory of the card is memory of the host. Everything else succeeds and does nothing. What is not in this file
   is generated: a function that returns 0 (benchmarks/support/empty_card.py). */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MULTIPROCESSORS = 132, MEMORY_GB = 141 };

static int new_handle(void **handle) {
  *handle = calloc(1, 4096);
  return *handle ? 0 : 2;
}

static int new_memory(void **address, size_t nbytes) {
  *address = aligned_alloc(256, (nbytes + 255) / 256 * 256);
  return *address ? 0 : 2;
}

/* the card: an H200's numbers, in CUDA 13's struct cudaDeviceProp */
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaGetDeviceProperties(char *properties, int device) {
  memset(properties, 0, 1008);
  strcpy(properties, "empty");
  *(int *)(properties + 308) = 32;    /* warpSize */
  *(int *)(properties + 320) = 1024;  /* maxThreadsPerBlock */
  *(int *)(properties + 360) = 9;     /* major */
  *(int *)(properties + 384) = MULTIPROCESSORS;
  *(size_t *)(properties + 672) = 232448; /* sharedMemPerBlockOptin */
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? MULTIPROCESSORS : 1024;
  return 0;
}
int cudaMemGetInfo(size_t *unused, size_t *total) {
  *unused = *total = MEMORY_GB * 1000000000ul;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, void *kernel, int threads, size_t shared,
                                                           unsigned flags) {
  *count = 1;
  return 0;
}
int cudaFuncGetAttributes(char *attributes, void *kernel) { memset(attributes, 0, 140); return 0; }
int cudaPointerGetAttributes(char *attributes, void *address) { memset(attributes, 0, 32); return 0; }
int __cudaGetKernel(void **kernel, void *function) { *kernel = function; return 0; }

/* memory */
int cudaMalloc(void **address, size_t nbytes) { return new_memory(address, nbytes); }
int cudaMallocHost(void **address, size_t nbytes) { return new_memory(address, nbytes); }
int cudaHostAlloc(void **address, size_t nbytes, unsigned flags) { return new_memory(address, nbytes); }
int cudaFree(void *address) { free(address); return 0; }
int cudaFreeHost(void *address) { free(address); return 0; }
int cudaMemcpy(void *to, const void *from, size_t nbytes, int kind) { memmove(to, from, nbytes); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t nbytes, int kind, void *stream) {
  memmove(to, from, nbytes);
  return 0;
}
int cudaMemset(void *address, int value, size_t nbytes) { memset(address, value, nbytes); return 0; }
int cudaMemsetAsync(void *address, int value, size_t nbytes, void *stream) {
  memset(address, value, nbytes);
  return 0;
}

/* handles */
int cudaStreamCreate(void **stream) { return new_handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return new_handle(stream); }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { return new_handle(graph); }
int cudaEventCreate(void **event) { return new_handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return new_handle(event); }
int cudaGraphInstantiate(void **executable) { return new_handle(executable); }
int cublasCreate_v2(void **handle) { return new_handle(handle); }
int cublasLtCreate(void **handle) { return new_handle(handle); }

/* cuDNN: one plan for every convolution, without a workspace */
size_t cudnnGetVersion(void) { return 92801; }
size_t cudnnGetCudartVersion(void) { return 13000; }
const char *cudnnGetErrorString(int status) { return "empty"; }
void cudnnGetLastErrorString(char *text, size_t nbytes) { if (nbytes) *text = 0; }
int cudnnCreate(void **handle) { return new_handle(handle); }
int cudnnGetStream(void *handle, void **stream) { *stream = 0; return 0; }
int cudnnCreateTensorDescriptor(void **descriptor) { return new_handle(descriptor); }
int cudnnCreateFilterDescriptor(void **descriptor) { return new_handle(descriptor); }
int cudnnCreateConvolutionDescriptor(void **descriptor) { return new_handle(descriptor); }
int cudnnCreateActivationDescriptor(void **descriptor) { return new_handle(descriptor); }
int cudnnCreateReduceTensorDescriptor(void **descriptor) { return new_handle(descriptor); }
int cudnnBackendCreateDescriptor(int type, void **descriptor) { return new_handle(descriptor); }
int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t wanted, int64_t *count, void *values) {
  enum { INT64 = 3, DESCRIPTOR = 15 };
  if (count) *count = 1;
  if (values && wanted > 0 && type != DESCRIPTOR) {
    if (type == INT64) *(int64_t *)values = 0;
    else *(int *)values = 0;
  }
  return 0;
}
static int no_bytes(size_t *nbytes) { *nbytes = 0; return 0; }
int cudnnGetReductionWorkspaceSize(void *a, void *b, void *c, void *d, size_t *nbytes) { return no_bytes(nbytes); }
int cudnnGetReductionIndicesSize(void *a, void *b, void *c, void *d, size_t *nbytes) { return no_bytes(nbytes); }
