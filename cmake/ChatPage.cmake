# llama-server's own chat page: built with npm where npm is found (its .npmrc turns install scripts off), else left
# to upstream's download.  Without either the server answers its API and has no page; `doctor` says which it is.

find_program(NPM npm)
if(NPM)
  set(LLAMA_BUILD_UI ON)
else()
  set(LLAMA_BUILD_UI OFF)
  message(STATUS "pyllamarun: no npm; llama-server's chat page is left to upstream's download")
endif()
set(LLAMA_USE_PREBUILT_UI ON)
