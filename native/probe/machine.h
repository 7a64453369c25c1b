// The devices that ggml sees.
#pragma once

#include <nlohmann/json.hpp>

// [{"name": "CUDA0", "description": "NVIDIA GeForce RTX 3060", "backend": "CUDA", "type": "gpu", "id": "0000:01:00.0",
//   "free_bytes": …, "total_bytes": …}, …]
nlohmann::ordered_json list_devices();
