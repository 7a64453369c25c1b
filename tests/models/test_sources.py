"""What MODEL means: paths, names in other programs' stores, Hugging Face, addresses."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import run_cli
from misbehaving import Handler, RemoteContent, Server, misbehaving, redirect, refuse, serve
from remote_models import COMMIT, REPOSITORY, TYPES, content, publish, small, split

from pyllamarun import paths
from pyllamarun.errors import DownloadError, UsageError
from pyllamarun.models import hub, stores
from pyllamarun.models.gguf import STRING, Value
from pyllamarun.models.hub import HubName
from pyllamarun.models.names import is_safe, part_names, quantization, with_quantization
from pyllamarun.models.sources import resolve
from pyllamarun.units import MIB

OTHER_COMMIT = "d" * 40


# ---------------------------------------------------------------------------------------------- other programs' stores


def put(source: Path, target: Path) -> Path:
    """A model under another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)
    return target


def put_cached(source: Path, file: str, *, commit: str = COMMIT, main: bool = True) -> Path:
    """A model in Hugging Face's cache, laid out as huggingface_hub does: a blob, and a link in a snapshot."""
    folder = Path(os.environ["HF_HOME"]) / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(f"{file} at {commit}".encode()).hexdigest()
    put(source, blob)
    link = folder / "snapshots" / commit / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    if main:
        (folder / "refs/main").write_text(commit)
    return link


def snapshot(commit: str) -> Path:
    """Where Hugging Face's cache has the repository at a commit."""
    return Path(os.environ["HF_HOME"]) / "hub" / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / commit


def put_ollama(source: Path | None, name: str, *, digest: str = "", manifest: str | None = None) -> Path:
    """A model in Ollama's store, and the path of its blob; `name` is REGISTRY/NAMESPACE/MODEL/TAG."""
    folder = Path(os.environ["OLLAMA_MODELS"])
    digest = digest or "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64, "size": 1},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": 1},
    ]
    path = folder / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}) if manifest is None else manifest)
    blob = folder / "blobs" / digest.replace(":", "-")
    return put(source, blob) if source else blob


def put_lm_studio(source: Path, name: str) -> Path:
    return put(source, Path(os.environ["PYLLAMARUN_LMSTUDIO_MODELS"]) / name)


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


