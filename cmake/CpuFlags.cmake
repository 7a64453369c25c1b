# The CPU backend: built for this machine's instruction set, or, with PYLLAMARUN_PORTABLE, for all of them, chosen
# when the program starts.  GGML_NATIVE cannot be used: upstream excludes it together with GGML_BACKEND_DL.

set(GGML_NATIVE OFF)
if(PYLLAMARUN_PORTABLE)
  set(GGML_CPU_ALL_VARIANTS ON)
  set(PYLLAMARUN_LINKS_TO_THE_SYSTEM OFF)
  set(PYLLAMARUN_CPU_FLAGS "all variants")
else()
  set(PYLLAMARUN_LINKS_TO_THE_SYSTEM ON)
  # Upstream would otherwise add -mavx2 and its like, which an older CPU does not have.
  foreach(feature SSE42 AVX AVX2 BMI2 FMA F16C)
    set(GGML_${feature} OFF)
  endforeach()
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-march=native PYLLAMARUN_HAS_MARCH_NATIVE)
  if(PYLLAMARUN_HAS_MARCH_NATIVE)
    set(PYLLAMARUN_CPU_FLAGS -march=native)
  else()
    set(PYLLAMARUN_CPU_FLAGS -mcpu=native)
  endif()
endif()

function(pyllamarun_tune_cpu_backend)
  if(NOT PYLLAMARUN_PORTABLE)
    target_compile_options(ggml-cpu PRIVATE "$<$<COMPILE_LANGUAGE:C,CXX>:${PYLLAMARUN_CPU_FLAGS}>")
  endif()
endfunction()
