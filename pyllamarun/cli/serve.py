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
    from pyllamarun.cli.planning import plan_model
    from pyllamarun.run.process import running
    from pyllamarun.run.server import check_port, serve

    planned = plan_model(options)
    argv = planned.argv("llama-server", "--host", host, "--port", str(port))
    if dry_run:
        output.print_text(planned.shell_line(argv))
        return
    check_port(host, port)
    for warning in planned.plan.warnings:
        output.note(f"warning: {warning}")
    serve(running, argv, planned.environment(), host, port, output.print_text, output.note)
