// A ggml backend module that shows llama.cpp "GPUs" of a chosen size and computes on the CPU.  It refuses allocations
// over that size, and answers llama.cpp's questions about operations, padding and capabilities as ggml-cuda does, so
// that llama.cpp places, splits and runs out of memory as on a real card.  Loaded only through GGML_BACKEND_PATH.
//
//   PYLLAMARUN_VIRTUAL_GPUS      sizes in MiB, one per device: "12288" or "12288,8192"
//   PYLLAMARUN_VIRTUAL_RESERVED  MiB that the driver and context hold on each device (default 0): one number for all,
//   or
//                                one per device
//   PYLLAMARUN_VIRTUAL_STATE     file that receives "index used total peak\n" per device on each change, in bytes
//   PYLLAMARUN_VIRTUAL_NAMES     what each device calls itself, separated by ";" (default "virtual GPU, N MiB")
//   PYLLAMARUN_VIRTUAL_HOLLOW    1: what is copied to a device is not kept, for rehearsals without data
//   PYLLAMARUN_CARDS             which cards they stand for, as far as memory depends on it: cuda_rules/card.h

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <sstream>
#include <string>

#include "card.h"
#include "fusion.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml.h"
#include "operations.h"

namespace {

constexpr double kMiB = 1024.0 * 1024.0;
constexpr size_t kPage = 4096;

std::string setting(const char * name) {
    const char * value = std::getenv(name);
    return value ? value : "";
}

struct Device {
    int index = 0;
    std::string name, description, id, host_name;
    size_t total = 0, reserved = 0;
    std::atomic<size_t> used{0}, peak{0};
    ggml_backend_buffer_type buffer_type{}, host_buffer_type{};
    ggml_backend_device device{};
};

std::deque<Device> & devices() {
    static std::deque<Device> all;
    return all;
}

Device & device_of(ggml_backend_dev_t dev) {
    return *static_cast<Device *>(dev->context);
}
Device & device_of(ggml_backend_buffer_type_t type) {
    return *static_cast<Device *>(type->context);
}

ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// ---------------------------------------------------------------------------------------------- memory, counted

// Replaces the state file in one step: a reader never sees half of it.
void publish_state() {
    const char * path = std::getenv("PYLLAMARUN_VIRTUAL_STATE");
    if (!path || !*path) {
        return;
    }
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    const std::string partial = std::string(path) + ".tmp";
    FILE * file = std::fopen(partial.c_str(), "w");
    if (!file) {
        return;
    }
    for (const Device & d : devices()) {
        std::fprintf(file, "%d %zu %zu %zu\n", d.index, d.reserved + d.used, d.total, d.reserved + d.peak);
    }
    std::fclose(file);
    std::rename(partial.c_str(), path);
}

bool take(Device & d, size_t bytes) {
    size_t used = d.used;
    do {
        if (used + bytes + d.reserved > d.total) {
            return false;
        }
    } while (!d.used.compare_exchange_weak(used, used + bytes));
    size_t peak = d.peak;
    while (peak < used + bytes && !d.peak.compare_exchange_weak(peak, used + bytes)) {
    }
    publish_state();
    return true;
}

void give_back(Device & d, size_t bytes) {
    d.used -= bytes;
    publish_state();
}

// ---------------------------------------------------------------------------------------------- device buffers

struct Block {
    Device & device;
    void * data;
    size_t size;
};

Block & block_of(ggml_backend_buffer_t buffer) {
    return *static_cast<Block *>(buffer->context);
}

void buffer_free(ggml_backend_buffer_t buffer) {
    Block & block = block_of(buffer);
    std::free(block.data);
    give_back(block.device, block.size);
    delete &block;
}

void * buffer_base(ggml_backend_buffer_t buffer) {
    return block_of(buffer).data;
}

ggml_status buffer_init_tensor(ggml_backend_buffer_t, ggml_tensor *) {
    return GGML_STATUS_SUCCESS;
}

void buffer_memset(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    std::memset(static_cast<char *>(tensor->data) + offset, value, size);
}

void buffer_set(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    static const bool hollow = setting("PYLLAMARUN_VIRTUAL_HOLLOW") == "1";
    if (hollow) {
        return;
    }
    std::memcpy(static_cast<char *>(tensor->data) + offset, data, size);
}

void buffer_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    std::memcpy(data, static_cast<const char *>(tensor->data) + offset, size);
}

bool buffer_copy(ggml_backend_buffer_t, const ggml_tensor * from, ggml_tensor * to) {
    const bool readable =
        from->buffer && (ggml_backend_buffer_is_host(from->buffer) || from->buffer->iface.get_base == buffer_base);
    if (readable) {
        std::memcpy(to->data, from->data, ggml_nbytes(from));
    }
    return readable;
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    std::memset(block_of(buffer).data, value, block_of(buffer).size);
}

