// libcuda: the driver's virtual memory management, out of which ggml-cuda's scratch pool grows.

#include <cuda.h>
#include <sys/mman.h>

#include <map>
#include <mutex>

#include "machine.h"

using standin::Kind;

namespace {

constexpr size_t kGranularity = size_t(2) << 20;

struct Physical {
    size_t size;
    int card;
};

std::mutex mutex;
std::map<CUmemGenericAllocationHandle, Physical> created;  // by handle
std::map<CUdeviceptr, Physical> mapped;                    // by address
CUmemGenericAllocationHandle next_handle = 1;

}  // namespace

extern "C" {

CUresult cuGetErrorString(CUresult error, const char ** text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "an error of the stand-in";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice * device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int * value, CUdevice_attribute attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t * granularity, const CUmemAllocationProp *,
                                       CUmemAllocationGranularity_flags) {
    *granularity = kGranularity;
    return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle * handle, size_t size, const CUmemAllocationProp * properties,
                     unsigned long long) {
    const int card = standin::visible_cards().at(size_t(properties->location.id));
    if (!standin::take(card, size, Kind::pool)) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    std::lock_guard<std::mutex> lock(mutex);
    *handle = next_handle++;
    created[*handle] = {size, card};
    return CUDA_SUCCESS;
}

// Memory lives until it is both released and unmapped; ggml releases it as soon as it is mapped.
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    std::lock_guard<std::mutex> lock(mutex);
    created.erase(handle);
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t, CUmemGenericAllocationHandle handle, unsigned long long) {
    std::lock_guard<std::mutex> lock(mutex);
    mapped[address] = created[handle];
    mprotect(reinterpret_cast<void *>(address), size, PROT_READ | PROT_WRITE);
    return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto it = mapped.lower_bound(address); it != mapped.end() && it->first < address + size;) {
        standin::give_back(it->second.card, it->second.size, Kind::pool);
        it = mapped.erase(it);
    }
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr * address, size_t size, size_t, CUdeviceptr, unsigned long long) {
    void * data = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *address = reinterpret_cast<CUdeviceptr>(data);
    return data == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    munmap(reinterpret_cast<void *>(address), size);
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t) {
    return CUDA_SUCCESS;
}

}  // extern "C"
