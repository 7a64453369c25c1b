"""quantize: the whole file or none, nothing overwritten, and what it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import run_cli, start_cli
from misbehaving import RemoteContent, Server
from remote_models import REPOSITORY, publish

from pyllamarun.models import provenance, stores, unfinished
from pyllamarun.models.download import sha256_of
from pyllamarun.models.gguf import read_header
from pyllamarun.models.quantize import default_target
from pyllamarun.run.binaries import Binaries

Wrapped = Callable[[str], str]


@pytest.fixture
def source(smollm2: Path, tmp_path: Path) -> Path:
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.symlink_to(smollm2)
    return path


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny one, in Q4_0."""
    path = tmp_path / "tiny-Q4_0.gguf"
    shutil.copy(tiny("llama"), path)
    return path


@pytest.fixture
def wrapped(binaries: Binaries, tmp_path: Path) -> Wrapped:
    """A folder of the programs in which llama-quantize, when it is to write a file, is a shell script: $REAL is the
    program, $OUT the file that it would write."""

    def of(script: str) -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        for path in binaries.folder.iterdir():
            if path.name != "llama-quantize":
                (folder / path.name).symlink_to(path)
        program = folder / "llama-quantize"
        lines = ["#!/bin/bash", f"REAL='{binaries.path('llama-quantize')}'"]
        lines += ['case "$*" in *--help*|*--dry-run*) exec "$REAL" "$@";; esac', "OUT=${@: -3:1}", script]
        program.write_text("\n".join(lines) + "\n")
        program.chmod(0o755)
        return str(folder)

    return of


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(unfinished.SUFFIX))


