#include "fusion.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "ggml-impl.h"
#include "ggml.h"

namespace cuda_rules {
namespace {

constexpr int kMostSummedExperts = 15;  // MOE_WEIGHTED_REDUCTION_MAX_EXPERTS

// ---------------------------------------------------------------------------------------------- weighted expert sums

struct ExpertSum {
    ggml_tensor *experts = nullptr, *scale = nullptr, *weights = nullptr, *result = nullptr;
    int nodes = 0;
};

// A product of what the experts computed with one number for each of them.
struct WeightedExperts {
    ggml_tensor *experts = nullptr, *weights = nullptr;

    explicit WeightedExperts(const ggml_tensor * product) {
        if (product->op != GGML_OP_MUL || product->type != GGML_TYPE_F32 || !ggml_is_contiguous(product)) {
            return;
        }
        for (int i = 0; i < 2 && !experts; i++) {
            ggml_tensor *full = product->src[i], *factor = product->src[1 - i];
            if (is_plain(full) && is_plain(factor) && ggml_are_same_shape(full, product) && factor->ne[0] == 1 &&
                factor->ne[1] == product->ne[1] && factor->ne[2] == product->ne[2] && factor->ne[3] == product->ne[3]) {
                experts = full;
                weights = factor;
            }
        }
    }

  private:
    static bool is_plain(const ggml_tensor * tensor) {
        return tensor && tensor->type == GGML_TYPE_F32 && ggml_is_contiguous(tensor);
    }
};

bool is_view_of_expert(const ggml_tensor * view, const ggml_tensor * weighted, int expert) {
    return view->src[0] == weighted && view->view_src == weighted && view->type == GGML_TYPE_F32 &&
           view->ne[0] == weighted->ne[0] && view->ne[1] == weighted->ne[2] * weighted->ne[3] && view->ne[2] == 1 &&
           view->ne[3] == 1 && view->nb[0] == weighted->nb[0] && view->nb[1] == weighted->nb[2] &&
           view->view_offs == size_t(expert) * weighted->nb[1];
}

// ggml_cuda_match_moe_weighted_reduction: (experts * scale) * weights or experts * weights, and the sum over the views
// of its experts; nodes is 0 when there is none at this place.
ExpertSum expert_sum(const ggml_cgraph * graph, int start) {
    const WeightedExperts first(graph->nodes[start]);
    if (!first.experts) {
        return {};
    }
    ExpertSum sum;
    sum.experts = first.experts;
    sum.weights = first.weights;
    const ggml_tensor * weighted = graph->nodes[start];
    int products = 1;
    if (start + 1 < graph->n_nodes) {
        const WeightedExperts second(graph->nodes[start + 1]);
        if (second.experts == graph->nodes[start]) {
            sum.scale = first.weights;
            sum.weights = second.weights;
            weighted = graph->nodes[start + 1];
            products = 2;
        }
    }
    const int experts = int(weighted->ne[1]);
    sum.nodes = 2 * experts + products - 1;
    if (experts < 2 || experts > kMostSummedExperts || start + sum.nodes > graph->n_nodes) {
        return {};
    }
    std::vector<ggml_op> operations(size_t(products), GGML_OP_MUL);
    std::vector<ggml_tensor *> views;
    ggml_tensor * total = nullptr;
    int additions = 0;
    for (int i = start + products; i < start + sum.nodes; i++) {
        ggml_tensor * node = graph->nodes[i];
        operations.push_back(node->op);
        if (node->op == GGML_OP_VIEW) {
            if (int(views.size()) >= experts || !is_view_of_expert(node, weighted, int(views.size()))) {
                return {};
            }
            views.push_back(node);
            continue;
        }
        if (node->op != GGML_OP_ADD || node->type != GGML_TYPE_F32 || additions + 1 >= int(views.size()) ||
            node->src[0] != (total ? total : views[0]) || node->src[1] != views[size_t(additions) + 1]) {
            return {};
        }
        total = node;
        additions++;
    }
    const int last = start + sum.nodes - 1;
    if (int(views.size()) != experts || additions != experts - 1 || !ggml_is_contiguous(total) ||
        !ggml_can_fuse_subgraph(graph, start, sum.nodes, operations.data(), &last, 1)) {
        return {};
    }
    sum.result = total;
    return sum;
}

// ---------------------------------------------------------------------------------------------- routing to experts

// Walks over nodes that each read the one before.
class Chain {
  public:
    Chain(const ggml_cgraph * graph, int at) : graph_(graph), at_(at) {}

    ggml_tensor * node(int offset = 0) const { return graph_->nodes[at_ + offset]; }
    int at() const { return at_; }
    bool follows(ggml_op op) const { return inside() && node()->op == op && node()->src[0] == node(-1); }
    bool inside() const { return at_ < graph_->n_nodes; }
    void step() { at_++; }
    bool take(std::initializer_list<ggml_op> ops) {
        for (ggml_op op : ops) {
            if (!follows(op)) {
                return false;
            }
            step();
        }
        return true;
    }

