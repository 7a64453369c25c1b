#include "matrix_scratch.h"

#include <algorithm>

#include "ggml-impl.h"
#include "ggml.h"
#include "quantized_tiles.h"

namespace cuda_rules {
namespace {

constexpr int64_t kRowPadding = 512;              // MATRIX_ROW_PADDING
constexpr int64_t kVectorColumns = 8;             // MMVQ_MAX_BATCH_SIZE, MMVF_MAX_BATCH_SIZE
constexpr int64_t kDp4aColumns = 64;              // MMQ_DP4A_MAX_BATCH_SIZE
constexpr size_t kTiledSharedMemory = 48 * 1024;  // ggml_cuda_should_use_mmq

// ------------------------------------------------------------------------------------------- which kernel, and when

bool has_fast_f16(const Card & card) {  // fast_fp16_hardware_available
    return card.capability >= kPascal && card.capability != kDp4a;
}

// Strides that a kernel can read pairs of values at; also in ggml_cuda_should_use_mmf.
bool is_aligned_for_pairs(const ggml_tensor * matrix) {
    const size_t size = ggml_type_size(matrix->type);
    for (int i = 1; i < GGML_MAX_DIMS; i++) {
        if (matrix->nb[i] % (2 * size) != 0) {
            return false;
        }
    }
    return matrix->nb[0] == size;
}

// ggml_cuda_should_use_mmvf
bool has_float_vector_kernel(const ggml_tensor * matrix, int64_t columns, const Card & card) {
    if (matrix->ne[0] % 2 != 0 || !is_aligned_for_pairs(matrix)) {
        return false;
    }
    const bool ampere = card.compiled >= kAmpere;
    if (matrix->type == GGML_TYPE_F32) {
        return columns <= (!ampere && card.capability >= kTuring ? 4 : 3);
    }
    if (matrix->type != GGML_TYPE_F16 && matrix->type != GGML_TYPE_BF16) {
        return false;
    }
    const bool is_small = matrix->ne[1] <= 512 || matrix->ne[2] * matrix->ne[3] == 1;
    if (ampere) {
        return is_small && columns == 1;
    }
    if (card.capability >= kAda) {
        return is_small && columns <= 4;
    }
    const bool has_tensor_cores = card.capability >= (matrix->type == GGML_TYPE_F16 ? kVolta : kAmpere);
    return has_tensor_cores ? is_small && columns <= 3 : columns <= kVectorColumns;
}

// ggml_cuda_should_use_mmf
bool has_float_tile_kernel(const ggml_tensor * matrix, int64_t columns, bool of_experts, const Card & card) {
    constexpr int64_t kWarp = 32, kRowsPerBlock = 32;
    if (ggml_is_quantized(matrix->type) || !is_aligned_for_pairs(matrix) ||
        matrix->ne[0] % (kWarp * 4 / int64_t(ggml_type_size(matrix->type))) != 0 ||
        matrix->ne[1] % kRowsPerBlock != 0) {
        return false;
    }
    const int64_t most = !of_experts ? 16 : matrix->ne[1] <= 1024 ? 512 : 128;
    if (columns > most) {
        return false;
    }
    switch (matrix->type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_BF16:
            return card.compiled >= kAmpere;
        case GGML_TYPE_F16:
            return card.compiled == kVolta || card.compiled >= kTuring;
        default:
            return false;
    }
}

// ggml_cuda_should_use_mmvq: up to how many columns.
int64_t most_vector_columns(ggml_type type, const Card & card) {
    const bool volta = card.capability == kVolta, blackwell = card.capability == kBlackwell;
    switch (type) {
        case GGML_TYPE_Q2_K:
            return card.capability == kAda || volta ? 4
                   : blackwell                      ? 5
                   : card.capability == kDgxSpark   ? 6
                   : card.capability == kOrin       ? 1
                                                    : kVectorColumns;
        case GGML_TYPE_Q3_K:
            return card.capability == kAda || volta ? 6 : blackwell ? 5 : card.capability == kOrin ? 1 : kVectorColumns;
        case GGML_TYPE_Q4_K:
            return volta || blackwell ? 5 : card.capability == kOrin ? 1 : kVectorColumns;
        case GGML_TYPE_Q5_K:
            return volta || blackwell ? 6 : card.capability == kOrin ? 1 : kVectorColumns;
        case GGML_TYPE_Q6_K:
            return volta || blackwell ? 7 : card.capability == kOrin ? 1 : kVectorColumns;
        default:
            return kVectorColumns;
    }
}

// get_mmvq_mmid_max_batch_pascal_older
int64_t most_vector_tokens_before_volta(ggml_type type) {
    switch (type) {
        case GGML_TYPE_IQ1_S:
        case GGML_TYPE_IQ1_M:
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
            return 6;
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ4_XS:
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
            return 5;
        case GGML_TYPE_IQ2_S:
        case GGML_TYPE_IQ3_S:
        case GGML_TYPE_IQ3_XXS:
        case GGML_TYPE_MXFP4:
        case GGML_TYPE_NVFP4:
        case GGML_TYPE_Q2_K:
        case GGML_TYPE_Q3_K:
        case GGML_TYPE_Q6_K:
        case GGML_TYPE_Q8_0:
            return 4;
        default:
            return kVectorColumns;
    }
}

// get_mmvq_mmid_max_batch: the same for experts, in tokens.
int64_t most_vector_tokens(ggml_type type, const Card & card) {
    if (card.capability == kVolta || card.capability >= kAda) {
        return kVectorColumns;
    }
    if (card.capability < kTuring) {
        return most_vector_tokens_before_volta(type);
    }
    switch (type) {  // get_mmvq_mmid_max_batch_turing_plus
        case GGML_TYPE_Q3_K:
            return 5;
        case GGML_TYPE_IQ3_S:
            return 6;
        case GGML_TYPE_IQ2_S:
        case GGML_TYPE_IQ3_XXS:
        case GGML_TYPE_MXFP4:
        case GGML_TYPE_Q2_K:
            return 7;
        default:
            return kVectorColumns;
    }
}

// ggml_cuda_should_use_mmq
bool has_quantized_tile_kernel(ggml_type type, int64_t columns, bool of_experts, const Card & card) {
    const bool supported = ggml_is_quantized(type) && type != GGML_TYPE_IQ1_M && type != GGML_TYPE_TQ1_0 &&
                           type != GGML_TYPE_TQ2_0 && type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K;
    if (!supported || card.shared_memory < kTiledSharedMemory) {
        return false;
    }
    if (card.compiled >= kTuring) {
        return true;
    }
    if (card.compiled < kDp4a) {
        return card.capability >= kPascal && of_experts;
    }
    return card.capability < kVolta || columns < kDp4aColumns;
}

// ------------------------------------------------------------------------------------------- what each kernel takes

// ggml_cuda_mul_mat_vec_q: so many rows of the other operand in blocks of 32 values (block_q8_1).
size_t vector_bytes(const ggml_tensor * operand, int64_t rows) {
    constexpr size_t kBlockBytes = 36, kBlockValues = 32;
    return from_pool(size_t(GGML_PAD(operand->ne[0], kRowPadding) * rows) * kBlockBytes / kBlockValues);
}

// ggml_cuda_mul_mat_q without experts.  The rows of anything but a single matrix of weights (of keys, say) may be
// fewer than they stand in the graph, so that its last wave of blocks may always be one that is not full.
size_t tiled_bytes(const ggml_tensor * op, int64_t columns, const Card & card) {
    const ggml_tensor *matrix = op->src[0], *operand = op->src[1];
    TiledProduct product;
    product.type = matrix->type;
    product.rows = matrix->ne[1];
    product.columns = columns;
    product.results = operand->ne[2] * operand->ne[3];
    product.four_bit = quantizes_to_four_bits(op, card);
    const int64_t values = GGML_PAD(operand->ne[0], kRowPadding) * columns * product.results;
    const size_t scales =
        product.four_bit && matrix->type == GGML_TYPE_NVFP4 ? size_t(columns * product.results) * sizeof(float) : 0;
    const size_t fixup = product.results > 1 ? most_fixup_bytes(product, card) : fixup_bytes(product, card);
    return from_pool(quantized_operand_bytes(product, values, card)) + from_pool(scales) + from_pool(fixup);
}

// ggml_cuda_mul_mat_cublas: the type in which it computes.
ggml_type cublas_type(const ggml_tensor * op, int64_t columns, const Card & card) {
    const ggml_type type = op->src[0]->type;
    if (op->op_params[0] == GGML_PREC_F32) {
        return GGML_TYPE_F32;
    }
    if (ggml_is_quantized(type) || type == GGML_TYPE_F16) {
        return has_fast_f16(card) ? GGML_TYPE_F16 : GGML_TYPE_F32;
    }
    if (type == GGML_TYPE_BF16 && card.capability < kAmpere && columns > (card.capability >= kVolta ? 8 : 128)) {
        return GGML_TYPE_F32;
    }
    return type;
}

// Whether cuBLAS is given an array of pointers, one for each product: ggml_cuda_mul_mat_cublas_impl.
bool needs_pointers(const ggml_tensor * op, ggml_type type) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    const auto is_contiguous = [type](const ggml_tensor * tensor) {
        return ggml_is_contiguous_2(tensor) || (tensor->type != type && !ggml_is_contiguously_allocated(tensor));
    };
    const bool is_one = b->ne[2] == 1 && b->ne[3] == 1;
    const bool is_pairwise = a->ne[2] == b->ne[2] && a->ne[3] == b->ne[3];
    return !is_one && !(is_pairwise && is_contiguous(a) && is_contiguous(b));
}

// ggml_cuda_mul_mat_cublas_impl: copies of both operands and of the result in the type in which it computes.
Scratch cublas_scratch(const ggml_tensor * op, int64_t columns, const Card & card) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    const ggml_type type = cublas_type(op, columns, card);
    const size_t size = ggml_type_size(type), results = size_t(b->ne[2] * b->ne[3]);
    const bool writes_f32 = type != GGML_TYPE_F16 || card.capability == kVolta;
    Scratch scratch;
    scratch.uses_cublas = true;
    if (a->type != type) {
        scratch.pool_bytes += from_pool(size_t(ggml_nelements(a)) * size);
    }
    if (b->type != type) {
        scratch.pool_bytes += from_pool(size_t(b->ne[0] * columns) * results * size);
    }
    if (!writes_f32) {
        scratch.pool_bytes += from_pool(size_t(op->ne[0] * columns) * results * size);
    }
    if (needs_pointers(op, type)) {
        scratch.pool_bytes += from_pool(2 * results * sizeof(void *)) + from_pool(results * sizeof(void *));
    }
    return scratch;
}

