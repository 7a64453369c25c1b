// pyllamarun-probe: what llama-server would allocate, without allocating it.
//
//   pyllamarun-probe                          answers each line of its input with one line of JSON:
//                                             an array of llama-server arguments   what they take (measure.h)
//                                             {"program": "llama-perplexity", "arguments": […]}
//                                                                                  the same for that program
//                                             "devices"                            the devices (machine.h), as they
//                                                                                  were when it started
//                                             {"cards": "…"}                       {}: which cards the devices are
//                                                                                  (cuda_rules/card.h), before the
//                                                                                  first question
//   pyllamarun-probe --devices                lists devices (machine.h)
//   pyllamarun-probe --read-bandwidth [--threads N]   measures how fast the CPU reads and computes (cpu_rates.h)
//   pyllamarun-probe --version
//
// A question that cannot be answered is answered {"error": what, "log": [llama.cpp's own words, …]}; the next one is
// not affected by it.  Only answers go to stdout.

#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "build-info.h"
#include "captured_log.h"
#include "common.h"
#include "cpu_rates.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"
#include "log.h"
#include "machine.h"
#include "measure.h"

using json = nlohmann::ordered_json;

namespace {

void print(const json & answer) {
    std::cout << answer.dump(-1, ' ', false, json::error_handler_t::replace) << std::endl;
}

json error(const std::string & what, const std::vector<std::string> & log) {
    return {{"error", what}, {"log", log}};
}

json answer(const std::string & line, const json & devices, CapturedLog & log) {
    log.clear();
    try {
        const json question = json::parse(line);
        if (question == "devices") {
            return devices;
        }
        if (question.is_object() && question.contains("program")) {
            return measure_memory(question.at("program").get<std::string>(),
                                  question.at("arguments").get<std::vector<std::string>>());
        }
        if (question.is_object()) {
            setenv("PYLLAMARUN_CARDS", question.at("cards").get<std::string>().c_str(), 1);
            return json::object();
        }
        return measure_memory("llama-server", question.get<std::vector<std::string>>());
    } catch (const std::exception & e) {
        return error(e.what(), log.lines());
    }
}

// llama.cpp aborts where it does not expect to be wrong; the last thing said must still be an answer.
CapturedLog * log_at_abort = nullptr;

void answer_abort(const char * message) {
    print(error(std::string("llama.cpp aborted: ") + message,
                log_at_abort ? log_at_abort->lines() : std::vector<std::string>{}));
}

int serve_questions() {
    CapturedLog log;
    log_at_abort = &log;
    ggml_set_abort_callback(answer_abort);
    const json devices = list_devices();
    for (std::string line; std::getline(std::cin, line);) {
        print(answer(line, devices, log));
    }
    return EXIT_SUCCESS;
}

}  // namespace

int main(int argc, char ** argv) {
    const std::string command = argc > 1 ? argv[1] : "";
    if (command == "--version") {
        std::cout << "version: " << llama_build_number() << " (" << llama_commit() << ")" << std::endl;
        return EXIT_SUCCESS;
    }
    common_init();
    common_log_set_verbosity_thold(LOG_LEVEL_ERROR);
    ggml_backend_load_all();
    if (command == "--read-bandwidth" && (argc == 2 || (argc == 4 && std::string(argv[2]) == "--threads"))) {
        print(measure_cpu_rates(argc == 4 ? std::atoi(argv[3]) : 0));
        return EXIT_SUCCESS;
    }
    if (command == "--devices") {
        print(list_devices());
        return EXIT_SUCCESS;
    }
    if (!command.empty()) {
        std::cerr << "usage: pyllamarun-probe [--devices | --read-bandwidth [--threads N] | --version]" << std::endl;
        return 2;
    }
    llama_backend_init();
    return serve_questions();
}
