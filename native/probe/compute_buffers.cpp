#include "compute_buffers.h"

#include <dlfcn.h>

#include <algorithm>
#include <functional>
#include <future>
#include <set>
#include <stdexcept>
#include <vector>

#include "common.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-memory.h"
#include "llama-model.h"

namespace {

thread_local bool keeps_assignments = false;

struct KeepAssignments {
    KeepAssignments() { keeps_assignments = true; }
    ~KeepAssignments() { keeps_assignments = false; }
};

// A ubatch in the middle of a prompt has no output, and llama.cpp offers no way to reserve for that: it is asked for a
// number of outputs that nothing else has, and where the tensor of that length is made, one of none is.
constexpr uint32_t kNone = 1000003;

template <typename Function>
Function original(const char * name) {
    void * symbol = dlsym(RTLD_NEXT, name);
    if (!symbol) {
        throw std::runtime_error(std::string("the ggml library has no ") + name);
    }
    return reinterpret_cast<Function>(symbol);
}

struct Shape {
    uint32_t tokens, sequences, outputs;
};

// One graph that was measured: its number among all of them, the prompt that it is of (0: as reserved when the server
// is ready), and its sizes per sched backend.
struct Measurement {
    size_t number;
    uint32_t prompt_tokens;
    std::vector<size_t> sizes;
};

struct Share {
    std::vector<Measurement> measurements;
    ScratchMemory scratch;
    GraphSteps generation;
    size_t rollback_bytes = 0;
};

// Sizes per sched backend; the graph is built for the state in which `memory` is.
std::vector<size_t> graph_sizes(llama_context & context, const Shape & shape, const llama_memory_context_i * memory,
                                Share & share) {
    std::vector<size_t> sizes(size_t(ggml_backend_sched_get_n_backends(context.get_sched())), 0);
    ggml_cgraph * graph = context.graph_reserve(shape.tokens, shape.sequences, shape.outputs, memory,
                                                /*split_only=*/true, sizes.data());
    if (!graph) {
        throw std::runtime_error("llama.cpp cannot build this model's graph");
    }
    include_scratch(share.scratch, context.get_sched(), graph);
    if (shape.tokens == shape.sequences && shape.tokens == context.get_cparams().n_seq_max) {
        share.generation = count_steps(context.get_sched(), graph);
    }
    return sizes;
}

// The graphs of llama_context::sched_reserve.
std::vector<Shape> reserved_shapes(const llama_context & context) {
    const llama_cparams & params = context.get_cparams();
    const uint32_t sequences = params.n_seq_max, tokens = std::min(params.n_ctx, params.n_ubatch);
    const uint32_t outputs = std::min(tokens, uint32_t(params.n_outputs_max));
    const uint32_t last_sequences =
        context.get_model().arch == LLM_ARCH_KIMI_LINEAR || context.get_model().arch == LLM_ARCH_MINIMAX_01 ? 1
                                                                                                            : sequences;
    return {{tokens, sequences, outputs}, {sequences, sequences, sequences}, {tokens, last_sequences, outputs}};
}

// Of few ubatches all, then ever fewer.
bool is_sampled(size_t n) {
    size_t step = 1;
    while (step * 8 <= n) {
        step *= 2;
    }
    return n % step == 0;
}

// Token counts of the n-th of `count` ubatches to measure: the full one, of those sampled; and for the last two also
// some that are a little smaller, where tensors that had fitted into each other's place no longer do.
std::vector<uint32_t> sampled_sizes(size_t n, size_t count, uint32_t n_ubatch) {
    if (n + 2 >= count) {
        std::vector<uint32_t> sizes{n_ubatch};
        for (uint32_t less : {1u, 2u, n_ubatch * 5 / 32, n_ubatch / 4, n_ubatch / 2}) {
            if (less > 0 && less < n_ubatch) {
                sizes.push_back(n_ubatch - less);
            }
        }
        return sizes;
    }
    return is_sampled(n) ? std::vector<uint32_t>{n_ubatch} : std::vector<uint32_t>{};
}

// The longest prompt that llama-server accepts: one token less than a slot holds.
uint32_t longest_prompt(const llama_context & context) {
    return context.get_cparams().n_ctx_seq - 1;
}

// Calls visit(ubatch, memory) for the ubatches of a batch, split as llama_context::decode splits it.
template <typename Visit>
void split(llama_context & context, common_batch & batch, const Visit & visit) {
    llama_batch_allocr allocator(context.get_model().hparams.n_pos_per_embd());
    if (!allocator.init(*batch.get(), context.get_model().vocab, /*output_all=*/false)) {
        throw std::runtime_error("llama.cpp refuses a prompt as long as the context");
    }
    const uint32_t n_ubatch = context.get_cparams().n_ubatch;
    llama_memory_context_ptr memory = context.get_memory()->init_batch(allocator, n_ubatch, false);
    if (!memory || memory->get_status() != LLAMA_MEMORY_STATUS_SUCCESS) {
        throw std::runtime_error("llama.cpp finds no room for a prompt as long as the context");
    }
    do {
        memory->apply();
        visit(memory->get_ubatch(), memory.get());
    } while (memory->next());
}

// The shape of a ubatch; of one that was not split by sequences, llama.cpp calls each token a sequence.
Shape shape_of(const llama_ubatch & ubatch) {
    const uint32_t outputs = uint32_t(std::count(ubatch.output, ubatch.output + ubatch.n_tokens, int8_t(1)));
    return {ubatch.n_tokens, ubatch.equal_seqs() ? ubatch.n_seqs : 1, outputs > 0 ? outputs : kNone};
}

// Calls visit(shape, prompt_tokens, memory) for ubatches of the longest prompt in one slot; prompt_tokens is the length
// of a prompt that ends with this ubatch.  visit_sizes(token counts, filled, memory) is for those that end a prompt, of
// each of these sizes.  after(filled) is called when the slot holds so many tokens.
template <typename VisitSizes, typename Visit, typename After>
void fill_a_slot(llama_context & context, const VisitSizes & visit_sizes, const Visit & visit, const After & after) {
    const llama_cparams & params = context.get_cparams();
    const uint32_t longest = longest_prompt(context);
    const size_t count = (longest + params.n_ubatch - 1) / params.n_ubatch;
    uint32_t filled = 0;
    size_t n = 0;
    while (filled < longest) {
        const uint32_t size = std::min(params.n_batch, longest - filled);
        common_batch batch = common_batch_get_one(&context, std::vector<llama_token>(size, 0));
        split(context, batch, [&](const llama_ubatch & ubatch, const llama_memory_context_i * memory) {
            const uint32_t n_ubatch = ubatch.n_tokens;
            const std::vector<uint32_t> sizes = sampled_sizes(n, count, n_ubatch);
            if (!sizes.empty()) {
                visit_sizes(sizes, filled, memory);
            }
            if (is_sampled(n) && filled + n_ubatch < longest && !params.embeddings) {
                visit(Shape{n_ubatch, 1, kNone}, filled + n_ubatch + 1, memory);
            }
            filled += n_ubatch;
            n++;
            after(filled);
        });
    }
}

// The same for the longest prompts in all slots at once, batched as llama-server does: those that generate first, then
// prompts, each as far as there is room.
template <typename Visit>
void fill_all_slots(llama_context & context, const Visit & visit) {
    const llama_cparams & params = context.get_cparams();
    const uint32_t longest = longest_prompt(context);
    std::vector<uint32_t> filled(params.n_seq_max, 0);
    size_t n = 0;
    while (std::any_of(filled.begin(), filled.end(), [&](uint32_t tokens) { return tokens < longest; })) {
        common_batch batch(&context);
        uint32_t room = params.n_batch;
        for (uint32_t slot = 0; slot < params.n_seq_max && room > 0; slot++) {
            if (filled[slot] == longest) {
                batch.add(0, int32_t(filled[slot]++), int32_t(slot), /*output=*/true);
                room--;
            }
        }
        for (uint32_t slot = 0; slot < params.n_seq_max; slot++) {
            for (; filled[slot] < longest && room > 0; filled[slot]++, room--) {
                batch.add(0, int32_t(filled[slot]), int32_t(slot), params.embeddings || filled[slot] + 1 == longest);
            }
        }
        split(context, batch, [&](const llama_ubatch & ubatch, const llama_memory_context_i * memory) {
            if (is_sampled(n++)) {
                visit(shape_of(ubatch), longest, memory);
            }
        });
    }
}

// Takes in the next tokens of the first `slots` slots, `each` of them, in one batch if there is room.
template <typename Visit>
void take_together(llama_context & context, uint32_t slots, uint32_t filled, uint32_t each, const Visit & visit) {
    const bool embeddings = context.get_cparams().embeddings;
    const uint32_t most = std::max(1u, context.get_cparams().n_batch / slots), end = filled + each;
    while (filled < end) {
        const uint32_t next = std::min(end, filled + most);
        common_batch batch(&context);
        for (uint32_t slot = 0; slot < slots; slot++) {
            for (uint32_t position = filled; position < next; position++) {
                batch.add(0, int32_t(position), int32_t(slot), embeddings || position + 1 == end);
            }
        }
        split(context, batch, visit);
        filled = next;
    }
}

// Slots that take in prompts at once, two and all of them: first up to the last batch's share of each, then that, when
// their caches are all but full.  fill_all_slots has no such ubatches, as there a slot is full when the next begins.
template <typename Visit>
void fill_together(llama_context & context, const Visit & visit) {
    const llama_cparams & params = context.get_cparams();
    const uint32_t longest = longest_prompt(context);
    for (uint32_t slots : std::set<uint32_t>{2, params.n_seq_max}) {
        const uint32_t each = std::min(params.n_batch / slots, longest);
        const auto measure = [&](const llama_ubatch & ubatch, const llama_memory_context_i * memory) {
            visit(shape_of(ubatch), longest, memory);
        };
        size_t n = 0;
        context.get_memory()->clear(/*data=*/false);
        take_together(context, slots, 0, longest - each,
                      [&](const llama_ubatch & ubatch, const llama_memory_context_i * memory) {
                          if (is_sampled(n++) || ubatch.output[ubatch.n_tokens - 1]) {
                              measure(ubatch, memory);
                          }
                      });
        take_together(context, slots, longest - each, each, measure);
    }
}

// The ubatches of chunks, each in a sequence of its own, as many as a batch holds and, at a text's end, fewer.
template <typename Visit>
void read_chunks(llama_context & context, const Chunks & chunks, const Visit & visit) {
    const llama_cparams & params = context.get_cparams();
    for (uint32_t sequences = params.n_seq_max; sequences > 0; sequences--) {
        context.get_memory()->clear(/*data=*/false);
        for (uint32_t start = 0; start < chunks.tokens; start += params.n_batch) {
            const uint32_t end = std::min(chunks.tokens, start + params.n_batch);
            common_batch batch(&context);
            for (uint32_t sequence = 0; sequence < sequences; sequence++) {
                for (uint32_t position = start; position < end; position++) {
                    batch.add(0, int32_t(position), int32_t(sequence), position >= chunks.first_output);
                }
            }
            split(context, batch, [&](const llama_ubatch & ubatch, const llama_memory_context_i * memory) {
                visit(shape_of(ubatch), chunks.tokens, memory);
            });
        }
    }
}

// Measures with take(tokens) these token counts, in falling order, and where more tokens take less than fewer do, those
// in between that take most: a graph is laid out anew there.
template <typename Take>
void measure_drops(const std::vector<uint32_t> & tokens, const Take & take) {
    uint32_t above = 0;
    std::vector<size_t> sizes_above;
    for (uint32_t below : tokens) {
        const std::vector<size_t> sizes = take(below);
        for (size_t i = 0; above > 0 && i < sizes.size(); i++) {
            uint32_t low = below, high = sizes[i] > sizes_above[i] ? above : below;
            size_t most = sizes[i];
            while (high - low > 1) {
                const uint32_t middle = low + (high - low) / 2;
                const size_t size = take(middle)[i];
                (size >= most ? low : high) = middle;
                most = std::max(most, size);
            }
        }
        above = below;
        sizes_above = sizes;
    }
}

// The graphs that fall to one of `shares` contexts: each to the one that has fewest so far.
Share measure_share(llama_context & context, NextnRows rows, const Chunks & chunks, bool with_rollback, size_t mine,
                    size_t shares) {
    Share share;
    size_t number = 0;
    std::vector<size_t> loads(shares, 0);
    const auto is_mine = [&](size_t graphs) {
        const auto least = std::min_element(loads.begin(), loads.end());
        *least += graphs;
        number++;
        return size_t(least - loads.begin()) == mine;
    };
    // A window is full when so many tokens are there, and what else is kept grows to the end.
    const uint32_t window = context.get_model().hparams.n_swa;
    const auto measure_rollback = [&](uint32_t filled) {
        if (with_rollback && (filled <= window || filled == longest_prompt(context))) {
            share.rollback_bytes =
                std::max(share.rollback_bytes, context.state_seq_get_size(0, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY));
        }
    };
    const auto measure = [&](const Shape & shape, uint32_t prompt, const llama_memory_context_i * memory) {
        if (is_mine(1)) {
            share.measurements.push_back({number, prompt, graph_sizes(context, shape, memory, share)});
        }
    };
    // Where fewer tokens take more than many, the most is looked for between them, in one context.
    const auto measure_sizes = [&](const std::vector<uint32_t> & sizes, uint32_t filled,
                                   const llama_memory_context_i * memory) {
        if (!is_mine(sizes.size())) {
            return;
        }
        measure_drops(sizes, [&](uint32_t tokens) {
            const Shape shape{tokens, 1, context.get_cparams().embeddings ? tokens : 1};
            share.measurements.push_back({number, filled + tokens, graph_sizes(context, shape, memory, share)});
            return share.measurements.back().sizes;
        });
    };
    llama_memory_context_ptr full;
    if (context.get_memory()) {
        full = context.get_memory()->init_full();
    }
    for (const Shape & shape : reserved_shapes(context)) {
        measure(shape, 0, full.get());
    }
    if (rows != NextnRows::kNone) {
        context.set_embeddings_nextn(true, /*masked=*/rows == NextnRows::kOfOutputs);
    }
    if (context.get_memory() && chunks.tokens > 0) {
        read_chunks(context, chunks, measure);
    } else if (context.get_memory()) {
        fill_a_slot(context, measure_sizes, measure, measure_rollback);
        // Where slots share one cache, their ubatches are in effect those of one long prompt.
        if (context.get_cparams().n_seq_max > 1 && !context.get_cparams().kv_unified) {
            context.get_memory()->clear(/*data=*/false);
            fill_all_slots(context, measure);
            fill_together(context, measure);
        }
    }
    return share;
}

ComputeMemory combined(llama_context & context, const std::vector<Share> & shares) {
    ComputeMemory result;
    std::vector<const Measurement *> measurements;
    for (const Share & share : shares) {
        for (const Measurement & one : share.measurements) {
            measurements.push_back(&one);
        }
        for (const auto & [device, scratch] : share.scratch) {
            result.scratch[device].include(scratch);
        }
        if (!share.generation.devices.empty()) {
            result.generation = share.generation;
        }
        result.rollback_bytes = std::max(result.rollback_bytes, share.rollback_bytes);
    }
    std::stable_sort(measurements.begin(), measurements.end(),
                     [](const Measurement * a, const Measurement * b) { return a->number < b->number; });
    ggml_backend_sched_t sched = context.get_sched();
    for (const Measurement * one : measurements) {
        for (size_t i = 0; i < one->sizes.size(); i++) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(sched, int(i));
            ComputeBuffer & buffer = result.buffers[ggml_backend_sched_get_buffer_type(sched, backend)];
            if (one->prompt_tokens == 0) {
                buffer.at_ready = std::max(buffer.at_ready, one->sizes[i]);
            }
            if (one->sizes[i] > buffer.in_use) {
                buffer.in_use = one->sizes[i];
                buffer.worst_prompt_tokens = one->prompt_tokens;
            }
        }
    }
    return result;
}

}  // namespace

