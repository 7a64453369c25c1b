// Takes the place of ggml-cpu's computing in a rehearsal (LD_PRELOAD): every result is zeros at once, as what the CUDA
// stand-in's kernels leave behind.  Graphs are built, split, laid out and allocated as ever, and weights are never
// looked at, so that a model without data is rehearsed in seconds.

#include <cstring>

#include "ggml-cpu.h"
#include "ggml.h"

extern "C" ggml_status ggml_graph_compute(ggml_cgraph * graph, ggml_cplan *) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (!node->view_src && node->data) {  // a view's memory is another tensor's, such as the KV cache
            std::memset(node->data, 0, ggml_nbytes(node));
        }
    }
    return GGML_STATUS_SUCCESS;
}