const char * type_name(ggml_backend_buffer_type_t type) {
    return device_of(type).name.c_str();
}

ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t type, size_t size) {
    Device & device = device_of(type);
    if (!take(device, size)) {
        // Worded as ggml_cuda_device_malloc's caller words it, so that one classifier serves both.
        GGML_LOG_ERROR("%s: allocating %.2f MiB on device %d: virtual GPU out of memory\n", __func__, size / kMiB,
                       device.index);
        return nullptr;
    }
    void * data = std::aligned_alloc(kPage, (size + kPage - 1) / kPage * kPage + kPage);
    if (!data) {
        give_back(device, size);
        return nullptr;
    }
    ggml_backend_buffer_i iface{};
    iface.free_buffer = buffer_free;
    iface.get_base = buffer_base;
    iface.init_tensor = buffer_init_tensor;
    iface.memset_tensor = buffer_memset;
    iface.set_tensor = buffer_set;
    iface.get_tensor = buffer_get;
    iface.cpy_tensor = buffer_copy;
    iface.clear = buffer_clear;
    return ggml_backend_buffer_init(type, iface, new Block{device, data, size}, size);
}

size_t type_alignment(ggml_backend_buffer_type_t) {
    return cuda_rules::kAlignment;
}
size_t type_alloc_size(ggml_backend_buffer_type_t type, const ggml_tensor * tensor) {
    return cuda_rules::alloc_size(tensor, cuda_rules::card(size_t(device_of(type).index)));
}
bool type_is_host(ggml_backend_buffer_type_t) {
    return false;
}

// The host buffer type stands for pinned memory: with it, llama.cpp chooses the same CPU buffers as beside CUDA.
const char * host_type_name(ggml_backend_buffer_type_t type) {
    return device_of(type).host_name.c_str();
}

ggml_backend_buffer_t host_type_alloc(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(cpu()), size);
    if (buffer) {
        buffer->buft = type;
    }
    return buffer;
}

size_t host_type_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_dev_buffer_type(cpu()));
}
bool host_type_is_host(ggml_backend_buffer_type_t) {
    return true;
}

// ---------------------------------------------------------------------------------------------- computing, on the CPU

ggml_backend_t inner(ggml_backend_t backend) {
    return static_cast<ggml_backend_t>(backend->context);
}

const char * backend_name(ggml_backend_t backend) {
    return device_of(backend->device).name.c_str();
}

void backend_free(ggml_backend_t backend) {
    ggml_backend_free(inner(backend));
    delete backend;
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    return ggml_backend_graph_compute(inner(backend), graph);
}

void backend_optimize(ggml_backend_t, ggml_cgraph * graph, ggml_backend_graph_optimize_params * allocator) {
    cuda_rules::keep_fused_inputs(graph, allocator);
}

// Work is done when a call returns: there is nothing to wait for, and an event has always happened.
void backend_synchronize(ggml_backend_t) {}
void backend_event(ggml_backend_t, ggml_backend_event_t) {}
ggml_backend_event_t event_new(ggml_backend_dev_t dev) {
    return new ggml_backend_event{dev, nullptr};
}
void event_free(ggml_backend_dev_t, ggml_backend_event_t event) {
    delete event;
}
void event_synchronize(ggml_backend_dev_t, ggml_backend_event_t) {}

// llama.cpp hands its --threads to every backend that offers this.
void set_n_threads(ggml_backend_t backend, int n_threads) {
    auto * set = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu()), "ggml_backend_set_n_threads"));
    if (set) {
        set(inner(backend), n_threads);
    }
}

// ---------------------------------------------------------------------------------------------- devices

const char * device_name(ggml_backend_dev_t dev) {
    return device_of(dev).name.c_str();
}
const char * device_description(ggml_backend_dev_t dev) {
    return device_of(dev).description.c_str();
}
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void device_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) {
    const Device & d = device_of(dev);
    *total = d.total;
    *free = d.total - std::min(d.total, d.reserved + d.used);
}

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name = device_name(dev);
    props->description = device_description(dev);
    props->type = device_type(dev);
    props->device_id = device_of(dev).id.c_str();
    device_memory(dev, &props->memory_free, &props->memory_total);
    props->caps.async = true;  // ggml_backend_cuda_device_get_props, for a card that is not integrated
    props->caps.host_buffer = true;
    props->caps.events = true;
    props->caps.mmap_support = true;
}

ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = {0x70, 0x79, 0x6c, 0x6c, 0x61, 0x6d, 0x61, 0x72,
                             0x75, 0x6e, 0x76, 0x67, 0x70, 0x75, 0x30, 0x31};
    ggml_backend_t cpu_backend = ggml_backend_dev_init(cpu(), nullptr);
    if (!cpu_backend) {
        return nullptr;
    }
    ggml_backend_i iface{};
    iface.get_name = backend_name;
    iface.free = backend_free;
    iface.graph_compute = backend_compute;
    iface.graph_optimize = backend_optimize;
    iface.synchronize = backend_synchronize;
    iface.event_record = backend_event;
    iface.event_wait = backend_event;
    return new ggml_backend{&guid, iface, dev, cpu_backend};
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev) {
    return &device_of(dev).buffer_type;
}
ggml_backend_buffer_type_t device_host_buffer_type(ggml_backend_dev_t dev) {
    return &device_of(dev).host_buffer_type;
}

