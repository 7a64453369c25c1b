#include "quantized_tiles.h"

#include <algorithm>
#include <climits>

#include "ggml-impl.h"

namespace cuda_rules {
namespace {

constexpr int64_t kTileRows = 128;      // I in mmq-config-ampere.cuh and -blackwell.cuh
constexpr int64_t kFullTileRows = 128;  // rows not a multiple of it need the kernel with bounds checks ("fallback")
constexpr int kMostTileColumns = 128;   // mul_mat_q_switch_J
constexpr size_t kBlockBytes = 144;     // block_q8_1_mmq and block_fp4_mmq
constexpr size_t kThreads = 256;        // nthreads in all configurations

bool has_stream_k(const Card & card) {
    return card.compiled >= kVolta;
}

bool has_fp4_instructions(const Card & card) {  // blackwell_mma_available
    return card.compiled >= kBlackwell && card.compiled < kRubin;
}

// The widths J that are compiled, of tiles that are 128 rows high, or 64 before Volta: mmq-config-*.cuh.
bool is_tile_width(int columns, bool checks_bounds, const Card & card) {
    if (columns > (has_stream_k(card) ? 128 : 64)) {
        return false;
    }
    switch (columns) {
        case 8:
        case 16:
        case 32:
        case 64:
        case 128:
            return true;
        case 24:
        case 40:
        case 48:
        case 80:
        case 96:
        case 112:
            return !checks_bounds;
        default:
            return false;
    }
}

// Bytes of shared memory that a row of the matrix's tile takes: ggml_cuda_mmq_get_sram_stride, for the layout that
// mmq-config-ampere.cuh names.  (Volta has a layout of its own, of which every tile fits into its 96 KiB.)
size_t bytes_per_tile_row(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q2_K:
            return 100 * sizeof(int32_t);
        case GGML_TYPE_Q3_K:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S:
        case GGML_TYPE_NVFP4:
            return 84 * sizeof(int32_t);
        default:
            return 76 * sizeof(int32_t);
    }
}

// mmq_get_nbytes_shared
size_t shared_bytes(const TiledProduct & product, int columns) {
    const ggml_type layout = product.four_bit ? GGML_TYPE_MXFP4 : product.type;
    return columns * sizeof(int32_t) + kTileRows * bytes_per_tile_row(layout) +
           GGML_PAD(columns * kBlockBytes, kThreads * sizeof(int32_t));
}

// mul_mat_q_switch_J: the narrowest tile among those that need the fewest.
int64_t tile_columns(const TiledProduct & product, const Card & card) {
    const bool checks_bounds = product.rows % kFullTileRows != 0;
    int best = 0;
    int64_t fewest = INT_MAX;
    for (int columns = 8; columns <= kMostTileColumns && fewest > 1; columns += 8) {
        if (!is_tile_width(columns, checks_bounds, card) || shared_bytes(product, columns) > card.shared_memory) {
            continue;
        }
        const int64_t tiles = (product.columns + columns - 1) / columns;
        if (tiles < fewest) {
            best = columns;
            fewest = tiles;
        }
    }
    return best;
}

// ggml_cuda_mmq_get_J_max
int64_t widest_tile(const TiledProduct & product, const Card & card) {
    const bool checks_bounds = product.rows % kFullTileRows != 0;
    int columns = int(std::min<int64_t>(product.columns, kMostTileColumns));
    for (columns -= columns % 8; columns > 0 && !is_tile_width(columns, checks_bounds, card);) {
        columns -= 8;
    }
    return columns;
}

}  // namespace

size_t most_fixup_bytes(const TiledProduct & product, const Card & card) {
    if (!has_stream_k(card)) {
        return 0;
    }
    return size_t(card.multiprocessors) * size_t(tile_columns(product, card)) * kTileRows * sizeof(float);
}

size_t fixup_bytes(const TiledProduct & product, const Card & card) {
    if (!has_stream_k(card)) {
        return 0;
    }
    const int64_t width = tile_columns(product, card), multiprocessors = card.multiprocessors;
    if (width == 0) {
        return 0;
    }
    const int64_t tiles =
        (product.rows + kTileRows - 1) / kTileRows * ((product.columns + width - 1) / width) * product.results;
    const int64_t waves = (tiles + multiprocessors - 1) / multiprocessors;
    const bool one_tile_per_block = 100 * tiles / (multiprocessors * waves) >= 90;
    return one_tile_per_block || tiles % multiprocessors == 0 ? 0 : most_fixup_bytes(product, card);
}

size_t quantized_operand_bytes(const TiledProduct & product, int64_t values, const Card & card) {
    const size_t values_per_block = product.four_bit ? 256 : 128;  // QK_FP4_MMQ, QK8_1_MMQ
    return size_t(values) * kBlockBytes / values_per_block + size_t(widest_tile(product, card)) * kBlockBytes;
}

bool quantizes_to_four_bits(const ggml_tensor * op, const Card & card) {
    const ggml_type type = op->src[0]->type;
    return (type == GGML_TYPE_MXFP4 || type == GGML_TYPE_NVFP4) && has_fp4_instructions(card) &&
           ggml_get_op_params_i32(op, 3) != GGML_PREC_Q8;
}

}  // namespace cuda_rules
