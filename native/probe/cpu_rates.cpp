#include "cpu_rates.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

using json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

namespace {

constexpr size_t kSmallestRing = size_t(128) << 20, kLargestRing = size_t(512) << 20;
constexpr size_t kSlice = size_t(4) << 20;  // as large as a matrix of a small model
constexpr double kPerRead = 0.025, kPerRate = 0.005, kSlowest = 0.04;
constexpr int kFewest = 3, kMost = 64;
constexpr int kRounds = 3;
constexpr int64_t kWidth = 4096, kNarrow = 512, kSmallRows = 512, kBatch = 128, kBatchRows = 256;
constexpr int64_t kHeads = 32, kKeyHeads = 8, kHeadLength = 128, kTokens = 1024;
constexpr int64_t kNodes = 64;

// Several times the last-level cache that these cores share, so that hardly anything is read from it.
size_t ring_size() {
    size_t cache_kib = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> cache_kib;
    return std::clamp((cache_kib << 10) * 3, kSmallestRing, kLargestRing);
}

// Bytes from 0x20 to 0x3f make numbers of every type that are neither subnormal nor infinite, and varied indices.
void fill(uint8_t * data, size_t size, int threads) {
    std::vector<std::thread> writers;
    for (int t = 0; t < threads; t++) {
        writers.emplace_back([=] {
            uint64_t state = 88172645463325252ull + uint64_t(t);
            const size_t begin = size / 8 * size_t(t) / size_t(threads) * 8;
            const size_t end = size / 8 * size_t(t + 1) / size_t(threads) * 8;
            for (size_t i = begin; i < end; i += 8) {
                state ^= state << 13, state ^= state >> 7, state ^= state << 17;
                const uint64_t value = 0x2020202020202020ull | (state & 0x1f1f1f1f1f1f1f1full);
                std::memcpy(data + i, &value, 8);
            }
        });
    }
    for (std::thread & writer : writers) {
        writer.join();
    }
}

// Memory that is read round and round, a slice at a time, so that what is read next was read longest ago.
class Ring {
  public:
    Ring(uint8_t * data, size_t size) : data_(data), size_(size) {}

    uint8_t * next(size_t slice) {
        if (position_ + slice > size_) {
            position_ = 0;
        }
        uint8_t * result = data_ + position_;
        position_ += (slice + 63) / 64 * 64;
        return result;
    }

    uint8_t * data() const { return data_; }
    size_t size() const { return size_; }

  private:
    uint8_t * data_;
    size_t size_, position_ = 0;
};

// Pages that lie together, as those of a file that the kernel has read from disk in large folios: with single pages of
// 4 KiB, scattered over a memory that is mostly page cache, F16 reads a quarter slower than such a file.
struct Pages {
    uint8_t * data;
    size_t size;

    explicit Pages(size_t bytes) : size(bytes) {
        void * memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            throw std::runtime_error("there is no memory to measure with");
        }
        madvise(memory, size, MADV_HUGEPAGE);
        data = static_cast<uint8_t *>(memory);
    }
    ~Pages() { munmap(data, size); }
    Pages(const Pages &) = delete;
    Pages & operator=(const Pages &) = delete;
};

// What a step takes when nothing else disturbs it much.
double lower_quartile(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + long(values.size() / 4), values.end());
    return values[values.size() / 4];
}

// Seconds of one step, after one that is not counted.
double time_of(const std::function<void()> & step) {
    step();
    std::vector<double> seconds;
    const auto start = Clock::now();
    for (int i = 0; i < kMost; i++) {
        const auto begin = Clock::now();
        if (i > 0 && Seconds(begin - start).count() > (i < kFewest ? kSlowest : kPerRate)) {
            break;
        }
        step();
        seconds.push_back(Seconds(Clock::now() - begin).count());
    }
    return lower_quartile(seconds);
}

// The least that each thing took in any round.  A neighbour on the same memory slows all that a second holds by a
// third, and no counter of this machine shows it; whoever comes back a second later often finds it gone.
class Least {
  public:
    double of(const std::string & what, double seconds) {
        double & least = least_.emplace(what, seconds).first->second;
        return least = std::min(least, seconds);
    }

  private:
    std::map<std::string, double> least_;
};

// Sums with eight accumulators: enough loads in flight for memory, not the adder, to be what it waits for.
uint64_t read_all(const uint8_t * data, size_t size) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i + 64 <= size; i += 64) {
        for (size_t j = 0; j < 8; j++) {
            uint64_t word;
            std::memcpy(&word, data + i + 8 * j, 8);
            sums[j] += word;
        }
    }
    uint64_t total = 0;
    for (uint64_t sum : sums) {
        total += sum;
    }
    return total;
}

