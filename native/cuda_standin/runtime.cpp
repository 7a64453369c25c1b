// libcudart: what ggml-cuda calls of the CUDA runtime.  Memory is counted and never touched, kernels do nothing,
// streams and events are always done.  Reading back gives zeros.

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "machine.h"

using standin::Card;
using standin::Kind;
using standin::visible_cards;

namespace {

struct Block {
    size_t size;
    int card;
};

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

std::mutex blocks_mutex;
std::map<void *, Block> & blocks() {
    static std::map<void *, Block> all;
    return all;
}

cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) {
        last_error = error;
    }
    return error;
}

bool is_valid(int device) {
    return device >= 0 && size_t(device) < visible_cards().size();
}

// CUDA counts the cards that it shows; the machine counts all.
int card_index(int device) {
    return visible_cards()[size_t(device)];
}

const Card & card_of(int device) {
    return standin::cards()[size_t(card_index(device))];
}

// The error of whatever touches the current card.
cudaError_t card_state() {
    if (!is_valid(current_device)) {
        return result(cudaErrorNoDevice);
    }
    return standin::is_lost(card_index(current_device)) ? result(cudaErrorDevicesUnavailable) : cudaSuccess;
}

// Address space that takes no memory until it is written to, which nobody does.
void * reserve(size_t size) {
    void * data = mmap(nullptr, std::max(size, size_t(1)), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
}

void * new_handle() {
    static std::mutex mutex;
    static size_t next = 0x1000;
    std::lock_guard<std::mutex> lock(mutex);
    return reinterpret_cast<void *>(next += 16);
}

}  // namespace

