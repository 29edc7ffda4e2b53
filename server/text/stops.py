"""Stop strings, found in text that arrives in pieces.

Which match counts: the one that is complete first, as a reader of the text from left to right would see it. Among
stops that end at the same character the longest wins. So the result is a function of the text alone, never of how it
was cut into pieces, and generation never waits for a longer stop once a shorter one is complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _Node:
    """A prefix of at least one stop string (Aho and Corasick, 1975)."""

    depth: int
    children: dict[str, _Node] = field(default_factory=dict)
    fail: _Node | None = None
    stop: str | None = None  # the longest stop string that is a suffix of this prefix
    held: int = 0  # the longest suffix that may still grow into a stop string, in characters


def _build(stops: Sequence[str]) -> _Node:
    """The automaton, in time and memory linear in the joined length of the stops. Raises ValueError on an empty one."""
    root = _Node(0)
    for stop in stops:
        if not stop:
            raise ValueError("a stop string must not be empty")
        node = root
        for character in stop:
            node = node.children.setdefault(character, _Node(node.depth + 1))
        node.stop = stop
    queue = deque([root])
    while queue:
        parent = queue.popleft()
        for character, node in parent.children.items():
            back = parent.fail
            while back is not None and character not in back.children:
                back = back.fail
            node.fail = back.children[character] if back is not None else root
            node.stop = node.stop or node.fail.stop
            node.held = node.depth if node.children else node.fail.held
            queue.append(node)
    return root


class StopMatcher:
    """Watches the text of one choice for its stop strings.

    Owns the text that may still become a stop string: at any time the longest suffix of the text that is a proper
    prefix of a stop. `push` and `flush` return text in order, each character once. After a match there is no more text.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._root = _build(stops)
        self._node = self._root
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def fresh(self) -> StopMatcher:
        """Another matcher of the same stops, at the beginning of another text. It shares what takes time to make."""
        other = copy(self)
        other._node, other._held, other.matched = self._root, "", None
        return other

    def push(self, text: str, armed: bool = True) -> str:
        """Text that is now certain to be part of the output. Sets `matched` when a stop string is complete.

        armed: whether a stop that is complete within `text` counts; text keeps being held back either way, so that a
        stop that begins here and ends later leaves nothing behind.
        """
        root = self._root
        node = self._node
        if node is root and root.children.keys().isdisjoint(text):
            return text
        text = self._held + text
        for position in range(len(self._held), len(text)):
            character = text[position]
            while character not in node.children and node.fail is not None:
                node = node.fail
            node = node.children.get(character, root)
            if node.stop is not None and armed:
                self.matched = node.stop
                self._held = ""
                self._node = root
                return text[: position + 1 if self._include_stop else position + 1 - len(node.stop)]
        self._node = node
        certain = len(text) - node.held
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text still held back: nothing more will come."""
        held, self._held, self._node = self._held, "", self._root
        return held
