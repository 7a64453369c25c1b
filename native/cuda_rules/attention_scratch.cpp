#include "attention_scratch.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "ggml-impl.h"
#include "ggml.h"
#include "operations.h"

namespace cuda_rules {
namespace {

constexpr int64_t kKvStride = 256;  // FATTN_KQ_STRIDE

// What cudaOccupancyMaxActiveBlocksPerMultiprocessor answers on the stand-in.  Of most kernels at least as many blocks
// fit (their __launch_bounds__ ask the compiler for it), but a card's driver may answer more or less; the partial
// results of the matrix kernel are proportional to it.
constexpr int64_t kBlocksPerMultiprocessor = 2;

// How launch_fattn is called.
struct Launch {
    AttentionTile tile;
    int64_t keys_per_step = 0;  // nbatch_fa
    bool stream_k = false, gathers = false;
};

int64_t divided(int64_t a, int64_t b) {  // rounding up
    return (a + b - 1) / b;
}

// ------------------------------------------------------------------------------------------- the matrix kernel

// ggml_cuda_flash_attn_ext_mma_f16, for a head size of 576, of which GLM has 20 query heads to one of keys.
int64_t heads_of_mla(const ggml_tensor * op, int64_t ratio, const Card & card) {
    const int64_t queries = op->src[0]->ne[1], keys = op->src[1]->ne[1];
    if (ratio != 20) {
        return ratio % 16 == 0 ? 16 : 4;
    }
    if (card.capability >= kDgxSpark) {
        return queries <= 8 ? 16 : 4;
    }
    if (card.capability >= kBlackwell) {
        return queries <= 4 && keys >= 65536 ? 16 : 4;
    }
    if (card.capability >= kAda) {
        return queries <= 4 ? 16 : 4;
    }
    return card.capability >= kTuring && queries <= 4 ? (keys <= 16384 ? 16 : 32) : 4;
}

// ncols2: ggml_cuda_flash_attn_ext_mma_f16 and _switch_ncols2
int64_t heads_of_matrix_tile(const ggml_tensor * op, const Card & card) {
    const int64_t ratio = op->src[0]->ne[2] / op->src[1]->ne[2];
    switch (op->src[0]->ne[0]) {
        case 192:
            return ratio % 16 == 0 ? 16 : 8;
        case 320:
            return 32;
        case 576:
            return heads_of_mla(op, ratio, card);
        default:
            break;
    }
    if (!groups_query_heads(op)) {
        return 1;
    }
    if (card.capability == kVolta) {
        return ratio % 8 == 0 ? 8 : ratio % 4 == 0 ? 4 : ratio % 2 == 0 ? 2 : 1;
    }
    return ratio > 4 ? 8 : ratio > 2 ? 4 : 2;
}

// ggml_cuda_flash_attn_ext_mma_f16_switch_ncols1
AttentionTile matrix_tile(const ggml_tensor * op, const Card & card) {
    const int64_t queries = op->src[0]->ne[1], heads = heads_of_matrix_tile(op, card);
    const bool has_wide_gather = op->src[0]->ne[0] == 256 && heads == 8;
    if (!(has_wide_gather && queries > 32 / heads) && gathers_keys(op, card, {1, heads})) {
        return {1, heads};
    }
    if (heads <= 8 && card.compiled >= kTuring && queries <= 8 / heads) {
        return {8 / heads, heads};
    }
    if (heads <= 16 && queries <= 16 / heads) {
        return {16 / heads, heads};
    }
    if (queries <= 32 / heads || card.compiled == kTuring) {
        return {32 / heads, heads};
    }
    return {64 / heads, heads};
}

// nbatch_fa: ggml_cuda_fattn_mma_get_config_{ampere,turing,volta}
int64_t keys_per_matrix_step(int64_t size, int64_t columns, const Card & card) {
    switch (size) {
        case 192:
            return columns == 8 ? 64 : 32;
        case 256:
            return columns <= 16 ? 64 : 32;
        case 512:
            return card.compiled >= kAmpere && columns <= 16 ? 64 : 32;
        case 320:
        case 576:
            return 32;
        default:
            return columns == 8 ? 128 : 64;
    }
}

Launch matrix_launch(const ggml_tensor * op, const Card & card) {
    Launch launch;
    launch.tile = matrix_tile(op, card);
    launch.keys_per_step = keys_per_matrix_step(op->src[0]->ne[0], launch.tile.queries * launch.tile.heads, card);
    launch.stream_k = true;
    launch.gathers = gathers_keys(op, card, launch.tile);
    return launch;
}

// ------------------------------------------------------------------------------------------- the tile kernel

// ncols2: launch_fattn_tile_switch_ncols2
int64_t heads_of_tile(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2];
    const int64_t ratio = q->ne[2] / k->ne[2];
    float max_bias = 0.0f;
    std::memcpy(&max_bias, op->op_params + 1, sizeof(max_bias));
    const bool is_limited = ratio <= 4 && v->ne[0] <= 256;
    const bool groups = op->src[3] && max_bias == 0.0f && (!is_limited || q->ne[1] <= 16) && k->ne[1] % kKvStride == 0;
    if (!groups) {
        return 1;
    }
    switch (k->ne[0]) {
        case 320:
            return 16;
        case 576:
            return ratio % 16 == 0 ? 16 : 4;
        case 192:
            return ratio % 16 == 0 ? 16 : 8;
        default:
            return ratio % 8 == 0 ? 8 : ratio % 4 == 0 ? 4 : ratio % 2 == 0 ? 2 : 1;
    }
}

// cols_per_block: launch_fattn_tile_switch_ncols1
int64_t columns_of_tile(const ggml_tensor * op, int64_t heads) {
    const int64_t queries = op->src[0]->ne[1];
    if (op->src[0]->ne[0] <= 256 && queries > 16 / heads) {
        return 32;
    }
    for (int64_t columns : {16, 8, 4}) {
        if (heads <= columns && queries > columns / 2 / heads) {
            return columns;
        }
    }
    return 2;
}

// nbatch_fa, by columns 2, 4, 8, 16, 32: ggml_cuda_fattn_tile_get_config_nvidia_fp16 and _fp32
int64_t keys_per_tile_step(int64_t size, int64_t columns, const Card & card) {
    struct Steps {
        int64_t size;
        int16_t keys[5];
    };
    static const Steps f16[] = {
        {40, {128, 128, 128, 64, 64}}, {64, {64, 64, 128, 64, 64}}, {72, {64, 128, 64, 64, 64}},
        {80, {64, 64, 64, 64, 128}},   {96, {64, 64, 64, 64, 128}}, {112, {64, 64, 64, 32, 128}},
        {0, {64, 64, 64, 64, 64}},
    };
    static const Steps f32[] = {
        {64, {64, 32, 32, 64, 64}},  {128, {64, 32, 64, 32, 64}}, {192, {64, 32, 32, 32, 32}},
        {256, {64, 32, 32, 32, 32}}, {0, {32, 32, 32, 32, 32}},
    };
    const bool has_fast_f16 = card.compiled >= kPascal && card.compiled != kDp4a;  // fast_fp16_available
    const Steps * steps = has_fast_f16 ? f16 : f32;
    while (steps->size != 0 && steps->size != size) {
        steps++;
    }
    int index = 0;
    while (index < 4 && columns > int64_t(2) << index) {
        index++;
    }
    return steps->keys[index];
}

Launch tile_launch(const ggml_tensor * op, const Card & card) {
    Launch launch;
    const int64_t heads = heads_of_tile(op), columns = columns_of_tile(op, heads);
    launch.tile = {columns / heads, heads};
    launch.keys_per_step = keys_per_tile_step(op->src[1]->ne[0], columns, card);
    return launch;
}

// ------------------------------------------------------------------------------------------- launch_fattn

// should_use_stream_k and blocks_num.x there
int64_t stream_k_blocks(int64_t tiles, int64_t steps, const Card & card) {
    const int64_t most = kBlocksPerMultiprocessor * card.multiprocessors;
    const int64_t waves = divided(tiles, most);
    if (card.capability < kAda && 100 * tiles / (most * waves) >= 75) {
        return tiles;
    }
    const int64_t blocks = std::min(most, steps * tiles);
    const int64_t rounded = blocks / tiles * tiles;
    const int64_t loss_percent = rounded > 0 ? 100 * (blocks - rounded) / blocks : 100;
    return loss_percent <= 5 ? rounded : blocks;
}

// parallel_blocks there
int64_t blocks_per_tile(int64_t tiles, int64_t steps, const Card & card) {
    const int64_t per_wave = kBlocksPerMultiprocessor * card.multiprocessors;
    int64_t best = std::min(kBlocksPerMultiprocessor, steps), best_waves = 0, best_percent = 0;
    for (int64_t blocks = best; blocks <= steps; blocks++) {
        const int64_t waves = divided(tiles * blocks, per_wave);
        const int64_t percent = 100 * tiles * blocks / (waves * per_wave);
        if (best_percent >= 95 && waves > best_waves) {
            break;
        }
        if (percent > best_percent) {
            best_waves = waves;
            best_percent = percent;
            best = blocks;
        }
    }
    return best;
}

// KV_max there: which keys to read, or up to which.
size_t key_list_bytes(const ggml_tensor * op, const Launch & launch) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *mask = op->src[3];
    const int64_t tiles = divided(q->ne[1], launch.tile.queries);
    if (launch.gathers) {
        const int64_t keys = std::min<int64_t>(k->ne[1], launch.tile.queries * ggml_get_op_params_i32(op, 4));
        return from_pool(size_t((keys + 1) * tiles * mask->ne[3]) * sizeof(int32_t));
    }
    const bool skips = mask && k->ne[1] % kKvStride == 0 && (q->ne[1] >= 1024 || q->ne[3] > 1);
    return skips ? from_pool(size_t(tiles * q->ne[3]) * sizeof(int32_t)) : 0;
}

