"""What a web server says that it sends: which bytes, of how many, of which version of a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyllamarun.errors import DownloadError
from pyllamarun.models.refusals import Place

if TYPE_CHECKING:
    import requests


@dataclass(frozen=True)
class Answer:
    """`length_bytes` from byte `start` on, of a file of `total_bytes`; none after 416.

    `version` is the ETag, or the date where there is none; "" where there is neither.  `is_range` is false for the
    whole file.
    """

    version: str
    total_bytes: int
    start: int
    length_bytes: int
    is_range: bool


def read_answer(place: Place, response: requests.Response) -> Answer:
    """Raises DownloadError where it says less than is needed, or contradicts itself."""
    headers = response.headers
    encoding = headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise fault(place, f"It sends the file encoded ({encoding}), although it was asked not to.")
    version = headers.get("ETag") or headers.get("Last-Modified", "")
    content_range, announced = headers.get("Content-Range", ""), headers.get("Content-Length", "")
    if response.status_code == 416:
        match = re.fullmatch(r"bytes \*/(\d{1,18})", content_range)
        return Answer(version, int(match[1]) if match else 0, 0, 0, True)
    if response.status_code == 200:
        if not announced.isdecimal():
            raise fault(place, "It does not say how large the file is.")
        total = int(announced[:19])
        return Answer(version, total, 0, total, False)
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", content_range)
    if not match:
        raise fault(place, "It does not say which bytes of how many it sends.")
    first, last, total = map(int, match.groups())
    length = last - first + 1
    if not 0 < length <= total - first:
        raise fault(place, f"Of {total:,} bytes it sends {first:,} to {last:,}.")
    if announced not in ("", str(length)):
        raise fault(place, f"It announces {announced} bytes for a range of {length}.")
    return Answer(version, total, first, length, True)


def fault(place: Place, why: str) -> DownloadError:
    what = f"{place.shown} cannot be read: its server does not do what it should."
    return DownloadError(what, why=why, remedy="Download the file by other means, and name it by its path.")
