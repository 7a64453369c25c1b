// The cards whose rules are asked for, as far as ggml-cuda looks at them.
//
//   PYLLAMARUN_CARDS   one card per ";", in the order in which ggml lists the GPUs: "capability,SMs,shared
//                      KiB,compiled", e.g. "8.6,28,99,8.6".  shared: what a block may ask for
//                      (cudaDevAttrMaxSharedMemoryPerBlockOptin).  compiled: the highest capability that ggml-cuda is
//                      compiled for and the card has, 0 if none; left out, the card's own.  A card that is not named is
//                      taken to be like the last one, without any like an RTX 3060
#pragma once

#include <cstddef>

namespace cuda_rules {

struct Card {
    int capability = 860;  // as ggml-cuda counts it: 100 * major + 10 * minor
    int multiprocessors = 28;
    size_t shared_memory = 99 * 1024;  // bytes
    int compiled = 860;                // ggml_cuda_highest_compiled_arch(capability)
};

// GGML_CUDA_CC_*
constexpr int kPascal = 600, kDp4a = 610, kVolta = 700, kTuring = 750, kAmpere = 800, kOrin = 870, kAda = 890,
              kHopper = 900, kBlackwell = 1200, kDgxSpark = 1210, kRubin = 1300;

// The index-th GPU, from 0.
const Card & card(size_t index);

}  // namespace cuda_rules