// Bytes per second of all threads together, each reading a part of the ring of its own.
double read_bandwidth(const Ring & ring, int threads) {
    std::atomic<uint64_t> bytes{0}, sink{0};
    std::vector<std::thread> readers;
    const size_t part = ring.size() / size_t(threads), step = std::min(part, size_t(1) << 20);
    const auto start = Clock::now();
    for (int t = 0; t < threads; t++) {
        readers.emplace_back([&, t] {
            for (size_t i = 0; Seconds(Clock::now() - start).count() < kPerRead;
                 i = i + 2 * step > part ? 0 : i + step) {
                sink += read_all(ring.data() + size_t(t) * part + i, step);
                bytes += step;
            }
        });
    }
    for (std::thread & reader : readers) {
        reader.join();
    }
    return double(bytes) / Seconds(Clock::now() - start).count();
}

json read_bandwidths(const Ring & ring, int threads, Least & least, int & best_threads) {
    json results = json::array();
    std::vector<std::pair<int, double>> found;
    for (int n = 1; n <= threads; n = n == threads ? n + 1 : std::min(threads, n < 4 ? n + 1 : n + n / 2)) {
        found.emplace_back(n, 1 / least.of("read " + std::to_string(n), 1 / read_bandwidth(ring, n)));
        results.push_back({{"threads", n}, {"bytes_per_second", found.back().second}});
    }
    double best = 0;
    for (const auto & [n, rate] : found) {
        best = std::max(best, rate);
    }
    best_threads =
        std::find_if(found.begin(), found.end(), [&](auto & one) { return one.second > 0.95 * best; })->first;
    return results;
}

// The CPU backend with a pool of threads, as llama.cpp has it.
class Backend {
  public:
    explicit Backend(int threads) {
        ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (!dev) {
            throw std::runtime_error("there is no CPU backend");
        }
        reg_ = ggml_backend_dev_backend_reg(dev);
        backend_ = ggml_backend_dev_init(dev, nullptr);
        function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(backend_, threads);
        ggml_threadpool_params params;
        ggml_threadpool_params_init(&params, threads);
        pool_ = function<decltype(&ggml_threadpool_new)>("ggml_threadpool_new")(&params);
        function<decltype(&ggml_backend_cpu_set_threadpool)>("ggml_backend_cpu_set_threadpool")(backend_, pool_);
    }
    ~Backend() {
        function<decltype(&ggml_threadpool_free)>("ggml_threadpool_free")(pool_);
        ggml_backend_free(backend_);
    }
    Backend(const Backend &) = delete;
    Backend & operator=(const Backend &) = delete;

    void compute(ggml_cgraph * graph) const { ggml_backend_graph_compute(backend_, graph); }
    bool supports(const ggml_tensor * op) const { return ggml_backend_supports_op(backend_, op); }
    ggml_backend_t get() const { return backend_; }

    // The buffer type of the backend's own layout; null if it has none.
    ggml_backend_buffer_type_t repacking() const {
        const auto types = function<ggml_backend_dev_get_extra_bufts_t>("ggml_backend_dev_get_extra_bufts");
        for (auto * type = types(ggml_backend_get_device(backend_)); type && *type; type++) {
            if (std::strcmp(ggml_backend_buft_name(*type), "CPU_REPACK") == 0) {
                return *type;
            }
        }
        return nullptr;
    }

  private:
    template <typename Function>
    Function function(const char * name) const {
        return reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(reg_, name));
    }

    ggml_backend_reg_t reg_;
    ggml_backend_t backend_;
    ggml_threadpool_t pool_;
};

// A graph whose inputs lie where they are put, and the rest in a buffer of its own.
class Graph {
  public:
    Graph() : inputs_(context()), nodes_(context()) {}
    ~Graph() {
        ggml_backend_buffer_free(buffer_);
        ggml_free(nodes_);
        ggml_free(inputs_);
    }
    Graph(const Graph &) = delete;
    Graph & operator=(const Graph &) = delete;

    ggml_context * inputs() const { return inputs_; }
    ggml_context * nodes() const { return nodes_; }

    ggml_cgraph * up_to(const std::vector<ggml_tensor *> & results, const Backend & backend) {
        buffer_ = ggml_backend_alloc_ctx_tensors(nodes_, backend.get());
        ggml_backend_buffer_clear(buffer_, 0);
        ggml_cgraph * graph = ggml_new_graph_custom(nodes_, 4 * kNodes, false);
        for (ggml_tensor * result : results) {
            ggml_build_forward_expand(graph, result);
        }
        return graph;
    }

  private:
    static ggml_context * context() {
        return ggml_init(
            {ggml_tensor_overhead() * 8 * kNodes + ggml_graph_overhead_custom(4 * kNodes, false), nullptr, true});
    }

    ggml_context *inputs_, *nodes_;
    ggml_backend_buffer_t buffer_ = nullptr;
};