def test_a_path_is_a_path(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("HOME", str(model.parent))
    for text in (str(model), model.name, f"./{model.name}", f"~/{model.name}"):
        source = resolve(text)
        assert source.is_here
        assert source.read_header().architecture == "llama"


def test_a_path_goes_before_a_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_lm_studio(model, "pub/repo/x.gguf")
    monkeypatch.chdir(tmp_path)
    assert resolve("x.gguf").path == Path(os.environ["PYLLAMARUN_LMSTUDIO_MODELS"]) / "pub/repo/x.gguf"
    put(model, tmp_path / "x.gguf")
    assert resolve("x.gguf").path == Path("x.gguf")


def test_ollamas_models_are_found_by_their_names(model: Path) -> None:
    three = put_ollama(model, "registry.ollama.ai/library/llama3.2/3b")
    latest = put_ollama(model, "registry.ollama.ai/library/llama3.2/latest")
    own = put_ollama(model, "registry.ollama.ai/me/tuned/v1")
    other = put_ollama(model, "hf.co/someone/Model-GGUF/Q4_K_M")
    found = {
        "llama3.2:3b": three,
        "llama3.2": latest,
        "llama3.2:latest": latest,
        "me/tuned:v1": own,
        "hf.co/someone/Model-GGUF:Q4_K_M": other,
    }
    for text, path in found.items():
        source = resolve(text)
        assert (source.path, source.read_header().architecture) == (path, "llama"), text
    with pytest.raises(UsageError, match="no model of that name"):
        resolve("tuned:v1")


@pytest.mark.parametrize(
    "text",
    ["pub/Repo-GGUF/model-Q4_K_M.gguf", "model-Q4_K_M.gguf", "Model-q4_k_m", "pub/Repo-GGUF", "pub/repo-gguf:q4_k_m"],
)
def test_lm_studios_models_are_found_by_shorter_names_too(text: str, model: Path) -> None:
    path = put_lm_studio(model, "pub/Repo-GGUF/model-Q4_K_M.gguf")
    put_lm_studio(model, "pub/Repo-GGUF/mmproj-F16.gguf")
    assert resolve(text).path == path


def test_a_short_name_of_several_models_is_none(model: Path) -> None:
    for name in ("a.Q4_K_M.gguf", "a.Q8_0.gguf"):
        put_lm_studio(model, f"pub/repo/{name}")
    with pytest.raises(UsageError, match='Several models are called "pub/repo"') as caught:
        resolve("pub/repo")
    assert "pub/repo/a.Q4_K_M.gguf" in caught.value.why
    assert "pub/repo/a.Q8_0.gguf" in caught.value.why
    assert resolve("pub/repo:Q8_0").path.name == "a.Q8_0.gguf"


def test_hugging_faces_cache_is_read_through_its_links(model: Path) -> None:
    link = put_cached(model, "model-Q4_K_M.gguf")
    put_cached(model, "model-Q4_K_M.gguf", commit=OTHER_COMMIT, main=False)
    source = resolve(f"{REPOSITORY}/model-Q4_K_M.gguf")
    assert source.path == link
    assert source.read_header().architecture == "llama"
    older = resolve(f"{REPOSITORY}/model-Q4_K_M.gguf@{OTHER_COMMIT[:12]}")
    assert OTHER_COMMIT in str(older.path)


def test_pyllamaruns_own_folder_is_a_store(model: Path) -> None:
    path = put(model, paths.models_folder() / "host/folder/model.gguf")
    assert resolve("model").path == path


def test_a_name_that_nothing_has_is_told_with_what_to_do() -> None:
    with pytest.raises(UsageError, match="no model of that name on this machine") as caught:
        resolve("someone/some-model")
    assert "hf:someone/some-model" in caught.value.remedy
    assert caught.value.exit_code == 2


def test_a_folder_that_leads_to_itself_is_entered_once(model: Path) -> None:
    path = put_lm_studio(model, "pub/repo/model.gguf")
    (path.parent / "again").symlink_to(path.parent.parent)
    assert [one.path for one in stores.all_stored()] == [path]


def test_links_to_folders_elsewhere_are_followed(model: Path, tmp_path: Path) -> None:
    put(model, tmp_path / "disk/repo/model.gguf")
    folder = Path(os.environ["PYLLAMARUN_LMSTUDIO_MODELS"])
    folder.mkdir(parents=True)
    (folder / "pub").symlink_to(tmp_path / "disk")
    assert resolve("pub/repo/model.gguf").path == folder / "pub/repo/model.gguf"


BROKEN_MANIFESTS = {
    "not JSON": "{",
    "deep JSON": "[" * 100_000,
    "a list": "[]",
    "no layers": "{}",
    "layers of another kind": '{"layers": 3}',
    "another format": '{"layers": [{"mediaType": "application/vnd.ollama.image.tensor", "digest": "sha256:00"}]}',
    "not text": "\ud800",
}


@pytest.mark.parametrize("manifest", BROKEN_MANIFESTS.values(), ids=BROKEN_MANIFESTS)
def test_a_broken_manifest_is_a_damaged_model(manifest: str, model: Path) -> None:
    folder = Path(os.environ["OLLAMA_MODELS"]) / "manifests/registry.ollama.ai/library/broken"
    folder.mkdir(parents=True)
    (folder / "latest").write_bytes(manifest.encode("utf-8", "surrogatepass"))
    put_ollama(model, "registry.ollama.ai/library/sound/latest")
    problems = {one.name: one.problem for one in stores.all_stored()}
    assert problems["broken:latest"]
    assert problems["sound:latest"] == ""


@pytest.mark.parametrize("digest", ["sha256:../../../../etc/passwd", "sha256:" + "0" * 63 + "/", "/etc/passwd"])
def test_a_digest_leads_nowhere_else(digest: str) -> None:
    put_ollama(None, "registry.ollama.ai/library/evil/latest", digest=digest)
    (one,) = stores.all_stored()
    assert one.problem == "Its manifest names no sound digest."
    assert one.path.name == "latest"


def test_a_blob_that_is_gone_is_a_damaged_model() -> None:
    put_ollama(None, "registry.ollama.ai/library/gone/latest")
    (one,) = stores.all_stored()
    assert one.problem == "Its blob is missing."


def test_a_split_model_is_one_and_says_when_parts_are_missing(model: Path) -> None:
    for number in (1, 2):
        put_lm_studio(model, f"pub/whole/m-0000{number}-of-00002.gguf")
    put_lm_studio(model, "pub/half/m-00001-of-00002.gguf")
    put_lm_studio(model, "pub/headless/m-00002-of-00002.gguf")
    found = {one.name: (len(one.parts), one.problem) for one in stores.all_stored()}
    assert found == {
        "pub/half/m-00001-of-00002.gguf": (1, "1 of its 2 parts are missing."),
        "pub/headless/m-00002-of-00002.gguf": (1, "The first part of this split model is missing."),
        "pub/whole/m-00001-of-00002.gguf": (2, ""),
    }


# ------------------------------------------------------------------------------------------------ what names say

QUANTIZATIONS = {
    "model-Q4_K_M.gguf": "Q4_K_M",
    "model.q4_0.gguf": "Q4_0",
    "Model-UD-IQ2_XXS.gguf": "UD-IQ2_XXS",
    "Q8_0/model-00001-of-00002.gguf": "Q8_0",
    "model-BF16-00001-of-00002.gguf": "BF16",
    "gpt-oss-120b-mxfp4.gguf": "MXFP4",
    "Qwen3-8B.gguf": "",
    "model-f16-Q5_K_S.gguf": "Q5_K_S",
}


def test_a_quantization_is_read_from_a_name() -> None:
    assert {name: quantization(name) for name in QUANTIZATIONS} == QUANTIZATIONS


def test_a_quantization_means_a_publishers_own_where_there_is_no_other() -> None:
    names = ["m-UD-Q4_K_XL.gguf", "m-UD-Q2_K.gguf", "m-Q2_K.gguf"]
    assert with_quantization(names, "q4_k_xl") == ["m-UD-Q4_K_XL.gguf"]
    assert with_quantization(names, "Q2_K") == ["m-Q2_K.gguf"]
    assert with_quantization(names, "UD-Q2_K") == ["m-UD-Q2_K.gguf"]
    assert with_quantization(names, "Q4") == []


def test_the_parts_of_a_split_are_named_as_llama_cpp_does() -> None:
    assert part_names("a/m-00001-of-00003.gguf") == [f"a/m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert part_names("m-00002-of-00003.gguf") == ["m-00002-of-00003.gguf"]


def test_names_that_lead_elsewhere_are_not_safe() -> None:
    for name in ("../x", "a/../../x", "/etc/x", "a//x", "./x", "a\\x", "a\nx", "x" * 256, ""):
        assert not is_safe(name), name
    assert is_safe("a/b/é-x.gguf")


HUB_NAMES = {
    "a/b": HubName("a/b"),
    "a/b:Q4_K_M": HubName("a/b", quantization="Q4_K_M"),
    "a/b/c.gguf": HubName("a/b", "c.gguf"),
    "a/b.c/d e/f.gguf": HubName("a/b.c", "d e/f.gguf"),
    "a/b@v1": HubName("a/b", revision="v1"),
    "a/b:q8_0@refs/pr/1": HubName("a/b", quantization="q8_0", revision="refs/pr/1"),
    "a/b/c.gguf@abc": HubName("a/b", "c.gguf", revision="abc"),
}


@pytest.mark.parametrize(("text", "name"), HUB_NAMES.items(), ids=HUB_NAMES)
def test_names_on_hugging_face(text: str, name: HubName) -> None:
    assert hub.parse_name(text) == name
    assert str(name) == f"hf:{text}"


@pytest.mark.parametrize(
    "text",
    ["", "a", "a/", "/b", "../b", "a/..", "a/b:", "a/b@", "a/b/c.txt", "a/b/../../c.gguf", "a/b//c.gguf", "a b/c",
     "a/b@../x", "a/b:Q4/x.gguf", "a/b?x=1", "a/b@main?x"],
)  # fmt: skip
def test_what_is_no_name_on_hugging_face_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        resolve(f"hf:{text}")


# ------------------------------------------------------------------------------------------------ Hugging Face


@pytest.fixture
def server(hugging_face: Server) -> Server:
    return hugging_face


@pytest.fixture
def remote(tmp_path: Path) -> RemoteContent:
    return small(tmp_path / "made.gguf", tokens=100)


@pytest.mark.parametrize("text", ["", ":q4_k_m", "/sub/model-Q4_K_M.gguf"])
def test_a_model_on_hugging_face_is_read_by_its_header(text: str, server: Server, remote: RemoteContent) -> None:
    publish(server, {"sub/model-Q4_K_M.gguf": remote, "mmproj-F16.gguf": remote})
    source = resolve(f"hf:{REPOSITORY}{text}")
    assert not source.is_here
    assert source.name == f"hf:{REPOSITORY}/sub/model-Q4_K_M.gguf"
    assert source.path == snapshot(COMMIT) / "sub/model-Q4_K_M.gguf"
    header = source.read_header()
    assert (header.architecture, header.path) == ("llama", source.path)
    assert server.sent_bytes < len(remote.head) + MIB
    assert server.requests[-1].path == f"/{REPOSITORY}/resolve/{COMMIT}/sub/model-Q4_K_M.gguf", "one commit throughout"


def test_a_revision_is_asked_for_and_kept_apart(server: Server, remote: RemoteContent) -> None:
    publish(server, {"m.gguf": remote}, revision="refs%2Fpr%2F1", commit=OTHER_COMMIT)
    source = resolve(f"hf:{REPOSITORY}/m.gguf@refs/pr/1")
    assert source.path == snapshot(OTHER_COMMIT) / "m.gguf"
    assert source.read_header().architecture == "llama"


def test_several_models_in_a_repository_are_listed(server: Server, remote: RemoteContent, tmp_path: Path) -> None:
    metadata = {"general.architecture": Value(STRING, "llama")}
    parts = split(tmp_path / "p.gguf", metadata, [("t", TYPES["F16"], (32,))] * 2, 2)
    files = {"m-Q4_K_M.gguf": remote, "m-Q8_0-00001-of-00002.gguf": parts[0], "m-Q8_0-00002-of-00002.gguf": parts[1]}
    publish(server, files | {"mmproj-F16.gguf": remote, "a-Q2_K.gguf": remote, "b-Q2_K.gguf": remote})
    with pytest.raises(UsageError, match="has several models") as caught:
        resolve(f"hf:{REPOSITORY}")
    assert [line.split("  ")[0] for line in caught.value.why.splitlines()] == [
        f"hf:{REPOSITORY}/a-Q2_K.gguf",
        f"hf:{REPOSITORY}/b-Q2_K.gguf",
        f"hf:{REPOSITORY}:Q4_K_M",
        f"hf:{REPOSITORY}:Q8_0",
    ]
    with pytest.raises(DownloadError, match="There is no") as missing:
        resolve(f"hf:{REPOSITORY}:Q3_K_M")
    assert f"hf:{REPOSITORY}:Q4_K_M" in missing.value.why


def test_a_split_model_on_hugging_face_is_found_whole(server: Server, tmp_path: Path) -> None:
    tensors = [(f"blk.{number}.ffn_up.weight", TYPES["Q8_0"], (64, 64)) for number in range(4)]
    parts = split(tmp_path / "p.gguf", {"general.architecture": Value(STRING, "llama")}, tensors, 2)
    publish(server, {f"q/m-0000{number}-of-00002.gguf": part for number, part in enumerate(parts, 1)})
    assert len(resolve(f"hf:{REPOSITORY}").read_header().tensors) == 4
    publish(server, {"q/m-00001-of-00002.gguf": parts[0]})
    with pytest.raises(DownloadError, match="There is no q/m-00002-of-00002.gguf"):
        resolve(f"hf:{REPOSITORY}").read_header()


def test_a_file_that_is_in_the_cache_is_used_there(server: Server, model: Path) -> None:
    link = put_cached(model, "m-Q4_K_M.gguf")
    for text in ("/m-Q4_K_M.gguf", ":q4_k_m"):
        assert resolve(f"hf:{REPOSITORY}{text}").path == link
    assert server.requests == []
    publish(server, {"m-Q4_K_M.gguf": small(link.parent / "made")})
    assert resolve(f"hf:{REPOSITORY}").path == link


def test_a_file_that_was_pulled_is_used_there(server: Server, model: Path) -> None:
    path = put(model, paths.models_folder() / REPOSITORY / "m-Q4_K_M.gguf")
    assert resolve(f"hf:{REPOSITORY}:Q4_K_M").path == path
    assert server.requests == []


def test_a_split_that_is_only_half_in_the_cache_is_not_here(server: Server, model: Path, remote: RemoteContent) -> None:
    put_cached(model, "m-00001-of-00002.gguf")
    publish(server, {"m-00001-of-00002.gguf": remote, "m-00002-of-00002.gguf": remote})
    assert not resolve(f"hf:{REPOSITORY}/m-00001-of-00002.gguf").is_here


def test_offline_only_what_is_here_is_found(server: Server, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="is not on this machine") as caught:
        resolve(f"hf:{REPOSITORY}")
    assert "HF_HUB_OFFLINE" in caught.value.why
    link = put_cached(model, "m-Q4_K_M.gguf")
    assert resolve(f"hf:{REPOSITORY}").path == link
    with pytest.raises(DownloadError, match="There is no hf:someone/Model-GGUF:Q8_0"):
        resolve(f"hf:{REPOSITORY}:Q8_0")
    assert server.requests == []


def test_the_token_is_sent_to_hugging_face_and_never_shown(server: Server, remote: RemoteContent) -> None:
    token = "hf_do_not_print_me"
    publish(server, {"m.gguf": remote})
    with misbehaving() as elsewhere:
        stored = elsewhere.at("/blob", serve(remote))
        server.at(f"/{REPOSITORY}/resolve/{COMMIT}/m.gguf", redirect(stored))
        result = run_cli("inspect", f"hf:{REPOSITORY}", "--json", HF_TOKEN=token)
        assert result.returncode == 0, result.stdout
        assert {request.headers.get("Authorization") for request in server.requests} == {f"Bearer {token}"}
        assert elsewhere.requests
        assert all("Authorization" not in request.headers for request in elsewhere.requests)
    server.at(f"/api/models/{REPOSITORY}/revision/main", refuse(403, X_Error_Message=f"no {token}"))
    failed = run_cli("inspect", f"hf:{REPOSITORY}", HF_TOKEN=token, PYLLAMARUN_DEBUG="1")
    assert failed.returncode == 4
    assert token not in result.stdout + result.stderr + failed.stdout + failed.stderr


HUB_REFUSALS = {
    "gated": (refuse(403, X_Error_Code="GatedRepo"), f"/{REPOSITORY}, logged in"),
    "not there": (refuse(404, X_Error_Code="RepoNotFound"), "There is no model"),
    "not there, to strangers": (refuse(401), "for a private model, set HF_TOKEN"),
    "no such revision": (refuse(404, X_Error_Code="RevisionNotFound"), "no such revision"),
    "a login page": (serve(RemoteContent(b"<html>Please log in</html>")), "something else than a list"),
    "another JSON": (serve(RemoteContent(b'{"siblings": [3]}')), "something else than a list"),
}


@pytest.mark.parametrize(("answer", "message"), HUB_REFUSALS.values(), ids=HUB_REFUSALS)
def test_what_hugging_face_refuses_is_told(answer: Callable[[Handler], None], message: str, server: Server) -> None:
    server.at(f"/api/models/{REPOSITORY}/revision/main", answer)
    result = run_cli("plan", f"hf:{REPOSITORY}:Q4_K_M", "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.returncode, error["exit_code"], error["code"]) == (4, 4, "download")
    assert message in f"{error['what']}\n{error['why']}\n{error['remedy']}"


def test_a_list_of_files_without_end_is_left(server: Server) -> None:
    endless = RemoteContent(b'{"siblings": ["', 10**12)
    server.at(f"/api/models/{REPOSITORY}/revision/main", serve(endless))
    with pytest.raises(DownloadError, match="is too long"):
        resolve(f"hf:{REPOSITORY}")
    assert server.sent_bytes < 20 * MIB


def test_names_that_lead_out_of_a_repository_are_never_offered(server: Server, remote: RemoteContent) -> None:
    publish(server, {"../../evil.gguf": remote, "/etc/evil.gguf": remote, "good.gguf": remote})
    assert resolve(f"hf:{REPOSITORY}").name == f"hf:{REPOSITORY}/good.gguf"


def test_a_file_of_another_size_than_the_list_says_is_refused(server: Server, remote: RemoteContent) -> None:
    publish(server, {"m.gguf": remote})
    server.at(f"/{REPOSITORY}/resolve/{COMMIT}/m.gguf", serve(RemoteContent(remote.head, remote.size + 1)))
    with pytest.raises(DownloadError, match="changed while it was read"):
        resolve(f"hf:{REPOSITORY}").read_header()


# ------------------------------------------------------------------------------------------------ addresses


def test_the_address_of_a_page_on_hugging_face_is_its_model(server: Server, remote: RemoteContent) -> None:
    publish(server, {"m.gguf": remote})
    for kind in ("blob", "resolve"):
        source = resolve(f"{server.url}/{REPOSITORY}/{kind}/main/m.gguf?download=true")
        assert source.name == f"hf:{REPOSITORY}/m.gguf"


def test_an_address_keeps_its_query_to_itself(remote: RemoteContent) -> None:
    with misbehaving() as server:
        server.at("/a%20b/m.gguf", serve(remote))
        source = resolve(f"{server.url}/a%20b/m.gguf?key=secret#here")
        assert source.path == paths.models_folder() / f"127.0.0.1:{server.server_port}" / "a b/m.gguf"
        assert source.read_header().architecture == "llama"
        assert {request.path for request in server.requests} == {"/a%20b/m.gguf?key=secret"}
        server.at("/a%20b/m.gguf", refuse(404))
        with pytest.raises(DownloadError) as caught:
            resolve(f"{server.url}/a%20b/m.gguf?key=secret").read_header()
        assert "secret" not in str(caught.value)


ADDRESSES = {
    "plain http": ("http://example.com/m.gguf", "http://example.com is not used"),
    "a password": ("https://me:secret@example.com/m.gguf", "user name or password"),
    "no host": ("https:///m.gguf", "names no host"),
    "no port": ("https://example.com:x/m.gguf", "names no host"),
    "no file": ("https://example.com/", "does not end in the name"),
    "another file": ("https://example.com/m.bin", "does not end in the name"),
    "a way out": ("https://example.com/%2e%2e/m.gguf", "outside its folder"),
    "a hidden way out": ("https://example.com/a%2F..%2F..%2F../m.gguf", "outside its folder"),
    "a host that is a way out": ("https://../m.gguf", "outside its folder"),
    "half an address": ("https://[1::/m.gguf", "names no host"),
}


@pytest.mark.parametrize(("url", "message"), ADDRESSES.values(), ids=ADDRESSES)
def test_addresses_that_are_not_used(url: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(url)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_address_that_was_pulled_is_used_there(model: Path) -> None:
    path = put(model, paths.models_folder() / "example.com/models/m.gguf")
    source = resolve("https://example.com/models/m.gguf")
    assert (source.is_here, source.path) == (True, path)


@pytest.mark.parametrize("arguments", [["run", "-p", "Hi"], ["serve"]])
def test_running_what_is_not_here_says_how_to_pull_it(arguments: list[str], server: Server, tmp_path: Path) -> None:
    import llama_70b_header

    tensors = [(name, llama_70b_header.q4_k_m(name, shape), shape) for name, shape in llama_70b_header.shapes()]
    publish(server, {"m.gguf": content(tmp_path / "made.gguf", llama_70b_header.metadata(15), tensors)})
    command, *more = arguments
    result = run_cli(command, f"hf:{REPOSITORY}", *more, "--virtual-gpu", "12GiB")
    assert result.returncode == 2, result.stderr
    assert f"pyllamarun pull hf:{REPOSITORY}/m.gguf" in result.stderr
    planned = run_cli("plan", f"hf:{REPOSITORY}", "--virtual-gpu", "12GiB")
    assert f"pyllamarun pull hf:{REPOSITORY}/m.gguf" in planned.stdout


def test_a_model_that_is_not_here_is_rehearsed(model: Path, server: Server) -> None:
    publish(server, {"m.gguf": RemoteContent(model.read_bytes())})
    result = run_cli("rehearse", f"hf:{REPOSITORY}", "--virtual-gpu", "1GiB", "-c", "512", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    data = json.loads(result.stdout)["data"]
    assert (data["fits"], data["model"]) == (True, str(snapshot(COMMIT) / "m.gguf"))
    assert not snapshot(COMMIT).exists()
    assert not paths.models_folder().exists()
