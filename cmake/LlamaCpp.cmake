# Finds llama.cpp's source and makes sure that it is the pinned one.
#
# The submodule vendor/llama.cpp, when it has content, must be a checkout of the pinned commit without changes.
# When it is empty, the same tree is taken from the pinned source package, whose sha256 pip checks.

set(pin_file "${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp.toml")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${pin_file}")
file(STRINGS "${pin_file}" pin_lines REGEX "^[a-z0-9_]+ = \"")
foreach(line IN LISTS pin_lines)
  string(REGEX MATCH "^([a-z0-9_]+) = \"([^\"]*)\"" _ "${line}")
  set(pin_${CMAKE_MATCH_1} "${CMAKE_MATCH_2}")
endforeach()
foreach(key tag commit source_package source_sha256 source_folder)
  if(NOT pin_${key})
    message(FATAL_ERROR "${pin_file} has no \"${key}\".")
  endif()
endforeach()

set(LLAMA_CPP_TAG "${pin_tag}")
set(LLAMA_CPP_COMMIT "${pin_commit}")
string(SUBSTRING "${pin_commit}" 0 7 LLAMA_CPP_SHORT_COMMIT)
string(REGEX REPLACE "^b" "" LLAMA_CPP_BUILD_NUMBER "${pin_tag}")

set(vendored "${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp")
set(ways_out "Either fill the submodule with the pinned commit:
    git submodule update --init --force vendor/llama.cpp
or empty the folder, and the build takes the same tree from the source package ${pin_source_package}:
    rm -rf vendor/llama.cpp && mkdir vendor/llama.cpp")

function(check_vendored_checkout)
  find_package(Git QUIET)
  if(NOT GIT_FOUND)
    message(FATAL_ERROR "vendor/llama.cpp has content, and without git nothing can tell whether it is the pinned "
                        "commit ${LLAMA_CPP_SHORT_COMMIT}.  Install git.  Or:\n${ways_out}")
  endif()
  execute_process(COMMAND "${GIT_EXECUTABLE}" -C "${vendored}" rev-parse --show-toplevel HEAD
                  OUTPUT_VARIABLE answer ERROR_VARIABLE complaint RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
  string(REGEX REPLACE "\n.*" "" toplevel "${answer}")
  string(REGEX REPLACE ".*\n" "" head "${answer}")
  file(REAL_PATH "${vendored}" vendored_path)
  if(failed OR NOT toplevel STREQUAL vendored_path)
    message(FATAL_ERROR "vendor/llama.cpp has content, but is no git checkout: nothing can tell whether it is the pinned "
                        "commit ${LLAMA_CPP_SHORT_COMMIT}.  ${complaint}\n${ways_out}")
  endif()
  if(NOT head STREQUAL LLAMA_CPP_COMMIT)
    message(FATAL_ERROR "vendor/llama.cpp is at commit ${head}, and vendor/llama.cpp.toml pins ${LLAMA_CPP_COMMIT} "
                        "(${LLAMA_CPP_TAG}).\n${ways_out}")
  endif()
  execute_process(COMMAND "${GIT_EXECUTABLE}" -C "${vendored}" status --porcelain --untracked-files=no
                  OUTPUT_VARIABLE changes OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(changes)
    message(FATAL_ERROR "vendor/llama.cpp is the pinned commit with changes:\n${changes}\n${ways_out}")
  endif()
endfunction()

# Downloads the source package into the build folder and unpacks llama.cpp from it to `destination`.
function(unpack_source_package destination)
  set(download "${CMAKE_BINARY_DIR}/download")
  string(REGEX REPLACE "==" "-" archive_stem "${pin_source_package}")
  string(REPLACE "-" "_" archive_glob "${archive_stem}")
  string(REPLACE "_" "?" archive_glob "${archive_glob}")
  file(MAKE_DIRECTORY "${download}")
  file(WRITE "${download}/requirements.txt" "${pin_source_package} --hash=sha256:${pin_source_sha256}\n")
  message(STATUS "pyllamarun: vendor/llama.cpp is empty; taking ${LLAMA_CPP_TAG} from ${pin_source_package}")
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" -m pip download --no-deps --no-binary :all: --no-build-isolation --require-hashes
            --disable-pip-version-check --progress-bar off --dest "${download}" --requirement "${download}/requirements.txt"
    OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE failed)
  file(GLOB archive "${download}/${archive_glob}.tar.gz")
  if(failed OR NOT archive)
    message(FATAL_ERROR "llama.cpp's source package ${pin_source_package} could not be downloaded:\n${output}\n"
                        "Either make it reachable (pip's own settings apply: a mirror, a proxy, PIP_FIND_LINKS), or:\n"
                        "    git submodule update --init vendor/llama.cpp")
  endif()
  file(SHA256 "${archive}" sha256)
  if(NOT sha256 STREQUAL pin_source_sha256)
    message(FATAL_ERROR "${archive} has sha256 ${sha256}, and vendor/llama.cpp.toml pins ${pin_source_sha256}.  "
                        "Remove it and install again, or:\n    git submodule update --init vendor/llama.cpp")
  endif()
  file(REMOVE_RECURSE "${destination}" "${download}/unpacked")
  file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${download}/unpacked" PATTERNS "*/${pin_source_folder}/*")
  file(GLOB tree "${download}/unpacked/*/${pin_source_folder}")
  # A submodule's .git file points at a repository that is not in the package; with it, ninja never finds its
  # manifest up to date ("manifest still dirty after 100 tries").
  file(REMOVE "${tree}/.git")
  file(RENAME "${tree}" "${destination}")
  file(REMOVE_RECURSE "${download}")
endfunction()

if(EXISTS "${vendored}/CMakeLists.txt")
  check_vendored_checkout()
  set(LLAMA_CPP_DIR "${vendored}")
  set(LLAMA_CPP_ORIGIN "submodule")
else()
  file(GLOB leftovers "${vendored}/*")
  if(leftovers)
    message(FATAL_ERROR "vendor/llama.cpp is neither empty nor llama.cpp.\n${ways_out}")
  endif()
  set(LLAMA_CPP_DIR "${CMAKE_BINARY_DIR}/llama.cpp")
  set(LLAMA_CPP_ORIGIN "${pin_source_package}")
  set(stamp "${CMAKE_BINARY_DIR}/llama.cpp.sha256")
  set(unpacked "")
  if(EXISTS "${stamp}" AND EXISTS "${LLAMA_CPP_DIR}/CMakeLists.txt")
    file(READ "${stamp}" unpacked)
  endif()
  if(NOT unpacked STREQUAL pin_source_sha256)
    unpack_source_package("${LLAMA_CPP_DIR}")
    file(WRITE "${stamp}" "${pin_source_sha256}")
  endif()
endif()
message(STATUS "pyllamarun: llama.cpp ${LLAMA_CPP_TAG} (${LLAMA_CPP_SHORT_COMMIT}) from ${LLAMA_CPP_ORIGIN}")