size_t launch_bytes(const ggml_tensor * op, const Launch & launch, const Card & card) {
    const ggml_tensor *q = op->src[0], *k = op->src[1];
    const int64_t value_size = op->src[2]->ne[0];
    int64_t keys = k->ne[1];
    if (launch.gathers) {
        keys = std::min<int64_t>(keys, launch.tile.queries * ggml_get_op_params_i32(op, 4));
    }
    const int64_t steps = divided(keys, launch.keys_per_step);
    const int64_t head_tiles = divided(q->ne[2] / k->ne[2], launch.tile.heads);
    const int64_t tiles = divided(q->ne[1], launch.tile.queries) * head_tiles * k->ne[2] * q->ne[3];
    size_t bytes = key_list_bytes(op, launch);
    if (launch.stream_k) {
        const int64_t blocks = stream_k_blocks(tiles, steps, card);
        if (tiles % blocks != 0) {
            const int64_t columns = launch.tile.queries * launch.tile.heads;
            bytes += from_pool(size_t(blocks * columns * (2 + value_size / 2)) * 2 * sizeof(float));
        }
        return bytes;
    }
    const int64_t parts = blocks_per_tile(tiles, steps, card);
    if (parts > 1) {
        const int64_t rows = q->ne[1] * q->ne[2] * q->ne[3];
        bytes += from_pool(size_t(parts * rows * value_size) * sizeof(float)) +
                 from_pool(size_t(parts * rows) * 2 * sizeof(float));
    }
    return bytes;
}

