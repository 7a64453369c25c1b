#include "measure.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <future>
#include <stdexcept>

#include "captured_log.h"
#include "common.h"
#include "compute_buffers.h"
#include "ggml-backend.h"
#include "llama-context.h"
#include "llama-cpp.h"
#include "llama-ext.h"
#include "llama-model.h"
#include "llama.h"
#include "mtmd.h"
#include "programs.h"
#include "sampling.h"
#include "speculative.h"

using json = nlohmann::ordered_json;

namespace {

constexpr size_t kMostContexts = 4;

// The devices that llama_prepare_model_devices would use, as far as host buffers and mmap depend on them.
std::vector<ggml_backend_dev_t> devices_of(const common_params & params) {
    std::vector<ggml_backend_dev_t> devices;
    if (!params.devices.empty()) {
        for (ggml_backend_dev_t dev : params.devices) {
            if (dev) {
                devices.push_back(dev);
            }
        }
        return devices;
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_GPU) {
            devices.push_back(dev);
        }
    }
    return devices;
}

bool maps_the_file(const common_params & params) {
    switch (params.load_mode) {
        case LLAMA_LOAD_MODE_MMAP:
        case LLAMA_LOAD_MODE_MMAP_MLOCK:
            return true;
        case LLAMA_LOAD_MODE_AUTO:  // llama_model_base::load_tensors: unless a device objects
            for (ggml_backend_dev_t dev : devices_of(params)) {
                ggml_backend_dev_props props;
                ggml_backend_dev_get_props(dev, &props);
                if (!props.caps.mmap_support) {
                    return false;
                }
            }
            return true;
        default:
            return false;
    }
}

bool has_host_buffers(const common_params & params) {
    for (ggml_backend_dev_t dev : devices_of(params)) {
        if (ggml_backend_dev_host_buffer_type(dev)) {
            return true;
        }
    }
    return false;
}

bool is_repacking(ggml_backend_buffer_type_t buffer_type) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto * get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
    for (ggml_backend_buffer_type_t * extra = get ? get(cpu) : nullptr; extra && *extra; extra++) {
        if (*extra == buffer_type) {
            return true;
        }
    }
    return false;
}

bool is_pinned(ggml_backend_buffer_type_t buffer_type) {
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        if (ggml_backend_dev_host_buffer_type(ggml_backend_dev_get(i)) == buffer_type) {
            return true;
        }
    }
    return false;
}

const char * kind_of(ggml_backend_buffer_type_t buffer_type, bool holds_mapped_weights) {
    if (is_pinned(buffer_type)) {
        return "pinned";
    }
    if (is_repacking(buffer_type)) {
        return "repacked";
    }
    if (!ggml_backend_buft_is_host(buffer_type)) {
        return "device";
    }
    return holds_mapped_weights ? "mapped" : "host";
}

json buffer(const char * device, const char * name, const char * part, const char * use, const char * kind,
            size_t bytes) {
    return {{"device", device}, {"buffer", name}, {"part", part}, {"use", use}, {"kind", kind}, {"bytes", bytes}};
}

void add_scratch(json & answer, const ScratchMemory & memory, const char * part) {
    for (const auto & [dev, scratch] : memory) {
        const size_t workspace = scratch.uses_cublas ? cuda_rules::cublas_workspace_size(card_of(dev)) : 0;
        answer["scratch"].push_back({{"device", ggml_backend_dev_name(dev)},
                                     {"part", part},
                                     {"pool_bytes", cuda_rules::pool_size(scratch.pool_bytes)},
                                     {"workspace_bytes", workspace}});
    }
}

// Contexts with the same parameters, of which only the first speaks for itself.
struct Contexts {
    std::vector<llama_context_ptr> all;

    llama_context * first() const { return all.front().get(); }

    std::vector<llama_context *> pointers() const {
        std::vector<llama_context *> result;
        for (const llama_context_ptr & one : all) {
            result.push_back(one.get());
        }
        return result;
    }
};

void add_steps(json & answer, const GraphSteps & graph, const char * part) {
    json devices = json::array();
    for (const auto & [dev, steps] : graph.devices) {
        devices.push_back(
            {{"device", ggml_backend_dev_name(dev)}, {"products", steps.products}, {"others", steps.others}});
    }
    answer["graphs"].push_back({{"part", part}, {"splits", graph.splits}, {"devices", devices}});
}

// Whether llama-server keeps copies of what a slot's memory cannot roll back (server_context_impl: do_checkpoint): of
// sliding windows, and where tokens cannot be taken off the end (common_context_can_seq_rm).
bool makes_checkpoints(const common_params & params, llama_context * context) {
    llama_memory_t memory = llama_get_memory(context);
    if (params.n_ctx_checkpoints <= 0 || params.embedding || !memory) {
        return false;
    }
    if ((!params.swa_full && llama_model_n_swa(llama_get_model(context)) > 0) || llama_n_rs_seq(context) > 0) {
        return true;
    }
    const llama_model * model = llama_get_model(context);
    return llama_model_is_recurrent(model) || llama_model_is_hybrid(model);
}

