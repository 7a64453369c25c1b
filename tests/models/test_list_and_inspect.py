"""list and inspect: what they count, held against llama.cpp, and what they print of files from strangers."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import gguf
import pytest
import shapes
import synthetic
from harness import Machine, run_cli

from pyllamarun import paths
from pyllamarun.models.catalog import Catalog
from pyllamarun.models.gguf import ARRAY, FLOAT32, INT32, STRING, UINT32, Array, Header, Tensor, Value, read_header
from pyllamarun.models.skeleton import write_sparse
from pyllamarun.models.store import open_index
from pyllamarun.models.stores import all_stored
from pyllamarun.models.summary import ROLES, kv_bytes_by_layer, role, summarize
from pyllamarun.models.types import TENSOR_TYPES

F32, F16 = TENSOR_TYPES[0], TENSOR_TYPES[1]


# ------------------------------------------------------------------------------------------------ inspect


@pytest.mark.parametrize("architecture", [*synthetic.ARCHITECTURES, "deepseek2-mtp"])
def test_the_kv_cache_grows_by_what_inspect_says(
    architecture: str, tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    """A recurrent state, which does not grow, is no part of the difference."""
    path = tiny(architecture)
    sizes = []
    for tokens in (1024, 2048):
        answer = machine(4096).ask(["-m", str(path), "-ngl", "0", "-c", str(tokens), "--swa-full"])
        sizes.append(answer.bytes(use="context"))
    assert sizes[1] - sizes[0] == 1024 * summarize(read_header(path)).kv_bytes_per_token


def header_of(architecture: str, metadata: dict[str, object], layers: int = 4) -> Header:
    """A header without tensors; the keys stand under the architecture's prefix."""
    values = {"general.architecture": Value(STRING, architecture)}
    for key, data in ({"block_count": layers, "embedding_length": 256} | metadata).items():
        value = Value(UINT32, data)
        if isinstance(data, list):
            value = Value(ARRAY, Array(INT32, len(data), struct.pack(f"<{len(data)}i", *data)))
        values[f"{architecture}.{key}"] = value
    return Header((Path("x.gguf"),), values, (), 0)


KV_CASES = {
    "no key length: as wide as the model": ("llama", {"attention.head_count": 4}, [4 * 2 * 64 * 2] * 4),
    "heads by layer": (
        "llama", {"attention.head_count": 4, "attention.head_count_kv": [4, 0, 2, 1]}, [1024, 0, 512, 256],
    ),
    "heads for too few layers": (
        "llama", {"attention.head_count": 4, "attention.head_count_kv": [4, 2]}, [1024, 512, 0, 0],
    ),
    "shorter heads where a window slides": (
        "gemma4",
        {"attention.head_count": 4, "attention.key_length": 128, "attention.value_length": 128,
         "attention.key_length_swa": 32, "attention.value_length_swa": 32,
         "attention.sliding_window_pattern": [1, 0, 1, 0]},
        [512, 2048, 512, 2048],
    ),
    "layers that share the cache of earlier ones": (
        "gemma4", {"attention.head_count": 4, "attention.shared_kv_layers": 3}, [1024, 0, 0, 0],
    ),
    "linear attention in most layers": ("qwen3next", {"attention.head_count": 4}, [0, 0, 0, 1024]),
    "linear attention in every second layer": (
        "qwen35", {"attention.head_count": 4, "full_attention_interval": 2}, [0, 1024, 0, 1024],
    ),
    "no attention": ("rwkv7", {}, [0] * 4),
    "nonsense": ("llama", {"attention.head_count": 0, "attention.key_length": -5}, [0] * 4),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "metadata", "expected"), KV_CASES.values(), ids=KV_CASES)
def test_kv_bytes_by_layer(architecture: str, metadata: dict[str, object], expected: list[int]) -> None:
    assert list(kv_bytes_by_layer(header_of(architecture, metadata))) == expected


