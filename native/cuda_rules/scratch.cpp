#include "scratch.h"

#include <algorithm>

#include "attention_scratch.h"
#include "ggml-impl.h"
#include "ggml.h"
#include "matrix_scratch.h"

namespace cuda_rules {
namespace {

constexpr int64_t kMostBitonicColumns = 1024;        // ggml_cuda_op_argsort
constexpr size_t kSortChunkBytes = size_t(1) << 26;  // argsort_f32_i32_cuda_cub_chunk_nrows
constexpr int64_t kImplicitConvolutionLimit = INT32_MAX - 256;

// ------------------------------------------------------------------------------------------- what CUB takes

// CUB's algorithms say how much they need only when asked, and not the same in each version of CUDA.  These are bounds.
// Sorting needs copies of keys and values and counts for each tile, up to 8.2 bytes a value and a few KiB in CUDA 13.5;
// scans and sums need a state for each tile or block, and top-k a few candidates: 160 KiB for a million values.
constexpr size_t kCubStates = size_t(1) << 20;

size_t cub_sort_bytes(int64_t values) {
    return from_pool(size_t(values) * 9 + kCubStates);
}

size_t cub_states_bytes() {
    return from_pool(kCubStates);
}

// ------------------------------------------------------------------------------------------- operations

// ggml_cuda_op_soft_max: a row that does not fit into shared memory is spread over all multiprocessors.
Scratch soft_max_scratch(const ggml_tensor * op, const Card & card) {
    const ggml_tensor * rows = op->src[0];
    const size_t shared = (GGML_PAD(size_t(rows->ne[0]), 32) + 32) * sizeof(float);
    const bool spreads = shared > card.shared_memory && !op->src[1] && !op->src[2] && rows->ne[0] > 8192;
    if (!spreads) {
        return {};
    }
    const size_t bytes = from_pool(size_t(card.multiprocessors) * sizeof(float) * sizeof(float));
    return {2 * bytes, false};
}

// argsort_f32_i32_cuda_cub: indices and two copies of the keys, a chunk of rows at a time.
size_t sorted_rows_bytes(const ggml_tensor * keys) {
    const int64_t rows = std::min(std::max(int64_t(kSortChunkBytes / keys->nb[1]), int64_t(1)), ggml_nrows(keys));
    const int64_t values = keys->ne[0] * rows;
    return 3 * from_pool(size_t(values) * sizeof(float)) + from_pool(size_t(rows + 1) * sizeof(int32_t)) +
           cub_sort_bytes(values);
}

Scratch argsort_scratch(const ggml_tensor * op) {  // ggml_cuda_op_argsort
    const ggml_tensor * keys = op->src[0];
    return keys->ne[0] <= kMostBitonicColumns ? Scratch{} : Scratch{sorted_rows_bytes(keys), false};
}

// ggml_cuda_op_top_k: CUB's own, one row at a time, or, before CUDA 13.1, which takes far more where there are many
// rows, an argsort into a temporary tensor.
Scratch top_k_scratch(const ggml_tensor * op) {
    const ggml_tensor * keys = op->src[0];
    const int64_t rows = std::min(std::max(int64_t(kSortChunkBytes / keys->nb[1]), int64_t(1)), ggml_nrows(keys));
    const size_t sorted = from_pool(size_t(keys->ne[0] * rows) * sizeof(int32_t));
    return {sorted + std::max(argsort_scratch(op).pool_bytes, cub_states_bytes()), false};
}

// cumsum_cuda
Scratch cumsum_scratch(const ggml_tensor * op) {
    const int64_t columns = op->src[0]->ne[0], rows = ggml_nrows(op->src[0]);
    const bool by_cub = (rows == 1 && columns > 1024) || columns / rows > 4096;
    return {by_cub ? cub_states_bytes() : 0, false};
}

// ggml_cuda_op_mean; the lower of its two thresholds
Scratch mean_scratch(const ggml_tensor * op) {
    const bool by_cub = ggml_nrows(op->src[0]) == 1 && op->src[0]->ne[0] > 32768;
    return {by_cub ? cub_states_bytes() : 0, false};
}

// ssm_scan_ssd_f32_cuda, the matrix form of Mamba-2 for more than 128 tokens; ggml_cuda_op_ssm_scan
Scratch state_space_scan_scratch(const ggml_tensor * op, const Card & card) {
    constexpr int64_t kChunk = 256, kFewestTokens = 128, kMostTokens = 8192;
    const ggml_tensor *states = op->src[0], *x = op->src[1], *a = op->src[3], *b = op->src[4];
    const int64_t state = states->ne[0], head = states->ne[1], heads = x->ne[1], groups = b->ne[1];
    const bool multiplies =
        a->nb[1] == sizeof(float) && ggml_get_op_params_i32(op, 0) <= 1 && head % 8 == 0 && card.capability >= kTuring;
    Scratch scratch;
    for (int64_t sequences = 1; multiplies && sequences <= x->ne[3]; sequences++) {
        const int64_t tokens = std::min(x->ne[2] * x->ne[3] / sequences, kMostTokens);
        if (tokens <= kFewestTokens) {
            break;
        }
        const int64_t in_chunk = kChunk * heads * sequences;
        const size_t per_token = from_pool(size_t(tokens * heads * sequences) * sizeof(float));
        scratch.include({2 * per_token + from_pool(size_t(kChunk * kChunk * groups * sequences) * sizeof(float)) +
                             from_pool(size_t(in_chunk * head) * sizeof(ggml_fp16_t)) +
                             from_pool(size_t(in_chunk * state) * sizeof(ggml_fp16_t)) +
                             from_pool(size_t(in_chunk * state) * sizeof(float)) +
                             from_pool(size_t(in_chunk * kChunk) * sizeof(ggml_fp16_t)),
                         true});
    }
    return scratch;
}

// ggml_cuda_out_prod: pointers for a batch in which src0 is used more than once.
Scratch outer_product_scratch(const ggml_tensor * op) {
    const bool is_strided = op->ne[2] == op->src[0]->ne[2] && op->ne[2] > 1;
    const int64_t products = op->ne[2] * op->ne[3];
    return {is_strided || products == 1 ? 0 : 3 * from_pool(size_t(products) * sizeof(void *)), true};
}

// ggml_cuda_op_solve_tri
Scratch triangular_scratch(const ggml_tensor * op) {
    constexpr int64_t kMostFastRows = 64, kMostFastColumns = 32;  // MAX_N_FAST, MAX_K_FAST
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    if (a->ne[0] <= kMostFastRows && b->ne[0] <= kMostFastColumns) {
        return {};
    }
    return {2 * from_pool(size_t(a->ne[2] * a->ne[3]) * sizeof(void *)), true};
}

// ggml_cuda_op_conv2d and ggml_cuda_op_conv3d: the padded input in f16, and the parts of a long sum.  A bound: the
// sum may be split into fewer.
Scratch convolution_scratch(const ggml_tensor * op, int dimensions, const Card & card) {
    const ggml_tensor *kernel = op->src[0], *input = op->src[1];
    if (kernel->type != GGML_TYPE_F16 || ggml_nelements(op) > kImplicitConvolutionLimit) {
        return {};
    }
    constexpr int64_t kTile = 64, kMostParts = 32, kBlocksPerMultiprocessor = 8;
    int64_t padded = ggml_nelements(input);
    bool is_pointwise = true;
    for (int i = 0; i < dimensions; i++) {
        is_pointwise = is_pointwise && kernel->ne[i] == 1;
        padded = padded / input->ne[i] * (input->ne[i] + 2 * ggml_get_op_params_i32(op, dimensions + i));
    }
    const int64_t tiles = std::max(ggml_nelements(op) / (kTile * kTile), int64_t(1));
    const int64_t parts = std::min(kMostParts, kBlocksPerMultiprocessor * card.multiprocessors / tiles + 1);
    const size_t sums = parts > 1 ? size_t(ggml_nelements(op) * parts) * sizeof(float) : 0;
    return {from_pool(size_t(padded) * sizeof(ggml_fp16_t)) + from_pool(sums), is_pointwise};
}

}  // namespace

void Scratch::include(const Scratch & other) {
    pool_bytes = std::max(pool_bytes, other.pool_bytes);
    uses_cublas = uses_cublas || other.uses_cublas;
}

bool may_take_scratch(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_FLASH_ATTN_EXT:
        case GGML_OP_SOFT_MAX:
        case GGML_OP_ARGSORT:
        case GGML_OP_TOP_K:
        case GGML_OP_CUMSUM:
        case GGML_OP_SUM:
        case GGML_OP_MEAN:
        case GGML_OP_SSM_SCAN:
        case GGML_OP_OUT_PROD:
        case GGML_OP_SOLVE_TRI:
        case GGML_OP_CONV_2D:
        case GGML_OP_CONV_3D:
            return true;
        default:
            return false;
    }
}

