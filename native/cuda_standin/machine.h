// The machine that the stand-in shows: its cards, and what each process on it holds.
//
//   PYLLAMARUN_STANDIN_CARDS    one card per ";": "name,MiB,capability,SMs,shared KiB,bus bits,memory MHz,PCIe,lanes,
//                               reserved MiB,MIG MiB", e.g. "NVIDIA GeForce RTX 3060,12288,8.6,28,99,192,7501,4,16,
//                               244"; what is reserved the driver keeps for itself.  A card with "MIG MiB" is divided,
//                               and CUDA sees its one instance, of that size, in place of the card
//   CUDA_VISIBLE_DEVICES        as NVIDIA documents it: see visible_cards()
//   PYLLAMARUN_STANDIN_STATE    folder of the machine, shared by all its processes; see below.  Without it a process is
//                               alone on its machine and leaves no trace
//   PYLLAMARUN_STANDIN_CONTEXT  bytes that a process costs on a card from its first use on (default 0)
//   PYLLAMARUN_STANDIN_FAIL     what goes wrong on purpose, separated by ";":
//                                 oom-above=BYTES   allocations larger than this fail
//                                 oom-at=N          the N-th allocation on a card fails (from 1), and all after it
//                                 lost=CARD         the card answers "device lost" to everything that touches it
//                                 nvml=hang | na    NVML never answers, or answers that it does not know
//
// The state folder holds one file a process, processes/PID, with a line a card: "card context buffers pool peak
// pool_peak allocations", in bytes; peak is the largest sum of the first three.  A dead process's file no longer
// counts.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace standin {

struct Card {
    std::string name;
    size_t total = 0, reserved = 0;
    int major = 0, minor = 0, multiprocessors = 0;
    size_t shared_memory = 0;
    int bus_bits = 0, memory_mhz = 0, pcie_generation = 0, pcie_lanes = 0;
    int index = 0;
    size_t instance = 0;  // its MIG instance's memory, 0 where it is not divided
    std::string pci_bus_id() const;
    std::string uuid() const;           // of the card
    std::string instance_uuid() const;  // of its MIG instance
    size_t memory() const { return instance ? instance : total; }
};

// What one process holds on one card.
struct Usage {
    int pid = 0;
    size_t context = 0, buffers = 0, pool = 0, peak = 0, pool_peak = 0, allocations = 0;
    size_t total() const { return context + buffers + pool; }
};

enum class Kind { buffer, pool };

const std::vector<Card> & cards();

// The cards that CUDA shows this process, in its order, as indices into cards().  CUDA_VISIBLE_DEVICES lists them by
// index or by the beginning of a UUID that only one has ("GPU-57a2", "MIG-57a2"); the first entry that names none ends
// the list, so that an empty one and "-1" show nothing.  NVML does not heed it.
const std::vector<int> & visible_cards();

bool is_lost(int card);
std::string nvml_fault();

// Takes memory on a card for this process, and the context's on first use; false when the card has not so much left.
bool take(int card, size_t bytes, Kind kind);
void give_back(int card, size_t bytes, Kind kind);

// Makes sure that this process's context is counted on the card.
void touch(int card);

// What all living processes hold on a card.
std::vector<Usage> usage(int card);
size_t used_bytes(int card);  // with what the driver keeps

}  // namespace standin
