// The tiles in which ggml-cuda multiplies with a quantized matrix, and the scratch memory of that kernel: mmq.cuh,
// mmq.cu and mmq-config-*.cuh of llama.cpp b11312.
#pragma once

#include <cstddef>
#include <cstdint>

#include "card.h"
#include "ggml.h"

namespace cuda_rules {

struct TiledProduct {
    ggml_type type = GGML_TYPE_COUNT;  // of the matrix
    int64_t rows = 0, columns = 0;     // of the result
    int64_t results = 1;               // how many of them one kernel computes
    bool four_bit = false;             // the other operand is quantized to 4 bits instead of 8
};

// Bytes for the partial sums of tiles that several blocks work on, 0 if there are none: launch_mul_mat_q's tmp_fixup.
size_t fixup_bytes(const TiledProduct & product, const Card & card);

// The same if the last wave of blocks were never full.
size_t most_fixup_bytes(const TiledProduct & product, const Card & card);

// Bytes for `values` values of the other operand, quantized, where the result has so many columns: src1_q8_1 in
// ggml_cuda_mul_mat_q.
size_t quantized_operand_bytes(const TiledProduct & product, int64_t values, const Card & card);

// Whether it is quantized to 4 bits: ggml_cuda_mmq_get_prec_src1.
bool quantizes_to_four_bits(const ggml_tensor * op, const Card & card);

}  // namespace cuda_rules
