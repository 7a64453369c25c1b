// libnvidia-ml: what machine/gpu.py asks, through pynvml, of the driver's management library.  There is no nvml.h in
// the toolkit; the structures are those of NVIDIA's API reference.

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "machine.h"

namespace {

enum Status { kSuccess = 0, kInvalidArgument = 2, kNotSupported = 3, kInsufficientSize = 7, kGpuIsLost = 15 };
constexpr unsigned long long kUnknown = ~0ull;  // NVML_VALUE_NOT_AVAILABLE
constexpr unsigned kMemoryClock = 2;            // NVML_CLOCK_MEM

struct Memory {
    unsigned long long total, free, used;
};

struct PciInfo {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};

struct ProcessInfo {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
};

using Device = const standin::Card *;

int copied(const std::string & text, char * to, unsigned size) {
    if (text.size() + 1 > size) {
        return kInsufficientSize;
    }
    std::memcpy(to, text.c_str(), text.size() + 1);
    return kSuccess;
}

bool knows_nothing() {
    return standin::nvml_fault() == "na";
}

template <typename Number>
int answered(Number * to, Number value) {
    if (knows_nothing()) {
        return kNotSupported;
    }
    *to = value;
    return kSuccess;
}

}  // namespace

extern "C" {

int nvmlInitWithFlags(unsigned) {
    while (standin::nvml_fault() == "hang") {
        sleep(1);
    }
    return kSuccess;
}
int nvmlInit_v2() {
    return nvmlInitWithFlags(0);
}
int nvmlShutdown() {
    return kSuccess;
}

const char * nvmlErrorString(int status) {
    switch (status) {
        case kSuccess:
            return "Success";
        case kNotSupported:
            return "Not Supported";
        case kGpuIsLost:
            return "GPU is lost";
        default:
            return "Invalid Argument";
    }
}

int nvmlSystemGetDriverVersion(char * version, unsigned size) {
    return copied("580.00 (stand-in)", version, size);
}

int nvmlSystemGetCudaDriverVersion_v2(int * version) {
    *version = 13000;
    return kSuccess;
}

int nvmlDeviceGetCount_v2(unsigned * count) {
    *count = unsigned(standin::cards().size());
    return kSuccess;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device * device) {
    if (index >= standin::cards().size()) {
        return kInvalidArgument;
    }
    if (standin::is_lost(int(index))) {
        return kGpuIsLost;
    }
    *device = &standin::cards()[index];
    return kSuccess;
}

int nvmlDeviceGetName(Device device, char * name, unsigned size) {
    return copied(device->name, name, size);
}

int nvmlDeviceGetUUID(Device device, char * uuid, unsigned size) {
    return copied(device->uuid(), uuid, size);
}

int nvmlDeviceGetPciInfo_v3(Device device, PciInfo * info) {
    std::memset(info, 0, sizeof(*info));
    info->bus = unsigned(device->index) + 1;
    std::snprintf(info->bus_id_legacy, sizeof(info->bus_id_legacy), "%s", device->pci_bus_id().c_str());
    std::snprintf(info->bus_id, sizeof(info->bus_id), "0000%s", device->pci_bus_id().c_str());
    return kSuccess;
}

int nvmlDeviceGetMemoryInfo(Device device, Memory * memory) {
    memory->total = device->total;
    memory->used = standin::used_bytes(device->index);
    memory->free = memory->total - memory->used;
    return kSuccess;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device device, unsigned * count, ProcessInfo * infos) {
    const std::vector<standin::Usage> usages = standin::usage(device->index);
    const unsigned room = *count;
    *count = unsigned(usages.size());
    if (room < usages.size()) {
        return kInsufficientSize;
    }
    for (size_t i = 0; i < usages.size(); i++) {
        infos[i] = {unsigned(usages[i].pid), knows_nothing() ? kUnknown : usages[i].total(), ~0u, ~0u};
    }
    return kSuccess;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(Device, unsigned * count, ProcessInfo *) {
    *count = 0;
    return kSuccess;
}

int nvmlDeviceGetMigMode(Device device, unsigned * current, unsigned * pending) {
    *current = *pending = device->instance ? 1 : 0;
    return knows_nothing() ? kNotSupported : kSuccess;
}

int nvmlDeviceGetCudaComputeCapability(Device device, int * major, int * minor) {
    *major = device->major;
    *minor = device->minor;
    return kSuccess;
}

int nvmlDeviceGetMemoryBusWidth(Device device, unsigned * bits) {
    return answered(bits, unsigned(device->bus_bits));
}

int nvmlDeviceGetMaxClockInfo(Device device, unsigned clock, unsigned * mhz) {
    return clock == kMemoryClock ? answered(mhz, unsigned(device->memory_mhz)) : int(kNotSupported);
}

int nvmlDeviceGetMaxPcieLinkGeneration(Device device, unsigned * generation) {
    return answered(generation, unsigned(device->pcie_generation));
}

int nvmlDeviceGetCurrPcieLinkWidth(Device device, unsigned * lanes) {
    return answered(lanes, unsigned(device->pcie_lanes));
}

}  // extern "C"
