// What ggml-cuda would say of a tensor or an operation: the rules that decide how llama.cpp splits its graph between
// GPU and CPU and how large its buffers become.  Restated from llama.cpp b11312,
// ggml/src/ggml-cuda/{ggml-cuda,fattn}.cu, for a card with tensor cores (compute capability >= 7.5); the named
// functions are where each rule comes from.
#pragma once

#include <cstddef>

struct ggml_tensor;

namespace cuda_rules {

constexpr size_t kAlignment = 128;  // ggml_backend_cuda_buffer_type_get_alignment

// Bytes that a tensor takes on the device: ggml_backend_cuda_buffer_type_get_alloc_size.
size_t alloc_size(const ggml_tensor * tensor);

// Whether there is a kernel for the operation: ggml_backend_cuda_device_supports_op, less the check that its sources
// lie on the same device.
bool has_kernel(const ggml_tensor * op);

// Whether weights in host memory are worth copying to the device for it: ggml_backend_cuda_device_offload_op.
bool worth_offloading(const ggml_tensor * op);

}  // namespace cuda_rules
