"""Where a quantized file comes from, written into its metadata; what llama-quantize cannot write there, beside it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyllamarun.models.gguf import Header, Value

PREFIX = "pyllamarun.quantize."
MAX_VALUE_BYTES = 127  # llama_model_kv_override::val_str in include/llama.h; string_parse_kv_override refuses more


@dataclass(frozen=True)
class Provenance:
    """What is kept of a quantization; "" and () where it is not known, or there is none.

    `source` is what the user calls the source, `source_sha256` a digest for each of its files, `options` those of
    llama-quantize.
    """

    source: str
    source_sha256: tuple[str, ...]
    source_type: str
    type: str
    options: tuple[str, ...]
    imatrix: str
    imatrix_sha256: str
    tool: str
    llama_cpp: str

    def values(self) -> dict[str, str]:
        """By the last part of their keys."""
        return {
            "source": self.source,
            "source_sha256": " ".join(self.source_sha256),
            "source_type": self.source_type,
            "type": self.type,
            "options": " ".join(self.options),
            "imatrix": self.imatrix,
            "imatrix_sha256": self.imatrix_sha256,
            "tool": self.tool,
            "llama_cpp": self.llama_cpp,
        }

    def overrides(self, source: Header) -> list[str]:
        """llama-quantize's arguments: what there is to say, each at most as long as it can be.

        What the source says of its own quantization would be copied, and must not be taken for this one's.
        """
        words = []
        for name, value in self.values().items():
            if value or f"{PREFIX}{name}" in source.metadata:
                words += ["--override-kv", f"{PREFIX}{name}=str:{shortened(value)}"]
        return words

    def beside(self) -> dict[str, Any]:
        """What did not go into the file whole, for a JSON file beside it; empty where all of it did."""
        is_whole = all(shortened(value) == value for value in self.values().values())
        return {} if is_whole else asdict(self)


def shortened(value: str) -> str:
    """As much of a value as llama-quantize takes, on one line, whole characters only."""
    line = re.sub(r"[\x00-\x1f\x7f]", " ", value)
    return os.fsencode(line)[:MAX_VALUE_BYTES].decode("utf-8", "ignore")


def read_provenance(metadata: Mapping[str, Value]) -> dict[str, str]:
    """What a file says of its quantization, by the last part of its keys; empty where we did not make it."""
    found = {key.removeprefix(PREFIX): value.data for key, value in metadata.items() if key.startswith(PREFIX)}
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def sidecar_text(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=1) + "\n"