def test_every_tensor_has_one_role_and_one_type(tiny: Callable[[str], Path]) -> None:
    for architecture in synthetic.ARCHITECTURES:
        header = read_header(tiny(architecture))
        summary = summarize(header)
        for groups in (summary.roles, summary.types):
            assert sum(group.tensors for group in groups) == len(header.tensors)
            assert sum(group.size_bytes for group in groups) == header.weights_bytes == summary.weights_bytes
            assert sum(group.parameters for group in groups) == header.parameters


ROLE_CASES = {
    "token_embd.weight": "embeddings",
    "per_layer_token_embd.weight": "embeddings",
    "output.weight": "output",
    "output_norm.weight": "output",
    "blk.0.attn_q.weight": "attention",
    "blk.11.attn_kv_a_mqa.weight": "attention",
    "blk.0.post_attention_norm.weight": "attention",
    "blk.0.ffn_up.weight": "ffn",
    "blk.0.ffn_up_shexp.weight": "ffn",
    "blk.0.ffn_gate_inp.weight": "ffn",
    "blk.0.ffn_down_exps.weight": "experts",
    "blk.0.ffn_gate_up_exps.weight": "experts",
    "dec.blk.3.cross_attn_k.weight": "attention",
    "blk.0.ssm_in.weight": "other",
    "rope_freqs.weight": "other",
    "v.blk.0.attn_q.weight": "other",
}


@pytest.mark.parametrize(("name", "expected"), ROLE_CASES.items(), ids=ROLE_CASES)
def test_roles(name: str, expected: str) -> None:
    assert role(Tensor(name, F32, (1,), 0, 4)) == expected
    assert expected in ROLES


def test_inspect_shows_what_a_real_model_is(smollm2: Path) -> None:
    result = run_cli("inspect", smollm2, "--json")
    envelope = json.loads(result.stdout)
    assert (envelope["kind"], envelope["schema"], envelope["ok"]) == ("inspect", 1, True)
    data = envelope["data"]
    assert (data["architecture"], data["file_type"], data["layers"]) == ("llama", "Q4_1", 30)
    assert (data["parameters"], data["vocabulary_size"]) == (134_515_008, 49_152)
    assert data["kv_bytes_per_token"] == 30 * 3 * 64 * 2 * 2
    assert data["file_bytes"] == smollm2.stat().st_size
    assert {group["name"]: group["tensors"] for group in data["types"]} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    assert data["rope"]["freq_base"] == 100_000
    assert (data["source"], data["here"]) == (str(smollm2), True)
    tokens = next(field for field in data["metadata"] if field["key"] == "tokenizer.ggml.tokens")
    assert (len(tokens["value"]), tokens["length"], tokens["type"]) == (8, 49_152, "string[]")
    assert len(result.stdout) < 20_000
    text = run_cli("inspect", smollm2).stdout
    assert "134,515,008 parameters" in text
    assert "23,040 bytes a token" in text


def test_inspect_shows_experts_and_parts(tmp_path: Path) -> None:
    path = shapes.write(shapes.qwen3_30b_a3b(), tmp_path / "moe.gguf")
    data = json.loads(run_cli("inspect", path, "--json").stdout)["data"]
    assert (data["experts"], data["experts_used"]) == (128, 8)
    largest = max(data["roles"], key=lambda group: group["size_bytes"])
    assert largest["name"] == "experts"
    assert "128 experts, of which a token uses 8" in run_cli("inspect", path).stdout


def test_nothing_from_a_file_drives_the_terminal_or_breaks_the_json(tmp_path: Path) -> None:
    evil = "\x1b[2J\x9b31mname\n\u202e"
    metadata = {
        "general.architecture": Value(STRING, "evil\x1b"),
        "general.name": Value(STRING, evil),
        f"evil.{evil}": Value(STRING, evil * 1000),
        "evil.nan": Value(FLOAT32, float("nan")),
        "evil.infinite": Value(ARRAY, Array(FLOAT32, 1, b"\x00\x00\x80\x7f")),
        "evil.words": Value(ARRAY, Array(STRING, 1, len(evil.encode()).to_bytes(8, "little") + evil.encode())),
    }
    path = write_sparse(tmp_path / "evil.gguf", metadata, [(f"{evil}.weight", F32, (8,))])
    text, as_json = run_cli("inspect", path), run_cli("inspect", path, "--json")
    assert text.returncode == as_json.returncode == 0, text.stderr
    for output in (text.stdout, as_json.stdout):
        assert all(c.isprintable() or c == "\n" for c in output)
        assert len(output) < 5000

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    data = json.loads(as_json.stdout, parse_constant=no_constant)["data"]
    assert any(field["value"] == "nan" for field in data["metadata"])


