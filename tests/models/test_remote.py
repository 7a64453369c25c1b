"""Headers over the network: what little is fetched, and every way in which a server can fail."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
import synthetic
from harness import run_cli
from misbehaving import (
    Behaviour,
    Handler,
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
from remote_models import TYPES, small, split, vocabulary

from pyllamarun.errors import DownloadError, ModelError, PyllamarunError
from pyllamarun.models.gguf import STRING, Header, Value, read_header
from pyllamarun.models.http import Patience, Web
from pyllamarun.models.refusals import Place
from pyllamarun.models.remote import RemoteFile, read_remote_header
from pyllamarun.units import GIB, MIB

FILE = "/models/model.gguf"
TOKEN = "hf_do_not_print_me"


@pytest.fixture
def server() -> Iterator[Server]:
    with misbehaving() as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> RemoteContent:
    """With a header of 64 KiB at least, so that it takes several requests."""
    model = small(tmp_path / "made.gguf", tokens=20_000)
    assert len(model.head) > 256 << 10
    return model


class Waits:
    """Stands for sleeping, and remembers for how long."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def read(url: str, *, token: str | None = None, page: str = "", waits: Waits | None = None) -> Header:
    """The header of what lies at an address, by a reader with little patience."""
    sleep = waits or Waits()
    patience = Patience(connect_seconds=2, stall_seconds=0.3, sleep=sleep)
    login = "set HF_TOKEN" if page else ""
    with closing(Web(patience)) as web:

        def find(path: Path) -> RemoteFile:
            address = url.rpartition("/")[0] + "/" + path.name
            return RemoteFile(Place(address, path.name, token, page, login))

        return read_remote_header(web, Path("kept") / url.rpartition("/")[2], find)


# ------------------------------------------------------------------------------------------------ what is fetched


def test_a_header_is_read_with_little_more_traffic_than_its_size(server: Server, model: RemoteContent) -> None:
    header = read(server.at(FILE, serve(model)))
    assert (header.architecture, header.vocabulary_size, header.file_bytes) == ("llama", 20_000, model.size)
    assert header.path == Path("kept/model.gguf")
    assert server.sent_bytes < len(model.head) + MIB // 2
    assert len(server.requests) < 8


@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_it_is_the_header_that_the_file_has(architecture: str, tiny: Callable[[str], Path], server: Server) -> None:
    path = tiny(architecture)
    local, remote = read_header(path), read(server.at(FILE, serve(RemoteContent(path.read_bytes()))))
    assert (remote.metadata, remote.tensors, remote.file_bytes) == (local.metadata, local.tensors, local.file_bytes)


@pytest.mark.parametrize("tokens", [0, 3000, 100_000, 400_000])
def test_traffic_is_bounded_for_headers_of_any_size(tokens: int, server: Server, tmp_path: Path) -> None:
    model = small(tmp_path / "made.gguf", tokens=tokens)
    read(server.at(FILE, serve(model)))
    assert server.sent_bytes < len(model.head) + MIB


def test_what_is_known_to_be_needed_is_fetched_at_once(server: Server, tmp_path: Path) -> None:
    """Each of the 400,000 tokens takes at least the 8 bytes of its length."""
    model = small(tmp_path / "made.gguf", tokens=400_000)
    read(server.at(FILE, serve(model)))
    ranges = [request.headers["Range"].removeprefix("bytes=").split("-") for request in server.requests]
    assert max(int(end) - int(start) for start, end in ranges) > 400_000 * 8 - MIB


def test_a_server_without_ranges_is_left_where_the_header_ends(server: Server, model: RemoteContent) -> None:
    header = read(server.at(FILE, without_ranges(model)))
    assert header.vocabulary_size == 20_000
    assert len(server.requests) == 1
    assert server.sent_bytes < len(model.head) + MIB


