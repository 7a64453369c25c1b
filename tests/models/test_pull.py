"""pull, rm and verify against a server on this machine, and against huggingface_hub itself."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from harness import PYLLAMARUN, run_cli, start_cli
from huggingface_hub import hf_hub_download, scan_cache_dir, try_to_load_from_cache
from misbehaving import Behaviour, Handler, RemoteContent, Server, serve
from remote_models import COMMIT, REPOSITORY, TYPES, content, publish, sha256, split

from pyllamarun import output, paths
from pyllamarun.models.gguf import STRING, UINT32, Value, read_header
from pyllamarun.models.store import open_index
from pyllamarun.units import MIB

NAME = f"hf:{REPOSITORY}:Q4_0"
FILE = "Model-Q4_0.gguf"
OTHER_COMMIT = "d" * 40
SECONDS = 60.0  # that nothing takes, but for what hangs


def cache() -> Path:
    return Path(os.environ["HF_HOME"]) / "hub"


def repository() -> Path:
    return cache() / f"models--{REPOSITORY.replace('/', '--')}"


def done(*arguments: str | Path, **environment: str) -> Any:
    """What a command says with --json, having succeeded."""
    result = run_cli(*arguments, "--json", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)["data"]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> RemoteContent:
    return RemoteContent(tiny("llama").read_bytes())


def large(path: Path, *, layers: int = 1) -> RemoteContent:
    """A header that is sound, if no model of llama.cpp's, and 17 MiB of data a layer."""
    metadata = {"general.architecture": Value(STRING, "llama"), "llama.block_count": Value(UINT32, layers)}
    return content(path, metadata, [(f"blk.{n}.ffn_up.weight", TYPES["Q8_0"], (4096, 4096)) for n in range(layers)])


# ------------------------------------------------------------------------------------- what huggingface_hub finds


def test_huggingface_hub_finds_what_was_pulled_and_downloads_nothing(
    hugging_face: Server, model: RemoteContent
) -> None:
    publish(hugging_face, {f"sub/{FILE}": model})
    data = done("pull", NAME)
    path = Path(data["path"])
    assert (data["store"], data["here"], data["sha256"]) == ("huggingface", False, [sha256(model)])
    assert path.read_bytes() == model.head
    assert try_to_load_from_cache(REPOSITORY, f"sub/{FILE}", cache_dir=cache()) == str(path)
    assert hf_hub_download(REPOSITORY, f"sub/{FILE}", cache_dir=cache(), local_files_only=True) == str(path)
    before = len(hugging_face.requests)
    assert hf_hub_download(REPOSITORY, f"sub/{FILE}", cache_dir=cache(), endpoint=hugging_face.url) == str(path)
    assert len(hugging_face.requests) == before + 1, "it asks for the ETag, and for no byte"
    found = scan_cache_dir(cache())
    assert found.warnings == []
    (repo,) = found.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == (REPOSITORY, COMMIT, frozenset({"main"}))
    assert [(one.file_path, one.blob_path.name) for one in revision.files] == [(path, sha256(model))]


def test_what_huggingface_hub_downloaded_is_here(hugging_face: Server, model: RemoteContent) -> None:
    publish(hugging_face, {FILE: model})
    path = hf_hub_download(REPOSITORY, FILE, cache_dir=cache(), endpoint=hugging_face.url)
    sent = hugging_face.sent_bytes
    data = done("pull", NAME)
    assert (data["here"], data["path"], data["transferred_bytes"]) == (True, path, 0)
    assert hugging_face.sent_bytes == sent


def test_another_revision_of_the_same_content_is_a_link(hugging_face: Server, model: RemoteContent) -> None:
    publish(hugging_face, {FILE: model})
    publish(hugging_face, {FILE: model}, revision="v2", commit=OTHER_COMMIT)
    done("pull", NAME)
    data = done("pull", f"{NAME}@v2")
    assert (data["transferred_bytes"], data["file_bytes"]) == (0, model.size)
    assert [path.name for path in (repository() / "blobs").iterdir()] == [sha256(model)]
    assert (repository() / "refs/v2").read_text() == OTHER_COMMIT