  private:
    const ggml_cgraph * graph_;
    int at_;
};

// ggml_cuda_should_use_topk_moe
bool has_routing_kernel(const ggml_tensor * gate, const ggml_tensor * weights, const ggml_tensor * ids) {
    const size_t experts = ids->nb[1] / ids->nb[0];
    const bool power_of_two = (experts & (experts - 1)) == 0 && experts <= 512;
    if ((!power_of_two && experts != 288 && experts != 576) || !ggml_is_contiguous(weights) ||
        !ggml_is_contiguous(gate->src[0])) {
        return false;
    }
    if (gate->op == GGML_OP_SOFT_MAX) {
        float scale = 1.0f, max_bias = 0.0f;
        std::memcpy(&scale, gate->op_params, sizeof(scale));
        std::memcpy(&max_bias, gate->op_params + 1, sizeof(max_bias));
        return scale == 1.0f && max_bias == 0.0f && !gate->src[1] && !gate->src[2];
    }
    return true;
}

// The operations that one kernel computes from the gate's node on; empty when they are not of the known form:
// ggml_cuda_topk_moe_fusion and its caller, for a gate before the choice of experts.
std::vector<ggml_op> routing_operations(const ggml_cgraph * graph, int start, int & ids_at) {
    std::vector<ggml_op> operations;
    Chain chain(graph, start);
    const ggml_tensor * gate = chain.node();
    if (gate->op == GGML_OP_UNARY && ggml_get_unary_op(gate) == GGML_UNARY_OP_SOFTPLUS) {
        chain.step();
        if (!chain.follows(GGML_OP_SQRT)) {
            return {};
        }
        operations = {GGML_OP_UNARY, GGML_OP_SQRT};
    } else if (gate->op == GGML_OP_SOFT_MAX ||
               (gate->op == GGML_OP_UNARY && ggml_get_unary_op(gate) == GGML_UNARY_OP_SIGMOID)) {
        operations = {gate->op};
    } else {
        return {};
    }
    const ggml_tensor * probabilities = chain.node();
    chain.step();
    if (!chain.follows(GGML_OP_RESHAPE)) {
        return {};
    }
    const ggml_tensor * reshaped = chain.node();
    operations.push_back(GGML_OP_RESHAPE);
    chain.step();
    const ggml_tensor * ranked = probabilities;
    if (chain.inside() && chain.node()->op == GGML_OP_ADD && chain.node()->src[0] == probabilities) {
        ranked = chain.node();
        operations.push_back(GGML_OP_ADD);
        chain.step();
    }
    if (!chain.inside() || chain.node()->op != GGML_OP_ARGSORT || chain.node()->src[0] != ranked) {
        return {};
    }
    chain.step();
    if (!chain.take({GGML_OP_VIEW})) {
        return {};
    }
    ids_at = chain.at() - 1;
    if (!chain.inside() || chain.node()->op != GGML_OP_GET_ROWS || chain.node()->src[0] != reshaped ||
        chain.node()->src[1] != chain.node(-1)) {
        return {};
    }
    operations.insert(operations.end(), {GGML_OP_ARGSORT, GGML_OP_VIEW, GGML_OP_GET_ROWS});
    chain.step();
    if (chain.inside() && chain.node()->op == GGML_OP_RESHAPE) {
        // Weights that are made to add up to one; where it begins so and goes on otherwise, no scale is looked for.
        if (!chain.take({GGML_OP_RESHAPE, GGML_OP_SUM_ROWS, GGML_OP_CLAMP}) || !chain.inside() ||
            chain.node()->op != GGML_OP_DIV || chain.node()->src[1] != chain.node(-1) ||
            chain.node()->src[0] != chain.node(-3)) {
            return operations;
        }
        chain.step();
        if (!chain.take({GGML_OP_RESHAPE})) {
            return operations;
        }
        operations.insert(operations.end(),
                          {GGML_OP_RESHAPE, GGML_OP_SUM_ROWS, GGML_OP_CLAMP, GGML_OP_DIV, GGML_OP_RESHAPE});
    }
    if (chain.follows(GGML_OP_SCALE)) {
        operations.push_back(GGML_OP_SCALE);
    }
    return operations;
}

// How many nodes one routing kernel computes from this one on; 0 if it is none.
int routing_nodes(const ggml_cgraph * graph, int start) {
    int ids_at = 0;
    const std::vector<ggml_op> operations = routing_operations(graph, start, ids_at);
    if (operations.empty()) {
        return 0;
    }
    const int count = int(operations.size());
    const int results[2] = {ids_at, start + count - 1};
    const bool fused = ggml_can_fuse_subgraph(graph, start, count, operations.data(), results, 2) &&
                       has_routing_kernel(graph->nodes[start], graph->nodes[results[1]], graph->nodes[ids_at]);
    return fused ? count : 0;
}

}  // namespace

void keep_fused_inputs(const ggml_cgraph * graph, ggml_backend_graph_optimize_params * allocator) {
    static const bool disabled = [] {
        const char * setting = std::getenv("GGML_CUDA_DISABLE_FUSION");
        return setting && std::atoi(setting) != 0;
    }();
    if (disabled) {
        return;
    }
    const auto keep = [&](ggml_tensor * tensor, ggml_tensor * until) {
        if (tensor) {
            allocator->add_alloc_dep(allocator->user_data, tensor, until);
        }
    };
    for (int i = 0; i < graph->n_nodes; i++) {
        const ExpertSum sum = expert_sum(graph, i);
        if (sum.nodes > 0) {
            keep(sum.experts, sum.result);
            keep(sum.weights, sum.result);
            keep(sum.scale, sum.result);
            i += sum.nodes - 1;
        }
        const int count = routing_nodes(graph, i);
        // Kept until the node after the fused ones: of the next split where this one ends with them, which is why
        // nodes beyond n_nodes are looked at, as upstream does.  The experts always come after their routing.
        for (int j = i; j < i + count; j++) {
            keep(graph->nodes[j], graph->nodes[i + count]);
            for (ggml_tensor * source : graph->nodes[j]->src) {
                keep(source, graph->nodes[i + count]);
            }
        }
        i += count > 0 ? count - 1 : 0;
    }
}

}  // namespace cuda_rules
