"""The words of the server that the page goes by."""

from typing import Any

from ...trainers import recipes
from ...trainers.core.events import DELETED, EVENTS
from ...trainers.run.record import ENDED, GOING
from ...trainers.run.unreadable import Unreadable
from .result import TrainingResult


def words() -> dict[str, Any]:
    """Names of the events in a history and of the message that a run was deleted, statuses of runs that go on and of
    those that have ended, ids of the nodes that start a run and of the one that waits for it.
    """
    return {
        "events": list(EVENTS),
        "deleted": DELETED,
        "going": GOING,
        "ended": [*ENDED, Unreadable.status],
        "train_nodes": list(recipes()),
        "result_node": TrainingResult.define_schema().node_id,
    }
