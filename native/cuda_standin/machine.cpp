#include "machine.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>

namespace standin {
namespace {

constexpr size_t kMiB = size_t(1) << 20, kKiB = size_t(1) << 10;

std::string setting(const char * name) {
    const char * value = std::getenv(name);
    return value ? value : "";
}

std::vector<std::string> split(const std::string & text, char separator) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) {
        parts.push_back(part);
    }
    return parts;
}

Card parse_card(const std::string & text, int index) {
    std::vector<std::string> fields = split(text, ',');
    fields.resize(11);
    const auto number = [&](size_t i) { return std::atof(fields[i].c_str()); };
    Card card;
    card.index = index;
    card.name = fields[0];
    card.total = size_t(number(1) * kMiB);
    card.major = int(number(2));
    card.minor = int(number(2) * 10 + 0.5) % 10;
    card.multiprocessors = int(number(3));
    card.shared_memory = size_t(number(4)) * kKiB;
    card.bus_bits = int(number(5));
    card.memory_mhz = int(number(6));
    card.pcie_generation = int(number(7));
    card.pcie_lanes = int(number(8));
    card.reserved = size_t(number(9) * kMiB);
    card.instance = size_t(number(10) * kMiB);
    return card;
}

bool starts_with(const std::string & text, const std::string & beginning) {
    return text.compare(0, beginning.size(), beginning) == 0;
}

// The card that an entry of CUDA_VISIBLE_DEVICES names, or -1.
int card_named(const std::string & entry) {
    if (!entry.empty() && entry.find_first_not_of("0123456789") == std::string::npos) {
        const unsigned long index = std::strtoul(entry.c_str(), nullptr, 10);
        return index < cards().size() ? int(index) : -1;
    }
    int found = -1;
    for (const Card & card : cards()) {
        const bool named = (starts_with(entry, "GPU-") && starts_with(card.uuid(), entry)) ||
                           (starts_with(entry, "MIG-") && card.instance && starts_with(card.instance_uuid(), entry));
        if (named && found >= 0) {
            return -1;
        }
        found = named ? card.index : found;
    }
    return found;
}

// "key=value" among the faults that were asked for.
std::string fault(const std::string & key) {
    for (const std::string & part : split(setting("PYLLAMARUN_STANDIN_FAIL"), ';')) {
        if (part.compare(0, key.size() + 1, key + "=") == 0) {
            return part.substr(key.size() + 1);
        }
    }
    return "";
}

bool is_alive(int pid) {
    return kill(pid, 0) == 0 || errno == EPERM;
}

// Only one process, and one thread in it, looks at the machine at a time.
class Locked {
  public:
    Locked() : guard_(mutex()) {
        const std::string folder = setting("PYLLAMARUN_STANDIN_STATE");
        if (!folder.empty()) {
            mkdir(folder.c_str(), 0777);
            mkdir((folder + "/processes").c_str(), 0777);
            file_ = open((folder + "/lock").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0666);
            if (file_ >= 0) {
                flock(file_, LOCK_EX);
            }
        }
    }
    ~Locked() {
        if (file_ >= 0) {
            close(file_);
        }
    }

  private:
    static std::mutex & mutex() {
        static std::mutex one;
        return one;
    }
    std::lock_guard<std::mutex> guard_;
    int file_ = -1;
};

std::vector<Usage> & own() {
    static std::vector<Usage> usages(cards().size());
    return usages;
}

std::string process_file(int pid) {
    const std::string folder = setting("PYLLAMARUN_STANDIN_STATE");
    return folder.empty() ? "" : folder + "/processes/" + std::to_string(pid);
}

void publish() {
    const std::string path = process_file(getpid());
    if (path.empty()) {
        return;
    }
    const std::string partial = path + ".partial";
    FILE * file = std::fopen(partial.c_str(), "w");
    if (!file) {
        return;
    }
    for (size_t i = 0; i < own().size(); i++) {
        const Usage & u = own()[i];
        std::fprintf(file, "%zu %zu %zu %zu %zu %zu %zu\n", i, u.context, u.buffers, u.pool, u.peak, u.pool_peak,
                     u.allocations);
    }
    std::fclose(file);
    std::rename(partial.c_str(), path.c_str());
}

