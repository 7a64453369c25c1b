#include "captured_log.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <sstream>

#include "llama-impl.h"
#include "llama.h"
#include "log.h"

namespace {

constexpr size_t kLastLines = 12;
constexpr off_t kLastBytes = 64 * 1024;

thread_local bool is_muted = false;

// Whether a line is one of an error, by its own level or that of the line which it continues.
bool is_kept(ggml_log_level level) {
    static thread_local ggml_log_level last = GGML_LOG_LEVEL_INFO;
    if (level != GGML_LOG_LEVEL_CONT) {
        last = level;
    }
    return last == GGML_LOG_LEVEL_ERROR && !is_muted;
}

void keep_errors(ggml_log_level level, const char * text, void *) {
    if (is_kept(level)) {
        std::fputs(text, stderr);
    }
}

}  // namespace

// Takes the place of llama.cpp's own function, which writes every line out before it asks whether anybody wants it: an
// eighth of the time of a question.
void llama_log_internal(ggml_log_level level, const char * format, ...) {
    if (is_kept(level)) {
        va_list arguments;
        va_start(arguments, format);
        std::vfprintf(stderr, format, arguments);
        va_end(arguments);
    }
}

void mute_this_thread() {
    is_muted = true;
}

CapturedLog::CapturedLog() : original_stderr_(dup(STDERR_FILENO)), captured_(memfd_create("log", MFD_CLOEXEC)) {
    llama_log_set(keep_errors, nullptr);
    dup2(captured_, STDERR_FILENO);
}

CapturedLog::~CapturedLog() {
    dup2(original_stderr_, STDERR_FILENO);
    close(original_stderr_);
    close(captured_);
}

void CapturedLog::clear() {
    common_log_flush(common_log_main());
    std::fflush(stderr);
    if (ftruncate(captured_, 0) == 0) {
        lseek(captured_, 0, SEEK_SET);
    }
}

std::vector<std::string> CapturedLog::lines() const {
    common_log_flush(common_log_main());
    std::fflush(stderr);
    const off_t end = lseek(captured_, 0, SEEK_CUR);
    const off_t start = std::max(off_t(0), end - kLastBytes);
    std::string text(size_t(end - start), '\0');
    const ssize_t count = pread(captured_, text.data(), text.size(), start);
    text.resize(size_t(std::max(count, ssize_t(0))));

    std::vector<std::string> lines;
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);) {
        if (line.find_first_not_of(" \t\r") != std::string::npos) {
            lines.push_back(line);
        }
    }
    if (lines.size() > kLastLines) {
        lines.erase(lines.begin(), lines.end() - kLastLines);
    }
    return lines;
}
