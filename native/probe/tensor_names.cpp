// Takes the place of two functions by which llama.cpp writes and reads the names of tensors: a program's symbols come
// first.  A question builds some thirty graphs of thousands of tensors, and sorts the model's by their layers; of its
// time printf was a tenth, and scanf as much.

#include <algorithm>
#include <charconv>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <system_error>

#include "ggml.h"

namespace {

// What snprintf would write, of formats with no other directives than %s and %d; false for others.
bool write_name(char * name, size_t size, const char * format, va_list arguments) {
    char *out = name, *const end = name + size - 1;
    const auto append = [&](const char * text, size_t length) {
        length = std::min(length, size_t(end - out));
        std::memcpy(out, text, length);
        out += length;
    };
    for (; *format; format++) {
        if (*format != '%') {
            append(format, 1);
        } else if (*++format == 's') {
            const char * text = va_arg(arguments, const char *);
            append(text, strnlen(text, size));
        } else if (*format == 'd') {
            char digits[16];
            const auto written = std::to_chars(digits, digits + sizeof(digits), va_arg(arguments, int));
            append(digits, size_t(written.ptr - digits));
        } else {
            return false;
        }
    }
    *out = 0;
    return true;
}

}  // namespace

extern "C" ggml_tensor * ggml_format_name(ggml_tensor * tensor, const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const bool is_written = write_name(tensor->name, sizeof(tensor->name), format, arguments);
    va_end(arguments);
    if (!is_written) {
        va_start(arguments, format);
        std::vsnprintf(tensor->name, sizeof(tensor->name), format, arguments);
        va_end(arguments);
    }
    return tensor;
}

// llama_model_loader::weight_name_comparer's.  (The header gives this function the name under which it is called.)
int sscanf(const char * text, const char * format, ...) {
    constexpr const char kPrefix[] = "blk.";
    va_list arguments;
    va_start(arguments, format);
    int fields = 0;
    if (std::strcmp(format, "blk.%d.") != 0) {
        fields = std::vsscanf(text, format, arguments);
    } else if (std::strncmp(text, kPrefix, sizeof(kPrefix) - 1) == 0) {
        const char * digits = text + sizeof(kPrefix) - 1;
        const auto read = std::from_chars(digits, digits + std::strlen(digits), *va_arg(arguments, int *));
        fields = read.ec == std::errc() ? 1 : 0;
    }
    va_end(arguments);
    return fields;
}
