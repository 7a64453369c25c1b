#include "machine.h"

#include "ggml-backend.h"

using json = nlohmann::ordered_json;

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