def test_all_parts_of_a_split_come_and_the_projector_when_asked(hugging_face: Server, tmp_path: Path) -> None:
    metadata = {"general.architecture": Value(STRING, "llama"), "llama.block_count": Value(UINT32, 2)}
    tensors = [(f"blk.{n}.ffn_up.weight", TYPES["F16"], (64, 64)) for n in range(2)]
    names = [f"sub/m-Q4_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    parts = dict(zip(names, split(tmp_path / "p.gguf", metadata, tensors, 2)))
    projector = content(tmp_path / "v", {"general.architecture": Value(STRING, "clip")}, tensors[:1])
    publish(hugging_face, parts | {"mmproj-BF16.gguf": projector, "mmproj-F16.gguf": projector})
    alone = done("pull", NAME)
    assert alone["projector"] is None
    assert alone["file_bytes"] == sum(one.size for one in parts.values())
    data = done("pull", NAME, "--mmproj")
    assert (data["path"], data["transferred_bytes"]) == (alone["path"], projector.size)
    done("rm", data["path"], "--yes")
    done("rm", data["projector"], "--yes")
    data = done("pull", NAME, "--mmproj")
    assert [Path(path).name for path in data["parts"]] == [Path(name).name for name in names]
    assert Path(data["projector"]).name == "mmproj-F16.gguf"
    assert data["file_bytes"] == sum(one.size for one in parts.values()) + projector.size
    assert len(read_header(Path(data["path"])).tensors) == 2
    assert done("pull", NAME, "--mmproj")["here"]


@pytest.mark.parametrize("hash_of_server", ["../../../../outside", "", 3, "A" * 64])
def test_what_a_server_calls_a_hash_is_no_path(
    hash_of_server: object, hugging_face: Server, model: RemoteContent
) -> None:
    """Such a file goes to pyllamarun's own folder."""
    publish(hugging_face, {FILE: model})
    siblings = [{"rfilename": FILE, "size": model.size, "lfs": {"sha256": hash_of_server}, "blobId": hash_of_server}]
    listing = RemoteContent(json.dumps({"sha": COMMIT, "siblings": siblings}).encode())
    hugging_face.at(f"/api/models/{REPOSITORY}/revision/main", serve(listing))
    data = done("pull", NAME)
    assert data["path"] == str(paths.models_folder() / REPOSITORY / FILE)
    assert files(cache()) == set()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "Unset HF_HUB_OFFLINE"),
        ({"HF_HUB_CACHE": "/dev/null/hub"}, "set HF_HUB_CACHE to a folder that is"),
        ({"PYLLAMARUN_HOME": "/dev/null/home"}, "set PYLLAMARUN_HOME to a folder that is"),
    ],
)
def test_where_a_folder_cannot_be_used_it_says_so(
    environment: dict[str, str], words: str, hugging_face: Server, model: RemoteContent
) -> None:
    publish(hugging_face, {FILE: model})
    result = run_cli("pull", NAME, **environment)
    assert result.returncode in (2, 4), result.stderr
    assert words in result.stderr


# ------------------------------------------------------------------------------------------------------ addresses


def test_a_model_at_an_address_goes_to_the_own_folder_and_its_query_nowhere(
    hugging_face: Server, model: RemoteContent
) -> None:
    url = hugging_face.at("/files/m.gguf", serve(model))
    result = run_cli("pull", f"{url}?token=s3cr3t", "--sha256", sha256(model).upper())
    assert result.returncode == 0, result.stderr
    path = paths.models_folder() / f"127.0.0.1:{hugging_face.server_port}" / "files/m.gguf"
    assert path.read_bytes() == model.head
    assert str(path) in result.stdout
    assert sha256(model) in result.stdout
    assert "s3cr3t" not in result.stdout + result.stderr
    kept = [file for file in Path(os.environ["PYLLAMARUN_HOME"]).rglob("*") if file.is_file()]
    assert [file for file in kept if b"s3cr3t" in file.read_bytes()] == []
    assert done("verify", path, "--deep")["models"][0]["verdict"] == "matches"


def test_another_checksum_than_was_given_leaves_nothing(hugging_face: Server, model: RemoteContent) -> None:
    url = hugging_face.at("/m.gguf", serve(model))
    assert run_cli("pull", url, "--sha256", "0" * 64).returncode == 4
    assert not list(paths.models_folder().rglob("*.gguf"))
    publish(hugging_face, {FILE: model})
    sent = hugging_face.sent_bytes
    result = run_cli("pull", NAME, "--sha256", "0" * 64)
    assert result.returncode == 4, "the repository says so already"
    assert hugging_face.sent_bytes < sent + MIB
    done("pull", url, "--sha256", sha256(model))
    assert run_cli("pull", url, "--sha256", "0" * 64).returncode == 4, "nor is the one that is here another"