// ggml_cuda_flash_attn_ext
Launch launch(const ggml_tensor * op, const Card & card) {
    switch (attention_kernel(op, card)) {
        case AttentionKernel::matrix:
            return matrix_launch(op, card);
        case AttentionKernel::tile:
            return tile_launch(op, card);
        default: {  // ggml_cuda_flash_attn_ext_vec_case
            Launch launch;
            launch.tile.queries = op->src[0]->ne[1] == 1 ? 1 : 2;
            launch.keys_per_step = op->src[0]->ne[0];
            return launch;
        }
    }
}

// ------------------------------------------------------------------------------------------- over fewer tokens

// The operation over other numbers of sequences, of tokens in each, and of keys.
class Variation {
  public:
    explicit Variation(const ggml_tensor * op) : op_(*op) {
        for (int i = 0; i < 4; i++) {
            if (op->src[i]) {
                sources_[i] = *op->src[i];
                op_.src[i] = &sources_[i];
            }
        }
    }

    const ggml_tensor * of(int64_t sequences, int64_t tokens, int64_t keys) {
        ggml_tensor &q = sources_[0], &k = sources_[1], &v = sources_[2], &mask = sources_[3];
        q.ne[1] = mask.ne[1] = tokens;
        k.ne[1] = v.ne[1] = mask.ne[0] = keys;
        for (ggml_tensor & source : sources_) {
            source.ne[3] = std::min(source.ne[3], sequences);
        }
        return &op_;
    }

  private:
    ggml_tensor op_, sources_[4] = {};
};

// The numbers of keys at which the kernel changes, up to the one of the graph.  Between them, more keys take no less:
// partial results are as many as blocks, and blocks at most as many as there are steps.
std::vector<int64_t> numbers_of_keys(int64_t most) {
    std::vector<int64_t> numbers{most};
    for (int64_t landmark : {4096, 8192, 16384, 65536}) {
        if (landmark < most) {
            numbers.push_back(landmark);
        }
        if (landmark - kKvStride < most) {
            numbers.push_back(landmark - kKvStride);
        }
    }
    return numbers;
}

// The numbers of tokens that take most: from 64 on, where neither kernel nor tile changes any more, whole tiles.
std::vector<int64_t> numbers_of_tokens(int64_t most, int64_t tile) {
    std::vector<int64_t> numbers{most};
    for (int64_t tokens = 1; tokens < most; tokens++) {
        if (tokens <= 64 || tokens % tile == 0) {
            numbers.push_back(tokens);
        }
    }
    return numbers;
}

}  // namespace

Scratch attention_scratch(const ggml_tensor * op, const Card & card) {
    const ggml_tensor * q = op->src[0];
    Scratch scratch;
    if (attention_kernel(op, card) == AttentionKernel::none) {
        return scratch;
    }
    Variation variation(op);
    for (int64_t sequences = q->ne[3]; sequences >= 1; sequences--) {
        const int64_t most = q->ne[1] * q->ne[3] / sequences;
        for (int64_t keys : numbers_of_keys(op->src[1]->ne[1])) {
            const int64_t tile = launch(variation.of(sequences, most, keys), card).tile.queries;
            for (int64_t tokens : numbers_of_tokens(most, tile)) {
                const ggml_tensor * fewer = variation.of(sequences, tokens, keys);
                scratch.include({launch_bytes(fewer, launch(fewer, card), card), false});
            }
        }
    }
    return scratch;
}

}  // namespace cuda_rules