std::vector<Usage> others(int card) {
    std::vector<Usage> found;
    const std::string folder = setting("PYLLAMARUN_STANDIN_STATE") + "/processes";
    DIR * directory = process_file(0).empty() ? nullptr : opendir(folder.c_str());
    if (!directory) {
        return found;
    }
    while (dirent * entry = readdir(directory)) {
        const int pid = std::atoi(entry->d_name);
        if (pid <= 0 || pid == getpid() || std::strchr(entry->d_name, '.') || !is_alive(pid)) {
            continue;
        }
        std::ifstream lines(folder + "/" + entry->d_name);
        int index = 0;
        for (Usage u; lines >> index >> u.context >> u.buffers >> u.pool >> u.peak >> u.pool_peak >> u.allocations;) {
            if (index == card) {
                u.pid = pid;
                found.push_back(u);
            }
        }
    }
    closedir(directory);
    return found;
}

size_t held_by_others(int card) {
    size_t sum = 0;
    for (const Usage & u : others(card)) {
        sum += u.total();
    }
    return sum;
}

// With the lock held: whether so much more fits; if so it is counted.
bool charge(int card, size_t bytes, size_t Usage::* what) {
    Usage & u = own()[size_t(card)];
    if (cards()[size_t(card)].reserved + held_by_others(card) + u.total() + bytes > cards()[size_t(card)].memory()) {
        return false;
    }
    u.*what += bytes;
    u.peak = std::max(u.peak, u.total());
    u.pool_peak = std::max(u.pool_peak, u.pool);
    return true;
}

bool open_context(int card) {
    Usage & u = own()[size_t(card)];
    if (u.pid != 0) {
        return true;
    }
    u.pid = getpid();
    const bool fits = charge(card, size_t(std::strtoull(setting("PYLLAMARUN_STANDIN_CONTEXT").c_str(), nullptr, 10)),
                             &Usage::context);
    publish();
    return fits;
}

bool fails_on_purpose(int card, size_t bytes) {
    const std::string above = fault("oom-above"), at = fault("oom-at");
    const size_t number = own()[size_t(card)].allocations;
    return (!above.empty() && bytes > std::strtoull(above.c_str(), nullptr, 10)) ||
           (!at.empty() && number >= std::strtoull(at.c_str(), nullptr, 10));
}

}  // namespace

std::string Card::pci_bus_id() const {
    char text[16];
    std::snprintf(text, sizeof(text), "0000:%02x:00.0", index + 1);
    return text;
}

std::string Card::uuid() const {
    char text[48];
    std::snprintf(text, sizeof(text), "GPU-57a2d11%x-0000-0000-0000-%012d", unsigned(index) & 15, index);
    return text;
}

std::string Card::instance_uuid() const {
    return "MIG" + uuid().substr(3);
}

const std::vector<int> & visible_cards() {
    static const std::vector<int> visible = [] {
        std::vector<int> list;
        const char * variable = std::getenv("CUDA_VISIBLE_DEVICES");
        if (!variable) {
            for (const Card & card : cards()) {
                list.push_back(card.index);
            }
            return list;
        }
        for (const std::string & entry : split(variable, ',')) {
            const int card = card_named(entry);
            if (card < 0 || std::count(list.begin(), list.end(), card)) {
                break;
            }
            list.push_back(card);
        }
        return list;
    }();
    return visible;
}

const std::vector<Card> & cards() {
    static const std::vector<Card> all = [] {
        std::vector<Card> list;
        for (const std::string & text : split(setting("PYLLAMARUN_STANDIN_CARDS"), ';')) {
            list.push_back(parse_card(text, int(list.size())));
        }
        return list;
    }();
    return all;
}

bool is_lost(int card) {
    return fault("lost") == std::to_string(card);
}

std::string nvml_fault() {
    return fault("nvml");
}

bool take(int card, size_t bytes, Kind kind) {
    Locked lock;
    if (!open_context(card)) {
        return false;
    }
    own()[size_t(card)].allocations++;
    const bool taken =
        !fails_on_purpose(card, bytes) && charge(card, bytes, kind == Kind::pool ? &Usage::pool : &Usage::buffers);
    publish();
    return taken;
}

void give_back(int card, size_t bytes, Kind kind) {
    Locked lock;
    Usage & u = own()[size_t(card)];
    (kind == Kind::pool ? u.pool : u.buffers) -= bytes;
    publish();
}

void touch(int card) {
    Locked lock;
    open_context(card);
}

std::vector<Usage> usage(int card) {
    Locked lock;
    std::vector<Usage> all = others(card);
    if (own()[size_t(card)].pid != 0) {
        all.push_back(own()[size_t(card)]);
    }
    return all;
}

size_t used_bytes(int card) {
    size_t sum = cards()[size_t(card)].reserved;
    for (const Usage & u : usage(card)) {
        sum += u.total();
    }
    return sum;
}

}  // namespace standin
