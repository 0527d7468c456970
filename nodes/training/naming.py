"""Which run a name means, and whether it is the run that is asked for."""

from ...trainers.core.config import TrainConfig
from ...trainers.run.checkpoint import Identity
from ...trainers.run.job import Job
from ...trainers.run.record import Spec


def goes_on(job: Job, identity: Identity, config: TrainConfig) -> bool:
    """Whether a finished run is the one that is asked for, or becomes it by more steps; ValueError if it cannot."""
    if identity.changes(job.spec.identity):
        return False
    job.require_reachable(config)
    if job.steps_of(config) == job.kept_steps:
        return not identity.adjusted(job.spec.identity)
    if not job.state_path.is_file():
        raise ValueError(
            f"run {job.spec.run_name!r} cannot be made longer than its {job.kept_steps} steps: its state was not kept "
            "(keep_state). Choose another run name"
        )
    return True


def same_name(one: str, other: str) -> bool:
    """As folders on Windows and macOS compare."""
    return one.casefold() == other.casefold()


def asked_as(spec: Spec) -> str:
    return spec.asked_as or spec.run_name


def may_be_meant(job: Job, run_name: str, identity: Identity) -> bool:
    """Whether who asks for `run_name` may mean this job, whose name is `run_name`, perhaps with a number.

    Not if it was asked for by another name, but for two cases, where it also has to be made of the same: its own name
    was typed, or an earlier version started it, which did not note what was asked for.
    """
    if same_name(asked_as(job.spec), run_name):
        return True
    own = same_name(job.spec.run_name, run_name)
    return (own or not job.spec.asked_as) and not identity.changes(job.spec.identity)
