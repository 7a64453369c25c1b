"""What the build makes: one wheel with exactly these files, which works anywhere; an sdist; and clear refusals.

They are slow, since they build; what was compiled already is not compiled again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from pyllamarun.run.binaries import Binaries

pytestmark = pytest.mark.slow

PROGRAMS = {
    "llama-cli", "llama-server", "llama-quantize", "llama-bench", "llama-perplexity", "llama-imatrix",
    "llama-gguf-split", "llama-fit-params", "ggml-rpc-server", "pyllamarun-probe",
}  # fmt: skip
LIBRARIES = {
    "libggml.so", "libggml-base.so", "libggml-cpu.so", "libggml-rpc.so", "libggml-virtual.so", "libhollow-cpu.so",
    "libllama.so", "libllama-common.so", "libmtmd.so", "libllama-cli-impl.so", "libllama-server-impl.so",
    "libllama-quantize-impl.so", "libllama-bench-impl.so", "libllama-perplexity-impl.so", "libllama-fit-params-impl.so",
}  # fmt: skip
BACKEND_LIBRARIES: dict[str, set[str]] = {
    "cpu": set(),
    "cuda": {"libggml-cuda.so", "libcuda-standin.so", "libnvml-standin.so"},
    "vulkan": {"libggml-vulkan.so"},
}


def run(*argv: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a program; cmake and ninja are those of the tests' own environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | variables
    return subprocess.run(
        [str(word) for word in argv], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def succeed(*argv: str | Path, cwd: Path | None = None, **variables: str) -> str:
    result = run(*argv, cwd=cwd, **variables)
    assert result.returncode == 0, f"{argv}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def make_venv(folder: Path) -> Path:
    """An empty virtual environment; returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    succeed(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ROOT)
    (built,) = folder.iterdir()
    return built


def test_one_wheel_with_exactly_these_programs(wheel: Path, binaries: Binaries) -> None:
    assert re.fullmatch(r"pyllamarun-0\.1\.0-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    in_bin = {name.removeprefix("pyllamarun/bin/") for name in names if name.startswith("pyllamarun/bin/")}
    assert in_bin == PROGRAMS | LIBRARIES | BACKEND_LIBRARIES[binaries.build.backend] | {"build.json"}
    assert not [name for name in names if "test" in name or name.endswith((".h", ".cmake", ".a"))]
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "LICENSE.llama.cpp"}


@pytest.fixture
def build_tree_away() -> Iterator[None]:
    """The build tree, out of the way of whatever might still refer to it."""
    build, away = ROOT / "build", ROOT / "build.away"
    build.rename(away)
    try:
        yield
    finally:
        away.rename(build)


@pytest.mark.usefixtures("build_tree_away")
def test_the_wheel_works_at_a_path_with_spaces_without_the_build_tree(
    wheel: Path, smollm2: Path, tmp_path: Path
) -> None:
    python = make_venv(tmp_path / "a folder with spaces")
    succeed(python, "-m", "pip", "install", wheel)
    command = python.with_name("pyllamarun")
    assert "llama.cpp b11312 (0c1e570)" in succeed(command, "--version", cwd=tmp_path)
    assert "binaries" in succeed(command, "doctor", cwd=tmp_path)
    assert "layers on the GPU" in succeed(command, "plan", smollm2, "--virtual-gpu", "450MiB", cwd=tmp_path)
    assert succeed(command, "run", smollm2, "-p", "Say hello.", "-n", "8", cwd=tmp_path).strip()