@pytest.mark.parametrize("answer", [serve, without_ranges])
def test_a_split_model_of_40_gb_is_planned_from_its_headers(
    answer: Callable[[RemoteContent], Behaviour], server: Server, tmp_path: Path
) -> None:
    import llama_70b_header

    metadata = llama_70b_header.metadata(file_type=15) | {"tokenizer.ggml.tokens": vocabulary(128_256)}
    tensors = [(name, llama_70b_header.q4_k_m(name, shape), shape) for name, shape in llama_70b_header.shapes()]
    parts = split(tmp_path / "made.gguf", metadata, tensors, 2)
    assert all(part.size > 18 * 10**9 for part in parts)
    for number, part in enumerate(parts, 1):
        server.at(f"/70b-0000{number}-of-00002.gguf", answer(part))
    url = f"{server.url}/70b-00001-of-00002.gguf"
    result = run_cli("plan", url, "--virtual-gpu", "12GiB", "--vram", "11.5GiB", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    plan = json.loads(result.stdout)["data"]
    assert plan["weights_bytes"] > 39 * GIB
    assert 0 < plan["gpu_layers"] < plan["layers"]
    assert (plan["source"], plan["here"]) == (url, False)
    assert plan["argv"][plan["argv"].index("-m") + 1] == plan["model"]
    assert plan["model"].endswith(f"/models/127.0.0.1:{server.server_port}/70b-00001-of-00002.gguf")
    assert not Path(plan["model"]).exists()
    assert server.sent_bytes <= sum(len(part.head) for part in parts) + MIB


@pytest.mark.parametrize("count", [2, 9, 30])
def test_traffic_is_bounded_for_all_parts_together(count: int, server: Server, tmp_path: Path) -> None:
    tensors = [(f"blk.{number}.ffn_up.weight", TYPES["Q8_0"], (4096, 4096)) for number in range(count * 30)]
    parts = split(tmp_path / "made.gguf", {"general.architecture": Value(STRING, "llama")}, tensors, count)
    for number, part in enumerate(parts, 1):
        server.at(f"/m-{number:05d}-of-{count:05d}.gguf", serve(part))
    header = read(f"{server.url}/m-00001-of-{count:05d}.gguf")
    assert len(header.tensors) == len(tensors)
    assert (len(header.parts), header.file_bytes) == (count, sum(part.size for part in parts))
    assert server.sent_bytes <= sum(len(part.head) for part in parts) + MIB


def test_parts_of_another_model_are_refused_as_those_of_a_local_one(server: Server, tmp_path: Path) -> None:
    tensors = [(f"blk.{number}.ffn_up.weight", TYPES["Q8_0"], (64, 64)) for number in range(4)]
    first, _ = split(tmp_path / "made.gguf", {"general.architecture": Value(STRING, "llama")}, tensors, 2)
    server.at("/m-00001-of-00002.gguf", serve(first))
    server.at("/m-00002-of-00002.gguf", serve(first))
    with pytest.raises(ModelError, match="m-00002-of-00002.gguf is not part 2 of 2"):
        read(f"{server.url}/m-00001-of-00002.gguf")


def test_a_missing_part_is_named(server: Server, tmp_path: Path) -> None:
    tensors = [(f"blk.{number}.ffn_up.weight", TYPES["Q8_0"], (64, 64)) for number in range(4)]
    first, _ = split(tmp_path / "made.gguf", {"general.architecture": Value(STRING, "llama")}, tensors, 2)
    server.at("/m-00001-of-00002.gguf", serve(first))
    with pytest.raises(DownloadError, match="There is no m-00002-of-00002.gguf"):
        read(f"{server.url}/m-00001-of-00002.gguf")


# ----------------------------------------------------------------------------------------------- connections that break


def test_a_reset_midway_is_resumed_where_it_broke(server: Server, model: RemoteContent) -> None:
    header = read(server.at(FILE, break_off(model, 10_000), break_off(model, 5_000), serve(model)))
    assert header.vocabulary_size == 20_000
    ranges = [request.headers["Range"] for request in server.requests]
    assert [text.partition("-")[0] for text in ranges[:3]] == ["bytes=0", "bytes=10000", "bytes=15000"]


def test_a_server_without_ranges_that_breaks_off_is_begun_again(server: Server, model: RemoteContent) -> None:
    def once(handler: Handler) -> None:
        handler.answer(200, model.head[:50_000], Content_Length=model.size, ETag=model.etag)
        handler.reset()

    assert read(server.at(FILE, once, without_ranges(model))).vocabulary_size == 20_000


def test_one_that_goes_on_breaking_is_told_after_some_tries(server: Server, model: RemoteContent) -> None:
    with pytest.raises(DownloadError, match="cannot be read") as caught:
        read(server.at(FILE, break_off(model, 1)))
    assert "so it went 4 times" in caught.value.why
    assert len(server.requests) == 4


def until_closed(model: RemoteContent, change: Callable[[bytes], bytes]) -> Behaviour:
    """A range without its length, which ends where the connection does; and what `change` makes of it."""

    def behaviour(handler: Handler) -> None:
        start, end = handler.wanted(model)
        bounds = f"bytes {start}-{end - 1}/{model.size}"
        body = change(model.read(start, end))
        handler.answer(206, body, Content_Length=None, Connection="close", Content_Range=bounds, ETag=model.etag)
        handler.close_connection = True

    return behaviour


def test_a_body_that_ends_early_is_asked_for_again(server: Server, model: RemoteContent) -> None:
    short = until_closed(model, lambda body: body[:-9])
    assert read(server.at(FILE, short, serve(model))).vocabulary_size == 20_000
    assert server.requests[1].headers["Range"].startswith(f"bytes={(64 << 10) - 9}-")


def test_a_body_that_is_longer_than_announced_harms_nothing(server: Server, model: RemoteContent) -> None:
    def long(handler: Handler) -> None:
        start, end = handler.wanted(model)
        bounds = f"bytes {start}-{end - 1}/{model.size}"
        body = model.read(start, end) + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
        handler.answer(206, body, Content_Length=end - start, Content_Range=bounds, ETag=model.etag)

    tokens, told = 0, ""
    try:
        tokens = read(server.at(FILE, long, serve(model))).vocabulary_size
    except DownloadError as error:
        told = error.what
    # What comes after it may come so late that it begins the next answer, which is told.
    assert tokens == 20_000 or "changed while it was read" in told


def test_a_body_without_a_length_may_be_too_long(server: Server, model: RemoteContent) -> None:
    too_long = until_closed(model, lambda body: body + b"more")
    assert read(server.at(FILE, too_long)).vocabulary_size == 20_000


def test_bodies_that_stay_empty_are_told_after_some_tries(server: Server, model: RemoteContent) -> None:
    with pytest.raises(DownloadError, match="cannot be read") as caught:
        read(server.at(FILE, until_closed(model, lambda _: b"")))
    assert "bytes early" in caught.value.why


@pytest.mark.parametrize("after", [0, 1000])
def test_a_stall_is_noticed(after: int, server: Server, model: RemoteContent) -> None:
    start = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        read(server.at(FILE, stall(model, after)))
    assert "Nothing came for 0.3 seconds" in caught.value.why
    assert time.monotonic() - start < 10


def test_a_stall_is_got_over(server: Server, model: RemoteContent) -> None:
    assert read(server.at(FILE, stall(model, 1000), serve(model))).vocabulary_size == 20_000
    assert server.requests[1].headers["Range"].startswith("bytes=1000-")


def test_a_trickle_is_a_stall(server: Server, model: RemoteContent) -> None:
    with pytest.raises(DownloadError) as caught:
        read(server.at(FILE, trickle(model, 0.05)))
    assert "bytes came in" in caught.value.why


def test_a_server_that_accepts_and_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DownloadError) as caught:
        read(f"http://127.0.0.1:{silent.getsockname()[1]}/model.gguf")
    assert "did not answer within 0.3 seconds" in caught.value.why


