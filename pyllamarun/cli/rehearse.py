"""pyllamarun rehearse: a plan carried out without a card and without the model's data, its memory counted."""

from __future__ import annotations

import click

from pyllamarun.cli.options import PlanOptions, as_json, planning


@click.command(name="rehearse", short_help="Prove a plan: load, prompt, count every byte.")
@planning
@click.option("--for-real", is_flag=True, help="On this machine's own card, as its driver counts.")
@as_json
def command(options: PlanOptions, for_real: bool, as_json: bool) -> int:
    """Starts llama-server exactly as MODEL's plan says, prompts every slot full, and reports the peak on each GPU.

    The model's data is not needed: a header is enough, and nothing is computed.  With --gpu, in a build with CUDA,
    llama.cpp's own CUDA backend runs on a stand-in for that card.  Exits with 3 when the budget is exceeded.
    """
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    from pyllamarun import output
    from pyllamarun.cli.planning import planned
    from pyllamarun.errors import UsageError
    from pyllamarun.machine.gpu import survey_gpus
    from pyllamarun.models.skeleton import write_skeleton
    from pyllamarun.planning.request import RPC, fixed_value
    from pyllamarun.run.process import running
    from pyllamarun.run.rehearsal import DriverMeter, StageMeter, driver_usage, rehearse
    from pyllamarun.run.report import describe_rehearsal
    from pyllamarun.run.server import free_port
    from pyllamarun.run.stage import REAL

    with planned(options) as plan:
        if not plan.plan.devices:
            raise UsageError("There is no GPU to rehearse for.", remedy="Name one: --gpu 'RTX 3060'.")
        if fixed_value(plan.plan.argv, *RPC):
            raise UsageError(
                "What RPC servers hold cannot be counted from here.",
                remedy="Rehearse without --rpc, or on their machines.",
            )
        if for_real != (plan.stage.kind == REAL):
            raise UsageError(
                "--for-real is for this machine's own card."
                if for_real
                else "A rehearsal would load this machine's card.",
                remedy="Leave --gpu and --virtual-gpu out, or --for-real."
                if for_real
                else "Name a card to rehearse for, --gpu 'RTX 3060', or say --for-real.",
            )
        stage = plan.stage.hollow(plan.binaries)
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="pyllamarun-") as folder:
            skeleton = write_skeleton(plan.model.header, Path(folder) / "model.gguf", servable=True)
            argv = plan.argv("llama-server", "--host", "127.0.0.1", "--port", str(port))
            argv[argv.index("-m") + 1] = str(skeleton)
            meter = (
                DriverMeter(driver_usage(survey_gpus, plan.planner.devices), plan.plan.devices)
                if for_real
                else StageMeter(stage)
            )
            with output.status("rehearsing") as show:
                result = rehearse(running, argv, port, plan.plan, stage, meter, show, lambda _: None)
        if not for_real:
            plan.planner.rehearsals(plan.model.header).put(plan.plan.argv[1:], result)
    if as_json:
        output.print_json(output.envelope("rehearse", asdict(result) | {"fits": result.fits}))
    else:
        output.print_text(describe_rehearsal(result, plan.stage.description))
    return 0 if result.fits else 3