struct Weights {
    ggml_backend_buffer_t buffer;
    Ring ring;
    bool repacked;

    const char * layout() const { return repacked ? "repacked" : "plain"; }

    std::string called(const ggml_tensor * matrix) const {
        return std::string(layout()) + " " + ggml_type_name(matrix->type) + " " + std::to_string(matrix->ne[0]) + "x" +
               std::to_string(matrix->ne[1]);
    }
};

// A backend with so many threads, and what was measured with it in this round and earlier ones.
struct Bench {
    int threads;
    Least & least;
    Backend backend{threads};

    double time(const std::string & what, const std::function<void()> & step) const {
        return least.of(std::to_string(threads) + " " + what, time_of(step));
    }
};

// Seconds of a product of `rows` rows of a type, `width` long, with `columns` vectors; 0 where the backend does not
// take it.
double product_time(const Bench & bench, Weights & weights, ggml_type type, int64_t width, int64_t rows,
                    int64_t columns) {
    Graph graph;
    ggml_tensor * matrix = ggml_new_tensor_2d(graph.inputs(), type, width, rows);
    ggml_tensor * vectors = ggml_new_tensor_2d(graph.nodes(), GGML_TYPE_F32, width, columns);
    ggml_tensor * product = ggml_mul_mat(graph.nodes(), matrix, vectors);
    ggml_backend_tensor_alloc(weights.buffer, matrix, weights.ring.data());
    if (!bench.backend.supports(product) || (weights.repacked && !matrix->extra)) {
        return 0;
    }
    ggml_cgraph * steps = graph.up_to({product}, bench.backend);
    return bench.time(weights.called(matrix) + " x " + std::to_string(columns), [&] {
        matrix->data = weights.ring.next(ggml_nbytes(matrix));
        bench.backend.compute(steps);
    });
}

// Seconds of `count` products of small matrices, or of one that has the rows of all; 0 where the backend does not take
// it.
double products_time(const Bench & bench, Weights & weights, ggml_type type, int64_t count, int64_t rows) {
    Graph graph;
    ggml_tensor * vector = ggml_new_tensor_1d(graph.nodes(), GGML_TYPE_F32, kNarrow);
    std::vector<ggml_tensor *> matrices, products;
    for (int64_t i = 0; i < count; i++) {
        matrices.push_back(ggml_new_tensor_2d(graph.inputs(), type, kNarrow, rows));
        ggml_backend_tensor_alloc(weights.buffer, matrices.back(), weights.ring.data());
        products.push_back(ggml_mul_mat(graph.nodes(), matrices.back(), vector));
    }
    if (!bench.backend.supports(products[0]) || (weights.repacked && !matrices[0]->extra)) {
        return 0;
    }
    ggml_cgraph * steps = graph.up_to(products, bench.backend);
    return bench.time(weights.called(matrices[0]) + " times " + std::to_string(count), [&] {
        for (ggml_tensor * matrix : matrices) {
            matrix->data = weights.ring.next(ggml_nbytes(matrix));
        }
        bench.backend.compute(steps);
    });
}

// What a product costs besides its bytes and rows: threads wait for one another, and for memory to be read in a row.
double product_seconds(const Bench & bench, Weights & weights, ggml_type type) {
    const double many = products_time(bench, weights, type, kNodes, kSmallRows);
    const double one = products_time(bench, weights, type, 1, kNodes * kSmallRows);
    return std::max(0.0, (many - one) / double(kNodes - 1));
}

json weight_rates(const Bench & bench, std::vector<Weights> & layouts, bool with_more) {
    json results = json::array();
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const ggml_type type = ggml_type(i);
        const bool is_weight =
            type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || ggml_is_quantized(type);
        if (!is_weight || type == GGML_TYPE_Q8_1 || type == GGML_TYPE_Q8_K || ggml_blck_size(type) == 0) {
            continue;
        }
        for (Weights & weights : layouts) {
            const int64_t rows = int64_t(kSlice / ggml_row_size(type, kWidth)) / 32 * 32;
            const double seconds = product_time(bench, weights, type, kWidth, rows, 1);
            if (seconds == 0) {
                continue;
            }
            const double bytes = double(ggml_row_size(type, kWidth)) * double(rows);
            results.push_back(
                {{"type", ggml_type_name(type)}, {"layout", weights.layout()}, {"bytes_per_second", bytes / seconds}});
            if (with_more) {
                // As many bytes in more and shorter rows tell what a row costs besides its bytes.
                const int64_t more_rows = rows * (kWidth / kNarrow);
                const double narrow = product_time(bench, weights, type, kNarrow, more_rows, 1);
                const double per_row = std::max(0.0, (narrow - seconds) / double(more_rows - rows));
                results.back()["bytes_per_second"] = bytes / std::max(seconds / 2, seconds - per_row * double(rows));
                results.back()["row_seconds"] = per_row;
                results.back()["product_seconds"] = product_seconds(bench, weights, type);
                const double batch = product_time(bench, weights, type, kWidth, kBatchRows, kBatch);
                results.back()["flops_per_second"] = 2.0 * double(kWidth * kBatchRows * kBatch) / batch;
            }
        }
    }
    return results;
}