def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    waits = Waits()
    with pytest.raises(DownloadError, match="cannot be reached") as caught:
        read(f"http://127.0.0.1:{port}/model.gguf", waits=waits)
    assert "Connection refused" in caught.value.why
    assert waits.seconds == []


# ---------------------------------------------------------------------------------------------- one version of one file


def test_a_file_that_changes_midway_is_an_error(server: Server, model: RemoteContent) -> None:
    with pytest.raises(DownloadError, match="changed while it was read"):
        read(server.at(FILE, serve(model), serve(replace(model, etag='"two"'))))
    assert server.requests[1].headers["If-Range"] == '"one"'


def test_a_file_that_changes_without_another_etag_is_known_by_its_size(server: Server, model: RemoteContent) -> None:
    with pytest.raises(DownloadError, match="changed while it was read") as caught:
        read(server.at(FILE, serve(model), serve(replace(model, size=model.size + 32))))
    assert f"{model.size + 32:,}" in caught.value.why


def test_a_file_that_shrinks_midway_is_an_error(server: Server, model: RemoteContent) -> None:
    small = RemoteContent(model.head[:1000])
    with pytest.raises(DownloadError, match="changed while it was read"):
        read(server.at(FILE, serve(model), serve(small)))


def test_a_weak_etag_is_compared_but_not_sent(server: Server, model: RemoteContent) -> None:
    weak = replace(model, etag='W/"one"')
    assert read(server.at(FILE, serve(weak))).vocabulary_size == 20_000
    assert all("If-Range" not in request.headers for request in server.requests)
    with pytest.raises(DownloadError, match="changed"):
        read(server.at("/other.gguf", serve(weak), serve(replace(weak, etag='W/"two"'))))


