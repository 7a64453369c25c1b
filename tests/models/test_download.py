"""A file fetched over the network: whatever goes wrong, nothing is lost, and the final name is a right file's."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from misbehaving import (
    Behaviour,
    Handler,
    MadeUpContent,
    RemoteContent,
    Server,
    break_off,
    misbehaving,
    redirect,
    refuse,
    serve,
    stall,
    trickle,
    without_ranges,
)

from pyllamarun.errors import DownloadError
from pyllamarun.models.download import Fetched, Wanted, fetch
from pyllamarun.models.http import Patience, Web
from pyllamarun.models.partial import CHUNK_BYTES, Partial
from pyllamarun.models.refusals import Place
from pyllamarun.units import MIB

FILE, NAME, TOKEN = "/models/model.gguf", "model.gguf", "hf_do_not_print_me"
CONTENT = MadeUpContent(b"GGUF", 40 * MIB)
SHA256 = CONTENT.sha256
PROGRAM = """
import sys
from pathlib import Path
from pyllamarun.models.download import Wanted, fetch
from pyllamarun.models.http import Web
from pyllamarun.models.refusals import Place
url, target, sha256 = sys.argv[1:]
wanted = Wanted(Place(url, "the model"), Path(target), sha256=sha256)
fetched = fetch(Web(), wanted, say=lambda text: print(text, flush=True))
print(fetched.sha256, fetched.waited, fetched.transferred_bytes, flush=True)
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with misbehaving() as server:
        yield server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / NAME


def bring(url: str, target: Path, waits: list[float] | None = None, said: list[str] | None = None, **more: object):
    patience = Patience(stall_seconds=0.3, sleep=(waits if waits is not None else []).append)
    wanted = replace(Wanted(Place(url, "the model", login="set HF_TOKEN"), target), **more)  # type: ignore[arg-type]
    return fetch(Web(patience), wanted, say=(said if said is not None else []).append)


def assert_is_there(fetched: Fetched, target: Path, content: MadeUpContent = CONTENT, sha256: str = SHA256) -> None:
    assert names(target) == [NAME]
    assert hashlib.sha256(target.read_bytes()).hexdigest() == fetched.sha256 == sha256
    assert fetched.size_bytes == content.size


def names(target: Path) -> list[str]:
    """What stands beside it, and itself."""
    return sorted(path.name for path in target.parent.iterdir())


def interrupted(server: Server, target: Path, content: MadeUpContent = CONTENT, **more: object) -> int:
    """Begins a download that breaks off; how many bytes of it came."""
    url = server.at(FILE, *[break_off(content, 3 * MIB)] * 3, refuse(404))
    with pytest.raises(DownloadError) as caught:
        bring(url, target, **more)
    assert "are kept: it goes on from there" in caught.value.remedy
    assert not target.exists()
    there = Partial(target, lambda: None)
    there.close()
    assert there.done_bytes >= 3 * MIB
    return there.done_bytes


@pytest.mark.parametrize("behaviour", [serve, without_ranges])
def test_it_comes_whole_and_is_hashed_as_it_comes(
    server: Server, target: Path, behaviour: Callable[[RemoteContent], Behaviour]
) -> None:
    seen: list[tuple[int, int]] = []
    place = Place(server.at(FILE, behaviour(CONTENT)), "the model")
    fetched = fetch(Web(), Wanted(place, target, CONTENT.size, SHA256.upper()), lambda *sizes: seen.append(sizes))
    assert_is_there(fetched, target)
    assert fetched.etag == '"one"'
    assert (fetched.transferred_bytes, fetched.resumed_bytes, fetched.waited) == (CONTENT.size, 0, False)
    assert seen == sorted(seen)
    assert seen[-1] == (CONTENT.size, CONTENT.size)
    assert server.sent_bytes < CONTENT.size + 4096


@pytest.mark.parametrize("behaviour", [serve, without_ranges])
def test_it_goes_on_where_it_broke_off(
    server: Server, target: Path, behaviour: Callable[[RemoteContent], Behaviour]
) -> None:
    """A server that heeds no ranges any more sends all of it again; what is there is left as it is."""
    came = interrupted(server, target)
    fetched = bring(server.at(FILE, behaviour(CONTENT)), target)
    assert_is_there(fetched, target)
    assert fetched.resumed_bytes == came
    if behaviour is serve:
        assert fetched.transferred_bytes == CONTENT.size - came