def models(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.gguf"))


def test_q2_k_is_warned_about(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.gguf"
    result = run_cli("quantize", model, "Q2_K", "-o", target, "--no-plan")
    assert result.returncode == 0, result.stderr
    assert "Q2_K loses much" in result.stderr
    assert target.exists()


def test_requantizing_says_what_it_costs(model: Path) -> None:
    result = run_cli("quantize", model, "Q3_K_M", "--no-plan", "--dry-run")
    assert "The source is Q4_0 already: quantizing it again loses more" in result.stderr


def test_an_existing_target_is_left_alone(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "taken.gguf"
    target.write_text("mine")
    result = run_cli("quantize", source, "Q3_K_M", "-o", target)
    assert result.returncode == 2
    assert "exists already" in result.stderr
    assert target.read_text() == "mine"


@pytest.mark.parametrize("name", ["dangling.gguf", "x" * 300 + ".gguf"])
def test_a_target_that_cannot_be_made_is_refused_before_the_work(name: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / name
    if len(name) < 255:
        target.symlink_to("/nonexistent/elsewhere.gguf")
    result = run_cli("quantize", source, "Q3_K_M", "-o", target)
    assert result.returncode == 2
    assert not leftovers(tmp_path)


def test_the_source_is_no_target(source: Path) -> None:
    result = run_cli("quantize", source, "Q3_K_M", "-o", source)
    assert (result.returncode, "The target is the source" in result.stderr) == (2, True)


def test_the_same_type_is_refused_by_any_of_its_names(model: Path, tmp_path: Path) -> None:
    assert run_cli("quantize", model, "Q4_K_M", "-o", tmp_path / "made.gguf", "--no-plan").returncode == 0
    for name in ("Q4_K_M", "q4_k"):
        result = run_cli("quantize", tmp_path / "made.gguf", name)
        assert (result.returncode, "is Q4_K_M already" in result.stderr) == (2, True)


def test_an_unknown_type_is_refused_with_those_that_exist(source: Path) -> None:
    result = run_cli("quantize", source, "Q9_X")
    assert result.returncode == 2
    assert 'no quantization type "Q9_X"' in result.stderr
    assert "Q3_K_M" in result.stderr


def test_a_type_that_needs_an_importance_matrix_says_so(source: Path, tmp_path: Path) -> None:
    result = run_cli("quantize", source, "Q3_K_M", "IQ2_XXS")
    assert (result.returncode, "needs an importance matrix" in result.stderr) == (2, True)
    assert models(tmp_path) == [source.name], "before the work, not after it"
    assert not leftovers(tmp_path)


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = run_cli("quantize", source, "Q3_K_M", "--dry-run", "--virtual-gpu", "450MiB")
    assert result.returncode == 0
    assert "120 are Q4_0 in place of Q3_K" in result.stdout, "rows of 576 are no multiple of 256"
    assert "llama-quantize --allow-requantize" in result.stdout
    assert models(tmp_path) == [source.name]


def test_a_full_disk_is_noticed_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyllamarun.errors import UsageError
    from pyllamarun.models import quantize

    full = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UsageError, match=r"1000 KiB|977 KiB"):
        quantize.check_disk(tmp_path, 10**8)


FAILURES = {
    "a full disk": ("trap '' XFSZ; ulimit -f 300; exec \"$REAL\" \"$@\"", 2, "took no more of the new file"),
    "a short file": ("\"$REAL\" \"$@\"; truncate -s -100000 \"$OUT\"", 4, "cannot be read back"),
    "no file": ("exit 0", 5, "wrote no tiny-Q3_K_M.gguf"),
    "another type": ("\"$REAL\" \"${@:1:$#-2}\" Q5_0 1", 4, "where it had announced"),
    "too long a file": ("\"$REAL\" \"$@\"; truncate -s +4096 \"$OUT\"", 4, "its tensors make"),
    "its end": ("kill -SEGV $$", 5, "ended by signal 11"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_midway_leaves_nothing(name: str, model: Path, wrapped: Wrapped, tmp_path: Path) -> None:
    script, code, words = FAILURES[name]
    result = run_cli("quantize", model, "Q3_K_M", "--no-plan", PYLLAMARUN_BIN_DIR=wrapped(script))
    assert result.returncode == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert models(tmp_path) == [model.name]
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    quiet = subprocess.DEVNULL
    process = start_cli("quantize", source, "Q5_K_M", "-t", "1", "--no-plan", stdout=quiet, stderr=quiet)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(f"*{unfinished.SUFFIX}/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert leftovers(tmp_path), "it never began"
    process.send_signal(number)
    assert process.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:
        assert unfinished.remove_dead(tmp_path) == 1, "as the next call does"
    assert not leftovers(tmp_path)
    assert models(tmp_path) == [source.name]


def test_the_next_call_clears_away_what_a_dead_one_left(model: Path, tmp_path: Path) -> None:
    left = tmp_path / f"{unfinished.PREFIX}dead{unfinished.SUFFIX}"
    left.mkdir()
    for name in ("made-00001-of-00002.gguf", "made-00002-of-00002.gguf"):
        (left / name).write_text("part")
    os.link(left / "made-00002-of-00002.gguf", tmp_path / "made-00002-of-00002.gguf")  # when it was killed
    with unfinished.partial_folder(tmp_path) as alive:
        shutil.copy(model, alive / "under-way.gguf")
        assert "under-way.gguf" not in {path.name for path in stores.gguf_files(tmp_path)}
        assert run_cli("quantize", model, "Q3_K_M", "--no-plan").returncode == 0
        assert leftovers(tmp_path) == [alive.name]
    assert models(tmp_path) == ["tiny-Q3_K_M.gguf", model.name]


def test_parts_appear_together_or_not_at_all(tmp_path: Path) -> None:
    from pyllamarun.errors import UsageError

    with unfinished.partial_folder(tmp_path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("mine")
        (tmp_path / "a").write_text("another's")
        with pytest.raises(UsageError, match="appeared meanwhile"):
            unfinished.publish(folder, ["a", "b"], tmp_path)
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a"]
    assert (tmp_path / "a").read_text() == "another's"


def test_without_a_probe_there_are_no_plans_and_the_file_all_the_same(model: Path, wrapped: Wrapped) -> None:
    folder = wrapped('exec "$REAL" "$@"')
    (Path(folder) / "pyllamarun-probe").unlink()
    result = run_cli("quantize", model, "Q3_K_M", PYLLAMARUN_BIN_DIR=folder)
    assert (result.returncode, "No plans: pyllamarun-probe is missing" in result.stderr) == (0, True), result.stderr
    result = run_cli("quantize", model, "--fit", "1GiB", PYLLAMARUN_BIN_DIR=folder)
    assert result.returncode == 5


def test_several_types_in_one_call(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    result = run_cli("quantize", model, "Q5_K_M", "Q3_K_M", "-o", folder, "--json", "--virtual-gpu", "450MiB")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)["data"]
    assert [one["type"] for one in data["results"]] == ["Q5_K_M", "Q3_K_M"]
    assert [one["type"] for one in data["what_if"]] == ["Q4_0", "Q5_K_M", "Q3_K_M"]
    for row, one in zip(data["what_if"][1:], data["results"]):
        assert row["weights_bytes"] == one["after_bytes"] == read_header(Path(one["target"])).weights_bytes
        assert row["plan"]["fits"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("~nosuchuser/model.gguf", "Q3_K_M"), "no home folder"),
        (("MODEL", "Q3_K_M", "-o", "~nosuchuser/out.gguf"), "no home folder"),
        (("MODEL", "Q3_K_M", "-o", "/nonexistent/out.gguf"), "There is no folder"),
        (("MODEL", "Q3_K_M", "-o", "nowhere/"), "There is no folder"),
        (("MODEL", "Q3_K_M", "Q2_K", "-o", "one.gguf"), "is no folder"),
        (("MODEL",), "Neither a type nor --fit"),
        (("MODEL", "Q3_K_M", "--fit", "1GiB"), "exclude each other"),
        (("MODEL", "--fit", "1GiB", "--speed", "quick"), "is no speed"),
        (("MODEL", "Q3_K_M", "--imatrix", "/nonexistent"), "There is no file"),
        (("MODEL", "Q3_K_M", "--imatrix", "auto", "/nonexistent"), "There is no file"),
        (("MODEL", "Q3_K_M", "--tensor-type", "attn_v=q9"), 'no tensor type "q9"'),
        (("MODEL", "Q3_K_M", "--tensor-type", "atn_v=q6_K"), 'is called "atn_v"'),
        (("MODEL", "Q3_K_M", "--output-tensor-type", "q9"), 'no tensor type "q9"'),
    ],
)
def test_what_cannot_be_done_ends_well(arguments: tuple[str, ...], words: str, model: Path) -> None:
    result = run_cli("quantize", *(model if word == "MODEL" else word for word in arguments))
    assert (result.returncode, words in result.stderr) == (2, True), result.stderr
    assert "Traceback" not in result.stderr


def test_an_importance_matrix_that_is_none_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "matrix").write_text("none")
    result = run_cli("quantize", model, "Q3_K_M", "--imatrix", tmp_path / "matrix", "--no-plan")
    assert (result.returncode, "Traceback" in result.stderr) == (5, False)
    assert models(tmp_path) == [model.name]


def test_relative_names_that_begin_with_a_number_are_no_types(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "3models").mkdir()
    monkeypatch.chdir(tmp_path)
    result = run_cli("quantize", model.name, "Q5_K_M", "-o", "3models/7b.gguf", "--no-plan")
    assert result.returncode == 0, result.stderr
    assert read_header(tmp_path / "3models/7b.gguf").file_type == "Q5_K_M"


def test_options_go_into_the_forecast_and_the_file(model: Path, tmp_path: Path) -> None:
    options = ["--tensor-type", "attn_v=q8_0", "--output-tensor-type", "Q5_0", "--token-embedding-type", "q4_1"]
    result = run_cli("quantize", model, "Q5_K_M", "--pure", *options, "--no-plan", "--json")
    assert result.returncode == 0, result.stderr
    types = {tensor.name: tensor.type.name for tensor in read_header(tmp_path / "tiny-Q5_K_M.gguf").tensors}
    assert (types["blk.0.attn_v.weight"], types["output.weight"], types["token_embd.weight"]) == (
        "Q8_0",
        "Q5_0",
        "Q4_1",
    )
    assert {types[f"blk.{i}.ffn_down.weight"] for i in range(4)} == {"Q5_K"}
    data = json.loads(result.stdout)["data"]
    counted = sum(role["tensors"] for role in data["what_if"][1]["roles"] if role["type"] == "Q8_0")
    assert counted == 4


@pytest.fixture
def split_model(model: Path, binaries: Binaries, tmp_path: Path) -> Path:
    argv = [binaries.path("llama-gguf-split"), "--split", "--split-max-tensors", "16", model, tmp_path / "parts-Q4_0"]
    subprocess.run(list(map(str, argv)), check=True, capture_output=True)
    model.unlink()
    return tmp_path / "parts-Q4_0-00001-of-00003.gguf"


def test_a_split_becomes_one_file_or_as_many(split_model: Path, tmp_path: Path) -> None:
    sources = models(tmp_path)
    assert run_cli("quantize", split_model, "Q3_K_M", "--no-plan").returncode == 0
    result = run_cli("quantize", split_model, "Q3_K_M", "--no-plan", "--keep-split", "--json")
    assert result.returncode == 0, result.stderr
    targets = [Path(target) for target in json.loads(result.stdout)["data"]["targets"]]
    assert [path.name for path in targets] == [f"parts-Q3_K_M-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert models(tmp_path) == sorted([*sources, "parts-Q3_K_M.gguf", *(path.name for path in targets)])
    one, several = read_header(tmp_path / "parts-Q3_K_M.gguf"), read_header(targets[0])
    assert {(t.name, t.type.name) for t in one.tensors} == {(t.name, t.type.name) for t in several.tensors}
    assert several.parts == tuple(targets)


def test_no_part_of_a_split_is_overwritten(split_model: Path, tmp_path: Path) -> None:
    taken = tmp_path / "parts-Q3_K_M-00002-of-00003.gguf"
    taken.write_text("mine")
    result = run_cli("quantize", split_model, "Q3_K_M", "--no-plan", "--keep-split")
    assert (result.returncode, "exists already" in result.stderr) == (2, True)
    assert taken.read_text() == "mine"


def said(path: Path) -> dict[str, str]:
    return provenance.read_provenance(read_header(path).metadata)


def test_a_file_says_where_it_comes_from(model: Path, binaries: Binaries, tmp_path: Path) -> None:
    run_cli("quantize", model, "Q5_K_M", "--hash-source", "--output-tensor-type", "q6_K", "--no-plan")
    first = said(tmp_path / "tiny-Q5_K_M.gguf")
    assert first["source"] == "tiny-Q4_0.gguf"
    assert first["source_sha256"] == sha256_of(model)
    assert (first["source_type"], first["type"]) == ("Q4_0", "Q5_K_M")
    assert first["options"] == "--output-tensor-type q6_K"
    assert binaries.build.commit in first["llama_cpp"]
    run_cli("quantize", tmp_path / "tiny-Q5_K_M.gguf", "Q3_K_M", "--no-plan")
    second = said(tmp_path / "tiny-Q3_K_M.gguf")
    assert second["source"] == "tiny-Q5_K_M.gguf"
    assert "source_sha256" not in second, "not that of the first"
    assert not list(tmp_path.glob("*.json"))


def test_what_the_file_cannot_hold_stands_beside_it(model: Path, tmp_path: Path) -> None:
    long = model.rename(tmp_path / f"{'ä' * 70}-Q4_0.gguf")
    result = run_cli("quantize", long, "Q3_K_M", "-o", tmp_path / "out.gguf", "--no-plan")
    assert result.returncode == 0, result.stderr
    assert said(tmp_path / "out.gguf")["source"] == "ä" * 63
    beside = json.loads((tmp_path / "out.gguf.provenance.json").read_text())
    assert beside["source"] == long.name


def test_a_model_in_hugging_faces_cache_is_not_written_beside(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "home/hf_home/hub/models--someone--Tiny-GGUF"
    digest = sha256_of(tiny("llama"))
    for part in ("blobs", "snapshots/" + "c" * 40):
        (folder / part).mkdir(parents=True)
    shutil.copy(tiny("llama"), folder / "blobs" / digest)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("c" * 40)
    (folder / "snapshots" / ("c" * 40) / "tiny-Q4_0.gguf").symlink_to(folder / "blobs" / digest)
    before = sorted(folder.rglob("*"))
    result = run_cli("quantize", "someone/Tiny-GGUF", "Q3_K_M", "--no-plan", "--json")
    assert result.returncode == 0, result.stderr
    target = Path(json.loads(result.stdout)["data"]["target"])
    assert target == tmp_path / "home/data/models/tiny-Q3_K_M.gguf"
    assert said(target)["source_sha256"] == digest, "which its name is"
    assert said(target)["source"] == "someone/Tiny-GGUF/tiny-Q4_0.gguf"
    assert sorted(folder.rglob("*")) == before


def test_a_model_of_ollamas_is_called_by_its_name(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder, digest = tmp_path / "home/ollama_models", sha256_of(tiny("llama"))
    manifest = folder / "manifests/registry.ollama.ai/library/tiny/8b-q4_0"
    for part in (manifest.parent, folder / "blobs"):
        part.mkdir(parents=True)
    layer = {"mediaType": stores.OLLAMA_MODEL, "digest": f"sha256:{digest}"}
    manifest.write_text(json.dumps({"layers": [layer]}))
    shutil.copy(tiny("llama"), folder / "blobs" / f"sha256-{digest}")
    result = run_cli("quantize", "tiny:8b-q4_0", "Q3_K_M", "--no-plan")
    assert result.returncode == 0, result.stderr
    made = tmp_path / "home/data/models/tiny-8b-Q3_K_M.gguf"
    assert (said(made)["source"], said(made)["source_sha256"]) == ("tiny:8b-q4_0", digest)


def test_a_model_that_is_not_here_is_looked_at_and_not_made(hugging_face: Server, model: Path) -> None:
    publish(hugging_face, {"model-Q4_0.gguf": RemoteContent(model.read_bytes())})
    name = f"hf:{REPOSITORY}/model-Q4_0.gguf"
    result = run_cli("quantize", name, "Q3_K_M", "--dry-run", "--json", "--virtual-gpu", "450MiB")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)["data"]
    assert data["what_if"][1]["plan"]["fits"]
    assert len(data["commands"]) == 1
    result = run_cli("quantize", name, "Q3_K_M")
    assert (result.returncode, f"pyllamarun pull {name}" in result.stderr) == (2, True)


def test_a_target_is_named_after_its_type(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    names = {
        "Model-8B-Q4_K_M.gguf": "Model-8B-Q3_K_M.gguf",
        "model.q4_k_s.gguf": "model.Q3_K_M.gguf",
        "model.gguf": "model-Q3_K_M.gguf",
        "Model-F16.gguf": "Model-Q3_K_M.gguf",
    }
    for name, expected in names.items():
        path = tmp_path / name
        os.link(tiny("llama"), path)
        assert default_target(read_header(path), "Q3_K_M").name == expected
