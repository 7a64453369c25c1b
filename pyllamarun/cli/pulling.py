"""From `pull`'s options to a model that is here.  Imported only when it runs."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pyllamarun import output, shell
from pyllamarun.cli import Terminated
from pyllamarun.cli.options import PlanOptions
from pyllamarun.cli.planning import wanted_machine, wanted_request
from pyllamarun.errors import BinaryError, DoesNotFit, DownloadError, UsageError
from pyllamarun.fitting import PARTLY, POOR, UNKNOWN, Fit, fit
from pyllamarun.models import pulling, stores
from pyllamarun.models.download import sha256_of
from pyllamarun.models.gguf import Header, read_header
from pyllamarun.models.model import Model
from pyllamarun.models.names import is_companion
from pyllamarun.models.pulling import Job, PulledFile
from pyllamarun.models.sources import Source, resolve
from pyllamarun.models.store import Index, known_sha256, open_index
from pyllamarun.planner import Planner
from pyllamarun.requantizing import Wish, find_quantizer, forecasts, target_of
from pyllamarun.units import format_seconds, format_size
from pyllamarun.whatif import compare_models


@dataclass(frozen=True)
class Wishes:
    """What `pull` was told besides the planning options."""

    fit: str | None
    mmproj: bool
    type_name: str | None
    sha256: str
    yes: bool
    as_json: bool


@dataclass(frozen=True)
class Got:
    """A model that is here now.  `here`: it was here before, in `store`; `fits`, by the plan before the first byte."""

    source: str
    path: Path
    parts: tuple[Path, ...]
    projector: Path | None
    store: str
    here: bool
    waited: bool
    file_bytes: int
    transferred_bytes: int
    resumed_bytes: int
    sha256: tuple[str, ...]
    fits: Fit | None
    seconds: float


def pull(options: PlanOptions, wishes: Wishes) -> None:
    """Gets it, and prints what came of that.  Raises what can go wrong on the way."""
    if wishes.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", wishes.sha256):
        raise UsageError(f'"{wishes.sha256}" is no sha256.', remedy="Write its 64 hexadecimal digits.")
    if not re.match(r"hf:|https?://", options.model, re.IGNORECASE):
        found = stores.find(options.model)
        if found is None and not stores.is_file(Path(options.model).expanduser()):
            remedy = "Name hf:OWNER/REPO:Q4_K_M or https://HOST/FILE.gguf."
            raise UsageError(f"{options.model} names no place on the network.", remedy=remedy)
    wishes = replace(wishes, sha256=wishes.sha256.lower())
    with open_index(output.note) as index:
        got = _get(options, wishes, index)
    if wishes.as_json:
        output.print_json(output.envelope("pull", asdict(got)))
    else:
        output.print_text(_words(got))
    if wishes.type_name is not None:
        _quantize(got.path, wishes)


def _get(options: PlanOptions, wishes: Wishes, index: Index) -> Got:
    if wishes.fit is not None:
        options = replace(options, vram=wishes.fit)
        source = _recommended(options)
    else:
        source = resolve(options.model)
    projector = _projector(source) if wishes.mmproj else None
    if source.is_here and (projector is None or projector.is_here):
        return _here(source.name, source.path, index, wishes, projector)
    if source.is_here and projector is not None:
        got = _brought(options, wishes, index, pulling.job_of(projector))
        parts = read_header(source.path).parts
        return replace(got, source=source.name, path=source.path, parts=parts, projector=projector.path)
    job = pulling.job_of(source, projector, wishes.sha256)
    same = pulling.same_here(job, index)
    if same is not None and projector is None:
        return _here(job.name, same.path, index, wishes, None)
    return _brought(options, wishes, index, job)


def _projector(source: Source) -> Source:
    from pyllamarun.models.network import projector

    return projector(source)


def _recommended(options: PlanOptions) -> Source:
    """The model of a repository that plans of all recommend."""
    from pyllamarun.models.network import repository

    models = repository(options.model)
    if not models:
        raise UsageError("--fit chooses one of a repository's models.", remedy="Name hf:OWNER/REPO and no more.")
    request = wanted_request(options)
    planner = Planner(wanted_machine(options.machine), overhead_bytes=request.overhead_bytes)
    with planner, output.status("comparing") as show:
        comparison = compare_models(planner, models, request, show)
    row = comparison.recommended_row
    if row is None:
        raise DoesNotFit(
            f"No model of {options.model} fits in {options.vram}.",
            why=comparison.rows[0].reason,
            remedy=f"Compare them: {shell.join(options.words('plan', options.model))}",
        )
    output.note(f"{row.label} of {len(models)}: {comparison.reason}.")
    return next(source for source in models if source.name == row.source)


def _here(name: str, path: Path, index: Index, wishes: Wishes, projector: Source | None) -> Got:
    """A model that is here already: sound, and what the user says that it is."""
    pulling.check_whole(path)
    header = read_header(path)
    parts = header.parts
    index.end(str(path))
    store = next((one.store for one in stores.all_stored() if path in one.parts), stores.NONE)
    sha256 = [known_sha256(part, index) for part in parts]
    if wishes.sha256:
        sha256 = [found or _hashed(part) for found, part in zip(sha256, parts)]
        if sha256 != [wishes.sha256]:
            raise DownloadError(
                f"{path} is here already, and is not the file that you want.",
                why=f"Its sha256 is {' '.join(sha256)}.",
                remedy=f"Remove it first: {shell.join(['pyllamarun', 'rm', str(path)])}",
            )
    size_bytes = header.file_bytes
    beside = projector.path if projector else None
    return Got(name, path, parts, beside, store, True, False, size_bytes, 0, 0, tuple(sha256), None, 0.0)


def _hashed(path: Path) -> str:
    with output.transfer("sha256", path.stat().st_size) as progress:
        return sha256_of(path, progress)


# ------------------------------------------------------------------------------------------ before the first byte


def _brought(options: PlanOptions, wishes: Wishes, index: Index, job: Job) -> Got:
    with output.status(job.name) as show:
        show("reading its header")
        header = job.source.read_header()
    size_bytes = _size_bytes(job, header)
    fits, more = _planned(options, wishes, job, header)
    came = pulling.present_bytes([part.target for part in job.parts])
    disks = pulling.check_disk(job, max(size_bytes - came, 0), more)
    _tell(job, header, size_bytes, came, fits, disks)
    if fits is not None and fits.verdict in POOR and not wishes.yes and not options.force:
        _ask(job, fits)
    return _fetched(wishes, index, job, size_bytes, came, fits)


def _size_bytes(job: Job, header: Header) -> int:
    """Of all files: as listed, or for an address as the header's reading found."""
    sizes = [part.remote.size_bytes for part in job.parts]
    return header.file_bytes if None in sizes else sum(size or 0 for size in sizes)