OTHER = MadeUpContent(b"GGUFother", CONTENT.size, '"two"')
SHORTER = MadeUpContent(b"GGUF", MIB, '"three"')
NAMELESS = MadeUpContent(b"GGUF", CONTENT.size, "")


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        (CONTENT, serve(OTHER), "it has changed on its server"),
        (CONTENT, without_ranges(OTHER), "it has changed on its server"),
        (CONTENT, serve(SHORTER), "it has changed on its server"),
        (NAMELESS, serve(NAMELESS), "its server does not say which version it sends"),
    ],
    ids=["another ETag", "another ETag and no ranges", "shorter: 416", "no ETag"],
)
def test_another_version_is_fetched_anew_and_says_so(
    server: Server, target: Path, before: MadeUpContent, now: Behaviour, why: str
) -> None:
    interrupted(server, target, before)
    said: list[str] = []
    fetched = bring(server.at(FILE, now), target, said=said)
    assert said == [f"the model is fetched anew: {why}."]
    content = next(
        one for one in (OTHER, SHORTER, NAMELESS) if (one.etag, one.size) == (fetched.etag, fetched.size_bytes)
    )
    assert_is_there(fetched, target, content, content.sha256)
    assert fetched.resumed_bytes == 0


def test_without_an_etag_a_checksum_lets_it_go_on(server: Server, target: Path) -> None:
    came = interrupted(server, target, NAMELESS, sha256=SHA256)
    assert bring(server.at(FILE, serve(NAMELESS)), target, sha256=SHA256).resumed_bytes == came


def test_a_file_that_changes_meanwhile_is_an_error_and_comes_anew_next_time(server: Server, target: Path) -> None:
    url = server.at(FILE, serve(CONTENT), serve(OTHER))
    with pytest.raises(DownloadError, match="changed while it was fetched"):
        bring(url, target)
    assert_is_there(bring(url, target), target, OTHER, OTHER.sha256)


def a_body_that_ends_early(handler: Handler) -> None:
    start, end = handler.wanted(CONTENT)
    bounds = f"bytes {start}-{end - 1}/{CONTENT.size}"
    handler.answer(206, CONTENT.read(start, end - 1000), Content_Length=None, Content_Range=bounds, ETag=CONTENT.etag)
    handler.close_connection = True


def a_body_that_is_too_long(handler: Handler) -> None:
    start, end = handler.wanted(CONTENT)
    bounds = f"bytes {start}-{end - 1}/{CONTENT.size}"
    body = CONTENT.read(start, end) + bytes(5000)
    handler.answer(206, body, Content_Length=None, Content_Range=bounds, ETag=CONTENT.etag)
    handler.close_connection = True


@pytest.mark.parametrize(
    "fault",
    [
        a_body_that_ends_early,
        a_body_that_is_too_long,
        break_off(CONTENT, 5000),
        Handler.reset,
        stall(CONTENT, 5000),
        trickle(CONTENT, 0.02),
        without_ranges(CONTENT),
    ],
    ids=["shorter", "longer", "closed", "reset", "stalls", "trickles", "200 to a range"],
)
def test_a_connection_that_fails_midway_is_made_again(server: Server, target: Path, fault: Behaviour) -> None:
    fetched = bring(server.at(FILE, serve(CONTENT), fault, serve(CONTENT)), target)
    assert_is_there(fetched, target)


def test_a_server_that_never_gets_on_is_left(server: Server, target: Path) -> None:
    with pytest.raises(DownloadError, match="cannot be fetched") as caught:
        bring(server.at(FILE, break_off(CONTENT, 1000)), target)
    assert "an answer ended" in caught.value.why.lower() or "connection broke" in caught.value.why
    assert len(server.requests) <= 4 * Patience().attempts * 2


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(server: Server, target: Path, status: int) -> None:
    waits: list[float] = []
    url = server.at(FILE, serve(CONTENT), refuse(status, Retry_After=7), serve(CONTENT))
    assert_is_there(bring(url, target, waits), target)
    assert waits == [7]


