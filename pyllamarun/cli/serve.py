"""pyllamarun serve: llama-server within the VRAM budget, until it is stopped."""

from __future__ import annotations

import click

from pyllamarun.cli.options import PlanOptions, dry_run, planning


@click.command(name="serve", short_help="Serve a model, within the VRAM budget.")
@planning
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="Port to listen on.")
@dry_run
def command(options: PlanOptions, host: str, port: int, dry_run: bool) -> None:
    """Plans MODEL and serves it with llama-server: an OpenAI-compatible API, and a chat page.

    Prints the address when the server is ready; its log goes to stderr.  SIGINT and SIGTERM stop it.
    """
    from pyllamarun import output
    from pyllamarun.cli.planning import planned
    from pyllamarun.run.process import running
    from pyllamarun.run.server import check_port, serve
    from pyllamarun.run.stage import ON_STANDIN

    with planned(options) as plan:
        argv = plan.argv("llama-server", "--host", host, "--port", str(port))
        stage = plan.stage
        if stage.kind == ON_STANDIN:
            argv += ["--alias", "rehearsal: nothing is computed, and no answer means anything"]
            stage = stage.hollow(plan.binaries)
        if dry_run:
            output.print_text(plan.shell_line(argv))
            return
        plan.check_here()
        check_port(host, port)
        for warning in plan.plan.warnings:
            output.note(f"warning: {warning}")
        if stage.description:
            output.note(stage.description)
        if stage.kind == ON_STANDIN:
            output.note("warning: nothing is computed; this is for rehearsing, and no answer means anything")
        serve(running, argv, stage.environment, host, port, output.print_text, output.note)