def _planned(
    options: PlanOptions, wishes: Wishes, job: Job, header: Header
) -> tuple[Fit | None, list[tuple[Path, int]]]:
    """Whether it fits, and what a requantization will write, and where.  A pull without programs is no error."""
    if is_companion(job.source.path.name):
        return None, []
    request, model = wanted_request(options), Model(job.source, header)
    more = []
    if wishes.type_name is not None:
        wish = Wish((wishes.type_name,))
        (made,) = forecasts(find_quantizer(), model, wish)
        more = [(target_of(job.source, header, wish, made.type).parent, made.header.file_bytes)]
    try:
        with Planner(wanted_machine(options.machine), overhead_bytes=request.overhead_bytes) as planner:
            return fit(planner, model, request), more
    except BinaryError as error:
        return Fit(UNKNOWN, "not known", reason=error.what), more


def _tell(
    job: Job, header: Header, size_bytes: int, came: int, fits: Fit | None, disks: Sequence[tuple[Path, int, int]]
) -> None:
    files = f" in {len(job.parts)} files" if len(job.parts) > 1 else ""
    already = f", of which {format_size(came)} are here" if came else ""
    kind = ", ".join(filter(None, (output.printable(header.architecture), header.file_type)))
    output.note(f"{job.name}: {kind}, {format_size(size_bytes)}{files}{already}")
    if fits is not None:
        output.note(f"{_fit_words(fits)}.")
    for folder, needed, free in disks:
        output.note(f"Disk: {format_size(needed)} of {format_size(free)} that are free in {folder}.")


