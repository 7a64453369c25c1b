"""The index: what it keeps, several processes at it, and what becomes of it when it is damaged or gone."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import run_cli

from pyllamarun import paths
from pyllamarun.models.store import Index, UnderWay, known_sha256, no_pulls, open_index, pulling

SHA256 = "ab" * 32


def index_file() -> Path:
    return paths.state_folder() / "index.sqlite"


def test_what_is_kept_of_a_file_is_there_for_the_next_process(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"content")
    with open_index() as index:
        index.keep_file(file, SHA256, source="hf:o/r:Q4_0", origin="https://host/m.gguf", revision="c" * 40, etag="e")
    with open_index() as index:
        record = index.file(file)
        assert record is not None
        assert (record.source, record.origin, record.revision) == ("hf:o/r:Q4_0", "https://host/m.gguf", "c" * 40)
        assert known_sha256(file, index) == SHA256
        file.write_bytes(b"changed")
        os.utime(file, ns=(1, 1))
        assert known_sha256(file, index) == "", "of content that is no more"


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no database": lambda file: file.write_bytes(b"something else, and more of it than a header of SQLite has" * 99),
    "cut": lambda file: os.truncate(file, 5000),
    "zeros in the middle": lambda file: file.write_bytes(file.read_bytes()[:2000] + bytes(20000)),
    "of another version": lambda file: sqlite3.connect(file).execute("PRAGMA user_version = 99"),
    "another program's": lambda file: (file.unlink(), sqlite3.connect(file).execute("CREATE TABLE file (x)")),
    "empty": lambda file: os.truncate(file, 0),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_put_aside_and_made_anew(damage: str, tiny: Callable[[str], Path]) -> None:
    folder = paths.models_folder()
    folder.mkdir(parents=True)
    for number in range(40):
        os.link(tiny("llama"), folder / f"m{number}.gguf")
    before = run_cli("list", "--json", "--no-plan")
    DAMAGES[damage](index_file())
    after = run_cli("list", "--json", "--no-plan")
    assert after.returncode == 0, after.stderr
    assert after.stdout == before.stdout
    is_told = damage not in ("empty", "gone")
    assert ("was put aside" in after.stderr) == is_told
    assert index_file().with_name("index.sqlite.damaged").exists() == is_told
    with open_index() as index:
        assert len(index.headers()) == 40
    assert run_cli("list", "--json", "--no-plan").stderr == ""


def test_without_a_folder_to_write_to_everything_works_and_nothing_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    with Index(file / "index.sqlite") as index:
        index.keep_file(file, SHA256)
        assert index.file(file) is not None
    assert file.read_bytes() == b""


def test_many_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    """All make the index at the same time, too."""
    code = """
import sys
from pathlib import Path
from pyllamarun.models.store import open_index
folder, own = Path(sys.argv[1]), int(sys.argv[2])
for number in range(20):
    file = folder / f"{own}-{number}"
    file.write_bytes(b"")
    with open_index() as index:
        index.keep_file(file, "ab" * 32)
"""
    running = [subprocess.Popen([sys.executable, "-c", code, tmp_path, str(own)]) for own in range(6)]
    assert [process.wait() for process in running] == [0] * 6
    with open_index() as index:
        missing = [(a, b) for a in range(6) for b in range(20) if index.file(tmp_path / f"{a}-{b}") is None]
    assert missing == []


def test_a_pull_of_a_model_keeps_others_out_until_its_process_ends(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from pyllamarun.models.store import pulling
with pulling(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
    model = tmp_path / "m.gguf"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UnderWay), pulling(model):
        pass
    with pulling(tmp_path / "another.gguf"):
        pass
    with no_pulls() as quiet:
        assert not quiet
    holder.kill()
    holder.communicate()
    with pulling(model):
        pass
    with no_pulls() as quiet:
        assert quiet


def test_a_path_that_is_no_text_is_listed_all_the_same(tiny: Callable[[str], Path]) -> None:
    folder = paths.models_folder()
    folder.mkdir(parents=True)
    os.link(tiny("llama"), os.fsencode(folder) + b"/caf\xe9.gguf")
    result = run_cli("list", "--json", "--no-plan")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [model["architecture"] for model in json.loads(result.stdout)["data"]["models"]] == ["llama"]