# ----------------------------------------------------------------------------------------------------- here already


def test_the_same_file_in_another_programs_store_is_used(hugging_face: Server, model: RemoteContent) -> None:
    publish(hugging_face, {FILE: model})
    path = Path(os.environ["PYLLAMARUN_LMSTUDIO_MODELS"]) / REPOSITORY / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(model.head[:-1])
    assert not done("pull", NAME)["here"], "another size"
    run_cli("rm", NAME, "--yes")
    path.write_bytes(model.head)
    data = done("pull", NAME)
    assert (data["here"], data["store"], data["path"]) == (True, "lmstudio", str(path))
    assert "LM Studio" in run_cli("pull", NAME).stdout


def test_the_same_content_in_ollamas_store_is_used(hugging_face: Server, model: RemoteContent) -> None:
    publish(hugging_face, {FILE: model})
    folder = Path(os.environ["OLLAMA_MODELS"])
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{sha256(model)}"}]
    manifest = folder / "manifests/registry.ollama.ai/library/tiny/latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": layers}))
    blob = folder / "blobs" / f"sha256-{sha256(model)}"
    blob.parent.mkdir()
    blob.write_bytes(model.head)
    data = done("pull", NAME)
    assert (data["here"], data["store"], data["path"]) == (True, "ollama", str(blob))
    refused = run_cli("rm", "tiny:latest", "--yes")
    assert (refused.returncode, blob.exists()) == (2, True)
    assert "ollama rm tiny:latest" in refused.stderr


# ------------------------------------------------------------------------------------------- before the first byte


def test_what_does_not_fit_is_pulled_only_when_a_person_says_so(hugging_face: Server, model: RemoteContent) -> None:
    publish(hugging_face, {FILE: model})
    box = ("--virtual-gpu", "310MiB", "--vram", "10MiB")
    result = run_cli("pull", NAME, *box)
    assert result.returncode == 3, result.stderr
    assert "--yes" in result.stderr
    for answer, code in (("n", 3), ("y", 0)):
        text, status = on_a_terminal(["pull", NAME, *box], answer)
        assert "does not fit" in text
        assert status == code, text
    assert "B/s" in text, "a bar, with its rate"
    run_cli("rm", NAME, "--yes")
    assert done("pull", NAME, *box, "--yes")["fits"]["verdict"] == "no"


