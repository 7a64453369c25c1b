// What ggml-cuda would allocate besides llama.cpp's buffers, collected over the graphs of one context.
#pragma once

#include <map>

#include "ggml-backend.h"
#include "scratch.h"

// By device; only those that ggml-cuda drives, or that a virtual GPU stands for.
using ScratchMemory = std::map<ggml_backend_dev_t, cuda_rules::Scratch>;

// Adds what the operations of a graph take that the scheduler has just split.
void include_scratch(ScratchMemory & memory, ggml_backend_sched_t sched, ggml_cgraph * graph);

// What the rules say of a device's card.
const cuda_rules::Card & card_of(ggml_backend_dev_t device);
