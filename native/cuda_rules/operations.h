// What ggml-cuda would say of a tensor or an operation: the rules that decide how llama.cpp splits its graph between
// GPU and CPU and how large its buffers become.  Restated from llama.cpp b11312,
// ggml/src/ggml-cuda/{ggml-cuda,fattn}.cu, for NVIDIA cards; the named functions are where each rule comes from.
#pragma once

#include <cstddef>
#include <cstdint>

#include "card.h"

struct ggml_tensor;

namespace cuda_rules {

constexpr size_t kAlignment = 128;  // ggml_backend_cuda_buffer_type_get_alignment

// Bytes that a tensor takes on the device: ggml_backend_cuda_buffer_type_get_alloc_size.
size_t alloc_size(const ggml_tensor * tensor, const Card & card);

// Whether there is a kernel for the operation: ggml_backend_cuda_device_supports_op, less the check that its sources
// lie on the same device.
bool has_kernel(const ggml_tensor * op);

// Whether weights in host memory are worth copying to the device for it: ggml_backend_cuda_device_offload_op.
bool worth_offloading(const ggml_tensor * op);

enum class AttentionKernel { none, vector, tile, matrix };

// The kernel for a GGML_OP_FLASH_ATTN_EXT: ggml_cuda_get_best_fattn_kernel.
AttentionKernel attention_kernel(const ggml_tensor * op, const Card & card);

// Whether that kernel reads K and V through copies in f16 when they are held in another type.
bool reads_f16_copies(const ggml_tensor * op, const Card & card);

// What one block of the matrix kernel computes together: queries of one head (ncols1), and heads that share keys
// (ncols2).
struct AttentionTile {
    int64_t queries = 1, heads = 1;
};

// Whether that kernel, with such tiles, reads only the keys that the mask selects:
// ggml_cuda_flash_attn_ext_mma_f16_may_use_sparse and _shall_use_sparse.
bool gathers_keys(const ggml_tensor * op, const Card & card, AttentionTile tile);

// gqa_opt_applies there: whether a kernel may serve several query heads of one KV head together.
bool groups_query_heads(const ggml_tensor * op);

}  // namespace cuda_rules
