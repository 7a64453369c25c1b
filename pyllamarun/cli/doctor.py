"""pyllamarun doctor: what this machine has, and what it lacks."""

from __future__ import annotations

import click

from pyllamarun.cli.options import MachineOptions, as_json, machine


@click.command(name="doctor", short_help="What this machine has, and what it lacks.")
@machine
@as_json
def command(machine: MachineOptions, as_json: bool) -> int:
    """Looks at GPUs, RAM, CPU, disk and the llama.cpp programs.  Exits with 5 when something is broken."""
    import os
    import re
    from dataclasses import asdict

    from pyllamarun import output, paths
    from pyllamarun.cli.planning import wanted_machine
    from pyllamarun.errors import BinaryError
    from pyllamarun.machine.gpu import survey_gpus
    from pyllamarun.machine.host import read_cpu, read_disk, read_memory
    from pyllamarun.run import checkup
    from pyllamarun.run.binaries import find_binaries
    from pyllamarun.run.command import environment
    from pyllamarun.run.process import output_of
    from pyllamarun.run.stage import REAL, VIRTUAL, list_devices, open_stage, survey_stage

    memory, cpu, disk = read_memory(), read_cpu(), read_disk(paths.models_folder())
    rows: list[checkup.Row] = []
    try:
        binaries = find_binaries()
        with open_stage(binaries, wanted_machine(machine)) as stage:
            devices = list_devices(binaries, stage)
            survey = survey_stage(stage)
        _, text = output_of([binaries.path("llama-server"), "--version"], environment(binaries))
        commit = re.search(r"commit ([0-9a-f]+)", text)
        rows += checkup.check_stage(stage.description)
        if stage.kind != VIRTUAL:
            rows += checkup.check_gpus(survey, binaries.build.backend)
        if stage.kind == REAL:
            rows += checkup.check_visible(os.environ.get("CUDA_VISIBLE_DEVICES"), survey, devices)
        rows += checkup.check_kernels(binaries.build, survey)
        program_rows = checkup.check_build(binaries.build, commit[1] if commit else "", devices)
        program_rows += [
            checkup.Row(checkup.OK, "virtual GPU", f"{device.name}: {device.description}")
            for device in devices
            if device.backend == "VIRTUAL"
        ]
    except BinaryError as error:
        survey = survey_gpus()
        rows += checkup.check_gpus(survey, "unknown")
        program_rows = [checkup.Row(checkup.FAILURE, "binaries", error.what, error.remedy)]
    rows += checkup.check_memory(memory) + checkup.check_cpu(cpu) + checkup.check_disk(disk) + program_rows
    if as_json:
        facts = {"gpus": asdict(survey), "memory": asdict(memory), "cpu": asdict(cpu), "disk": asdict(disk)}
        output.print_json(output.envelope("doctor", {"rows": [asdict(row) for row in rows], **facts}))
    else:
        output.print_text(output.table([[row.status, row.topic, row.text] for row in rows]))
        for row in rows:
            if row.remedy:
                output.print_text(f"{row.topic}: {row.remedy}")
    return 5 if any(row.status == checkup.FAILURE for row in rows) else 0