json attention_rates(const Bench & bench, Weights & cache) {
    json results = json::array();
    for (ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
                           GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL}) {
        Graph graph;
        ggml_tensor * keys = ggml_new_tensor_3d(graph.inputs(), type, kHeadLength, kTokens, kKeyHeads);
        ggml_tensor * values = ggml_new_tensor_3d(graph.inputs(), type, kHeadLength, kTokens, kKeyHeads);
        ggml_tensor * queries = ggml_new_tensor_3d(graph.nodes(), GGML_TYPE_F32, kHeadLength, 1, kHeads);
        ggml_tensor * mask = ggml_new_tensor_2d(graph.nodes(), GGML_TYPE_F16, kTokens, 64);
        const float scale = 1.0f / std::sqrt(float(kHeadLength));
        ggml_tensor * result = ggml_flash_attn_ext(graph.nodes(), queries, keys, values, mask, scale, 0.0f, 0.0f);
        ggml_backend_tensor_alloc(cache.buffer, keys, cache.ring.data());
        ggml_backend_tensor_alloc(cache.buffer, values, cache.ring.data());
        if (!bench.backend.supports(result)) {
            continue;
        }
        ggml_cgraph * steps = graph.up_to({result}, bench.backend);
        const double seconds = bench.time(std::string("attention ") + ggml_type_name(type), [&] {
            keys->data = cache.ring.next(ggml_nbytes(keys));
            values->data = cache.ring.next(ggml_nbytes(values));
            bench.backend.compute(steps);
        });
        const double elements = double(kHeads * kTokens * 2 * kHeadLength);
        results.push_back({{"type", ggml_type_name(type)}, {"elements_per_second", elements / seconds}});
    }
    return results;
}

// Seconds of a graph of `count` steps, each of which waits for the one before.
double chain_time(const Bench & bench, int64_t count) {
    Graph graph;
    ggml_tensor * other = ggml_new_tensor_1d(graph.nodes(), GGML_TYPE_F32, kWidth);
    ggml_tensor * result = other;
    for (int64_t i = 0; i < count; i++) {
        result = ggml_add(graph.nodes(), result, other);
    }
    ggml_cgraph * steps = graph.up_to({result}, bench.backend);
    return bench.time("chain of " + std::to_string(count), [&] { bench.backend.compute(steps); });
}

json rates(const Bench & bench, std::vector<Weights> & layouts, bool with_more) {
    const double short_chain = chain_time(bench, 1);
    const double node = std::max(0.0, (chain_time(bench, kNodes) - short_chain) / double(kNodes - 1));
    return {{"threads", bench.threads},
            {"graph_seconds", std::max(0.0, short_chain - node)},
            {"node_seconds", node},
            {"weights", weight_rates(bench, layouts, with_more)},
            {"attention", attention_rates(bench, layouts[0])}};
}

}  // namespace

json measure_cpu_rates(int threads) {
    const int usable = std::max(1, int(std::thread::hardware_concurrency()));
    if (threads <= 0) {
        threads = std::min(usable, int(common_cpu_get_num_math()));
    }
    const auto start = Clock::now();
    const Pages pages(ring_size());
    fill(pages.data, pages.size, threads);
    const Ring ring(pages.data, pages.size);
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    std::vector<Weights> layouts{
        {ggml_backend_dev_buffer_from_host_ptr(dev, pages.data, pages.size, pages.size), ring, false}};
    if (ggml_backend_buffer_type_t repacking = Backend(1).repacking()) {
        ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(repacking, pages.size);
        auto * data = static_cast<uint8_t *>(ggml_backend_buffer_get_base(buffer));
        fill(data, pages.size, threads);  // its layout takes as many bytes, and no rate depends on what they say
        layouts.push_back({buffer, Ring(data, pages.size), true});
    }
    Least least;
    int best_threads = 1;
    json read, all, one;
    for (int round = 0; round < kRounds; round++) {
        read = read_bandwidths(ring, threads, least, best_threads);
        all = rates({threads, least}, layouts, true);
        one = threads == 1 ? all : rates({1, least}, layouts, false);
    }
    for (Weights & weights : layouts) {
        ggml_backend_buffer_free(weights.buffer);
    }
    return {{"threads", threads},
            {"best_threads", best_threads},
            {"buffer_bytes", pages.size},
            {"read", read},
            {"one", one},
            {"all", all},
            {"milliseconds", 1000 * Seconds(Clock::now() - start).count()}};
}
