# ccache, where it is installed, told to see through the folder that a clone happens to lie in: a second clone on
# the same machine compiles in seconds.  A compiler is known by its content, since nvcc may lie in the build folder,
# installed anew for each clone.  `env` and not `cmake -E env`, whose path changes with each of pip's isolated build
# environments and would make ninja rebuild everything.

find_program(CCACHE ccache)
if(CCACHE)
  set(launcher env "CCACHE_BASEDIR=${CMAKE_SOURCE_DIR}" CCACHE_NOHASHDIR=1 CCACHE_COMPILERCHECK=content "${CCACHE}")
  foreach(language C CXX CUDA)
    set(CMAKE_${language}_COMPILER_LAUNCHER ${launcher})
  endforeach()
  message(STATUS "pyllamarun: compiling through ${CCACHE}")
endif()
