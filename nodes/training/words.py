"""The server's words for the page: names of events, statuses and nodes."""

from typing import Any

from ...trainers import recipes
from ...trainers.core.events import DELETED, EVENTS
from ...trainers.run.record import ENDED, GOING
from ...trainers.run.unreadable import Unreadable
from .result import TrainingResult


def words() -> dict[str, Any]:
    """Names of history events and of the deletion message, statuses of active and ended runs, and ids of the Train
    nodes and Training Result.
    """
    return {
        "events": list(EVENTS),
        "deleted": DELETED,
        "going": GOING,
        "ended": [*ENDED, Unreadable.status],
        "train_nodes": list(recipes()),
        "result_node": TrainingResult.define_schema().node_id,
    }