bool is_ours(ggml_backend_buffer_type_t type) {
    return type->iface.get_name == type_name;
}

bool device_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    for (const ggml_tensor * source : op->src) {
        if (source && source->buffer && is_ours(source->buffer->buft) && source->buffer->buft->device != dev) {
            return false;
        }
    }
    return cuda_rules::has_kernel(op) && ggml_backend_dev_supports_op(cpu(), op);
}

bool device_supports_buffer_type(ggml_backend_dev_t dev, ggml_backend_buffer_type_t type) {
    return type == device_buffer_type(dev);
}

bool device_offload_op(ggml_backend_dev_t, const ggml_tensor * op) {
    return cuda_rules::worth_offloading(op);
}

// ---------------------------------------------------------------------------------------------- registry

const char * registry_name(ggml_backend_reg_t) {
    return "VIRTUAL";
}
size_t registry_count(ggml_backend_reg_t) {
    return devices().size();
}
ggml_backend_dev_t registry_device(ggml_backend_reg_t, size_t index) {
    return &devices()[index].device;
}

void * registry_function(ggml_backend_reg_t, const char * name) {
    if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void *>(set_n_threads);
    }
    return nullptr;
}

ggml_backend_reg registry{
    GGML_BACKEND_API_VERSION, {registry_name, registry_count, registry_device, registry_function}, nullptr};

void add_device(size_t total, size_t reserved, const std::string & description) {
    Device & d = devices().emplace_back();
    d.index = int(devices().size()) - 1;
    d.name = "VIRTUAL" + std::to_string(d.index);
    d.id = "virtual:" + std::to_string(d.index);
    d.host_name = "VIRTUAL_Host";
    d.description = description;
    d.total = total;
    d.reserved = reserved;

    ggml_backend_device_i & dev = d.device.iface;
    dev.get_name = device_name;
    dev.get_description = device_description;
    dev.get_memory = device_memory;
    dev.get_type = device_type;
    dev.get_props = device_props;
    dev.init_backend = device_init_backend;
    dev.get_buffer_type = device_buffer_type;
    dev.get_host_buffer_type = device_host_buffer_type;
    dev.supports_op = device_supports_op;
    dev.supports_buft = device_supports_buffer_type;
    dev.offload_op = device_offload_op;
    dev.event_new = event_new;
    dev.event_free = event_free;
    dev.event_synchronize = event_synchronize;
    d.device.reg = &registry;
    d.device.context = &d;

    ggml_backend_buffer_type_i & type = d.buffer_type.iface;
    type.get_name = type_name;
    type.alloc_buffer = type_alloc;
    type.get_alignment = type_alignment;
    type.get_alloc_size = type_alloc_size;
    type.is_host = type_is_host;
    d.buffer_type.device = &d.device;
    d.buffer_type.context = &d;

    ggml_backend_buffer_type_i & host = d.host_buffer_type.iface;
    host.get_name = host_type_name;
    host.alloc_buffer = host_type_alloc;
    host.get_alignment = host_type_alignment;
    host.is_host = host_type_is_host;
    d.host_buffer_type.device = &d.device;
    d.host_buffer_type.context = &d;
}

size_t mib_to_bytes(const std::string & text) {
    return size_t(std::strtod(text.c_str(), nullptr) * kMiB);
}

void add_devices_from_environment() {
    std::stringstream sizes(setting("PYLLAMARUN_VIRTUAL_GPUS")), names(setting("PYLLAMARUN_VIRTUAL_NAMES"));
    std::stringstream reservations(setting("PYLLAMARUN_VIRTUAL_RESERVED"));
    size_t reserved = 0;
    std::string size, name, reservation;
    while (std::getline(sizes, size, ',')) {
        if (std::getline(reservations, reservation, ',')) {
            reserved = mib_to_bytes(reservation);
        }
        if (!std::getline(names, name, ';') || name.empty()) {
            name = "virtual GPU, " + size + " MiB";
        }
        add_device(mib_to_bytes(size), reserved, name);
    }
}

ggml_backend_reg_t virtual_gpu_registry() {
    static const bool once = [] {
        add_devices_from_environment();
        publish_state();
        return true;
    }();
    (void)once;
    return &registry;
}

}  // namespace

GGML_BACKEND_DL_IMPL(virtual_gpu_registry)