void add_context(json & answer, const Contexts & contexts, NextnRows rows, const Chunks & chunks, const char * part,
                 bool mapped, bool with_weights) {
    const bool checkpoints = answer["checkpoints"] > 0;
    const auto [compute, scratch, generation, rollback_bytes] =
        measure_compute_memory(contexts.pointers(), rows, chunks, checkpoints);
    answer["checkpoint_bytes"] = answer.value("checkpoint_bytes", size_t(0)) + rollback_bytes;
    json & buffers = answer["buffers"];
    add_scratch(answer, scratch, part);
    add_steps(answer, generation, part);
    for (const auto & [type, memory] : llama_get_memory_breakdown(contexts.first())) {
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(type);
        const bool on_device = !ggml_backend_buft_is_host(type) && !is_repacking(type);
        const char * device = dev && on_device ? ggml_backend_dev_name(dev) : "CPU";
        const char * name = ggml_backend_buft_name(type);
        const auto add = [&](const char * use, const char * kind, size_t bytes) {
            if (bytes > 0) {
                buffers.push_back(buffer(device, name, part, use, kind, bytes));
            }
        };
        add("weights", kind_of(type, mapped), with_weights ? memory.model : 0);
        add("context", kind_of(type, false), memory.context);
        const auto found = compute.find(type);
        if (found != compute.end()) {
            add("compute", kind_of(type, false), found->second.at_ready);
            add("compute_growth", kind_of(type, false), found->second.in_use - found->second.at_ready);
            if (found->second.worst_prompt_tokens > 0) {
                buffers.back()["worst_prompt_tokens"] = found->second.worst_prompt_tokens;
            }
        }
    }
}

// Where logits of whole chunks are wanted: the buffer that a decoded batch's come into, which llama_context keeps apart
// from what it reports (llama_context::output_reserve), and what the program makes of a chunk's.
void add_outputs(json & buffers, const llama_context & context, Program program, const Chunks & chunks) {
    const llama_model & model = context.get_model();
    const size_t n_vocab = model.vocab.n_tokens();
    const size_t sequences = context.get_cparams().n_seq_max;
    const size_t outputs =
        std::min<size_t>(context.get_cparams().n_batch, sequences * (chunks.tokens - chunks.first_output));
    ggml_backend_dev_t output_device = model.dev_output();
    ggml_backend_buffer_type_t host = output_device ? ggml_backend_dev_host_buffer_type(output_device) : nullptr;
    ggml_backend_buffer_type_t type = host ? host : ggml_backend_cpu_buffer_type();
    const char * name = ggml_backend_buft_name(type);
    buffers.push_back(buffer("CPU", name, "model", "compute", kind_of(type, false), outputs * n_vocab * sizeof(float)));
    const size_t own = own_bytes(program, chunks, n_vocab);
    if (own > 0) {
        buffers.push_back(buffer("CPU", "program", "model", "compute", "host", own));
    }
}

// llama.cpp cannot map a file that it does not read, so the question is asked with load mode "none".  With mmap it
// would put CPU weights into plain CPU buffers where it now takes the device's pinned ones
// (llama_model_loader::create_tensor: "avoid using a host buffer when using mmap"): ask for that placement.
llama_model_params without_allocation(common_params & params, bool mapped) {
    llama_model_params model_params = common_model_params_to_llama(params);
    if (mapped && has_host_buffers(params) && !model_params.no_host) {
        model_params.no_host = true;
        model_params.use_extra_bufts = false;
    }
    model_params.no_alloc = true;
    model_params.load_mode = LLAMA_LOAD_MODE_NONE;
    model_params.progress_callback = nullptr;
    return model_params;
}

llama_model_ptr load(common_params & params, bool mapped) {
    llama_model_ptr model(llama_model_load_from_file(params.model.path.c_str(), without_allocation(params, mapped)));
    if (!model) {
        throw std::runtime_error("llama.cpp refuses the model " + params.model.path);
    }
    return model;
}

// `count` contexts, each opened by a thread of its own.
Contexts open(llama_model * model, const llama_context_params & context_params, size_t count) {
    std::vector<std::future<llama_context_ptr>> others;
    for (size_t i = 1; i < count; i++) {
        others.push_back(std::async(std::launch::async, [&] {
            mute_this_thread();
            return llama_context_ptr(llama_init_from_model(model, context_params));
        }));
    }
    Contexts contexts;
    contexts.all.emplace_back(llama_init_from_model(model, context_params));
    for (auto & other : others) {
        contexts.all.push_back(other.get());
    }
    for (const llama_context_ptr & context : contexts.all) {
        if (!context) {
            throw std::runtime_error("llama.cpp refuses the context");
        }
    }
    return contexts;
}

// How many contexts share the work: more than a few would cost more to open than they save.  Samplers belong to one.
size_t context_count(const common_params & params) {
    cpu_set_t allowed;
    const bool is_known = sched_getaffinity(0, sizeof(allowed), &allowed) == 0;
    const size_t cores = is_known ? size_t(CPU_COUNT(&allowed)) : 1;
    return params.sampling.backend_sampling ? 1 : std::min(cores, kMostContexts);
}