def test_a_server_that_allows_one_connection_gets_one(server: Server, target: Path) -> None:
    lock = threading.Lock()

    def one_at_a_time(handler: Handler) -> None:
        if not lock.acquire(blocking=False):
            return refuse(429, Retry_After=3600)(handler)
        try:
            serve(CONTENT)(handler)
        finally:
            lock.release()

    assert_is_there(bring(server.at(FILE, one_at_a_time), target), target)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "wants a login"),
        (403, "forbids it"),
        (404, "does not know it"),
        (429, "wants fewer requests"),
        (503, "is overloaded"),
    ],
)
def test_refusals_are_told_apart_and_leave_nothing(server: Server, target: Path, status: int, words: str) -> None:
    with pytest.raises(DownloadError) as caught:
        bring(server.at(FILE, refuse(status, Retry_After=3600)), target)
    assert words in caught.value.why
    assert caught.value.exit_code == 4
    assert names(target) == []


def test_a_redirect_to_another_host_gets_no_token(server: Server, target: Path) -> None:
    """And neither the token nor the query of an address is in a message, or in what stays on the disk."""
    with misbehaving() as other:
        there = other.at("/blob", *[serve(CONTENT)] * 2, refuse(403))
        url = server.at(FILE, redirect(f"{there}?signature=secret"))
        place = Place(f"{url}?key=secret", "the model", TOKEN)
        with pytest.raises(DownloadError) as caught:
            fetch(Web(Patience(sleep=lambda _: None)), Wanted(place, target))
        assert all("Authorization" not in request.headers for request in other.requests)
        assert all(request.headers["Authorization"] == f"Bearer {TOKEN}" for request in server.requests)
    kept = [path for path in target.parent.iterdir() if path.suffix != ".partial"]
    for text in [str(caught.value), *(path.read_text("latin-1") for path in kept)]:
        assert "secret" not in text
        assert TOKEN not in text


def test_another_checksum_gives_no_file_and_keeps_what_came_aside(server: Server, target: Path) -> None:
    url = server.at(FILE, serve(CONTENT))
    with pytest.raises(DownloadError, match="not the file that was promised") as caught:
        bring(url, target, sha256="0" * 64)
    assert SHA256 in caught.value.why
    assert "Try again" in caught.value.remedy
    assert names(target) == [f"{NAME}.rejected"]
    assert_is_there(bring(url, target, sha256=SHA256), target)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<!DOCTYPE html><html>Log in</html>", "It is a web page."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "It is a Git-LFS pointer."),
        (b"PK\x03\x04 and so on", "It does not begin as a GGUF file does."),
        (b"", ""),
    ],
    ids=["HTML", "LFS", "a zip", "empty"],
)
@pytest.mark.parametrize("size_bytes", [None, CONTENT.size], ids=["size unknown", "size known"])
def test_what_is_no_model_leaves_nothing(
    server: Server, target: Path, body: bytes, why: str, size_bytes: int | None
) -> None:
    with pytest.raises(DownloadError, match="is no model|is empty") as caught:
        bring(server.at(FILE, serve(RemoteContent(body))), target, size_bytes=size_bytes)
    assert caught.value.why == why
    assert names(target) == []


@pytest.mark.parametrize("size_bytes", [None, CONTENT.size], ids=["size unknown", "size known"])
@pytest.mark.parametrize("page", [b"<html>Log in to the network</html>", b""], ids=["a page", "nothing"])
def test_a_login_page_takes_nothing_of_what_is_there(
    server: Server, target: Path, page: bytes, size_bytes: int | None
) -> None:
    came = interrupted(server, target)
    with pytest.raises(DownloadError, match="is no model|is empty") as caught:
        bring(server.at(FILE, serve(RemoteContent(page, etag=""))), target, size_bytes=size_bytes)
    assert "are kept: it goes on from there" in caught.value.remedy
    assert bring(server.at(FILE, serve(CONTENT)), target).resumed_bytes == came


def test_a_server_may_send_less_than_it_is_asked_for(server: Server, target: Path) -> None:
    def two_megabytes(handler: Handler) -> None:
        start, end = handler.wanted(CONTENT)
        end = min(end, start + 2 * MIB)
        bounds = f"bytes {start}-{end - 1}/{CONTENT.size}"
        handler.answer(206, CONTENT.read(start, end), Content_Range=bounds, ETag=CONTENT.etag)

    waits: list[float] = []
    assert_is_there(bring(server.at(FILE, two_megabytes), target, waits), target)
    assert waits == []


