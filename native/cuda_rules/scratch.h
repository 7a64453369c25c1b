// What ggml-cuda allocates besides the buffers that llama.cpp asks it for, while it computes a graph: its scratch pool
// (ggml_cuda_pool_vmm) and the workspace that it gives cuBLAS.  Restated from llama.cpp b11312, ggml/src/ggml-cuda/,
// for NVIDIA cards and an unsplit model (no -sm row); the named functions are where each rule comes from.
//
// Both belong to one backend, that is to one llama_context on one device.  Nothing else is allocated after loading:
// every other cudaMalloc in ggml-cuda is a buffer's (or -sm tensor's all-reduce), and streams beyond the first, which
// would have pools of their own, are used only where GGML_CUDA_GRAPH_OPT=1 asks for them.
#pragma once

#include <cstddef>

#include "card.h"

struct ggml_tensor;

namespace cuda_rules {

constexpr size_t kPoolGranularity = size_t(2) << 20;  // what drivers answer cuMemGetAllocationGranularity

struct Scratch {
    size_t pool_bytes = 0;     // the most that is taken from the pool at once
    bool uses_cublas = false;  // whose workspace is allocated at its first use

    void include(const Scratch & other);  // the worse of both
};

// Whether any kernel of the operation takes some.
bool may_take_scratch(const ggml_tensor * op);

// For one operation of a graph, by the kernel that ggml-cuda chooses on the card: the most that it takes as it stands,
// or over fewer tokens, sequences or keys, which can be more, because a kernel's work is then divided otherwise.
Scratch scratch(const ggml_tensor * op, const Card & card);

// What the pool has grown to after operations that took at most this much: ggml_cuda_pool_vmm::alloc.
size_t pool_size(size_t pool_bytes);

// ggml_backend_cuda_context::cublas_handle.
size_t cublas_workspace_size(const Card & card);

// What a request for so many bytes takes from the pool: ggml_cuda_pool_vmm::alloc.
constexpr size_t from_pool(size_t bytes) {
    return (bytes + 127) / 128 * 128;
}

}  // namespace cuda_rules
