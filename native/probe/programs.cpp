#include "programs.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "arg.h"
#include "speculative.h"

namespace {

const std::map<std::string, Program> kPrograms = {
    {"llama-server", Program::kServer},
    {"llama-perplexity", Program::kPerplexity},
    {"llama-imatrix", Program::kImatrix},
};

const std::string & name_of(Program program) {
    return std::find_if(kPrograms.begin(), kPrograms.end(), [&](const auto & one) { return one.second == program; })
        ->first;
}

llama_example example_of(Program program) {
    switch (program) {
        case Program::kPerplexity:
            return LLAMA_EXAMPLE_PERPLEXITY;
        case Program::kImatrix:
            return LLAMA_EXAMPLE_IMATRIX;
        default:
            return LLAMA_EXAMPLE_SERVER;
    }
}

// llama_server() in tools/server/server.cpp and server_output_limits() in tools/server/server-context.cpp.
void treat_as_server(common_params & params) {
    if (params.embedding) {
        params.n_batch = std::min(params.n_batch, params.n_ubatch);
    }
    if (params.n_parallel < 0) {
        params.n_parallel = 4;
        params.kv_unified = true;
    }
    if (params.kv_unified_per_slot > 0 && params.n_ctx == 0 && uint32_t(params.fit_params_min_ctx) != UINT32_MAX) {
        params.n_ctx = params.n_parallel * params.kv_unified_per_slot;
    }
    const bool pools =
        params.pooling_type != LLAMA_POOLING_TYPE_UNSPECIFIED && params.pooling_type != LLAMA_POOLING_TYPE_NONE;
    if (params.embedding || pools) {
        params.n_outputs_max = params.n_batch;
        params.n_outputs_max_per_seq = 1;
    } else {
        const auto limits = common_speculative_get_output_limits(params.n_batch, params.n_parallel,
                                                                 common_speculative_n_max(&params.speculative));
        params.n_outputs_max = std::max(1, int(limits.total));
        params.n_outputs_max_per_seq = std::max(1, int(limits.per_seq));
    }
}

// llama_perplexity() in tools/perplexity/perplexity.cpp and main() in tools/imatrix/imatrix.cpp, which do the same: as
// many chunks at once as a batch holds, all of a batch's tokens with logits (n_outputs_max is left at 0).
void treat_as_reader_of_chunks(common_params & params) {
    if (params.n_ctx <= 0) {
        throw std::runtime_error("a context of 0 tokens is refused");
    }
    const int chunk = params.n_ctx;
    params.n_parallel = std::max(1, params.n_batch / chunk);
    params.n_ctx = params.n_parallel * chunk;
    params.n_batch = std::min(params.n_batch, params.n_ctx);
    if (params.n_batch >= chunk && params.n_batch % chunk != 0) {
        throw std::runtime_error("-b has to be a multiple of -c, or less than it");
    }
}

}  // namespace

Program program_called(const std::string & name) {
    const auto found = kPrograms.find(name);
    if (found == kPrograms.end()) {
        throw std::runtime_error("the probe cannot answer for " + name);
    }
    return found->second;
}

common_params params_of(Program program, const std::vector<std::string> & arguments) {
    std::vector<std::string> owned{name_of(program)};
    owned.insert(owned.end(), arguments.begin(), arguments.end());
    std::vector<char *> argv;
    for (std::string & argument : owned) {
        argv.push_back(argument.data());
    }
    common_params params;
    if (program != Program::kServer) {
        params.n_ctx = 512;
    }
    if (!common_params_parse(int(argv.size()), argv.data(), params, example_of(program))) {
        throw std::runtime_error(name_of(program) + " refuses these arguments");
    }
    if (params.model.path.empty()) {
        throw std::runtime_error("the arguments name no model file (-m)");
    }
    if (!params.lora_adapters.empty() || !params.control_vectors.empty()) {
        throw std::runtime_error("LoRA adapters and control vectors cannot be counted before they are loaded");
    }
    if (program == Program::kServer) {
        treat_as_server(params);
    } else {
        treat_as_reader_of_chunks(params);
    }
    return params;
}

Chunks chunks_of(Program program, const common_params & params) {
    if (program == Program::kServer) {
        return {};
    }
    const uint32_t tokens = uint32_t(params.n_ctx / params.n_parallel);
    return {tokens, program == Program::kPerplexity ? tokens / 2 : 0};
}

size_t own_bytes(Program program, const Chunks & chunks, size_t n_vocab) {
    // perplexity()'s log_probs, in 16 bits, with a scale for each token; of kl_divergence()'s, half.
    return program == Program::kPerplexity ? chunks.tokens * (2 * ((n_vocab + 1) / 2) + 4) * sizeof(uint16_t) : 0;
}