def on_a_terminal(arguments: list[str], answer: str) -> tuple[str, int]:
    """What a command shows there, and its status, when its question is answered so."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([PYLLAMARUN, *arguments], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = ""
    while select.select([ours], [], [], SECONDS)[0]:
        try:
            piece = os.read(ours, 4096).decode()
        except OSError:  # the other end is closed
            break
        text += piece
        if "[y/N] " in piece:
            os.write(ours, answer.encode() + b"\n")
    os.close(ours)
    return text, process.wait(SECONDS)


def test_a_disk_without_room_is_told_before_the_first_byte(hugging_face: Server, tmp_path: Path) -> None:
    metadata = {"general.architecture": Value(STRING, "llama")}
    huge = content(tmp_path / "h", metadata, [("t", TYPES["F32"], (2**20, 2**20))])
    publish(hugging_face, {FILE: huge})
    result = run_cli("pull", NAME, "--yes")
    assert result.returncode == 4, result.stderr
    assert "There is not enough room" in result.stderr
    assert "4096.00 GiB more are needed" in result.stderr
    assert not repository().exists()


def test_fit_takes_the_model_that_plans_recommend(hugging_face: Server, tiny: Callable[[str], Path]) -> None:
    """The larger one does not fit."""
    small, other = (RemoteContent(tiny(name).read_bytes()) for name in ("llama", "qwen2"))
    publish(hugging_face, {"m-Q8_0.gguf": small, "m-F16.gguf": other})
    recommended = done("plan", f"hf:{REPOSITORY}", "--virtual-gpu", "2GiB", "--vram", "400MiB")["recommended"]
    data = done("pull", f"hf:{REPOSITORY}", "--fit", "400MiB", "--virtual-gpu", "2GiB")
    assert recommended
    assert Path(data["path"]).name == f"m-{recommended}.gguf"
    refused = run_cli("pull", f"hf:{REPOSITORY}", "--fit", "10MiB", "--virtual-gpu", "2GiB")
    assert refused.returncode == 3, refused.stderr


def test_quantize_makes_a_smaller_file_of_what_was_pulled(hugging_face: Server, tiny: Callable[[str], Path]) -> None:
    publish(hugging_face, {FILE: RemoteContent(tiny("llama-k-quants").read_bytes())})
    refused = run_cli("pull", NAME, "--quantize", "Q9_9")
    assert refused.returncode == 2, "before the first byte"
    assert not repository().exists()
    result = run_cli("pull", NAME, "--quantize", "Q3_K_M", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    pulled, made = (json.loads(line) for line in result.stdout.splitlines())
    assert (pulled["kind"], made["kind"]) == ("pull", "quantize")
    assert Path(made["data"]["target"]).parent == paths.models_folder()
    assert read_header(Path(made["data"]["target"])).file_type == "Q3_K_M"


def test_where_there_is_no_terminal_a_line_tells_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "LINE_SECONDS", 0.0)
    with output.transfer("m.gguf", 4 * MIB, MIB) as progress:
        progress(3 * MIB, 4 * MIB)
    assert re.fullmatch(r"m\.gguf: 3\.0 MiB of 4\.0 MiB, [\d.]+ .?i?B/s, \d\.\d s left\n", capsys.readouterr().err)
    with output.transfer("m.gguf", 4 * MIB, 3 * MIB) as progress:
        progress(3 * MIB, 4 * MIB)
    assert capsys.readouterr().err == "m.gguf: 3.0 MiB of 4.0 MiB, 0 B/s\n", "nothing came, so nothing is foretold"


# ------------------------------------------------------------------------------------------------ several processes


@dataclass
class Held:
    """A server's answer that stops midway, until it is let go."""

    content: RemoteContent
    reached: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)

    def behaviour(self) -> Behaviour:
        """As it should be for headers; the data come in two pieces."""
        soundly = serve(self.content)

        def behave(handler: Handler) -> None:
            _, end = handler.wanted(self.content)
            if end and end <= len(self.content.head) + MIB:
                soundly(handler)
                return
            write = handler.write
            sent = 0

            def held(data: bytes) -> None:
                nonlocal sent
                for position in range(0, len(data), MIB // 2):
                    write(data[position : position + MIB // 2])
                    sent += MIB // 2
                    if sent > MIB // 2 and not self.let_go.is_set():
                        self.reached.set()
                        self.let_go.wait(SECONDS)

            vars(handler)["write"] = held
            soundly(handler)

        return behave


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts commands, of which none outlives the test."""
    with ExitStack() as stack:

        def started(*arguments: str) -> subprocess.Popen[str]:
            process: subprocess.Popen[str] = start_cli(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield started


@pytest.fixture
def held(hugging_face: Server, tmp_path: Path) -> Iterator[Held]:
    """A repository whose file comes to a stop midway."""
    held = Held(large(tmp_path / "made"))
    publish(hugging_face, {FILE: held.content})
    hugging_face.at(f"/{REPOSITORY}/resolve/{COMMIT}/{FILE}", held.behaviour())
    yield held
    held.let_go.set()


def says(process: subprocess.Popen[str], words: str) -> str:
    """Reads what it says on stderr up to a line with these words."""
    assert process.stderr
    said = ""
    for line in process.stderr:
        if words in line:
            return line
        said += line
    raise AssertionError(f"it ended without saying {words}:\n{said}")


def test_of_two_pulls_of_one_file_one_downloads_and_the_other_uses_it(
    hugging_face: Server, held: Held, start: Start
) -> None:
    first = start("pull", NAME, "--json")
    assert held.reached.wait(SECONDS)
    second = start("pull", NAME, "--json")
    says(second, "Another process pulls it already")
    held.let_go.set()
    results = [json.loads(process.communicate(timeout=SECONDS)[0])["data"] for process in (first, second)]
    assert [one["waited"] for one in results] == [False, True]
    assert [one["transferred_bytes"] for one in results] == [held.content.size, 0]
    assert hugging_face.sent_bytes < held.content.size + 2 * MIB


def test_list_verify_and_rm_are_safe_while_a_pull_runs(held: Held, start: Start) -> None:
    pull = start("pull", NAME)
    assert held.reached.wait(SECONDS)
    listed = done("list", "--no-plan")
    assert listed["models"] == []
    (begun,) = listed["begun"]
    assert begun["command"] == f"pyllamarun pull hf:{REPOSITORY}/{FILE}"
    assert begun["size_bytes"] == held.content.size
    assert "To go on: pyllamarun pull" in run_cli("list", "--no-plan").stdout
    assert run_cli("verify").returncode == 0
    for name in (f"hf:{REPOSITORY}/{FILE}", begun["path"]):
        refused = run_cli("rm", name, "--yes")
        assert refused.returncode == 2, refused.stderr
        assert "another process pulls it" in refused.stderr
    held.let_go.set()
    out, err = pull.communicate(timeout=SECONDS)
    assert pull.returncode == 0, out + err
    assert done("list", "--no-plan")["begun"] == []
    assert done("verify", "--deep")["models"][0]["verdict"] == "matches"


def test_rm_of_a_neighbour_leaves_a_pull_its_folders(
    hugging_face: Server, held: Held, model: RemoteContent, start: Start
) -> None:
    publish(hugging_face, {"n-Q8_0.gguf": model})
    done("pull", f"hf:{REPOSITORY}/n-Q8_0.gguf")
    publish(hugging_face, {FILE: held.content})
    hugging_face.at(f"/{REPOSITORY}/resolve/{COMMIT}/{FILE}", held.behaviour())
    pull = start("pull", NAME)
    assert held.reached.wait(SECONDS)
    assert done("rm", f"hf:{REPOSITORY}/n-Q8_0.gguf", "--yes")["freed_bytes"] == model.size
    held.let_go.set()
    out, err = pull.communicate(timeout=SECONDS)
    assert pull.returncode == 0, out + err
    assert scan_cache_dir(cache()).warnings == []


def test_an_interrupted_pull_says_how_to_go_on_and_goes_on(held: Held, start: Start) -> None:
    pull = start("pull", NAME)
    assert held.reached.wait(SECONDS)
    pull.send_signal(signal.SIGINT)
    line = says(pull, "Interrupted")
    pull.communicate(timeout=SECONDS)
    assert pull.returncode == 130
    assert f"To go on: pyllamarun pull hf:{REPOSITORY}/{FILE}" in line
    assert not (repository() / "snapshots" / COMMIT / FILE).exists()
    held.let_go.set()
    data = done("pull", NAME)
    assert data["resumed_bytes"] > 0
    assert data["transferred_bytes"] + data["resumed_bytes"] == data["file_bytes"] == held.content.size
    assert done("list", "--no-plan")["begun"] == []


def test_rm_takes_away_what_came_of_a_pull_that_was_interrupted(held: Held, start: Start) -> None:
    pull = start("pull", NAME)
    assert held.reached.wait(SECONDS)
    pull.kill()
    pull.communicate(timeout=SECONDS)
    (begun,) = done("list", "--no-plan")["begun"]
    done("rm", begun["source"], "--yes")
    assert done("list", "--no-plan")["begun"] == []
    assert not repository().exists()


def test_rm_finds_what_came_whole_and_was_not_linked_yet(hugging_face: Server, model: RemoteContent) -> None:
    publish(hugging_face, {FILE: model})
    data = done("pull", NAME)
    Path(data["path"]).unlink()
    with open_index() as index:
        index.begin(Path(data["path"]), data["source"], [repository() / "blobs" / sha256(model)], model.size)
    done("rm", data["source"], "--yes")
    assert not repository().exists()


# ------------------------------------------------------------------------------------------------------------- rm


def test_rm_frees_what_huggingface_hub_would(hugging_face: Server, model: RemoteContent, tmp_path: Path) -> None:
    """Of two revisions that share a file, the first goes without it."""
    other = large(tmp_path / "made")
    publish(hugging_face, {FILE: model, "n-Q8_0.gguf": other})
    publish(hugging_face, {FILE: model}, revision="v2", commit=OTHER_COMMIT)
    for name in (NAME, f"hf:{REPOSITORY}/n-Q8_0.gguf", f"{NAME}@v2"):
        done("pull", name)
    theirs = scan_cache_dir(cache()).delete_revisions(COMMIT)
    removed = [done("rm", name, "--yes") for name in (NAME, f"hf:{REPOSITORY}/n-Q8_0.gguf")]
    assert [one["freed_bytes"] for one in removed] == [0, other.size]
    assert removed[0]["shared_bytes"] == model.size
    assert sum(one["freed_bytes"] for one in removed) == theirs.expected_freed_size
    found = scan_cache_dir(cache())
    assert found.warnings == []
    assert [one.commit_hash for repo in found.repos for one in repo.revisions] == [OTHER_COMMIT]
    assert not (repository() / "refs/main").exists()
    assert done("rm", f"{NAME}@v2", "--yes")["freed_bytes"] == model.size
    assert not repository().exists()


def test_rm_keeps_off_what_huggingface_hub_is_getting(hugging_face: Server, model: RemoteContent) -> None:
    publish(hugging_face, {FILE: model})
    done("pull", NAME)
    with FileLock(cache() / ".locks" / repository().name / f"{sha256(model)}.lock"):
        refused = run_cli("rm", NAME, "--yes")
    assert refused.returncode == 2, refused.stderr
    assert run_cli("verify", "--deep").returncode == 0


def test_rm_removes_all_parts_and_empty_folders_and_asks_first(tiny: Callable[[str], Path]) -> None:
    folder = paths.models_folder() / "host/below"
    folder.mkdir(parents=True)
    path = Path(shutil.copy(tiny("llama"), folder / "m.gguf"))
    refused = run_cli("rm", path)
    assert (refused.returncode, path.exists()) == (2, True)
    assert "--yes" in refused.stderr
    assert on_a_terminal(["rm", "host/below/m.gguf"], "n")[1] == 2
    text, status = on_a_terminal(["rm", "host/below/m.gguf"], "y")
    assert status == 0, text
    assert "free again" in text
    assert list(paths.models_folder().iterdir()) == []


def test_rm_removes_nothing_that_no_store_keeps(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny("llama"), tmp_path / "mine.gguf"))
    refused = run_cli("rm", path, "--yes")
    assert (refused.returncode, path.exists()) == (2, True)
    assert run_cli("rm", "nothing", "--yes").returncode == 2


# --------------------------------------------------------------------------------------------------------- verify


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_verify_finds_a_single_bit_in_a_model_of_a_store(hugging_face: Server, model: RemoteContent) -> None:
    publish(hugging_face, {FILE: model})
    path = Path(done("pull", NAME)["path"])
    flip(path)
    assert done("verify", NAME)["models"][0]["verdict"] == "sound", "the header alone does not tell"
    result = run_cli("verify", NAME, "--deep")
    assert result.returncode == 4
    assert "damaged" in result.stdout
    assert hashlib.sha256(path.read_bytes()).hexdigest() in result.stdout
    told = json.loads(run_cli("verify", "--deep", "--json").stdout)
    assert [one["verdict"] for one in told["data"]["models"]] == ["damaged"]


def test_verify_records_a_checksum_where_there_is_none(tiny: Callable[[str], Path]) -> None:
    paths.models_folder().mkdir(parents=True)
    path = Path(shutil.copy(tiny("llama"), paths.models_folder() / "m.gguf"))
    assert done("verify", "--deep")["models"][0]["verdict"] == "recorded"
    assert done("verify", "--deep")["models"][0]["verdict"] == "matches"
    flip(path)
    assert run_cli("verify", "--deep").returncode == 4


def test_verify_finds_what_is_cut_or_missing(tiny: Callable[[str], Path]) -> None:
    folder = paths.models_folder()
    folder.mkdir(parents=True)
    os.truncate(shutil.copy(tiny("llama"), folder / "cut.gguf"), 100_000)
    shutil.copy(tiny("llama"), folder / "half-00001-of-00002.gguf")
    shutil.copy(tiny("llama"), folder / "whole.gguf")
    result = run_cli("verify")
    assert result.returncode == 4
    assert "2 of 3 models are not sound" in result.stderr
    assert run_cli("verify", "whole.gguf").returncode == 0