extern "C" {

// ---- devices

cudaError_t cudaGetDeviceCount(int * count) {
    *count = int(visible_cards().size());
    return *count > 0 ? cudaSuccess : result(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int * device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (!is_valid(device)) {
        return result(cudaErrorInvalidDevice);
    }
    current_device = device;
    standin::touch(card_index(device));
    return card_state();
}

cudaError_t cudaSetDeviceFlags(unsigned) {
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp * properties, int device) {
    if (!is_valid(device)) {
        return result(cudaErrorInvalidDevice);
    }
    const Card & card = card_of(device);
    std::memset(properties, 0, sizeof(*properties));
    std::snprintf(properties->name, sizeof(properties->name), "%s", card.name.c_str());
    properties->totalGlobalMem = card.memory();
    properties->major = card.major;
    properties->minor = card.minor;
    properties->multiProcessorCount = card.multiprocessors;
    properties->warpSize = 32;
    properties->sharedMemPerBlock = 48 * 1024;
    properties->sharedMemPerBlockOptin = card.shared_memory;
    properties->sharedMemPerMultiprocessor = card.shared_memory + 1024;
    properties->regsPerBlock = 65536;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 1536;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->cooperativeLaunch = 1;
    properties->memoryBusWidth = card.bus_bits;
    properties->pciBusID = card.index + 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr attribute, int device) {
    if (!is_valid(device)) {
        return result(cudaErrorInvalidDevice);
    }
    const Card & card = card_of(device);
    switch (attribute) {
        case cudaDevAttrCooperativeLaunch:
        case cudaDevAttrHostRegisterSupported:
            *value = 1;
            break;
        case cudaDevAttrMultiProcessorCount:
            *value = card.multiprocessors;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = int(card.shared_memory);
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = card.major;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = card.minor;
            break;
        case cudaDevAttrWarpSize:
            *value = 32;
            break;
        default:
            *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char * id, int size, int device) {
    if (!is_valid(device)) {
        return result(cudaErrorInvalidDevice);
    }
    std::snprintf(id, size_t(size), "%s", card_of(device).pci_bus_id().c_str());
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int * can, int, int) {
    *can = 0;  // as GeForce cards answer
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaDeviceDisablePeerAccess(int) {
    return cudaSuccess;
}

// ---- memory

cudaError_t cudaMemGetInfo(size_t * free, size_t * total) {
    if (cudaError_t error = card_state()) {
        return error;
    }
    const Card & card = card_of(current_device);
    standin::touch(card.index);
    *total = card.memory();
    *free = *total - std::min(*total, standin::used_bytes(card.index));
    return cudaSuccess;
}

cudaError_t cudaMalloc(void ** data, size_t size) {
    if (cudaError_t lost = card_state()) {
        return lost;
    }
    const int card = card_index(current_device);
    if (!standin::take(card, size, Kind::buffer)) {
        return result(cudaErrorMemoryAllocation);
    }
    *data = reserve(size);
    std::lock_guard<std::mutex> lock(blocks_mutex);
    blocks()[*data] = {size, card};
    return cudaSuccess;
}

cudaError_t cudaMallocManaged(void ** data, size_t size, unsigned) {
    return cudaMalloc(data, size);
}

cudaError_t cudaFree(void * data) {
    Block block{};
    {
        std::lock_guard<std::mutex> lock(blocks_mutex);
        auto found = blocks().find(data);
        if (found == blocks().end()) {
            return cudaSuccess;
        }
        block = found->second;
        blocks().erase(found);
    }
    munmap(data, std::max(block.size, size_t(1)));
    standin::give_back(block.card, block.size, Kind::buffer);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void ** data, size_t size) {
    *data = reserve(size);
    std::lock_guard<std::mutex> lock(blocks_mutex);
    blocks()[*data] = {size, -1};
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void ** data, size_t size, unsigned) {
    return cudaMallocHost(data, size);
}

cudaError_t cudaFreeHost(void * data) {
    std::lock_guard<std::mutex> lock(blocks_mutex);
    auto found = blocks().find(data);
    if (found != blocks().end()) {
        munmap(data, std::max(found->second.size, size_t(1)));
        blocks().erase(found);
    }
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *, size_t, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *) {
    return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void ** device, void * host, unsigned) {
    *device = host;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void * to, const void *, size_t size, cudaMemcpyKind kind, cudaStream_t) {
    if (kind == cudaMemcpyDeviceToHost) {
        std::memset(to, 0, size);
    }
    return card_state();
}

cudaError_t cudaMemcpy2DAsync(void * to, size_t pitch, const void *, size_t, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t) {
    for (size_t row = 0; kind == cudaMemcpyDeviceToHost && row < height; row++) {
        std::memset(static_cast<char *>(to) + row * pitch, 0, width);
    }
    return card_state();
}

cudaError_t cudaMemcpyPeerAsync(void *, int, const void *, int, size_t, cudaStream_t) {
    return card_state();
}
cudaError_t cudaMemset(void *, int, size_t) {
    return card_state();
}
cudaError_t cudaMemsetAsync(void *, int, size_t, cudaStream_t) {
    return card_state();
}

// ---- streams, events, graphs

cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, unsigned) {
    *stream = static_cast<cudaStream_t>(new_handle());
    return card_state();
}
cudaError_t cudaStreamDestroy(cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return card_state();
}
cudaError_t cudaDeviceSynchronize() {
    return card_state();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus * status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t * graph) {
    *graph = static_cast<cudaGraph_t>(new_handle());
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t * exec, cudaGraph_t, unsigned long long) {
    *exec = static_cast<cudaGraphExec_t>(new_handle());
    return cudaSuccess;
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t, cudaGraph_t, cudaGraphExecUpdateResultInfo * info) {
    std::memset(info, 0, sizeof(*info));
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    return card_state();
}
cudaError_t cudaGraphDestroy(cudaGraph_t) {
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) {
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, unsigned) {
    *event = static_cast<cudaEvent_t>(new_handle());
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return card_state();
}
cudaError_t cudaEventQuery(cudaEvent_t) {
    return cudaSuccess;
}

// ---- errors

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() {
    return last_error;
}
const char * cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorNoDevice:
            return "no CUDA-capable device is detected";
        case cudaErrorDevicesUnavailable:
            return "CUDA-capable device(s) is/are busy or unavailable";
        default:
            return "an error of the stand-in";
    }
}

// ---- kernels, which do nothing

cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) {
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes * attributes, const void *) {
    const Card & card = card_of(current_device);
    std::memset(attributes, 0, sizeof(*attributes));
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->binaryVersion = attributes->ptxVersion = card.major * 10 + card.minor;
    attributes->maxDynamicSharedSizeBytes = int(card.shared_memory);
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int * blocks, const void *, int, size_t, unsigned) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int * blocks, const void *, int, size_t) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) {
    return card_state();
}
cudaError_t __cudaLaunchKernel(void *, dim3, dim3, void **, size_t, cudaStream_t) {
    return card_state();
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *, void **) {
    return card_state();
}
cudaError_t cudaLaunchCooperativeKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) {
    return card_state();
}
cudaError_t __cudaGetKernel(void ** kernel, const void * function) {
    *kernel = const_cast<void *>(function);
    return cudaSuccess;
}

// ---- what nvcc's own code calls when a library with kernels is loaded

void ** __cudaRegisterFatBinary(void *) {
    static void * handle[4];
    return handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *) {}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void *) {
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 * grid, dim3 * block, size_t * shared, void * stream) {
    *grid = *block = dim3{1, 1, 1};
    *shared = 0;
    *static_cast<void **>(stream) = nullptr;
    return cudaSuccess;
}

}  // extern "C"