# ------------------------------------------------------------------------------------------------ list


def test_list_shows_the_models_of_all_stores_and_what_is_wrong_with_some(tiny: Callable[[str], Path]) -> None:
    model = tiny("llama")
    own = paths.models_folder() / "host/own-Q4_0.gguf"
    studio = Path(os.environ["PYLLAMARUN_LMSTUDIO_MODELS"]) / "pub/repo"
    hub = Path(os.environ["HF_HOME"]) / "hub/models--some--Repo/snapshots" / ("c" * 40)
    blobs = Path(os.environ["OLLAMA_MODELS"]) / "blobs"
    manifests = Path(os.environ["OLLAMA_MODELS"]) / "manifests/registry.ollama.ai/library/tiny"
    for folder in (own.parent, studio, hub, blobs, manifests):
        folder.mkdir(parents=True)
    os.link(model, own)
    os.link(model, hub / "m.gguf")
    (hub.parents[1] / "refs").mkdir()
    (hub.parents[1] / "refs/main").write_text("c" * 40)
    os.link(model, blobs / ("sha256-" + "a" * 64))
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "a" * 64}]
    (manifests / "latest").write_text(json.dumps({"layers": layers}))
    (studio / "cut.gguf").write_bytes(model.read_bytes()[:-1])
    (studio / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    (studio / "gone.gguf").symlink_to("/nonexistent/gone.gguf")
    (studio / "zero.gguf").symlink_to("/dev/zero")
    os.mkfifo(studio / "pipe.gguf")
    result = run_cli("list", "--json")
    assert result.returncode == 0, result.stdout
    envelope = json.loads(result.stdout)
    assert envelope["kind"] == "list"
    models = {entry["name"]: entry for entry in envelope["data"]["models"]}
    assert {name: entry["store"] for name, entry in models.items()} == {
        "host/own-Q4_0.gguf": "pyllamarun",
        "some/Repo/m.gguf": "huggingface",
        "pub/repo/cut.gguf": "lmstudio",
        "pub/repo/gone.gguf": "lmstudio",
        "pub/repo/pipe.gguf": "lmstudio",
        "pub/repo/pointer.gguf": "lmstudio",
        "pub/repo/zero.gguf": "lmstudio",
        "tiny:latest": "ollama",
    }
    sound = models["tiny:latest"]
    assert (sound["architecture"], sound["trained_context_tokens"]) == ("llama", synthetic.N_CTX_TRAIN)
    assert (sound["file_bytes"], sound["parts"], sound["problem"]) == (model.stat().st_size, 1, "")
    assert sound["path"] == str(blobs / ("sha256-" + "a" * 64))
    assert "is incomplete" in models["pub/repo/cut.gguf"]["problem"]
    assert "Git-LFS pointer" in models["pub/repo/pointer.gguf"]["problem"]
    assert "no file" in models["pub/repo/gone.gguf"]["problem"]
    text = run_cli("list").stdout
    assert "not a regular file" in models["pub/repo/pipe.gguf"]["problem"]
    assert "not a regular file" in models["pub/repo/zero.gguf"]["problem"]
    assert text.count("damaged") == 5
    assert "tiny:latest" in text
    for name in models:
        problem = models[name]["problem"]
        assert (run_cli("inspect", name).returncode == 0) == (not problem), name


def test_list_says_whether_each_model_fits() -> None:
    folder = paths.models_folder()
    folder.mkdir(parents=True)
    shapes.write(shapes.llama_8b(32), folder / "large.gguf")
    shapes.write(shapes.llama_8b(4), folder / "small.gguf")
    write_sparse(folder / "foreign.gguf", {"general.architecture": Value(STRING, "nobody")}, [("t", F16, (256, 256))])
    (folder / "damaged.gguf").write_bytes(b"GGUF")
    machine = ("--virtual-gpu", "3GiB", "--ram-bandwidth", "50GB/s")
    result = run_cli("list", *machine, "--json")
    assert result.returncode == 0, result.stderr
    fits = {Path(model["path"]).stem: model["fits"] for model in json.loads(result.stdout)["data"]["models"]}
    plan = json.loads(run_cli("plan", folder / "large.gguf", *machine, "--json").stdout)["data"]
    assert fits["large"]["verdict"] == "partly"
    assert fits["large"]["gpu_layers"] == plan["gpu_layers"]
    assert fits["large"]["generation"] == plan["speed"]["generation"]
    assert fits["small"]["verdict"] == "gpu"
    assert (fits["foreign"]["verdict"], "nobody" in fits["foreign"]["reason"]) == ("unknown", True)
    assert fits["damaged"] is None
    text = run_cli("list", *machine).stdout
    assert f"{plan['gpu_layers']} of 33 layers" in text
    assert "all on the GPU" in text
    bare = json.loads(run_cli("list", "--no-plan", "--json").stdout)["data"]["models"]
    assert [model["fits"] for model in bare] == [None] * 4


def test_without_llama_cpp_the_models_are_listed_all_the_same(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = paths.models_folder()
    folder.mkdir(parents=True)
    os.link(tiny("llama"), folder / "m.gguf")
    (tmp_path / "build.json").write_text('{"tag": "b1", "commit": "0", "backend": "cpu"}')
    result = run_cli("list", PYLLAMARUN_BIN_DIR=str(tmp_path))
    assert (result.returncode, "m.gguf" in result.stdout) == (0, True)
    assert "Whether they fit is not known" in result.stderr


def test_list_without_a_model_says_where_one_would_be() -> None:
    result = run_cli("list")
    assert (result.returncode, result.stdout) == (0, "")
    assert str(paths.models_folder()) in result.stderr


def test_hundreds_of_models_are_listed_quickly_and_changes_are_seen(tmp_path: Path) -> None:
    words = b"".join((10).to_bytes(8, "little") + b"0123456789" for _ in range(100_000))
    metadata = {
        "general.architecture": Value(STRING, "llama"),
        "tokenizer.ggml.tokens": Value(ARRAY, Array(STRING, 100_000, words)),
    }
    made = write_sparse(tmp_path / "made.gguf", metadata, [("t", F16, (4096, 4096))])
    folder = paths.models_folder()
    folder.mkdir(parents=True)
    for number in range(300):
        os.link(made, folder / f"m{number}.gguf")
    stored = all_stored()
    index = open_index()
    catalog = Catalog(index)
    first = list(catalog.entries(stored))
    catalog.save()
    start = time.monotonic()
    assert [asdict(entry) for entry in Catalog(index).entries(stored)] == [asdict(entry) for entry in first]
    assert time.monotonic() - start < 1, "their headers are read again"
    (folder / "m7.gguf").unlink()
    (folder / "m7.gguf").write_bytes(b"no model")
    changed = [entry.name for entry in Catalog(index).entries(stored) if entry.problem]
    assert changed == ["m7.gguf"]


def test_the_type_names_are_those_of_the_gguf_package() -> None:
    from pyllamarun.models.summary import TYPE_NAMES

    names = {"UINT": "u", "INT": "i", "FLOAT": "f"}
    for kind in gguf.GGUFValueType:
        if kind.name not in ("ARRAY", "STRING", "BOOL"):
            letters, digits = kind.name.rstrip("0123456789"), kind.name.lstrip("UINTFLOA")
            assert TYPE_NAMES[kind.value] == names[letters] + digits