def test_a_416_for_what_should_be_there_is_an_error(server: Server, model: RemoteContent) -> None:
    past = refuse(416, Content_Range=f"bytes */{model.size}", ETag=model.etag)
    with pytest.raises(DownloadError) as caught:
        read(server.at(FILE, serve(model), past))
    assert "past the end" in caught.value.why


def test_an_empty_file_is_no_model(server: Server) -> None:
    with pytest.raises(ModelError) as caught:
        read(server.at(FILE, serve(RemoteContent(b""))))
    assert caught.value.why == "It is empty."


def test_a_file_cut_anywhere_is_one_clear_error(server: Server, tmp_path: Path) -> None:
    head = small(tmp_path / "made.gguf", tokens=10).head
    for size in (1, 3, 4, 20, len(head) // 2, len(head)):
        with pytest.raises(ModelError, match="cut.gguf is"):
            read(server.at("/cut.gguf", serve(RemoteContent(head[:size]))))


IMPOSTORS = {
    "a web page": (b"<!DOCTYPE html>\n<html><body>Please log in</body></html>", "It is a web page"),
    "another web page": (b"\n\n <html lang=en>" + bytes(100), "It is a web page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "It is a Git-LFS pointer"),
    "something else": (b"PK\x03\x04" + bytes(100), "It begins with b'PK"),
}


@pytest.mark.parametrize(("body", "why"), IMPOSTORS.values(), ids=IMPOSTORS)
@pytest.mark.parametrize("answer", [serve, without_ranges])
def test_what_stands_in_place_of_a_model_is_told(
    answer: Callable[[RemoteContent], Behaviour], body: bytes, why: str, server: Server
) -> None:
    with pytest.raises(ModelError, match="model.gguf is not a GGUF file") as caught:
        read(server.at(FILE, answer(RemoteContent(body))))
    assert why in caught.value.why
    assert caught.value.exit_code == 4


# ----------------------------------------------------------------------------------------------- answers that are wrong


def wrong_range(model: RemoteContent, shift: int, more: int) -> Behaviour:
    def behaviour(handler: Handler) -> None:
        start, end = handler.wanted(model)
        start, end = start + shift, end + shift + more
        handler.answer(206, model.read(start, end), Content_Range=f"bytes {start}-{end - 1}/{model.size}")

    return behaviour


def test_another_range_than_the_one_asked_for_is_refused(server: Server, model: RemoteContent) -> None:
    for shift, more in ((1, 0), (0, 1), (100, -50)):
        with pytest.raises(DownloadError, match="does not do what it should") as caught:
            read(server.at(FILE, wrong_range(model, shift, more)))
        assert "it sends" in caught.value.why


def test_a_smaller_range_than_the_one_asked_for_is_read_on(server: Server, model: RemoteContent) -> None:
    assert read(server.at(FILE, wrong_range(model, 0, -1000))).vocabulary_size == 20_000


UNUSABLE = {
    "no Content-Range": (206, {}, "which bytes"),
    "a Content-Range without a total": (206, {"Content_Range": "bytes 0-19/*"}, "which bytes"),
    "a length that is not the range's": (206, {"Content_Range": "bytes 0-9/99"}, "announces 20 bytes"),
    "a range past the end": (206, {"Content_Range": "bytes 0-19/10"}, "it sends"),
    "gzip": (200, {"Content_Encoding": "gzip"}, "encoded (gzip)"),
    "no length": (200, {"Content_Length": None, "Connection": "close"}, "how large"),
    "a length that is none": (200, {"Content_Length": "-5"}, "how large"),
}


@pytest.mark.parametrize(("status", "headers", "why"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_answer_is_one_clear_error(
    status: int, headers: dict[str, str | None], why: str, server: Server
) -> None:
    with pytest.raises(DownloadError) as caught:
        read(server.at(FILE, refuse(status, **headers)))
    assert why in caught.value.why


def test_no_compression_is_asked_for(server: Server, model: RemoteContent) -> None:
    read(server.at(FILE, serve(model)))
    assert {request.headers["Accept-Encoding"] for request in server.requests} == {"identity"}


# ------------------------------------------------------------------------------------------------ refusals


REFUSALS = {
    "401": (401, {}, None, "", "wants a login"),
    "401 with a token": (401, {}, TOKEN, "", "does not accept the token"),
    "401 from a hub": (401, {}, None, "PAGE", "There is no model"),
    "403": (403, {}, None, "", "forbids it"),
    "403 from a hub": (403, {}, TOKEN, "PAGE", "Look at PAGE"),
    "gated": (403, {"X_Error_Code": "GatedRepo"}, TOKEN, "PAGE", "Accept it at PAGE"),
    "gated, without a token": (401, {"X_Error_Code": "GatedRepo"}, None, "PAGE", "set HF_TOKEN"),
    "404": (404, {}, None, "", "does not know it (404)"),
    "no such revision": (404, {"X_Error_Code": "RevisionNotFound"}, None, "PAGE", "no such revision"),
    "no such repository": (404, {"X_Error_Code": "RepoNotFound"}, TOKEN, "PAGE", "There is no model"),
    "a status that nobody expects": (418, {}, None, "", "answered 418"),
    "no content": (204, {}, None, "", "answered 204"),
}


@pytest.mark.parametrize(("status", "headers", "token", "page", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_told_apart(
    status: int, headers: dict[str, str], token: str | None, page: str, message: str, server: Server
) -> None:
    with pytest.raises(DownloadError) as caught:
        read(server.at(FILE, refuse(status, **headers)), token=token, page=page)
    assert message in str(caught.value)
    assert (caught.value.exit_code, caught.value.code) == (4, "download")
    assert TOKEN not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(status: int, server: Server, model: RemoteContent) -> None:
    waits = Waits()
    busy = refuse(status, Retry_After="7")
    assert read(server.at(FILE, busy, busy, serve(model)), waits=waits).vocabulary_size == 20_000
    assert waits.seconds == [7, 7]


def test_a_date_to_come_back_is_understood(server: Server, model: RemoteContent) -> None:
    waits = Waits()
    read(server.at(FILE, refuse(503, Retry_After=formatdate(time.time() + 9, usegmt=True)), serve(model)), waits=waits)
    assert 5 < waits.seconds[0] <= 9


@pytest.mark.parametrize("retry_after", [None, "soon", "-3", ""])
def test_without_a_time_that_can_be_read_waits_grow(
    retry_after: str | None, server: Server, model: RemoteContent
) -> None:
    waits = Waits()
    busy = refuse(503, Retry_After=retry_after)
    read(server.at(FILE, busy, busy, busy, serve(model)), waits=waits)
    assert waits.seconds == [0.5, 1, 2]


def test_a_server_that_stays_busy_is_told_after_some_tries(server: Server) -> None:
    with pytest.raises(DownloadError) as caught:
        read(server.at(FILE, refuse(429, Retry_After="2")), page="PAGE")
    assert "wants fewer requests (429), and asks to wait 2 seconds" in caught.value.why
    assert "With a token more requests are allowed" in caught.value.remedy
    assert len(server.requests) == 4


def test_a_wait_of_an_hour_is_left_to_the_user(server: Server) -> None:
    waits = Waits()
    with pytest.raises(DownloadError) as caught:
        read(server.at(FILE, refuse(429, Retry_After="3600")), waits=waits)
    assert "asks to wait 3,600 seconds" in caught.value.why
    assert (waits.seconds, len(server.requests)) == ([], 1)


# ------------------------------------------------------------------------------------------------ redirects and tokens


def test_a_redirect_is_followed_once_and_remembered(server: Server, model: RemoteContent) -> None:
    server.at("/store/abc", serve(model))
    assert read(server.at(FILE, redirect("/store/abc"))).vocabulary_size == 20_000
    assert [request.path for request in server.requests].count(FILE) == 1


def test_the_body_of_a_redirect_is_left_alone(server: Server, model: RemoteContent) -> None:
    def endless(handler: Handler) -> None:
        handler.answer(302, Location="/store/abc", Content_Length=10**12)
        for _ in range(1 << 20):
            handler.write(bytes(1 << 10))

    server.at("/store/abc", serve(model))
    assert read(server.at(FILE, endless)).vocabulary_size == 20_000
    assert server.sent_bytes < len(model.head) + 2 * MIB


def test_where_a_redirect_led_may_expire(server: Server, model: RemoteContent) -> None:
    server.at("/store/abc", serve(model), refuse(403))
    server.at("/store/def", serve(model))
    url = server.at(FILE, redirect("/store/abc"), redirect("/store/def"))
    assert read(url).vocabulary_size == 20_000


def test_the_token_goes_home_and_nowhere_else(server: Server, model: RemoteContent) -> None:
    with misbehaving() as elsewhere:
        target = elsewhere.at("/store/abc", serve(model))
        read(server.at(FILE, redirect(target)), token=TOKEN)
        assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"
        assert len(elsewhere.requests) > 1
        for request in elsewhere.requests:
            assert TOKEN not in str(request.headers)
            assert "Authorization" not in request.headers


def test_a_netrc_is_not_used(
    server: Server, model: RemoteContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    read(server.at(FILE, serve(model)))
    assert all("Authorization" not in request.headers for request in server.requests)


def test_a_cookie_is_not_sent_back(server: Server, model: RemoteContent) -> None:
    read(server.at(FILE, serve(model, Set_Cookie="id=secret; Path=/")))
    assert all("Cookie" not in request.headers for request in server.requests)


@pytest.mark.parametrize("target", [FILE, "/a.gguf"], ids=["to itself", "in a circle"])
def test_redirects_without_end_are_an_error(target: str, server: Server) -> None:
    server.at("/a.gguf", redirect(FILE))
    with pytest.raises(DownloadError, match="redirected without end"):
        read(server.at(FILE, redirect(target)))
    assert len(server.requests) < 20


@pytest.mark.parametrize(
    "target", ["http://192.0.2.1/x.gguf", "file:///etc/passwd", "ftp://127.0.0.1/x", "http://[", "http://h:no/"]
)
def test_a_redirect_to_where_nothing_is_got_from_is_refused(target: str, server: Server) -> None:
    with pytest.raises(DownloadError, match="is redirected to where it is not followed"):
        read(server.at(FILE, redirect(target)))
    assert len(server.requests) == 1


def test_a_token_is_in_no_representation() -> None:
    assert TOKEN not in repr(RemoteFile(Place("https://h/x.gguf", "x", TOKEN)))


def test_what_is_no_answer_at_all_is_one_clear_error(server: Server) -> None:
    def noise(handler: Handler) -> None:
        handler.write(b"\x16\x03\x01\x02\x00" * 20)
        handler.close_connection = True

    with pytest.raises(PyllamarunError) as caught:
        read(server.at(FILE, noise))
    assert isinstance(caught.value, DownloadError)
