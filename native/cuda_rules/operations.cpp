#include "operations.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "ggml-impl.h"
#include "ggml.h"

namespace cuda_rules {
namespace {

constexpr int64_t kRowPadding = 512;      // MATRIX_ROW_PADDING
constexpr int64_t kKvStride = 256;        // FATTN_KQ_STRIDE
constexpr int64_t kSuperBlock = 256;      // QK_K
constexpr int64_t kOffloadMinBatch = 32;  // ggml_backend_cuda_reg, unless GGML_OP_OFFLOAD_MIN_BATCH says otherwise

bool is_any_of(ggml_type type, std::initializer_list<ggml_type> types) {
    for (ggml_type one : types) {
        if (type == one) {
            return true;
        }
    }
    return false;
}

bool is_float(ggml_type type) {
    return is_any_of(type, {GGML_TYPE_F32, GGML_TYPE_F16});
}

bool has_attention_head_size(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2];
    const int64_t ratio = q->ne[2] / k->ne[2];
    switch (k->ne[0]) {
        case 40:
        case 64:
        case 72:
        case 80:
        case 96:
        case 112:
        case 128:
        case 256:
            return v->ne[0] == k->ne[0];
        case 192:
            return v->ne[0] == 128 && groups_query_heads(op) && ratio % 8 == 0;
        case 320:
            return v->ne[0] == 256 && groups_query_heads(op) && ratio % 32 == 0;
        case 512:
            return v->ne[0] == 512 && groups_query_heads(op);
        case 576:
            return v->ne[0] == 512 && groups_query_heads(op);
        default:
            return false;
    }
}

bool prefers_vector_kernel(const ggml_tensor * op, const Card & card) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2];
    const int64_t ratio = q->ne[2] / k->ne[2];
    if (ggml_is_quantized(k->type) || ggml_is_quantized(v->type)) {
        return q->ne[1] <= (card.compiled >= kTuring && card.capability < kAda ? 1 : 2);
    }
    if (card.compiled >= kTuring && card.capability >= kAda && q->ne[1] == 1 && q->ne[3] == 1 &&
        !(ratio > 4 && (q->ne[0] >= 256 || k->ne[1] >= 8192)) &&
        !(ratio > 4 && groups_query_heads(op) && gathers_keys(op, card, {1, 8}))) {
        return true;
    }
    return q->ne[1] == 1 && !groups_query_heads(op);
}

// gqa_ratio_eff: how many query heads of one KV head a kernel of Volta's serves together.
int64_t heads_together(const ggml_tensor * op) {
    const int64_t size = op->src[0]->ne[0], ratio = op->src[0]->ne[2] / op->src[1]->ne[2];
    const int64_t most = size == 320 ? 32 : size == 576 || size == 192 ? 16 : 8;
    int64_t heads = 1;
    while (ratio % (2 * heads) == 0 && heads < most) {
        heads *= 2;
    }
    return heads;
}

// ggml_cuda_flash_attn_ext_get_alloc_size: the result, and f16 copies of a K and V that are held in another type.
size_t attention_alloc_size(const ggml_tensor * op, const Card & card) {
    const ggml_tensor *k = op->src[1], *v = op->src[2];
    size_t size = ggml_nbytes(op);
    if (!reads_f16_copies(op, card)) {
        return size;
    }
    const bool v_is_view_of_k =
        v->view_src && (v->view_src == k || (v->view_src == k->view_src && v->view_offs == k->view_offs));
    if (k->type != GGML_TYPE_F16) {
        size = GGML_PAD(size, kAlignment) + ggml_nelements(k) * sizeof(ggml_fp16_t);
    }
    if (v->type != GGML_TYPE_F16 && !v_is_view_of_k) {
        size = GGML_PAD(size, kAlignment) + ggml_nelements(v) * sizeof(ggml_fp16_t);
    }
    return size;
}

bool has_copy_kernel(const ggml_tensor * op) {
    const ggml_type from = op->src[0]->type, to = op->src[1]->type;
    const std::initializer_list<ggml_type> floats = {GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_F16};
    const std::initializer_list<ggml_type> simple_quants = {GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,
                                                            GGML_TYPE_Q5_0, GGML_TYPE_Q5_1};
    if (is_any_of(from, floats) && is_any_of(to, floats)) {
        return true;
    }
    if (from == GGML_TYPE_F32 && (is_any_of(to, simple_quants) || to == GGML_TYPE_IQ4_NL || to == GGML_TYPE_I32)) {
        return true;
    }
    if (to == GGML_TYPE_F32 && (is_any_of(from, simple_quants) || from == GGML_TYPE_I32)) {
        return true;
    }
    return from == to && ggml_is_contiguous(op->src[0]) && ggml_is_contiguous(op->src[1]);
}

