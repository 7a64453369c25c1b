"""What would help a plan, and what to type for it.  Imported only where a plan needs help."""

from __future__ import annotations

from dataclasses import replace

from pyllamarun import output, shell
from pyllamarun.cli.options import PlanOptions
from pyllamarun.cli.planning import Planned, wanted_request
from pyllamarun.errors import DoesNotFit
from pyllamarun.models.model import Model
from pyllamarun.planner import Planner
from pyllamarun.planning.plan import Advice
from pyllamarun.planning.report import describe_advice
from pyllamarun.planning.request import Request
from pyllamarun.whatif import advise


def advice_for(planned: Planned, options: PlanOptions) -> tuple[Advice, ...]:
    """What would help a plan; its model, where it is a requantization that is not made yet, has to be made first."""
    with output.status("looking for what would help"):
        advice = advise(planned.planner, planned.model, wanted_request(options), planned.plan)
    if planned.plan.requantization is None or planned.is_here:
        return advice
    return tuple(replace(one, command=planned.first) for one in advice)


def with_advice(
    error: DoesNotFit, planner: Planner, model: Model, request: Request, options: PlanOptions
) -> DoesNotFit:
    """The error, with what would fit instead."""
    with output.status("looking for what would fit"):
        advice = advise(planner, model, request, None)
    remedy = "\n".join([error.remedy, *advice_lines(advice, options)])
    return DoesNotFit(error.what, why=error.why, remedy=remedy)


def advice_lines(advice: tuple[Advice, ...], options: PlanOptions) -> list[str]:
    return describe_advice(advice, [_command(one, options) for one in advice])


def _command(advice: Advice, options: PlanOptions) -> str:
    plan = shell.join(options.words("plan", advice.source, advice.words, advice.arguments))
    return f"{advice.command} && {plan}" if advice.command else plan