// ggml_cuda_op_mul_mat_use_fwht and ggml_cuda_op_fwht_impl
bool is_hadamard_transform(const ggml_tensor * op) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    const int64_t size = b->ne[0];
    return ggml_get_op_params_i32(op, 1) == GGML_HINT_SRC0_IS_HADAMARD && a->type == GGML_TYPE_F32 &&
           op->type == GGML_TYPE_F32 && (b->type == GGML_TYPE_F32 || b->type == GGML_TYPE_F16) &&
           ggml_is_contiguous(b) && ggml_is_contiguous(op) && ggml_are_same_shape(b, op) &&
           (size == 64 || size == 128 || size == 256 || size == 512);
}

// A single row is multiplied as a transposed vector.
bool is_transposed_vector(const ggml_tensor * op, int64_t columns, const Card & card) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    return a->ne[1] == 1 && columns > kVectorColumns && op->ne[2] == 1 && op->ne[3] == 1 && a->type == GGML_TYPE_F32 &&
           ggml_is_contiguous(a) && ggml_is_contiguous(b) && ggml_is_contiguous(op) &&
           has_float_vector_kernel(b, 1, card);
}

// ggml_cuda_mul_mat, for so many columns of the other operand.
Scratch scratch_for_columns(const ggml_tensor * op, int64_t columns, const Card & card) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    if (b->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32) {
        return cublas_scratch(op, columns, card);
    }
    if (has_float_vector_kernel(a, columns, card) || is_transposed_vector(op, columns, card) ||
        has_float_tile_kernel(a, columns, /*of_experts=*/false, card)) {
        return {};
    }
    if (ggml_is_quantized(a->type) && columns <= most_vector_columns(a->type, card)) {
        return {vector_bytes(b, columns * b->ne[2] * b->ne[3]), false};
    }
    if (has_quantized_tile_kernel(a->type, columns, /*of_experts=*/false, card)) {
        return {tiled_bytes(op, columns, card), false};
    }
    return cublas_scratch(op, columns, card);
}

