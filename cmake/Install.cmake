# What the wheel holds: the programs, the libraries they need, and build.json, all in pyllamarun/bin.

set(programs
  llama-cli llama-server llama-quantize llama-bench llama-perplexity llama-imatrix llama-gguf-split llama-fit-params
  ggml-rpc-server pyllamarun-probe)
set(libraries
  ggml ggml-base llama llama-common mtmd
  llama-cli-impl llama-server-impl llama-quantize-impl llama-bench-impl llama-perplexity-impl llama-fit-params-impl
  ggml-rpc ggml-virtual hollow-cpu)
if(PYLLAMARUN_PORTABLE)
  get_property(cpu_variants DIRECTORY "${LLAMA_CPP_DIR}/ggml/src" PROPERTY BUILDSYSTEM_TARGETS)
  list(FILTER cpu_variants INCLUDE REGEX "^ggml-cpu-")
  list(FILTER cpu_variants EXCLUDE REGEX "-feats$")
  list(APPEND libraries ${cpu_variants})
else()
  list(APPEND libraries ggml-cpu)
endif()
if(GGML_CUDA)
  list(APPEND libraries ggml-cuda cuda-standin nvml-standin)
endif()
if(GGML_VULKAN)
  list(APPEND libraries ggml-vulkan)
endif()

# A wheel holds no links, so a library with a version in its name would be stored twice or thrice; and no headers.
foreach(library IN LISTS libraries)
  foreach(property VERSION SOVERSION PUBLIC_HEADER PRIVATE_HEADER)
    set_property(TARGET ${library} PROPERTY ${property})
  endforeach()
endforeach()

set(build_json "${CMAKE_BINARY_DIR}/build.json")
get_target_property(ui_folder llama-ui BINARY_DIR)
set(PYLLAMARUN_CUDA_ARCHITECTURES_USED "")
if(GGML_CUDA)
  get_target_property(PYLLAMARUN_CUDA_ARCHITECTURES_USED ggml-cuda CUDA_ARCHITECTURES)
endif()
string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_RELEASE}" PYLLAMARUN_CXX_FLAGS)
configure_file(cmake/build.json.in "${build_json}.in" @ONLY)
add_custom_command(
  OUTPUT "${build_json}"
  COMMAND "${CMAKE_COMMAND}" "-DTEMPLATE=${build_json}.in" "-DUI_HEADER=${ui_folder}/ui.h" "-DOUTPUT=${build_json}"
          -P "${CMAKE_CURRENT_SOURCE_DIR}/cmake/WriteBuildJson.cmake"
  DEPENDS "${build_json}.in" llama-server
  VERBATIM)
add_custom_target(pyllamarun-all ALL DEPENDS ${programs} ${libraries} "${build_json}")

install(TARGETS ${programs} RUNTIME DESTINATION bin)
install(TARGETS ${libraries} LIBRARY DESTINATION bin)
install(FILES "${build_json}" DESTINATION bin)