def test_a_size_other_than_announced_is_an_error_before_anything_is_kept(server: Server, target: Path) -> None:
    with pytest.raises(DownloadError, match="not the file that was announced"):
        bring(server.at(FILE, serve(CONTENT)), target, size_bytes=CONTENT.size + 1)
    assert names(target) == []


def test_a_disk_too_small_is_told_before_anything_is_written(server: Server, target: Path) -> None:
    with pytest.raises(DownloadError, match="free, and .* are needed"):
        bring(server.at(FILE, serve(RemoteContent(b"GGUF", 10**17))), target)
    assert names(target) == []
    assert server.sent_bytes < 64 * MIB


DISK_FULL = """
import os, subprocess, sys
from pathlib import Path
from pyllamarun.errors import DownloadError
from pyllamarun.models import disk, transfer
from pyllamarun.models.download import Wanted, fetch
from pyllamarun.models.http import Web
from pyllamarun.models.refusals import Place
url, folder, sha256 = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", folder], check=True)
wanted = Wanted(Place(url, "the model"), Path(folder, "model.gguf"), sha256=sha256)
filler = Path(folder, "filler")
def fill(*_):
    if not filler.exists():  # somebody else takes the room while it is on its way
        filler.write_bytes(bytes(30 << 20))
try:
    fetch(Web(), wanted, progress=fill)
except DownloadError as error:
    print(error, "|", sorted(os.listdir(folder)))
filler.unlink()
fetched = fetch(Web(), wanted)
print(fetched.resumed_bytes > 0, fetched.sha256, os.listdir(folder))
wanted.target.unlink()
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
try:
    fetch(Web(), wanted)
except DownloadError as error:
    print(error)
"""


def test_a_disk_that_fills_up_and_a_folder_that_is_read_only(server: Server, tmp_path: Path) -> None:
    """On a file system of its own: what came is kept, and it goes on once there is room."""
    alone = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    half = threading.Event()

    def slow_at_the_end(handler: Handler) -> None:
        if handler.wanted(CONTENT)[0] >= CHUNK_BYTES:
            half.wait(0.5)
        serve(CONTENT)(handler)

    argv = [*alone, sys.executable, "-c", DISK_FULL, server.at(FILE, slow_at_the_end), tmp_path, SHA256]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "is full.\nMake room there, and try again." in result.stdout
    assert "'model.gguf.partial', 'model.gguf.partial.journal']" in result.stdout
    assert f"True {SHA256} ['model.gguf']" in result.stdout
    assert "cannot be written.\nRead-only file system" in result.stdout