Scratch scratch(const ggml_tensor * op, const Card & card) {
    switch (op->op) {
        case GGML_OP_MUL_MAT:
            return product_scratch(op, card);
        case GGML_OP_MUL_MAT_ID:
            return expert_product_scratch(op, card);
        case GGML_OP_FLASH_ATTN_EXT:
            return attention_scratch(op, card);
        case GGML_OP_SOFT_MAX:
            return soft_max_scratch(op, card);
        case GGML_OP_ARGSORT:
            return argsort_scratch(op);
        case GGML_OP_TOP_K:
            return top_k_scratch(op);
        case GGML_OP_CUMSUM:
            return cumsum_scratch(op);
        case GGML_OP_SUM:
            return {cub_states_bytes(), false};
        case GGML_OP_MEAN:
            return mean_scratch(op);
        case GGML_OP_SSM_SCAN:
            return state_space_scan_scratch(op, card);
        case GGML_OP_OUT_PROD:
            return outer_product_scratch(op);
        case GGML_OP_SOLVE_TRI:
            return triangular_scratch(op);
        case GGML_OP_CONV_2D:
            return convolution_scratch(op, 2, card);
        case GGML_OP_CONV_3D:
            return convolution_scratch(op, 3, card);
        default:
            return {};
    }
}

size_t pool_size(size_t pool_bytes) {
    return (pool_bytes + kPoolGranularity - 1) / kPoolGranularity * kPoolGranularity;
}

size_t cublas_workspace_size(const Card & card) {
    return size_t(card.capability >= kHopper ? 32 : 4) << 20;
}

}  // namespace cuda_rules
