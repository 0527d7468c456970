"""Finds the run that a name means, and decides whether it goes on or a new run starts."""

from ...trainers.core.config import TrainConfig
from ...trainers.run.checkpoint import RunKey
from ...trainers.run.job import Job
from ...trainers.run.record import Spec


def goes_on(job: Job, run_key: RunKey, config: TrainConfig) -> bool:
    """Whether a finished run equals the requested one, or can be made longer to it. ValueError if it cannot."""
    if run_key.changes(job.spec.run_key):
        return False
    job.require_reachable(config)
    if job.steps_of(config) == job.kept_steps:
        return not run_key.adjusted(job.spec.run_key)
    if not job.state_path.is_file():
        raise ValueError(
            f"run {job.spec.run_name!r} cannot be made longer than its {job.kept_steps} steps: its state was not kept "
            "(keep_state). Choose another run name"
        )
    return True


def same_name(one: str, other: str) -> bool:
    """Whether two names are equal as folders on Windows and macOS, where case does not matter."""
    return one.casefold() == other.casefold()


def asked_as(spec: Spec) -> str:
    return spec.asked_as or spec.run_name


def may_be_meant(job: Job, run_name: str, run_key: RunKey) -> bool:
    """Whether `run_name` may mean this job, whose name is `run_name` or `run_name` with a number.

    A job that was requested under another name is not meant. Two exceptions hold if the run key is equal: `run_name`
    is the job's full name, or an earlier version started the job and did not store the requested name.
    """
    if same_name(asked_as(job.spec), run_name):
        return True
    own = same_name(job.spec.run_name, run_name)
    return (own or not job.spec.asked_as) and not run_key.changes(job.spec.run_key)