def test_a_folder_that_is_none(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be written"):
        bring(server.at(FILE, serve(CONTENT)), tmp_path / "file" / NAME)
    assert not server.requests


def test_a_target_that_is_there_is_used_or_left(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"GGUF and more")
    sha256 = hashlib.sha256(b"GGUF and more").hexdigest()
    url = server.at(FILE, serve(CONTENT))
    assert bring(url, target, sha256=sha256) == Fetched(target, 13, sha256, "", 0, 0, waited=False)
    for other in ({"sha256": SHA256}, {"size_bytes": 14}):
        with pytest.raises(DownloadError, match="is there already, and is not what is wanted"):
            bring(url, target, **other)
    assert target.read_bytes() == b"GGUF and more"
    assert not server.requests


def start(url: str, target: Path, sha256: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", PROGRAM, url, str(target), sha256]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_fetches_and_the_other_waits_and_uses_it(server: Server, target: Path) -> None:
    begun, waiting = threading.Event(), threading.Event()

    def held(handler: Handler) -> None:
        begun.set()
        assert waiting.wait(30)
        serve(CONTENT)(handler)

    url = server.at(FILE, held)
    with start(url, target, SHA256) as first:
        assert begun.wait(30)
        with start(url, target, SHA256) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == f"Another process is fetching {NAME}: waiting for it.\n"
            waiting.set()
            assert second.communicate()[0] == f"{SHA256} True 0\n"
        assert first.communicate()[0] == f"{SHA256} False {CONTENT.size}\n"
    assert names(target) == [NAME]


def test_when_the_first_process_dies_the_other_goes_on(server: Server, target: Path) -> None:
    asked = threading.Event()

    def first_chunk_only(handler: Handler) -> None:
        if handler.wanted(CONTENT)[0] and not asked.is_set():
            asked.wait(30)
        serve(CONTENT)(handler)

    url = server.at(FILE, first_chunk_only)
    with start(url, target, SHA256) as first:
        wait_until(lambda: server.sent_bytes > CHUNK_BYTES)
        with start(url, target, SHA256) as second:
            assert second.stdout is not None
            assert second.stdout.readline().startswith("Another process")
            first.kill()
            asked.set()
            digest, waited, transferred = second.communicate()[0].split()
    assert (digest, waited) == (SHA256, "False")
    assert int(transferred) <= CONTENT.size - CHUNK_BYTES


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    pause = threading.Event()
    for _ in range(int(seconds / 0.001)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it did not come to that")


def test_20_kills_cost_hardly_a_byte(server: Server, target: Path) -> None:
    """SIGKILL at 20 random moments of 300 MB; all that the server sends is at most 1.05 times the size."""
    content = MadeUpContent(b"GGUF", 300 * 10**6)
    sha256 = content.sha256
    url = server.at(FILE, serve(content))

    def reached(sent_bytes: int) -> bool:
        return server.sent_bytes >= sent_bytes

    moments = sorted(random.Random(20).sample(range(content.size), 20))
    for moment in moments:
        with start(url, target, sha256) as process:
            wait_until(partial(reached, moment))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not target.exists()
    with start(url, target, sha256) as process:
        assert process.communicate()[0].startswith(sha256)
    assert names(target) == [NAME]
    assert hashlib.sha256(target.read_bytes()).hexdigest() == sha256
    assert server.sent_bytes <= 1.05 * content.size


def test_ctrl_c_leaves_at_once_and_it_goes_on_later(server: Server, target: Path) -> None:
    def interrupt(done_bytes: int, _: int) -> None:
        if done_bytes:
            raise KeyboardInterrupt

    url = server.at(FILE, stall(CONTENT, 5 * MIB), serve(CONTENT))
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        fetch(Web(), Wanted(Place(url, "the model"), target), interrupt)
    wait_until(lambda: threading.active_count() <= before + len(server.requests))
    fetched = bring(url, target)
    assert_is_there(fetched, target)
    assert fetched.resumed_bytes >= 1


def test_after_a_power_cut_only_what_was_flushed_counts(server: Server, target: Path) -> None:
    came = interrupted(server, target)
    journal = target.with_name(f"{NAME}.partial.journal")
    line, _, tables = journal.read_bytes().partition(b"\n")
    fields = json.loads(line)
    assert set(fields) == {"version", "size_bytes", "chunk_bytes", "boot"}
    flushed = tables[: len(tables) // 2]
    journal.write_bytes(json.dumps(fields | {"boot": "another"}).encode() + b"\n" + bytes(len(flushed)) + flushed)
    fetched = bring(server.at(FILE, serve(CONTENT)), target)
    assert_is_there(fetched, target)
    assert fetched.resumed_bytes == 0 < came


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"[" * 100_000 + data,
        lambda data: b"[]\n" + data,
        lambda _: b'{"version": "x", "size_bytes": 1e300, "chunk_bytes": 1, "boot": 1}\n',
        lambda data: data.replace(b'"size_bytes": 41943040', b'"size_bytes": 41943041'),
        lambda data: data.partition(b"\n")[0] + b"\n" + b"\xff" * (len(data) - data.index(b"\n") - 1),
    ],
    ids=["empty", "shorter", "half", "nested", "a list", "numbers", "another size", "more than there is"],
)
def test_a_damaged_journal_costs_a_new_start_and_no_wrong_file(
    server: Server, target: Path, damage: Callable[[bytes], bytes]
) -> None:
    interrupted(server, target)
    journal = target.with_name(f"{NAME}.partial.journal")
    journal.write_bytes(damage(journal.read_bytes()))
    said: list[str] = []
    assert_is_there(bring(server.at(FILE, serve(CONTENT)), target, said=said), target)
    assert len(said) == 1


def test_a_partial_file_that_was_cut_is_not_trusted(server: Server, target: Path) -> None:
    interrupted(server, target)
    os.truncate(target.with_name(f"{NAME}.partial"), MIB)
    assert_is_there(bring(server.at(FILE, serve(CONTENT)), target), target)
