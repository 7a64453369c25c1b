#!/usr/bin/env python3
"""How long a verified download takes, beside curl, which verifies nothing, and curl followed by sha256sum.

    python benchmarks/download.py [ROUNDS]

Run it with the Python that pyllamarun is installed in.  2 GiB come over loopback from a process that sends the file
from the page cache (sendfile) and heeds ranges; it is the same for all, and so is the disk.  Each run is a cold
process that writes a new file, and they alternate.  Ours hashes what it writes, keeps its journal, and gives the file
its name once it is flushed to the disk, which curl leaves to the system.  Medians; memory is the largest of all runs.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from pyllamarun.output import table
from pyllamarun.units import GIB, MIB

SIZE_BYTES = 2 * GIB
ROUNDS = 5
FETCH = """
import sys
from pathlib import Path
from pyllamarun.models.download import Wanted, fetch
from pyllamarun.models.http import Web
from pyllamarun.models.refusals import Place
url, target, sha256 = sys.argv[1:]
fetch(Web(), Wanted(Place(url, "the file"), Path(target), sha256=sha256))
"""


def write_content(path: Path) -> str:
    """A file without repetition within a block, and its sha256."""
    block, digest = random.Random(2).randbytes(8 * MIB), hashlib.sha256()
    with path.open("wb") as file:
        for number in range(SIZE_BYTES // len(block)):
            data = number.to_bytes(8, "little") + block[8:]
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def serve(path: Path, channel: Connection) -> None:
    """In a process of its own, which also makes the file, so that this one stays small: children inherit its peak."""
    channel.send(write_content(path))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            size = path.stat().st_size
            start, end = 0, size
            asked = self.headers.get("Range", "")
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, end = int(first), min(size, int(last or size) + 1)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", '"one"')
            self.end_headers()
            with path.open("rb") as file:
                while start < end:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    channel.send(server.server_port)
    server.serve_forever()


def measure(argv: Sequence[str | Path]) -> tuple[float, int]:
    """Seconds, and the peak of its memory in bytes."""
    begin = time.monotonic()
    process = subprocess.Popen([str(word) for word in argv], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{argv[0]} ended with status {process.returncode}.")
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name, "source.bin"), Path(name, "target.bin")
        ours, theirs = get_context("fork").Pipe()
        server = get_context("fork").Process(target=serve, args=(source, theirs), daemon=True)
        server.start()
        sha256 = ours.recv()
        os.sync()
        url = f"http://127.0.0.1:{ours.recv()}/source.bin"
        curl = ["curl", "--silent", "--fail", "--output", target, url]
        ways: dict[str, list[list[str | Path]]] = {
            "pyllamarun, verified": [[sys.executable, "-c", FETCH, url, target, sha256]],
            "curl": [curl],
            "curl; sha256sum": [curl, ["sha256sum", target]],
        }
        if shutil.which("openssl"):
            ways["curl; openssl sha256"] = [curl, ["openssl", "dgst", "-sha256", target]]
        runs: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, commands in ways.items():
                measured = [measure(command) for command in commands]
                target.unlink()
                runs[way].append((sum(seconds for seconds, _ in measured), max(peak for _, peak in measured)))
        server.terminate()
        server.join()
    medians = {way: statistics.median(seconds for seconds, _ in measured) for way, measured in runs.items()}
    own = medians["pyllamarun, verified"]
    rows = [
        (
            way,
            f"{medians[way]:.2f} s",
            f"{min(seconds for seconds, _ in measured):.2f}–{max(seconds for seconds, _ in measured):.2f}",
            f"{own / medians[way]:.2f}",
            f"{max(peak for _, peak in measured) / MIB:.0f} MiB",
        )
        for way, measured in runs.items()
    ]
    print(f"2 GiB over loopback, {rounds} rounds, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    print(table(rows, header=("", "median", "range", "ours / this", "memory"), right=(1, 2, 3, 4)))


if __name__ == "__main__":
    main()
