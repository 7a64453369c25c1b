// How fast this CPU reads memory, and how fast ggml's CPU backend computes with weights that it has to read.
#pragma once

#include <nlohmann/json.hpp>

// With as many threads as llama-server would use (0), or as many as given.  Rates are per second; of repeated
// measurements the lower quartile of the times counts, and of three rounds the fastest.
//
//   {"threads": 8, "best_threads": 6, "buffer_bytes": …, "milliseconds": …,
//    "read": [{"threads": 1, "bytes_per_second": …}, …],
//    "one": {"graph_seconds": …, "node_seconds": …,
//            "weights": [{"type": "Q4_0", "layout": "plain" | "repacked", "bytes_per_second": …}, …],
//            "attention": [{"type": "F16", "elements_per_second": …}, …]},
//    "all": {the same with all threads; its weights also have "row_seconds", "product_seconds" and "flops_per_second"}}
//
// read: plain reading, by threads; best_threads: the fewest that come near the best of it.  weights: what a product of
// a matrix with one vector reads, by type and by layout ("repacked" where the backend has a layout of its own for that
// type), each row costing row_seconds besides, and each product product_seconds; and what a product with many vectors
// computes.  node_seconds: what any other step of a graph costs, graph_seconds: to begin with one.
// attention: keys and values that a generated token's query heads look at, as elements (query heads × tokens × lengths
// of key and value), by the cache's type.
nlohmann::ordered_json measure_cpu_rates(int threads);
