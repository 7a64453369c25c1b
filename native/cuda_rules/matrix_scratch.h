// The scratch memory of matrix products: ggml_cuda_mul_mat and ggml_cuda_mul_mat_id of llama.cpp b11312.
#pragma once

#include "scratch.h"

namespace cuda_rules {

Scratch product_scratch(const ggml_tensor * op, const Card & card);         // GGML_OP_MUL_MAT
Scratch expert_product_scratch(const ggml_tensor * op, const Card & card);  // GGML_OP_MUL_MAT_ID

}  // namespace cuda_rules
