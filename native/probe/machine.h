// What the probe can say of the machine: devices as ggml sees them, and how fast its memory reads.
#pragma once

#include <nlohmann/json.hpp>

// [{"name": "CUDA0", "description": "NVIDIA GeForce RTX 3060", "backend": "CUDA", "type": "gpu", "id": "0000:01:00.0",
//   "free_bytes": …, "total_bytes": …}, …]
nlohmann::ordered_json list_devices();

// Reads a buffer that no cache holds, with one thread and then with several, each for a fraction of a second.
// {"buffer_bytes": …, "results": [{"threads": 1, "bytes_per_second": …}, {"threads": 8, …}]}
nlohmann::ordered_json measure_read_bandwidth(int threads);
