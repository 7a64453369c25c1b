// How many steps the graph of a generated token has on each device, and how often it goes from one to another.
#pragma once

#include <map>

#include "ggml-backend.h"

struct Steps {
    int products = 0;  // of matrices with activations
    int others = 0;    // whatever else is computed; views are not
};

struct GraphSteps {
    std::map<ggml_backend_dev_t, Steps> devices;
    int splits = 0;  // runs of steps on one device
};

// Of a graph that the scheduler has just split.
GraphSteps count_steps(ggml_backend_sched_t sched, ggml_cgraph * graph);
