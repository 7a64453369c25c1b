#include "graph_steps.h"

#include "ggml.h"

namespace {

bool is_computed(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return false;
        default:
            return !ggml_is_empty(node);
    }
}

}  // namespace

GraphSteps count_steps(ggml_backend_sched_t sched, ggml_cgraph * graph) {
    GraphSteps result;
    result.splits = ggml_backend_sched_get_n_splits(sched);
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(sched, node);
        if (!backend || !is_computed(node)) {
            continue;
        }
        Steps & steps = result.devices[ggml_backend_get_device(backend)];
        const bool is_product = node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID;
        (is_product ? steps.products : steps.others)++;
    }
    return result;
}
