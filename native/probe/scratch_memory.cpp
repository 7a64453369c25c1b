#include "scratch_memory.h"

#include <cstdint>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "ggml.h"

namespace {

bool follows_cuda_rules(ggml_backend_dev_t device) {
    const char * registry = ggml_backend_reg_name(ggml_backend_dev_backend_reg(device));
    return std::strcmp(registry, "CUDA") == 0 || std::strcmp(registry, "VIRTUAL") == 0;
}

template <typename Value>
void append(std::string & key, const Value & value) {
    key.append(reinterpret_cast<const char *>(&value), sizeof(value));
}

// All that the rules look at, so that each operation is thought about once, however many layers and graphs it is in.
std::string key_of(const ggml_tensor * op, const cuda_rules::Card & card) {
    std::string key;
    key.reserve(512);
    append(key, &card);
    append(key, op->op);
    append(key, op->op_params);
    for (const ggml_tensor * tensor :
         {op, static_cast<const ggml_tensor *>(op->src[0]), static_cast<const ggml_tensor *>(op->src[1]),
          static_cast<const ggml_tensor *>(op->src[2]), static_cast<const ggml_tensor *>(op->src[3])}) {
        append(key, tensor != nullptr);
        if (tensor) {
            append(key, tensor->type);
            append(key, tensor->ne);
            append(key, tensor->nb);
        }
    }
    return key;
}

cuda_rules::Scratch scratch_of(const ggml_tensor * op, const cuda_rules::Card & card) {
    static std::unordered_map<std::string, cuda_rules::Scratch> known;
    static std::shared_mutex mutex;
    std::string key = key_of(op, card);
    {
        std::shared_lock<std::shared_mutex> lock(mutex);
        const auto found = known.find(key);
        if (found != known.end()) {
            return found->second;
        }
    }
    const cuda_rules::Scratch scratch = cuda_rules::scratch(op, card);
    std::unique_lock<std::shared_mutex> lock(mutex);
    known.emplace(std::move(key), scratch);
    return scratch;
}

}  // namespace

void include_scratch(ScratchMemory & memory, ggml_backend_sched_t sched, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); i++) {
        ggml_backend_dev_t device = ggml_backend_get_device(ggml_backend_sched_get_backend(sched, i));
        if (follows_cuda_rules(device)) {
            memory.try_emplace(device);
        }
    }
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (ggml_is_empty(node) || !cuda_rules::may_take_scratch(node)) {
            continue;
        }
        ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(sched, node);
        const auto found = backend ? memory.find(ggml_backend_get_device(backend)) : memory.end();
        if (found != memory.end()) {
            found->second.include(scratch_of(node, card_of(found->first)));
        }
    }
}

const cuda_rules::Card & card_of(ggml_backend_dev_t device) {
    size_t index = 0;
    for (size_t i = 0; ggml_backend_dev_get(i) != device; i++) {
        index += ggml_backend_dev_type(ggml_backend_dev_get(i)) == GGML_BACKEND_DEVICE_TYPE_GPU;
    }
    return cuda_rules::card(index);
}
