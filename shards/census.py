"""What labels and masks of a set say of each other: a wrong numbering shows in no single photo, but in their counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from esol.base.errors import DataError
from esol.base.palette import VOID
from esol.data.samples import decode_mask


class Census:
    """Photos of each class: labelled with it, showing it in their mask, both; of those that have a mask at all."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.labelled: Counter[str] = Counter()
        self.masks = self.only_void = 0
        self._drawn: Counter[str] = Counter()
        self._both: Counter[str] = Counter()
        self._odd: list[str] = []  # photos whose mask shows what they are not labelled with, in words
        self._drawing = 0  # masks that show any class

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """A sample that is sound by itself; one without labels or mask counts as far as it goes."""
        labels = set(json.loads(members["json"])["labels"]) if "json" in members else set()
        self.labelled.update(labels)
        if "mask.png" not in members or "json" not in members:
            return
        levels = decode_mask(members["mask.png"], key, len(self.classes))
        numbers = np.flatnonzero(np.bincount(levels.ravel(), minlength=256))
        drawn = {self.classes[n - 1] for n in numbers.tolist() if 0 < n < VOID}
        self.masks += 1
        self.only_void += not drawn and VOID in numbers
        self._drawing += bool(drawn)
        self._drawn.update(drawn)
        self._both.update(drawn & labels)
        if drawn - labels:
            shows = ", ".join(sorted(drawn - labels))
            self._odd.append(f"{key} shows {shows}, its labels are {', '.join(sorted(labels)) or 'none'}")

    def include(self, other: Census) -> None:
        """Counts what another one has counted, of other photos of the same set."""
        for name in ("labelled", "_drawn", "_both"):
            getattr(self, name).update(getattr(other, name))
        self.masks, self.only_void = self.masks + other.masks, self.only_void + other.only_void
        self._odd, self._drawing = self._odd + other._odd, self._drawing + other._drawing

    def lines(self) -> list[str]:
        """A table of the classes, then what is odd about the masks, for people."""
        width = max(map(len, self.classes))
        rows = [f"  {'class':<{width}}  labelled" + ("  drawn  both" if self.masks else "")]
        for name in self.classes:
            more = f"  {self._drawn[name]:>5}  {self._both[name]:>4}" if self.masks else ""
            rows.append(f"  {name:<{width}}  {self.labelled[name]:>8}{more}")
        never = [name for name in self.classes if not self.labelled[name]]
        if never and any(self.labelled.values()):
            rows.append(f"warning: no photo is labelled {', '.join(never[:10])}{', ...' if len(never) > 10 else ''}")
        if self._odd:
            rows.append(
                f"warning: {len(self._odd)} of {self.masks} masks show a class that their photo is not labelled with: "
                f"{'; '.join(sorted(self._odd)[:3])}{'; ...' if len(self._odd) > 3 else ''}"
            )
        if 2 * self.only_void > self.masks:
            rows.append(f"warning: {self.only_void} of {self.masks} masks hold nothing but background and void (255)")
        return rows

    def refuse(self, where: str) -> None:
        """DataError where the masks' numbers must mean something else than the classes."""
        wrong = [name for name in self.classes if self._unlabelled(name) >= 2 and self._mostly(name)]
        if (len(self._odd) < 2 or 2 * len(self._odd) <= self._drawing) and not wrong:
            return  # one slip of a pen is no other numbering
        what = (
            f"{wrong[0]} is drawn in {self._drawn[wrong[0]]} masks, and {self._unlabelled(wrong[0])} of their photos "
            "are not labelled with it"
            if wrong
            else f"{len(self._odd)} of {self._drawing} masks show a class that their photo is not labelled with"
        )
        numbers = ", ".join(f"{n} = {name}" for n, name in enumerate(self.classes[:4], 1))
        raise DataError(
            f"{where}: {what} (such as: {sorted(self._odd)[0]}): masks must be numbered 0 = background, {numbers}"
            f"{', ...' if len(self.classes) > 4 else ''}, 255 = void"
        )

    def _unlabelled(self, name: str) -> int:
        return self._drawn[name] - self._both[name]

    def _mostly(self, name: str) -> bool:
        return 2 * self._unlabelled(name) > self._drawn[name]
