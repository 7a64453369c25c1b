// Which tensors ggml-cuda keeps alive beyond their last use, because a kernel computes several operations at once:
// the part of ggml_backend_cuda_graph_optimize that memory depends on.  Restated from llama.cpp b11312.
#pragma once

#include "ggml-backend-impl.h"

namespace cuda_rules {

// Tells the allocator of every tensor that a fused routing of experts, or a fused weighted sum over them, reads.
void keep_fused_inputs(const ggml_cgraph * graph, ggml_backend_graph_optimize_params * allocator);

}  // namespace cuda_rules
