// The programs that the probe can answer for, and how each treats its arguments and takes in text.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common.h"

enum class Program { kServer, kPerplexity, kImatrix };

// By its name, such as "llama-perplexity"; std::runtime_error for another.
Program program_called(const std::string & name);

// What the program makes of these arguments before it loads the model; std::runtime_error where it would refuse.
common_params params_of(Program program, const std::vector<std::string> & arguments);

// How a program takes in a text: in chunks of `tokens`, several at once where a batch holds several, and from token
// number `first_output` of each on it wants logits.  No tokens: prompts, as llama-server.
struct Chunks {
    uint32_t tokens = 0, first_output = 0;
};

Chunks chunks_of(Program program, const common_params & params);

// What the program itself keeps in plain memory for each chunk, besides what llama.cpp allocates.
size_t own_bytes(Program program, const Chunks & chunks, size_t n_vocab);
