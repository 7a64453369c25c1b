// How much memory llama-server, or a program that reads text in chunks, would allocate, asked of llama.cpp itself.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

// Loads model and context as llama-server with these arguments would, but without allocating (no_alloc), and returns
// what they would take.  The model may be a skeleton: a GGUF without tensor data.
//
//   {"n_layer": 80, "n_layer_nextn": 0, "n_ctx": 4096, "n_ctx_slot": 4096, "n_slots": 1, "n_ctx_train": 8192,
//    "n_expert": 0, "n_params": …, "flash_attention": true, "pipeline_parallel": false, "milliseconds": 24.1,
//    "buffers": [{"device": "CUDA0", "buffer": "CUDA0", "part": "model", "use": "weights", "kind": "device",
//                 "bytes": 123}, …]}
//
// part: model, draft or mmproj.  use: weights, context (KV cache and recurrent state), compute (as reserved when the
// server is ready), compute_growth (what prompts add to it, see compute_buffers.h; with "worst_prompt_tokens", the
// length of one that does) or, for mmproj, total. kind: device; or in host memory mapped (page cache of the file),
// pinned (page-locked, by the GPU's driver), repacked (the CPU backend's own layout) or host (plain).
//
// scratch: what ggml-cuda allocates besides while it computes, for each of its devices and for each context on it, by
// the rules of cuda_rules/scratch.h: its pool of scratch memory, and cuBLAS's workspace.
//
// graphs: [{"part": "model", "splits": 5, "devices": [{"device": "CUDA0", "products": …, "others": …}, …]}, …], the
// steps that one generated token takes (graph_steps.h).
//
// llama-perplexity and llama-imatrix are asked about by their own arguments; what they take is what they reach while
// they read chunks, and among the buffers in host memory are also those of the logits.
//
// checkpoints, checkpoint_bytes: how many copies of sliding windows and recurrent states llama-server keeps at most for
// each slot, in plain memory, and what one takes at most; 0 where it makes none.
//
// Throws std::runtime_error with llama.cpp's own reason where the program would refuse.  `-fit` is taken as off.
nlohmann::ordered_json measure_memory(const std::string & program, const std::vector<std::string> & arguments);
