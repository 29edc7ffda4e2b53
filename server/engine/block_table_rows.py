"""Which rows of the block tables on a GPU belong to whom."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.plan import PlannedRequest
from server.engine.request import Request


class BlockTableRows:
    """Which row of the block tables on the device belongs to which request, and how much of it is written.

    A request keeps its row while it decodes, so a step has little to tell the device: the blocks that are new. Rows of
    requests that were not in a step for the longest time are given to new ones.
    """

    def __init__(self, num_rows: int) -> None:
        self._free = list(range(num_rows - 1, -1, -1))
        self._rows: OrderedDict[int, _Row] = OrderedDict()  # by request id, the ones used last at the end

    def assign(self, planned_requests: Sequence[PlannedRequest]) -> tuple[list[int], list[tuple[int, int, int]]]:
        """The row of each planned request, and what to write: (row, column, block id). At most `num_rows` requests."""
        rows = self._rows
        newcomers = False
        for planned in planned_requests:
            request_id = planned.request.request_id
            if request_id in rows:
                rows.move_to_end(request_id)
            else:
                newcomers = True
        if newcomers:
            for planned in planned_requests:
                if planned.request.request_id not in rows:
                    # All of this step's rows are at the end by now, so the first one is not among them.
                    index = self._free.pop() if self._free else rows.popitem(last=False)[1].index
                    rows[planned.request.request_id] = _Row(index)
        indices: list[int] = []
        updates: list[tuple[int, int, int]] = []
        for planned in planned_requests:
            request = planned.request
            row = rows[request.request_id]
            block_ids = planned.block_ids
            if row.request is not request or row.num_preemptions != request.num_preemptions:
                row.request, row.num_preemptions, row.num_blocks = request, request.num_preemptions, 0
            if row.num_blocks < len(block_ids):
                for column in range(row.num_blocks, len(block_ids)):
                    updates.append((row.index, column, block_ids[column]))
                row.num_blocks = len(block_ids)
            indices.append(row.index)
        return indices, updates

    def forget(self) -> None:
        """Write every row anew when it is used next: it is not known what the device has."""
        for row in self._rows.values():
            row.request = None


@dataclass(slots=True)
class _Row:
    """A row of the block tables: the first `num_blocks` blocks that `request` got after so many preemptions."""

    index: int
    request: Request | None = None
    num_preemptions: int = 0
    num_blocks: int = 0
