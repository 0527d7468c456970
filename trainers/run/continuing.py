"""Resuming a run with changed options: checks its phases' new numbers of steps, and describes the changes."""

from ..core.recipe import Phase


def require_reachable(before: list[Phase], after: list[Phase], done: int, run_name: str) -> None:
    """ValueError if a run that made `done` steps of the phases `before` cannot go on with the phases `after`.

    A phase cannot become longer once the next one has begun, because the next one builds on its result.
    """
    if not done:
        return
    made = _made(before, done)
    current = list(made)[-1]
    asked = {phase.name: phase.steps for phase in after}
    order = {phase.name: phase.option for phase in (*after, *before)}
    past = list(asked)[: list(asked).index(current)] if current in asked else []
    for name in dict.fromkeys((*past, *made)):
        steps, least = asked.get(name, 0), made.get(name, 0)
        if steps < least:
            raise ValueError(
                f"{order[name]}={steps}: run {run_name!r} has made {least} of these steps already, expected at least "
                f"{least}, or another run_name"
            )
        if steps > least and name != current:
            raise ValueError(
                f"{order[name]}={steps}: run {run_name!r} is past phase {name!r}, which had {least} steps; phase "
                f"{current!r} builds on them. Expected {least}, or another run_name"
            )


def _made(phases: list[Phase], done: int) -> dict[str, int]:
    """The steps made in each phase that has begun. A phase counts as begun when the one before it is complete."""
    made = {}
    for phase in phases:
        made[phase.name] = min(done, phase.steps)
        done -= made[phase.name]
        if made[phase.name] < phase.steps:
            break
    return made


def describe(adjusted: list[str], done: int, lr_schedule: str) -> str:
    """A note on a run that goes on after `done` steps with changed options, or "" if none changed."""
    if not adjusted:
        return ""
    text = f"Goes on from step {done} with changed options: {', '.join(adjusted)}."
    planned = f" The {lr_schedule} learning rate schedule is computed again for all steps."
    return text + (planned if lr_schedule != "constant" else "")
