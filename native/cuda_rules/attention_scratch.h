// The scratch memory of flash attention: launch_fattn and the functions that choose its tiles, fattn*.cu* of llama.cpp
// b11312.
#pragma once

#include "scratch.h"

namespace cuda_rules {

Scratch attention_scratch(const ggml_tensor * op, const Card & card);  // GGML_OP_FLASH_ATTN_EXT

}  // namespace cuda_rules
