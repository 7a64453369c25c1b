"""Model files from strangers, through the installed command: an exit code and a sentence, never a traceback."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import run_cli, start_cli
from hostile import ESCAPES, FAULTS, drives_no_terminal, no_file

from pyllamarun import Machine, Model, Planner
from pyllamarun.errors import ModelError, UsageError
from pyllamarun.models.gguf import STRING, UINT32, Value, read_header
from pyllamarun.models.skeleton import MAX_VOCABULARY, write_sparse
from pyllamarun.planning.request import make_request
from pyllamarun.run.server import free_port

COMMANDS = {
    "plan": ("plan", "{}", "--virtual-gpu", "4GiB"),
    "inspect": ("inspect", "{}"),
    "quantize": ("quantize", "{}", "Q2_K", "--dry-run"),
}
SAMPLE = ["empty", "2^64-1 keys", "the name as an array", "overlapping tensors", "escapes in a tensor's name"]
Variant = Callable[..., Path]


def argv_of(command: str, path: Path) -> list[str]:
    return [word.format(path) for word in COMMANDS[command]]


def assert_refused(argv: list[str], exit_code: int) -> None:
    """In words and in JSON, fit for a terminal, and as an error that was foreseen."""
    result = run_cli(*argv, timeout=60)
    assert (result.returncode, result.stdout) == (exit_code, ""), result.stderr
    assert drives_no_terminal(result.stderr)
    assert "Traceback" not in result.stderr
    result = run_cli(argv[0], "--json", *argv[1:], timeout=60)
    assert drives_no_terminal(result.stdout)
    assert json.loads(result.stdout)["error"]["exit_code"] == result.returncode == exit_code


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", SAMPLE)
def test_a_fault_is_told(fault: str, command: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(FAULTS[fault][0])
    assert_refused(argv_of(command, path), 4)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in SAMPLE])
def test_every_fault_is_told(fault: str, command: str, tmp_path: Path) -> None:
    test_a_fault_is_told(fault, command, tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_is_told(kind: str, command: str, tmp_path: Path) -> None:
    assert_refused(argv_of(command, no_file(kind, tmp_path)), 2)


@pytest.mark.parametrize("option", ["-md", "--mmproj"])
def test_a_draft_or_a_projector_is_no_less_a_file_from_strangers(
    option: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "draft.gguf"
    path.write_bytes(FAULTS["an array of 2^60 strings"][0])
    with_model = ["plan", str(tiny("llama")), "--virtual-gpu", "4GiB", "--", option]
    assert_refused([*with_model, str(path)], 4)
    assert_refused([*with_model, str(no_file("fifo", tmp_path))], 2)


@pytest.fixture
def variant(tiny: Callable[[str], Path], tmp_path: Path) -> Variant:
    """A sound little model with other metadata (None leaves a key out), or another name for its first tensor."""

    def write(*, first_tensor: str = "", **changes: Value | None) -> Path:
        header = read_header(tiny("llama"))
        changed = dict(header.metadata) | {key.replace("__", "."): value for key, value in changes.items()}
        metadata = {key: value for key, value in changed.items() if value is not None}
        tensors = [(tensor.name, tensor.type, tensor.shape) for tensor in header.tensors]
        if first_tensor:
            tensors[0] = (first_tensor, *tensors[0][1:])
        return write_sparse(tmp_path / "model.gguf", metadata, tensors)

    return write


def test_a_models_name_cannot_drive_the_terminal(variant: Variant) -> None:
    argv = argv_of("plan", variant(general__name=Value(STRING, ESCAPES)))
    for more in ([], ["--json"], ["--dry-run"]):
        result = run_cli(*argv, *more)
        assert result.returncode == 0, result.stderr
        assert drives_no_terminal(result.stdout + result.stderr)


NAMES = {"escapes": os.fsencode(f"'{ESCAPES}\\.gguf"), "not UTF-8": b"caf\xe9\xff.gguf"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_files_name_cannot_drive_the_terminal(name: bytes, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """And the command that is shown for it is one for this file, wherever it is pasted."""
    path = tmp_path / os.fsdecode(name)
    path.symlink_to(tiny("llama"))
    for argv in (argv_of("plan", path), ["plan", path, "--virtual-gpu", "9MiB"], ["inspect", path]):
        result = run_cli(*argv)
        assert result.returncode in (0, 3), result.stderr
        assert drives_no_terminal(result.stdout + result.stderr)
    for argv in ([*argv_of("plan", path), "--dry-run"], argv_of("quantize", path)):
        shown = run_cli(*argv).stdout
        assert drives_no_terminal(shown)
        command = f"show() {{ printf '%s\\n' \"$@\"; }}; show {shown.splitlines()[-1]}"
        said = subprocess.run(["bash", "-c", command], capture_output=True)
        assert os.fsencode(path) in said.stdout


def test_a_servers_log_cannot_drive_the_terminal(variant: Variant) -> None:
    path = variant(general__name=Value(STRING, ESCAPES))
    arguments = ("serve", path, "--virtual-gpu", "4GiB", "--port", str(free_port()), "--", "-lv", "5")
    with start_cli(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as serving:
        log = ""
        for line in serving.stderr or []:
            log += line
            if "general.name" in line:
                break
        serving.terminate()
        log += serving.communicate(timeout=30)[1]
    assert "general.name" in log
    assert drives_no_terminal(log)


def test_an_answer_cannot_drive_the_terminal() -> None:
    leader, follower = pty.openpty()
    code = "from pyllamarun.output import write; write('a\\x1b[2J\\x9b31m\\r\\tb\\u200dc')"
    subprocess.run([sys.executable, "-c", code], stdout=follower, check=True)
    os.close(follower)
    shown = os.read(leader, 1000).decode()
    os.close(leader)
    assert shown == "a\ufffd[2J\ufffd31m\ufffd\tb\u200dc"


@pytest.mark.parametrize(
    ("changes", "exit_code"),
    [({"general__architecture": Value(STRING, ESCAPES)}, 4), ({"first_tensor": ESCAPES}, 2)],
    ids=["architecture", "tensor"],
)
def test_what_llama_cpp_says_of_a_name_cannot_either(changes: dict[str, Any], exit_code: int, variant: Variant) -> None:
    assert_refused(argv_of("plan", variant(**changes)), exit_code)


def test_a_chat_template_is_never_rendered(variant: Variant) -> None:
    template = (
        "{{ 6 * 7 * 1001 }}{% for i in range(10**12) %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endfor %}"
    )
    path = variant(tokenizer__chat_template=Value(STRING, template))
    for command in COMMANDS:
        result = run_cli(*argv_of(command, path), timeout=30)
        assert result.returncode == 0, result.stderr
        assert "42042" not in result.stdout + result.stderr
        assert ("{{ 6 * 7" in result.stdout) == (command == "inspect"), "as it stands, and only there"


CONTRADICTIONS = {
    "no expert is used": ("mixtral", "llama.expert_used_count", 0),
    "more experts are used than there are": ("deepseek2", "deepseek2.expert_used_count", 2**31),
    "one expert, and matrices of eight": ("mixtral", "llama.expert_count", 1),
    "a head of two values": ("jamba", "jamba.attention.key_length", 2),
    "a window of no tokens": ("gemma3", "gemma3.attention.sliding_window", 0),
}


@pytest.mark.parametrize(("architecture", "key", "number"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_makes_llama_cpp_crash_is_the_models_fault(
    architecture: str, key: str, number: int, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """And the next model is planned all the same."""
    sound = read_header(tiny(architecture))
    metadata = {**sound.metadata, key: Value(UINT32, number)}
    path = write_sparse(tmp_path / "m.gguf", metadata, [(one.name, one.type, one.shape) for one in sound.tensors])
    with Planner(Machine.of(gpus="1GiB", ram="8GiB")) as planner:
        for _ in range(2):
            with suppress(ModelError, UsageError):
                planner.plan(Model.open(path), make_request(context=1024))
            assert planner.plan(Model.open(tiny("llama")), make_request(context=1024)).gpu_layers > 0


def test_a_crash_is_told(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    sound = read_header(tiny("mixtral"))
    metadata = {**sound.metadata, "llama.expert_used_count": Value(UINT32, 0)}
    path = write_sparse(tmp_path / "m.gguf", metadata, [(one.name, one.type, one.shape) for one in sound.tensors])
    assert_refused(argv_of("plan", path), 4)
    assert "llama.cpp crashes on this model" in run_cli(*argv_of("plan", path)).stderr


def test_a_vocabulary_that_is_only_claimed_is_not_allocated(variant: Variant) -> None:
    """llama.cpp would make up so many tokens, of 40 bytes and more each."""
    size = Value(UINT32, MAX_VOCABULARY + 1)
    assert_refused(argv_of("plan", variant(tokenizer__ggml__tokens=None, llama__vocab_size=size)), 4)