bool has_get_rows_kernel(const ggml_tensor * op) {
    switch (op->src[0]->type) {
        case GGML_TYPE_IQ4_NL:
        case GGML_TYPE_MXFP4:
            return op->src[0]->ne[0] % kSuperBlock == 0;
        case GGML_TYPE_TQ1_0:
        case GGML_TYPE_TQ2_0:
        case GGML_TYPE_NVFP4:
        case GGML_TYPE_Q8_K:
            return false;
        default:
            return true;
    }
}

bool has_set_rows_kernel(const ggml_tensor * op) {
    const ggml_type from = op->src[0]->type;
    return (from == GGML_TYPE_F32 &&
            is_any_of(op->type, {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,
                                 GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL})) ||
           (from == GGML_TYPE_F16 && op->type == GGML_TYPE_F16);
}

bool has_state_space_scan_kernel(const ggml_tensor * op) {
    const int64_t d_state = op->src[0]->ne[0], d_head = op->src[0]->ne[1], n_head = op->src[0]->ne[2];
    if (op->src[3]->ne[0] == 1) {  // Mamba-2
        return (d_state == 96 || d_state == 128 || d_state == 256) && d_head % 16 == 0;
    }
    return ggml_get_op_params_i32(op, 0) <= 1 && d_state == 16 && d_head == 1 && n_head % 128 == 0 &&
           op->src[4]->ne[1] == 1;
}

bool has_arithmetic_kernel(const ggml_tensor * op) {
    const ggml_type a = op->src[0]->type, b = op->src[1]->type;
    if (a == GGML_TYPE_BF16 || b == GGML_TYPE_BF16 || op->type == GGML_TYPE_BF16) {
        return a == GGML_TYPE_BF16 && op->type == GGML_TYPE_BF16 && is_any_of(b, {GGML_TYPE_BF16, GGML_TYPE_F32});
    }
    return is_float(a) && is_float(b) && is_float(op->type);
}

}  // namespace

bool groups_query_heads(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    float max_bias = 0.0f;
    std::memcpy(&max_bias, op->op_params + 1, sizeof(max_bias));
    if (q->ne[2] / k->ne[2] < 2 || !mask || max_bias != 0.0f || k->ne[1] % kKvStride != 0) {
        return false;
    }
    for (const ggml_tensor * tensor : {q, k, v, mask}) {
        if (ggml_is_quantized(tensor->type)) {
            continue;
        }
        for (int i = 1; i < GGML_MAX_DIMS; i++) {
            if (tensor->nb[i] % 16 != 0) {
                return false;
            }
        }
    }
    return true;
}

bool gathers_keys(const ggml_tensor * op, const Card & card, AttentionTile tile) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    const int64_t size = k->ne[0];
    const bool compiled = v->ne[0] == std::min<int64_t>(size, 512) &&
                          ((tile.heads == 8 && tile.queries == 1 && (size == 256 || size == 512)) ||
                           (tile.heads == 8 && tile.queries == 8 && size == 256) ||
                           (tile.heads == 16 && tile.queries == 1 && size == 576));
    float max_bias = 0.0f, logit_softcap = 0.0f;
    std::memcpy(&max_bias, op->op_params + 1, sizeof(max_bias));
    std::memcpy(&logit_softcap, op->op_params + 2, sizeof(logit_softcap));
    const int64_t n_kv_max = ggml_get_op_params_i32(op, 4);
    const int64_t queries = tile.queries == 1 ? std::min<int64_t>(q->ne[1], 64 / tile.heads) : tile.queries;
    return compiled && card.compiled >= kTuring && mask && n_kv_max > 0 && max_bias == 0.0f && logit_softcap == 0.0f &&
           mask->ne[0] == k->ne[1] && mask->ne[1] >= q->ne[1] && mask->ne[2] == 1 &&
           k->ne[1] >= std::max<int64_t>(4096, 2 * queries * n_kv_max);
}

AttentionKernel attention_kernel(const ggml_tensor * op, const Card & card) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    const std::initializer_list<ggml_type> types = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q4_0,
                                                    GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0};
    if (!has_attention_head_size(op) || !is_any_of(k->type, types) || !is_any_of(v->type, types) ||
        (mask && mask->ne[2] != 1)) {
        return AttentionKernel::none;
    }
    const bool fits_vector = q->ne[0] <= 256 && q->ne[0] % 64 == 0 && q->ne[0] != 192 && k->ne[1] % kKvStride == 0;
    const bool fits_tensor_cores = q->ne[0] != 40 && q->ne[0] != 72;
    if (card.compiled == kVolta && fits_tensor_cores) {
        const int64_t columns = q->ne[1] * heads_together(op);
        return fits_vector && columns <= 2 ? AttentionKernel::vector
               : columns <= 16             ? AttentionKernel::tile
                                           : AttentionKernel::matrix;
    }
    if (fits_vector && prefers_vector_kernel(op, card)) {
        return AttentionKernel::vector;
    }
    return card.compiled >= kTuring && fits_tensor_cores ? AttentionKernel::matrix : AttentionKernel::tile;
}