// Samplers that run on the device are part of the graph (common_init_result).
struct BackendSamplers {
    std::vector<common_sampler_ptr> samplers;
    std::vector<llama_sampler_seq_config> configs;

    BackendSamplers(const llama_model * model, common_params & params, llama_context_params & context_params) {
        if (!params.sampling.backend_sampling) {
            return;
        }
        for (int i = 0; i < int(context_params.n_seq_max); i++) {
            samplers.emplace_back(common_sampler_init(model, params.sampling));
            configs.push_back({i, common_sampler_get(samplers.back().get())});
        }
        context_params.samplers = configs.data();
        context_params.n_samplers = configs.size();
    }
};

bool predicts_many(const common_params & params) {
    const auto & types = params.speculative.types;
    return std::find(types.begin(), types.end(), COMMON_SPECULATIVE_TYPE_DRAFT_MTP) != types.end();
}

// The draft model's or MTP context, opened beside the target's: common_speculative_init_result.
void add_draft(json & answer, common_params & params, llama_model * target, llama_context * target_context,
               bool mapped) {
    const bool has_draft = params.speculative.has_dft(), mtp = predicts_many(params);
    if (!has_draft && !mtp) {
        return;
    }
    common_params draft_params = common_base_params_to_speculative(params);
    llama_context_params context_params = common_context_params_to_llama(draft_params);
    if (mtp) {
        context_params.ctx_type = LLAMA_CONTEXT_TYPE_MTP;
    }
    context_params.n_ctx = llama_n_ctx(target_context);
    context_params.n_rs_seq = 0;
    context_params.ctx_other = target_context;
    llama_model_ptr draft;
    if (has_draft) {
        draft = load(draft_params, mapped);
    }
    const Contexts contexts = open(has_draft ? draft.get() : target, context_params, 1);
    add_context(answer, contexts, mtp ? NextnRows::kOfOutputs : NextnRows::kNone, {}, "draft", mapped, has_draft);
}

// server_context_impl::load_model's parameters for the vision or audio projector.
void add_mmproj(json & buffers, const common_params & params) {
    if (params.mmproj.path.empty()) {
        return;
    }
    mtmd_context_params mtmd_params = mtmd_context_params_default();
    mtmd_params.use_gpu = params.mmproj_use_gpu;
    mtmd_params.device = params.mmproj_device;
    mtmd_params.print_timings = false;
    mtmd_params.n_threads = params.cpuparams.n_threads;
    mtmd_params.flash_attn_type = params.flash_attn_type;
    mtmd_params.warmup = params.warmup;
    mtmd_params.image_min_tokens = params.image_min_tokens;
    mtmd_params.image_max_tokens = params.image_max_tokens;
    mtmd_params.batch_max_tokens = params.mtmd_batch_max_tokens;
    const auto usage = mtmd_get_memory_usage(params.mmproj.path.c_str(), mtmd_params);
    if (usage.empty()) {
        throw std::runtime_error("llama.cpp refuses the multimodal projector " + params.mmproj.path);
    }
    for (const auto & [dev, bytes] : usage) {
        const bool cpu = ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
        const char * name = ggml_backend_dev_name(dev);
        buffers.push_back(buffer(name, name, "mmproj", "total", cpu ? "host" : "device", bytes));
    }
}

}  // namespace

json measure_memory(const std::string & program_name, const std::vector<std::string> & arguments) {
    const Program program = program_called(program_name);
    common_params params = params_of(program, arguments);
    const auto start = std::chrono::steady_clock::now();
    const bool mapped = maps_the_file(params);
    llama_model_ptr model = load(params, mapped);
    llama_context_params context_params = common_context_params_to_llama(params);
    BackendSamplers samplers(model.get(), params, context_params);
    const Contexts contexts = open(model.get(), context_params, context_count(params));
    llama_context * context = contexts.first();

    json answer;
    answer["n_layer"] = llama_model_n_layer(model.get());
    answer["n_layer_nextn"] = llama_model_n_layer_nextn(model.get());
    answer["n_ctx"] = llama_n_ctx(context);
    answer["n_ctx_slot"] = llama_n_ctx_seq(context);
    answer["n_slots"] = params.n_parallel;
    answer["n_ctx_train"] = llama_model_n_ctx_train(model.get());
    answer["n_expert"] = llama_model_n_expert(model.get());
    answer["n_params"] = llama_model_n_params(model.get());
    answer["buffers"] = json::array();
    answer["scratch"] = json::array();
    answer["graphs"] = json::array();
    const Chunks chunks = chunks_of(program, params);
    const bool serves = chunks.tokens == 0;
    answer["checkpoints"] = serves && makes_checkpoints(params, context) ? params.n_ctx_checkpoints : 0;
    add_context(answer, contexts, predicts_many(params) ? NextnRows::kAll : NextnRows::kNone, chunks, "model", mapped,
                true);
    if (chunks.tokens > 0) {
        add_outputs(answer["buffers"], *context, program, chunks);
    }
    add_draft(answer, params, model.get(), context, mapped);
    add_mmproj(answer["buffers"], params);
    const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
    answer["milliseconds"] = elapsed.count();
    return answer;
}