// These three take the place of ggml's own functions for the libraries that call them: a program's symbols come first.
// llama_context::graph_reserve has reset the scheduler before it built the graph, so the second reset is left out.
extern "C" void ggml_backend_sched_reset(ggml_backend_sched_t sched) {
    static const auto reset = original<void (*)(ggml_backend_sched_t)>("ggml_backend_sched_reset");
    if (!keeps_assignments) {
        reset(sched);
    }
}

extern "C" ggml_tensor * ggml_new_tensor_1d(ggml_context * context, ggml_type type, int64_t length) {
    static const auto new_tensor =
        original<ggml_tensor * (*)(ggml_context *, ggml_type, int64_t)>("ggml_new_tensor_1d");
    return new_tensor(context, type, length == kNone ? 0 : length);
}

extern "C" void ggml_backend_sched_reserve_size(ggml_backend_sched_t sched, ggml_cgraph * graph, size_t * sizes) {
    static const auto reserve_size =
        original<void (*)(ggml_backend_sched_t, ggml_cgraph *, size_t *)>("ggml_backend_sched_reserve_size");
    KeepAssignments keep;
    reserve_size(sched, graph, sizes);
}

ComputeMemory measure_compute_memory(const std::vector<llama_context *> & contexts, NextnRows rows,
                                     const Chunks & chunks, bool with_rollback) {
    std::vector<std::future<Share>> others;
    for (size_t i = 1; i < contexts.size(); i++) {
        others.push_back(std::async(std::launch::async, measure_share, std::ref(*contexts[i]), rows, chunks, false, i,
                                    contexts.size()));
    }
    std::vector<Share> shares{measure_share(*contexts[0], rows, chunks, with_rollback, 0, contexts.size())};
    for (std::future<Share> & other : others) {
        shares.push_back(other.get());
    }
    return combined(*contexts[0], shares);
}