bool reads_f16_copies(const ggml_tensor * op, const Card & card) {
    const ggml_type k = op->src[1]->type, v = op->src[2]->type;
    switch (attention_kernel(op, card)) {
        case AttentionKernel::none:
            return false;
        case AttentionKernel::vector:  // it is compiled for equal pairs of these types (GGML_CUDA_FA_QUANTS)
            return k != v || !is_any_of(k, {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0});
        default:
            return true;
    }
}

size_t alloc_size(const ggml_tensor * tensor, const Card & card) {
    size_t size = tensor->op == GGML_OP_FLASH_ATTN_EXT ? attention_alloc_size(tensor, card) : ggml_nbytes(tensor);
    if (ggml_is_quantized(tensor->type) && tensor->ne[0] % kRowPadding != 0) {
        size += ggml_row_size(tensor->type, kRowPadding - tensor->ne[0] % kRowPadding);
    }
    return size;
}

bool has_kernel(const ggml_tensor * op) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    switch (op->op) {
        case GGML_OP_UNARY:
            return ggml_is_contiguous(a);
        case GGML_OP_GLU:
            return ggml_is_contiguous_1(a);
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return a->nb[0] == ggml_element_size(a) && b->nb[0] == ggml_element_size(b) &&
                   (b->type != GGML_TYPE_F16 || a->type == GGML_TYPE_F16) &&
                   !(op->op == GGML_OP_MUL_MAT_ID && ggml_get_op_params_i32(op, 3) == GGML_PREC_F32) &&
                   !is_any_of(a->type, {GGML_TYPE_TQ1_0, GGML_TYPE_TQ2_0});
        case GGML_OP_OUT_PROD:
            return op->type == GGML_TYPE_F32 && a->type == GGML_TYPE_F32 && b->type == GGML_TYPE_F32;
        case GGML_OP_GET_ROWS:
            return has_get_rows_kernel(op);
        case GGML_OP_SET_ROWS:
            return has_set_rows_kernel(op);
        case GGML_OP_SET:
            return is_any_of(op->type, {GGML_TYPE_F32, GGML_TYPE_I32}) && op->type == a->type && op->type == b->type;
        case GGML_OP_CPY:
            return has_copy_kernel(op);
        case GGML_OP_REPEAT:
            return is_float(a->type);
        case GGML_OP_CONCAT:
            return a->type == b->type && a->type == op->type;
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
        case GGML_OP_SUM:
            return ggml_is_contiguous_rows(a);
        case GGML_OP_SCALE:
            return is_any_of(a->type, {GGML_TYPE_F32, GGML_TYPE_BF16}) && op->type == a->type;
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
            return has_arithmetic_kernel(op);
        case GGML_OP_SSM_SCAN:
            return has_state_space_scan_kernel(op);
        case GGML_OP_SSM_CONV:
            return a->ne[1] % 128 == 0;
        case GGML_OP_ROLL:
            return a->type == GGML_TYPE_F32 && ggml_is_contiguous(a);
        case GGML_OP_ROPE:
        case GGML_OP_ROPE_BACK:
            return a->nb[0] == ggml_type_size(a->type) && ggml_is_contiguous_2(a);
        case GGML_OP_IM2COL:
        case GGML_OP_CONV_2D:
        case GGML_OP_ACC:
            return ggml_is_contiguous(a) && ggml_is_contiguous(b);
        case GGML_OP_SUM_ROWS:
        case GGML_OP_MEAN:
            return a->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(a);
        case GGML_OP_GROUP_NORM:
            return ggml_is_contiguous(a);
        case GGML_OP_FLASH_ATTN_EXT:
            return attention_kernel(op, Card{}) != AttentionKernel::none;  // on every card or on none
        default:
            return true;
    }
}

bool worth_offloading(const ggml_tensor * op) {
    static const int64_t min_batch = [] {
        const char * setting = std::getenv("GGML_OP_OFFLOAD_MIN_BATCH");
        return setting ? std::atoll(setting) : kOffloadMinBatch;
    }();
    switch (op->op) {
        case GGML_OP_GET_ROWS:
            return min_batch <= 0;
        case GGML_OP_MUL_MAT:
            return op->ne[1] >= min_batch;
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ROPE:
        case GGML_OP_ROPE_BACK:
            return op->ne[2] >= min_batch;
        default:
            return ggml_nrows(op) >= min_batch;
    }
}

}  // namespace cuda_rules
