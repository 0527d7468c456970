"""Going on with a run under other options: whether its phases can be as long as asked, and what is said of it."""

from ..core.recipe import Phase


def require_reachable(before: list[Phase], after: list[Phase], done: int, run_name: str) -> None:
    """ValueError if a run that made `done` steps of the phases `before` cannot go on with the phases `after`.

    A phase may become longer until the next one has begun, for that builds on what the phase made.
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
                f"{order[name]}={steps}: run {run_name!r} is past phase {name!r}, which had {least} steps and on which "
                f"phase {current!r} builds; expected {least}, or another run_name"
            )


def _made(phases: list[Phase], done: int) -> dict[str, int]:
    """Steps made of each phase that has begun; at the end of one the next counts as begun."""
    made = {}
    for phase in phases:
        made[phase.name] = min(done, phase.steps)
        done -= made[phase.name]
        if made[phase.name] < phase.steps:
            break
    return made


def describe(adjusted: list[str], done: int, lr_schedule: str) -> str:
    """One or two sentences about a run that goes on after `done` steps under other options; nothing if none changed."""
    if not adjusted:
        return ""
    text = f"Goes on from step {done} with changed options: {', '.join(adjusted)}."
    planned = f" The {lr_schedule} course of the learning rate is planned anew for all steps."
    return text + (planned if lr_schedule != "constant" else "")
