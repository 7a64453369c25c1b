// Takes the place of ggml-cpu's computing in a rehearsal (LD_PRELOAD): every result is zeros at once, as what the CUDA
// stand-in's kernels leave behind.  Graphs are built, split, laid out and allocated as ever, and weights are never
// looked at, so that a model without data is rehearsed in seconds.  llama.cpp asks the kernel to read a mapped model
// ahead; that is left out, since of a hole as large as a model it would make that many bytes of zeros.

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

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

extern "C" void * mmap(void * address, size_t size, int protection, int flags, int file, off_t offset) noexcept {
    return reinterpret_cast<void *>(syscall(SYS_mmap, address, size, protection, flags & ~MAP_POPULATE, file, offset));
}

extern "C" int posix_madvise(void *, size_t, int) noexcept {
    return 0;
}
extern "C" int posix_fadvise(int, off_t, off_t, int) noexcept {
    return 0;
}
