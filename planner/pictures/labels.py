"""Where labels stand: beside their marks, clear of each other, of all marks and of the lines between them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in the picture's units; down is positive."""


@dataclass
class Labels:
    """The labels of one picture.

    **Fields:**

    - `area`: where labels may stand. `height`: of a line of text. `apart`: between a mark's middle and its label.
    - `taken`: what no label may cover.
    """

    area: Box
    height: float = 14.0
    apart: float = 9.0
    taken: list[Box] = field(default_factory=list[Box])

    def keep_clear(self, x: float, y: float, half: float = 6.0) -> None:
        """A mark around a point."""
        self.taken.append((x - half, y - half, x + half, y + half))

    def keep_line_clear(self, corners: list[tuple[float, float]]) -> None:
        """A line of horizontal and vertical pieces."""
        for (a, b), (c, d) in itertools.pairwise(corners):
            self.taken.append((min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1))

    def place(self, x: float, y: float, wide: float) -> tuple[float, float] | None:
        """Left end and middle of the label of a mark at a point; `None` where there is no room near it.

        The nearest free place of a few, to the right if both sides are free.
        """
        step = self.height + 1
        downs = (0.0, step, -step, 2 * step, -2 * step)
        choices = sorted(itertools.product((False, True), downs), key=lambda c: abs(c[1]) + 0.4 * step * c[0])
        for to_left, down in choices:
            left = x - self.apart - wide if to_left else x + self.apart
            box = left, y + down - self.height / 2, left + wide, y + down + self.height / 2
            inside = box[0] >= self.area[0] and box[1] >= self.area[1] and box[2] <= self.area[2]
            if inside and box[3] <= self.area[3] and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                return left, y + down
        return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