def test_installing_again_takes_seconds(tmp_path: Path) -> None:
    python = make_venv(tmp_path / "again")
    succeed(python, "-m", "pip", "install", ROOT)
    start = time.monotonic()
    succeed(python, "-m", "pip", "install", "--force-reinstall", "--no-deps", ROOT)
    assert time.monotonic() - start < 60


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    succeed(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    (built,) = folder.iterdir()
    return built


def test_the_sdist_holds_the_project_and_not_llama_cpp(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(succeed("git", "ls-files", cwd=ROOT).split())
    left_out = {
        name for name in tracked if name.startswith((".ci/", "vendor/llama.cpp/")) or name == "vendor/llama.cpp"
    }
    assert tracked - left_out <= names
    assert not [name for name in names if name.startswith(("vendor/llama.cpp/", "build/", ".venv/"))]


def test_the_sdist_builds(sdist: Path, tmp_path: Path) -> None:
    """All of it where ccache has compiled it before, else what shows that source and configuration are complete."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    if shutil.which("ccache"):
        succeed(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, tree, PYLLAMARUN_BACKEND="cpu")
        assert len(list(tmp_path.glob("*.whl"))) == 1
    else:
        succeed("cmake", "-S", tree, "-B", tmp_path / "b", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release")
        succeed("cmake", "--build", tmp_path / "b", "--target", "ggml-virtual")


# ------------------------------------------------------------------------------------------------ the source


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    """llama.cpp's tree, as the build of this checkout unpacked it."""
    tree = next(ROOT.glob("build/*/llama.cpp"), None)
    if tree is None:
        pytest.skip("this checkout was built from the submodule")
    return tree


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project's own files, with an empty vendor/llama.cpp."""
    tree = tmp_path / "checkout"
    for name in succeed("git", "ls-files", cwd=ROOT).split():
        source, target = ROOT / name, tree / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    (tree / "vendor/llama.cpp").mkdir()
    return tree


@pytest.fixture
def same_source(checkout: Path, llama_cpp: Path) -> Callable[[], None]:
    """Puts llama.cpp where the build would unpack it: what is tested here is not the download."""

    def provide() -> None:
        (checkout / "b").mkdir()
        (checkout / "b/llama.cpp").symlink_to(llama_cpp)
        shutil.copy(llama_cpp.parent / "llama.cpp.sha256", checkout / "b/llama.cpp.sha256")

    return provide


def configure(checkout: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = ["cmake", "-S", checkout, "-B", checkout / "b", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *options]
    return run(*argv, **variables)


def as_submodule(checkout: Path, llama_cpp: Path) -> Path:
    """Fills vendor/llama.cpp as a git checkout, and returns it; the pin is set to its commit."""
    submodule = checkout / "vendor/llama.cpp"
    shutil.copytree(llama_cpp, submodule, dirs_exist_ok=True)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", submodule]
    succeed(*git, "init", "-q")
    succeed(*git, "add", "-A", "-f")
    succeed(*git, "commit", "-qm", "all")
    commit = succeed(*git, "rev-parse", "HEAD").strip()
    pin = checkout / "vendor/llama.cpp.toml"
    pin.write_text(re.sub(r'commit = "\w+"', f'commit = "{commit}"', pin.read_text()))
    return submodule


def test_a_filled_submodule_is_used(checkout: Path, llama_cpp: Path) -> None:
    as_submodule(checkout, llama_cpp)
    result = configure(checkout)
    assert result.returncode == 0, result.stderr
    assert "from submodule" in result.stdout
    assert not (checkout / "b/llama.cpp").exists()
    succeed("cmake", "--build", checkout / "b", "--target", "ggml-virtual")


def test_a_submodule_with_changes_is_refused(checkout: Path, llama_cpp: Path) -> None:
    submodule = as_submodule(checkout, llama_cpp)
    (submodule / "CMakeLists.txt").write_text("# mine\n")
    assert_refused(configure(checkout), "the pinned commit with changes")


def test_a_submodule_at_another_commit_is_refused(checkout: Path, llama_cpp: Path) -> None:
    submodule = as_submodule(checkout, llama_cpp)
    succeed("git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", submodule, "commit", "-qm", "x", "--allow-empty")
    assert_refused(configure(checkout), "and vendor/llama.cpp.toml pins")


def test_a_copy_that_is_no_checkout_is_refused(checkout: Path) -> None:
    (checkout / "vendor/llama.cpp/CMakeLists.txt").write_text("")
    assert_refused(configure(checkout), "is no git checkout")


def test_other_content_is_refused(checkout: Path) -> None:
    (checkout / "vendor/llama.cpp/notes.txt").write_text("")
    assert_refused(configure(checkout), "neither empty nor llama.cpp")


def assert_refused(result: subprocess.CompletedProcess[str], why: str) -> None:
    """An error that says why, and names both ways out."""
    assert result.returncode != 0
    text = re.sub(r"\s+", " ", result.stderr)
    assert why in text
    assert "git submodule update --init --force vendor/llama.cpp" in text
    assert "rm -rf vendor/llama.cpp && mkdir vendor/llama.cpp" in text


def test_a_source_package_that_cannot_be_had_names_the_other_way(checkout: Path) -> None:
    result = configure(checkout, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(checkout))
    assert result.returncode != 0
    assert "git submodule update --init vendor/llama.cpp" in result.stderr


def test_a_backend_that_does_not_exist_is_refused(checkout: Path, same_source: Callable[[], None]) -> None:
    same_source()
    result = configure(checkout, "-DPYLLAMARUN_BACKEND=metal")
    assert result.returncode != 0
    assert "it must be auto, cuda, vulkan or cpu" in re.sub(r"\s+", " ", result.stderr)


# ------------------------------------------------------------------------------------------------ CUDA


def test_cuda_compiles_without_a_complete_local_toolkit(checkout: Path, same_source: Callable[[], None]) -> None:
    same_source()
    options = [
        "-DPYLLAMARUN_BACKEND=cuda",
        "-DPYLLAMARUN_CUDA_ARCHITECTURES=86-real",
        "-DPYLLAMARUN_CUDA_FAST_COMPILE=1",
    ]
    result = configure(checkout, *options)
    assert result.returncode == 0, result.stderr[-3000:]
    target = "llama.cpp-build/ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir/scale.cu.o"
    succeed("ninja", "-C", checkout / "b", target)
    assert (checkout / "b" / target).stat().st_size > 10_000
    rules = (checkout / "b/build.ninja").read_text()
    flags = {name: rules.split(f"ggml-cuda.dir/{name}.o:")[1].split("\n\n")[0] for name in ("mmq.cu", "mmvq.cu")}
    assert {name: "-Ofc=max" in text for name, text in flags.items()} == {"mmq.cu": True, "mmvq.cu": False}
    if "is incomplete" in result.stdout:
        assert "pyllamarun: CUDA 13." in result.stdout
        made = ("lib64/libcublas.so", "lib64/libcudart.so", "lib64/stubs/libcuda.so")
        for name in ("bin/nvcc", "include/cublas_v2.h", *made):
            assert (checkout / "b/cuda-13" / name).exists()


def test_a_card_that_cuda_13_does_not_support_is_told_apart(checkout: Path, same_source: Callable[[], None]) -> None:
    same_source()
    result = configure(checkout, "-DPYLLAMARUN_BACKEND=cuda", "-DPYLLAMARUN_CUDA_ARCHITECTURES=61-real")
    if "is incomplete" not in result.stdout:
        pytest.skip("a complete local CUDA toolkit is here")
    assert result.returncode != 0
    text = re.sub(r"\s+", " ", result.stderr)
    assert "CUDA 13 does not support compute capability 6.1" in text
    assert "PYLLAMARUN_BACKEND=vulkan" in text
