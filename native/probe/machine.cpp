#include "machine.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "ggml-backend.h"

using json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

namespace {

const char * type_name(enum ggml_backend_dev_type type) {
    switch (type) {
        case GGML_BACKEND_DEVICE_TYPE_CPU:
            return "cpu";
        case GGML_BACKEND_DEVICE_TYPE_GPU:
            return "gpu";
        case GGML_BACKEND_DEVICE_TYPE_IGPU:
            return "igpu";
        case GGML_BACKEND_DEVICE_TYPE_ACCEL:
            return "accel";
        default:
            return "other";
    }
}

constexpr size_t kSmallestBuffer = size_t(256) << 20, kLargestBuffer = size_t(1) << 30;
constexpr std::chrono::milliseconds kPerResult{250};

// Several times the last-level cache, so that hardly a line is read from it.
size_t buffer_size() {
    const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return std::clamp(size_t(std::max(cache, 0L)) * 4, kSmallestBuffer, kLargestBuffer);
}

// Sums with eight accumulators: enough loads in flight for memory, not the adder, to be what it waits for.
uint64_t read_all(const uint64_t * data, size_t words) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i + 8 <= words; i += 8) {
        for (int j = 0; j < 8; j++) {
            sums[j] += data[i + j];
        }
    }
    uint64_t total = 0;
    for (uint64_t sum : sums) {
        total += sum;
    }
    return total;
}

struct Slice {
    std::unique_ptr<uint64_t[]> data;
    size_t words;
};

// Bytes read per second by all threads together over whole passes of their own slices.
double read_bandwidth(const std::vector<Slice> & slices, size_t threads) {
    std::atomic<uint64_t> bytes{0}, sink{0};
    std::vector<std::thread> readers;
    const auto start = Clock::now();
    const size_t per_thread = slices.size() / threads;
    for (size_t t = 0; t < threads; t++) {
        readers.emplace_back([&, t] {
            while (Clock::now() - start < kPerResult) {
                for (size_t s = t * per_thread; s < (t + 1) * per_thread; s++) {
                    sink += read_all(slices[s].data.get(), slices[s].words);
                    bytes += slices[s].words * sizeof(uint64_t);
                }
            }
        });
    }
    for (std::thread & reader : readers) {
        reader.join();
    }
    const std::chrono::duration<double> elapsed = Clock::now() - start;
    return double(bytes) / elapsed.count();
}

}  // namespace

json list_devices() {
    json devices = json::array();
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        ggml_backend_dev_props props;
        ggml_backend_dev_get_props(dev, &props);
        devices.push_back({{"name", props.name},
                           {"description", props.description},
                           {"backend", ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev))},
                           {"type", type_name(props.type)},
                           {"id", props.device_id ? json(props.device_id) : json(nullptr)},
                           {"free_bytes", props.memory_free},
                           {"total_bytes", props.memory_total}});
    }
    return devices;
}

json measure_read_bandwidth(int threads) {
    const size_t count = size_t(std::max(threads, 1));
    const size_t words = buffer_size() / sizeof(uint64_t) / count;
    std::vector<Slice> slices(count);
    std::vector<std::thread> writers;
    for (Slice & slice : slices) {  // each slice is first touched by a thread of its own, as weights are
        writers.emplace_back([&slice, words] {
            slice = {std::unique_ptr<uint64_t[]>(new uint64_t[words]), words};
            std::memset(slice.data.get(), 1, words * sizeof(uint64_t));
        });
    }
    for (std::thread & writer : writers) {
        writer.join();
    }
    json results = json::array();
    std::vector<size_t> counts{1};
    if (count > 1) {
        counts.push_back(count);
    }
    for (size_t n : counts) {
        results.push_back({{"threads", n}, {"bytes_per_second", read_bandwidth(slices, n)}});
    }
    return {{"buffer_bytes", words * count * sizeof(uint64_t)}, {"results", results}};
}