def _fit_words(fits: Fit) -> str:
    if fits.verdict in ("no", UNKNOWN):
        head = "It does not fit this machine" if fits.verdict == "no" else "Whether it fits is not known"
        return f"{head}: {fits.reason.rstrip('.')}"
    where = f"{fits.words} on the GPU" if fits.verdict == PARTLY else fits.words
    takes = f"{format_size(fits.vram_bytes)} of VRAM, " if fits.vram_bytes else ""
    speed = f"; {fits.pace} tok/s: {fits.speed}" if fits.generation else ""
    return f"Planned: {where}, {takes}{format_size(fits.ram_bytes)} of RAM{speed}"


def _ask(job: Job, fits: Fit) -> None:
    """Raises DoesNotFit where a person says no, or there is none."""
    answer = output.ask("Pull it nevertheless?")
    if not answer:
        raise DoesNotFit(
            f"{job.name} was not pulled.",
            why="" if answer is False else f"{_fit_words(fits)}.",
            remedy="To pull it nevertheless: --yes.  To see what would help: "
            + shell.join(["pyllamarun", "plan", job.name]),
        )


# ----------------------------------------------------------------------------------------------------- the bytes


def _fetched(wishes: Wishes, index: Index, job: Job, size_bytes: int, came: int, fits: Fit | None) -> Got:
    start = time.monotonic()

    try:
        with output.transfer(job.source.path.name, size_bytes, came) as progress:
            pulled = pulling.carry_out(job, index, size_bytes, progress, output.note)
    except (KeyboardInterrupt, Terminated):
        present = pulling.present_bytes([part.target for part in job.parts])
        share = f"{format_size(present)} of {format_size(size_bytes)}"
        output.note(f"Interrupted: {share} are here and stay.  To go on: {shell.join(_again(job, wishes))}")
        raise
    return _got(job, pulled, fits, time.monotonic() - start)


def _again(job: Job, wishes: Wishes) -> list[str]:
    words = ["pyllamarun", "pull", job.name]
    words += ["--mmproj"] * wishes.mmproj + ["--yes"] * wishes.yes
    words += ["--sha256", wishes.sha256] if wishes.sha256 else []
    return words + (["--quantize", wishes.type_name] if wishes.type_name else [])


def _got(job: Job, pulled: Sequence[PulledFile], fits: Fit | None, seconds: float) -> Got:
    return Got(
        source=job.name,
        path=job.source.path,
        parts=tuple(part.path for part in job.model_parts),
        projector=job.projector,
        store=stores.HUGGING_FACE if job.parts[0].remote.spot else stores.OWN,
        here=False,
        waited=any(one.waited for one in pulled),
        file_bytes=sum(one.size_bytes for one in pulled),
        transferred_bytes=sum(one.transferred_bytes for one in pulled),
        resumed_bytes=sum(one.resumed_bytes for one in pulled),
        sha256=tuple(one.sha256 for one in pulled),
        fits=fits,
        seconds=round(seconds, 3),
    )


def _words(got: Got) -> str:
    if got.here:
        where = f", in {stores.NAMES[got.store]}" if got.store in stores.NAMES else ""
        lines = [f"{got.source} is here already{where}: nothing was downloaded."]
    elif got.waited and not got.transferred_bytes:
        lines = [f"{got.source}: {format_size(got.file_bytes)}, which another process has pulled."]
    elif not got.transferred_bytes:
        lines = [f"{got.source}: {format_size(got.file_bytes)}, all of which was in the cache."]
    else:
        per_second = int(got.transferred_bytes / max(got.seconds, 0.001))
        before = f", {format_size(got.resumed_bytes)} of it before" if got.resumed_bytes else ""
        took = f"in {format_seconds(got.seconds)}, {format_size(per_second)}/s"
        lines = [f"{got.source}: {format_size(got.file_bytes)} {took}{before}."]
    lines += [f"sha256 {one}" for one in got.sha256 if one and not got.here]
    lines += [str(path) for path in (*got.parts, got.projector) if path]
    return "\n".join(map(output.printable, lines))


def _quantize(path: Path, wishes: Wishes) -> None:
    """As if it had been typed; with --json, that prints a line of its own."""
    from pyllamarun.cli import quantize

    assert wishes.type_name is not None
    words = [str(path), wishes.type_name, *["--json"] * wishes.as_json]
    quantize.command.main(words, prog_name="pyllamarun quantize", standalone_mode=False)