// ------------------------------------------------------------------------------------------- experts

// ggml_cuda_mul_mat_q with experts.
size_t expert_tiled_bytes(const ggml_tensor * op, int64_t tokens, const Card & card) {
    const ggml_tensor *matrix = op->src[0], *operand = op->src[1], *ids = op->src[2];
    const int64_t rows = tokens * ids->ne[0];
    TiledProduct product;
    product.type = matrix->type;
    product.rows = matrix->ne[1];
    product.columns = tokens;
    product.results = matrix->ne[2];
    product.four_bit = quantizes_to_four_bits(op, card);
    TiledProduct one_token = product;  // whose rows bound the tile that the operand is padded for
    one_token.columns = operand->ne[1];
    const size_t values = quantized_operand_bytes(one_token, GGML_PAD(operand->ne[0], kRowPadding) * rows, card);
    const size_t scales = product.four_bit && matrix->type == GGML_TYPE_NVFP4 ? size_t(rows) * sizeof(float) : 0;
    return 2 * from_pool(size_t(rows) * sizeof(int32_t)) + from_pool(size_t(matrix->ne[2] + 1) * sizeof(int32_t)) +
           from_pool(values) + from_pool(scales) + from_pool(fixup_bytes(product, card));
}

// ggml_cuda_mul_mat_f with experts.
size_t expert_float_bytes(const ggml_tensor * op, int64_t tokens) {
    constexpr int64_t kMostUnsorted = 16;
    if (tokens <= kMostUnsorted) {
        return 0;
    }
    const size_t rows = size_t(tokens * op->src[2]->ne[0]);
    return 2 * from_pool(rows * sizeof(int32_t)) + from_pool(size_t(op->src[0]->ne[2] + 1) * sizeof(int32_t));
}

