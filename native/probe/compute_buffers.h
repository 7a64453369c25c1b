// The sizes that a context's compute buffers have when llama-server is ready, and reach in use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "ggml-backend.h"
#include "graph_steps.h"
#include "programs.h"
#include "scratch_memory.h"

struct llama_context;

struct ComputeBuffer {
    size_t at_ready = 0;               // what llama_context::sched_reserve allocates
    size_t in_use = 0;                 // the largest it becomes while prompts fill the slots, or chunks are read
    uint32_t worst_prompt_tokens = 0;  // a prompt of this length makes it so; 0 if it does not grow
};

struct ComputeMemory {
    std::map<ggml_backend_buffer_type_t, ComputeBuffer> buffers;
    ScratchMemory scratch;      // in use
    GraphSteps generation;      // of the graph that generates a token in each slot
    size_t rollback_bytes = 0;  // the most of a slot that a copy of what cannot be rolled back takes, where asked for
};

// For which tokens llama-server takes the embedding that multi-token prediction goes by, from when it is ready.
enum class NextnRows { kNone, kAll, kOfOutputs };

// For contexts opened on a model that was loaded with no_alloc, all with the same parameters; they share the work, a
// thread each, and are left unusable.
//
// What llama.cpp measures of itself is neither.  It measures one graph, and in doing so forgets which backend its
// builder had chosen for the layers' norms (ggml_backend_sched_reserve_size resets the scheduler after the graph was
// built; ggml_backend_sched_reserve, which allocates, does not).  And the graph that it reserves for is not always the
// largest: where layers are split between GPU and CPU, each change between a prompt and generation lays the buffer out
// anew, and smaller tensors can be laid out worse.
ComputeMemory measure_compute_memory(const std::vector<llama_context *> & contexts, NextnRows rows,
                                     const Chunks & chunks, bool with_rollback);
