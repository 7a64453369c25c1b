#include "card.h"

#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

namespace cuda_rules {
namespace {

int counted_as_ggml_does(double capability) {
    return int(capability * 10 + 0.5) * 10;
}

Card parse(const std::string & text) {
    Card card;
    double capability = 0, multiprocessors = 0, shared_kib = 0, compiled = 0;
    char comma = 0;
    std::stringstream fields(text);
    if (fields >> capability >> comma >> multiprocessors >> comma >> shared_kib) {
        card.capability = card.compiled = counted_as_ggml_does(capability);
        card.multiprocessors = int(multiprocessors);
        card.shared_memory = size_t(shared_kib) * 1024;
        if (fields >> comma >> compiled) {
            card.compiled = counted_as_ggml_does(compiled);
        }
    }
    return card;
}

std::vector<Card> cards_from_environment() {
    std::vector<Card> cards;
    const char * setting = std::getenv("PYLLAMARUN_CARDS");
    std::stringstream texts(setting ? setting : "");
    for (std::string text; std::getline(texts, text, ';');) {
        cards.push_back(parse(text));
    }
    if (cards.empty()) {
        cards.emplace_back();
    }
    return cards;
}

}  // namespace

const Card & card(size_t index) {
    static const std::vector<Card> cards = cards_from_environment();
    return index < cards.size() ? cards[index] : cards.back();
}

}  // namespace cuda_rules