// The rest of ggml_cuda_mul_mat_id: rows are sorted by expert, and multiplied with each expert's matrix, at worst all
// tokens with one.
Scratch sorted_scratch(const ggml_tensor * op, int64_t tokens, const Card & card) {
    ggml_tensor matrix = *op->src[0], operand = *op->src[1], result = *op;
    const bool in_f32 = ggml_is_quantized(matrix.type) || (matrix.type == GGML_TYPE_F16 && !has_fast_f16(card));
    const size_t rows = size_t(tokens * op->src[2]->ne[0]);
    operand.type = in_f32 ? GGML_TYPE_F32 : matrix.type;
    const size_t sorted = 2 * rows * sizeof(int32_t),
                 operands = rows * size_t(operand.ne[0]) * ggml_type_size(operand.type),
                 results = rows * size_t(op->ne[0]) * sizeof(float);
    for (ggml_tensor * tensor : {&matrix, &operand, &result}) {
        tensor->ne[2] = 1;
        tensor->ne[3] = 1;
    }
    result.src[0] = &matrix;
    result.src[1] = &operand;
    result.op_params[0] = 0;
    Scratch scratch;
    for (int64_t columns = 1; columns <= tokens; columns++) {
        scratch.include(scratch_for_columns(&result, columns, card));
    }
    scratch.pool_bytes += from_pool(sorted) + from_pool(operands) + from_pool(results);
    return scratch;
}

}  // namespace

Scratch product_scratch(const ggml_tensor * op, const Card & card) {
    Scratch scratch;
    if (is_hadamard_transform(op)) {
        return scratch;
    }
    for (int64_t columns = 1; columns <= op->src[1]->ne[1]; columns++) {
        scratch.include(scratch_for_columns(op, columns, card));
    }
    return scratch;
}

Scratch expert_product_scratch(const ggml_tensor * op, const Card & card) {
    const ggml_tensor *matrix = op->src[0], *operand = op->src[1];
    const bool quantized = ggml_is_quantized(matrix->type);
    Scratch scratch;
    for (int64_t tokens = 1; tokens <= operand->ne[2]; tokens++) {
        if (quantized && tokens <= most_vector_tokens(matrix->type, card)) {
            scratch.include({vector_bytes(operand, operand->ne[1] * tokens), false});
        } else if (has_quantized_tile_kernel(matrix->type, tokens, /*of_experts=*/true, card)) {
            scratch.include({expert_tiled_bytes(op, tokens, card), false});
        } else if (has_float_tile_kernel(matrix, tokens, /*of_experts=*/true, card)) {
            scratch.include({expert_float_bytes(op, tokens), false});
        } else {
            scratch.include(sorted_scratch(op, operand->ne[2], card));
            break;  // which more tokens only make larger
        }
    }
    return scratch;
}

}  // namespace cuda_rules
