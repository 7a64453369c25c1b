"""The installed command, as a user types it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import synthetic
from harness import PYLLAMARUN, free_port, read_state, run_cli, start_cli

from pyllamarun.run.binaries import Binaries
from pyllamarun.units import GIB, MIB

QUESTION = "What is the capital of France? Answer in one sentence."
CARD = ("--virtual-gpu", "450MiB")  # too small for SmolLM2 beside the overhead


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} seconds"
        time.sleep(0.02)


def test_version_names_everything(binaries: Binaries) -> None:
    result = run_cli("--version")
    build = binaries.build
    assert result.returncode == 0
    assert result.stdout.strip() == f"pyllamarun 0.1.0, llama.cpp b11312 (0c1e570), backend {build.backend}"
    assert build.commit == "0c1e57098bba43ac29e6e3b677cdceebdd22334f"


def test_help_lists_the_commands() -> None:
    result = run_cli("--help")
    for command in ("doctor", "list", "inspect", "plan", "quantize", "run", "serve"):
        assert re.search(rf"^  {command} +\w", result.stdout, re.MULTILINE)


# ------------------------------------------------------------------------------------------------ plan


def test_the_founding_case_is_planned(header_70b: Path) -> None:
    start = time.monotonic()
    result = run_cli("plan", header_70b, "--virtual-gpu", "12GiB", "--vram", "11.5GiB", "-c", "4096", "--json")
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stderr
    envelope = json.loads(result.stdout)
    assert (envelope["kind"], envelope["schema"], envelope["ok"], envelope["error"]) == ("plan", 1, True, None)
    plan = envelope["data"]
    (gpu,) = plan["devices"]
    parts = ("weights_bytes", "context_bytes", "compute_bytes", "projector_bytes", "overhead_bytes")
    assert gpu["total_bytes"] == sum(gpu[part] for part in parts)
    assert gpu["total_bytes"] <= gpu["budget_bytes"] == int(11.5 * GIB)
    assert gpu["overhead_source"] == "assumed"
    layer_bytes = (gpu["weights_bytes"] + gpu["context_bytes"]) // plan["gpu_layers"]
    assert gpu["total_bytes"] + 1.2 * layer_bytes > gpu["budget_bytes"], "a layer's worth is left over"
    assert plan["layers"] == 81
    assert plan["argv"][0] == "llama-server"
    assert plan["argv"][plan["argv"].index("-ngl") + 1] == str(plan["gpu_layers"])
    assert plan["host"]["total_bytes"] == sum(v for k, v in plan["host"].items() if k != "total_bytes")
    more = run_cli(
        "plan", header_70b, "--virtual-gpu", "12GiB", "--vram", "11.5GiB", "-c", "4096", "--",
        "-ngl", str(plan["gpu_layers"] + 1),
    )  # fmt: skip
    assert more.returncode == 3
    assert seconds < 10, "it takes half a second where nothing else runs; the benchmark measures it"


def test_a_plan_for_people_shows_the_command(smollm2: Path) -> None:
    result = run_cli("plan", smollm2, *CARD)
    assert result.returncode == 0, result.stderr
    assert "layers on the GPU" in result.stdout
    assert "a CUDA context of 300.0 MiB, assumed until it is measured" in result.stdout
    assert shlex.split(result.stdout.splitlines()[-1])[-2:] == ["-fit", "off"]


def test_dry_run_is_the_command_that_works(smollm2: Path) -> None:
    result = run_cli("serve", smollm2, *CARD, "--port", "8099", "--dry-run", "--", "--alias", "two words")
    words = shlex.split(result.stdout)
    program = next(i for i, word in enumerate(words) if "=" not in word)
    assert words[program].endswith("/llama-server")
    assert words[words.index("--alias") + 1] == "two words"
    assert words[words.index("--port") + 1] == "8099"
    assert any(word.startswith("PYLLAMARUN_VIRTUAL_GPUS=450") for word in words[:program])


def test_passed_arguments_are_counted(smollm2: Path) -> None:
    def context_bytes(*more: str) -> int:
        result = run_cli("plan", smollm2, "--virtual-gpu", "2GiB", "--json", *more)
        (gpu,) = json.loads(result.stdout)["data"]["devices"]
        size: int = gpu["context_bytes"]
        return size

    f16, q8 = context_bytes(), context_bytes("--", "-ctk", "q8_0", "-ctv", "q8_0")
    # 34 bytes for 32 values instead of 64; and CUDA pads the last row of each of 60 tensors from 192 to 512 values,
    # 340 bytes, which are aligned to 128.
    assert q8 == f16 * 34 // 64 + 60 * 384


def test_no_gpu_means_the_cpu(smollm2: Path, binaries: Binaries) -> None:
    if binaries.build.backend != "cpu":
        pytest.skip("this build may see a GPU")
    plan = json.loads(run_cli("plan", smollm2, "--json").stdout)["data"]
    assert (plan["devices"], plan["gpu_layers"]) == ([], 0)
    assert plan["host"]["mapped_bytes"] > 90 * MIB


def test_a_context_above_the_trained_one_is_warned_about(smollm2: Path) -> None:
    result = run_cli("plan", smollm2, "--virtual-gpu", "2GiB", "-c", "16384")
    assert "longer than the 8,192 that the model was trained with" in result.stdout


ERRORS = {
    "a missing file": (["plan", "/nonexistent.gguf"], 2, "There is no file"),
    "no GGUF": (["plan", "/etc/passwd"], 4, "is not a GGUF file"),
    "a budget below the least": (["plan", "{model}", *CARD, "--vram", "310MiB"], 3, "Even with every layer on the CPU"),
    "a budget below the overhead": (["plan", "{model}", *CARD, "--vram", "9MiB"], 3, "and may use 9.0 MiB"),
    "no budget at all": (["plan", "{model}", *CARD, "--vram", "0"], 3, "and may use 0 B"),
    "a context above any": (["plan", "{model}", "-c", "2147483647"], 2, "not between 1 and 16,777,216"),
    "a budget above the card": (["plan", "{model}", *CARD, "--vram", "1GiB"], 3, "the card has 450.0 MiB"),
    "a budget for RAM above the machine": (["plan", "{model}", "--ram", "9999TiB"], 3, "this machine has"),
    "a budget for RAM that is none": (["plan", "{model}", "--ram", "8GiB,8GiB"], 2, "is no size"),
    "a budget for RAM below the least": (["plan", "{model}", *CARD, "--ram", "1MiB"], 3, "--ram allows 1.0 MiB"),
    "an empty budget": (["plan", "{model}", *CARD, "--vram", ""], 2, "is no size"),
    "an empty list of cards": (["plan", "{model}", "--virtual-gpu", ""], 2, "is no size"),
    "a card larger than any": (["plan", "{model}", "--virtual-gpu", "9999999TiB"], 2, "neither a card nor the size"),
    "a model after --": (["plan", "{model}", "--", "-m", "other.gguf"], 2, "cannot stand after"),
    "a port after --": (["serve", "{model}", "--", "--port=1"], 2, "cannot stand after"),
    "llama-server's version": (["plan", "{model}", "--", "--version"], 5, "The memory probe ended"),
    "a size that is none": (["plan", "{model}", *CARD, "--vram", "much"], 2, "is no size"),
    "one argument too many": (["plan", "{model}", "extra"], 2, "one argument too many"),
    "an option of llama.cpp that does not exist": (["plan", "{model}", "--", "--nonsense"], 2, "--nonsense"),
    "options that do not go together": (["plan", "{model}", "--", "-ctv", "q8_0", "-fa", "off"], 2, "flash_attn"),
    "a command that does not exist": (["fly"], 2, "No such command"),
    "no model": (["plan"], 2, "No model is named"),
    "an empty prompt": (["run", "{model}", "-p", " "], 2, "The prompt is empty"),
}


@pytest.mark.parametrize(("arguments", "exit_code", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(arguments: list[str], exit_code: int, message: str, smollm2: Path) -> None:
    arguments = [argument.format(model=smollm2) for argument in arguments]
    result = run_cli(*arguments)
    assert result.returncode == exit_code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_an_unknown_architecture_is_an_error_of_the_model(tmp_path: Path) -> None:
    spec = synthetic.llama()
    spec.arch = "nonesuch"
    result = run_cli("plan", synthetic.write(spec, tmp_path / "model.gguf"), *CARD)
    assert result.returncode == 4
    assert "llama.cpp does not know the architecture nonesuch" in result.stderr


def test_ram_has_a_budget_too(header_70b: Path) -> None:
    """Mapped weights may be read again; what is copied into memory must fit."""
    card = ("--virtual-gpu", "12GiB")
    small = json.loads(run_cli("plan", header_70b, *card, "--ram", "16GiB", "--json").stdout)["data"]
    assert small["residency"]["verdict"] == "reread"
    assert small["residency"]["limit_bytes"] == 16 * GIB
    assert small["argv"][-2:] == ["--cache-ram", "0"]
    large = run_cli("plan", header_70b, *card, "--ram", "64GiB")
    assert "All of it stays in memory" in large.stdout
    copied = run_cli("plan", header_70b, *card, "--ram", "16GiB", "--", "-lm", "none")
    assert (copied.returncode, "of it pinned; --ram allows 16.00 GiB" in copied.stderr) == (3, True)
    forced = run_cli("plan", header_70b, *card, "--ram", "16GiB", "--force", "--", "-lm", "none")
    assert (forced.returncode, "was forced" in forced.stdout) == (0, True)


def test_an_overhead_that_is_given_is_what_the_card_reserves(smollm2: Path) -> None:
    result = run_cli("plan", smollm2, "--virtual-gpu", "700MiB", "--overhead", "500MiB", "--json")
    assert result.returncode == 0, result.stdout
    plan = json.loads(result.stdout)["data"]
    assert plan["gpu_layers"] == plan["layers"]
    assert plan["devices"][0]["overhead_bytes"] == 500 * MIB


def test_settings_of_llama_cpp_in_the_environment_do_not_change_a_plan(smollm2: Path) -> None:
    plans = [
        json.loads(run_cli("plan", smollm2, *CARD, "--ram", "8GiB", "--json", **variables).stdout)["data"]
        for variables in ({}, {"LLAMA_ARG_DEVICE": "none", "LLAMA_ARG_CTX_SIZE": "64"})
    ]
    for plan in plans:
        del plan["residency"]  # what is available changes by the second
    assert plans[0] == plans[1]


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&-", "| true", "2>&1 >/dev/null | true"])
def test_closed_streams_change_no_exit_code(streams: str, smollm2: Path) -> None:
    for arguments, exit_code in (f"plan {smollm2} --json", 0), ("plan /nonexistent.gguf --json", 2):
        command = f"set -o pipefail; {PYLLAMARUN} {arguments} {streams}"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert result.returncode == exit_code or "|" in streams, result.stderr
        assert "Traceback" not in result.stderr + result.stdout


def test_errors_as_json(smollm2: Path) -> None:
    for arguments, exit_code in (
        (["plan", "/nonexistent.gguf"], 2),
        (["plan", str(smollm2), *CARD, "--vram", "9MiB"], 3),
    ):
        result = run_cli(*arguments, "--json")
        envelope = json.loads(result.stdout)
        assert result.returncode == envelope["error"]["exit_code"] == exit_code
        assert envelope["ok"] is False
        assert envelope["data"] is None
        assert envelope["error"]["what"]


def test_missing_binaries_say_where_they_were_looked_for(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "build.json").write_text('{"tag": "b1", "commit": "x", "backend": "cpu"}')
    result = run_cli("plan", smollm2, PYLLAMARUN_BIN_DIR=str(tmp_path))
    assert result.returncode == 5
    assert f"pyllamarun-probe is missing from {tmp_path}" in result.stderr


def test_a_driver_that_never_answers_is_given_up(smollm2: Path, binaries: Binaries, tmp_path: Path) -> None:
    for path in binaries.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    hanging = tmp_path / "pyllamarun-probe"
    hanging.unlink()
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    variables = {"PYLLAMARUN_BIN_DIR": str(tmp_path), "PYLLAMARUN_DRIVER_SECONDS": "0.5"}
    plan = run_cli("plan", smollm2, **variables)
    assert (plan.returncode, plan.stdout) == (5, "")
    assert "llama.cpp did not list the GPUs within 0.5 seconds" in plan.stderr
    assert "`nvidia-smi`" in plan.stderr
    assert "--gpu" in plan.stderr
    doctor = run_cli("doctor", **variables)
    assert (doctor.returncode, "did not list the GPUs" in doctor.stdout) == (5, True)
    for wrong in ("soon", "-1", "nan", "inf"):
        refused = run_cli("plan", smollm2, **variables | {"PYLLAMARUN_DRIVER_SECONDS": wrong})
        assert (refused.returncode, "is no number of seconds" in refused.stderr) == (2, True)


# ------------------------------------------------------------------------------------------------ doctor


def test_doctor() -> None:
    result = run_cli("doctor", "--json", "--virtual-gpu", "12GiB")
    assert result.returncode == 0, result.stdout
    data = json.loads(result.stdout)["data"]
    rows = {row["topic"]: row for row in data["rows"]}
    assert rows["binaries"]["status"] == "ok"
    assert "b11312 (0c1e570)" in rows["binaries"]["text"]
    assert "virtual 12.00 GiB GPU" in rows["virtual GPU"]["text"]
    assert data["memory"]["total_bytes"] > data["memory"]["available_bytes"] > 0
    assert data["cpu"]["physical_cores"] >= 1
    for row in data["rows"]:
        assert row["status"] in ("ok", "warning", "failure")
        assert row["status"] == "ok" or row["remedy"]


def test_doctor_finds_binaries_of_another_commit(binaries: Binaries, tmp_path: Path) -> None:
    for path in binaries.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    record = json.loads((binaries.folder / "build.json").read_text())
    (tmp_path / "build.json").unlink()
    (tmp_path / "build.json").write_text(json.dumps(record | {"commit": "f" * 40}))
    result = run_cli("doctor", PYLLAMARUN_BIN_DIR=str(tmp_path))
    assert result.returncode == 5
    assert "failure  binaries" in result.stdout


# ------------------------------------------------------------------------------------------------ run


def test_run_answers_with_part_of_the_model_on_a_card_too_small_for_it(smollm2: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    plan = json.loads(run_cli("plan", smollm2, *CARD, "--json").stdout)["data"]
    assert 0 < plan["gpu_layers"] < plan["layers"]
    result = run_cli(
        "run", smollm2, *CARD, "-p", QUESTION, "-n", "24", "--", "--temp", "0",
        PYLLAMARUN_VIRTUAL_STATE=str(state),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert result.stdout.count("\n") <= 3, "nothing but the answer"
    (device,) = read_state(state)
    buffers = plan["devices"][0]["total_bytes"] - plan["devices"][0]["overhead_bytes"]
    assert 300 * MIB + buffers * 0.9 < device.peak_bytes <= 300 * MIB + buffers


def test_run_does_not_take_a_prompt_for_a_command(smollm2: Path) -> None:
    result = run_cli("run", smollm2, "-p", "/exit", "-n", "8", "--", "--temp", "0")
    assert result.returncode == 0
    assert result.stdout.strip()


PROMPTS = {
    "longer than llama-cli repeats": "Say yes. " * 60,
    "with what looks like an escape": r"What does \n mean in C?",
    "with line breaks of another system": "Say yes.\r\nOr say no.",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_run_answers_any_prompt(prompt: str, smollm2: Path) -> None:
    result = run_cli("run", smollm2, "-p", prompt, "-n", "6", "--", "--temp", "0", "--ignore-eos")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_run_reports_a_prompt_that_is_longer_than_the_context(smollm2: Path) -> None:
    result = run_cli("run", smollm2, "-p", "-", "-n", "6", stdin="word " * 30_000)  # and longer than an argument may be
    assert result.returncode == 2, result.stderr
    assert "The prompt is longer than the context" in result.stderr
    assert result.stdout == ""


def test_run_reports_memory_that_ran_out(smollm2: Path) -> None:
    result = run_cli("run", smollm2, *CARD, "--force", "-p", "Hi", "-n", "4", "--", "-ngl", "99")
    assert result.returncode == 3
    assert "The GPU's memory ran out" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_run_leaves_nothing_behind(number: signal.Signals, smollm2: Path) -> None:
    arguments = ["run", smollm2, "-p", "Count to a million.", "--", "--ignore-eos"]
    process = start_cli(*arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout
    assert process.stdout.read(8), "an answer begins"
    children = psutil.Process(process.pid).children(recursive=True)
    assert [child.name() for child in children] == ["llama-cli"]
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    process.stdout.close()


# ------------------------------------------------------------------------------------------------ serve


class Serving:
    """`pyllamarun serve`, started; its stdout is read by a thread."""

    def __init__(self, *arguments: str | Path) -> None:
        self.port = free_port()
        words = ["serve", *arguments[:1], "--port", str(self.port), *arguments[1:]]
        self.process = start_cli(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.lines: list[str] = []
        self.log: list[str] = []
        self._threads = [
            threading.Thread(target=lambda: self.lines.extend(self.process.stdout or [])),
            threading.Thread(target=lambda: self.log.extend(self.process.stderr or [])),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream
            stream.close()

    def wait_until_ready(self) -> None:
        wait_for(lambda: bool(self.lines) or self.process.poll() is not None, "ready")
        assert self.lines == [f"ready: http://127.0.0.1:{self.port}\n"], "".join(self.log)[-2000:]

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def test_serve_serves_within_the_plan(smollm2: Path) -> None:
    with Serving(smollm2, *CARD) as serving:
        serving.wait_until_ready()
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{serving.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert "Paris" in json.load(answer)["choices"][0]["message"]["content"]


def test_serve_has_the_chat_page(smollm2: Path, binaries: Binaries) -> None:
    if not binaries.build.has_chat_page:
        pytest.skip("built without npm: no chat page")
    with Serving(smollm2) as serving:
        serving.wait_until_ready()
        request = urllib.request.Request(f"http://127.0.0.1:{serving.port}/", headers={"Accept-Encoding": "gzip"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/html")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_serve_stops_the_server(number: signal.Signals, smollm2: Path) -> None:
    with Serving(smollm2) as serving:
        serving.wait_until_ready()
        children = serving.children()
        serving.process.send_signal(number)
        assert serving.process.wait(20) == 128 + number
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive


def test_a_killed_serve_takes_the_server_along(smollm2: Path) -> None:
    with Serving(smollm2) as serving:
        serving.wait_until_ready()
        children = serving.children()
        assert children
        serving.process.kill()
        serving.process.wait()
        wait_for(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children), "the end", 5)


def test_a_port_in_use_is_refused_before_anything_is_loaded(smollm2: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_cli("serve", smollm2, "--port", str(port))
    assert result.returncode == 6
    assert f"127.0.0.1:{port} cannot be used" in result.stderr
    assert "load_model" not in result.stderr


def test_a_server_that_ends_by_itself_is_an_error(smollm2: Path) -> None:
    with Serving(smollm2) as serving:
        serving.wait_until_ready()
        (child,) = serving.children()
        os.kill(child.pid, signal.SIGKILL)
        assert serving.process.wait(20) == 6
    assert "It ended by signal 9" in "".join(serving.log)


def test_a_server_whose_memory_runs_out_says_so(smollm2: Path) -> None:
    result = run_cli("serve", smollm2, *CARD, "--force", "--port", str(free_port()), "--", "-ngl", "99")
    assert result.returncode == 3
    assert "The GPU's memory ran out" in result.stderr
