"""What a reviewer does, apart from how it travels: move through the traces, decide, take back.

Requests come from several threads; each public method holds the lock. Neighbours: `index.py` has the rows,
`data_pipeline/decisions.py` the file that decisions are appended to, `server.py` calls.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline import decisions, reviewed
from data_pipeline.decisions import Decision
from data_pipeline.reviewing import cases
from data_pipeline.reviewing.index import FACETS, Index
from fundus_jax.findings import clean
from fundus_jax.records import DataError

STATES = ("open", "accept", "correct", "reject")  # of a trace, for this reviewer
VOID, DISAGREE = "void", "disagree"
MOST_VALUES = 200  # of a facet that can be chosen


class Desk:
    """The traces of `index`, the decisions of the reviewer in `ledger`, and those of `others`."""

    def __init__(self, index: Index, ledger: decisions.Ledger, others: decisions.Book) -> None:
        self.index, self.ledger, self.others = index, ledger, others
        self.rules = reviewed.check_rules(index.folder / "traces")
        self.states = np.zeros(len(index), np.int8)
        self.void: dict[int, str] = {}
        self.lock = threading.Lock()
        for name in {*ledger.standing, *others} & index.rows.keys():
            self._note(index.rows[name])
        self.unknown = len(ledger.standing.keys() - index.rows.keys())

    def facets(self) -> dict[str, list[list[Any]]]:
        """What there is to choose by: FACET -> [value, how many traces], the most frequent first."""
        shown = {}
        for name in FACETS:
            numbers, values = self.index.facets[name]
            counts = np.bincount(numbers, minlength=len(values)).tolist()
            rows = sorted(zip(counts, values, strict=True), key=lambda one: (-one[0], one[1]))
            shown[name] = [[value, count] for count, value in rows[:MOST_VALUES]]
        return shown

    def look(self, row: int, move: int, filters: Mapping[str, str]) -> dict[str, Any]:
        """The case at `row` (`move` 0), or the next one that the filters choose after it (1) or before (-1).

        "decision" is a filter too: a state, "void" or "disagree". Where there is no such case, `row` is None;
        `next` is the row that would come then, whose picture can be asked for ahead.
        """
        with self.lock:
            wide = self.index.chosen(filters)
            mask = wide & self._decided(filters.get("decision", ""))
            rows = np.flatnonzero(mask)
            place = int(np.searchsorted(rows, row, side="right" if move > 0 else "left"))
            place -= move < 0
            at: int | None = None
            if move == 0 and 0 <= row < len(self.index):
                at = row
            elif 0 <= place < len(rows):
                at = int(rows[place])
            later = rows[np.searchsorted(rows, at, side="right") :] if at is not None else rows[:0]
            return {
                "row": at,
                "next": int(later[0]) if len(later) else None,
                "place": int(np.searchsorted(rows, at)) + 1 if at is not None and mask[at] else None,
                "matching": len(rows),
                "progress": self._progress(wide),
                **({"case": self._case(at)} if at is not None else {}),
            }

    def check(self, row: int, think: str, answer: str) -> dict[str, Any]:
        """What the quality check says of a correction, and its claims."""
        with self.lock:
            return self._check(row, think, answer)

    def decide(
        self, row: int, trace: str, outcome: str, reason: str, think: str, answer: str
    ) -> dict[str, Any]:
        """Decide on the trace with the sha256 `trace`; the decision is on the disk when this returns.

        Returns {"reasons": [...]} and changes nothing where a correction fails the quality check. Raises
        DataError for a decision that would not count, OSError where it can not be saved.
        """
        with self.lock:
            if outcome not in STATES[1:]:
                raise DataError(f"outcome is {outcome!r}; it must be one of {', '.join(STATES[1:])}")
            case = self.index.case(row)
            if outcome == "correct" and (faults := self._check(row, think, answer)["reasons"]):
                return {"reasons": faults}
            made = Decision(
                example=case.example.id, trace=trace, outcome=outcome, reason=reason, think=think,
                answer=answer, reviewer=self.ledger.reviewer, time=decisions.now(),
            )  # fmt: skip
            if why := reviewed.void(case.example, case.trace, made):
                raise DataError(f"this would not count: {why}")
            self.ledger.add(case.example.id, trace, outcome, reason, think, answer)
            self._note(row)
            return {"case": self._case(row), "reasons": []}

    def undo(self) -> int | None:
        """Take the last decision of this session back; its row, or None where there is none."""
        with self.lock:
            name = self.ledger.take_back()
            if name is None:
                return None
            self._note(self.index.rows[name])
            return self.index.rows[name]

    def _note(self, row: int) -> None:
        """Bring the state of a row up to date with what was decided on it."""
        mine = self.ledger.standing.get(self.index.ids[row])
        self.states[row] = 0
        self.void.pop(row, None)
        if mine is not None:
            case = self.index.case(row)
            why = reviewed.void(case.example, case.trace, mine)
            if why:
                self.void[row] = why
            else:
                self.states[row] = STATES.index(mine.outcome)

    def _decided(self, state: str) -> NDArray[np.bool_]:
        if state in STATES:
            return self.states == STATES.index(state)
        if state in (VOID, DISAGREE):
            mask = np.zeros(len(self.index), bool)
            mask[list(self.void if state == VOID else self._disagreeing())] = True
            return mask
        return np.ones(len(self.index), bool)

    def _disagreeing(self) -> list[int]:
        rows = [self.index.rows[name] for name in self.others if name in self.index.rows]
        return [row for row in rows if self.states[row] and not decisions.agree(self._all(row))]

    def _all(self, row: int) -> list[Decision]:
        name = self.index.ids[row]
        mine = self.ledger.standing.get(name)
        case = self.index.case(row)
        found = [*self.others.get(name, ()), *([mine] if mine else [])]
        return [one for one in found if not reviewed.void(case.example, case.trace, one)]

    def _progress(self, mask: NDArray[np.bool_]) -> dict[str, int]:
        counts = np.bincount(self.states[mask], minlength=len(STATES)).tolist()
        return dict(zip(STATES, counts, strict=True))

    def _case(self, row: int) -> dict[str, Any]:
        case = self.index.case(row)
        mine = self.ledger.standing.get(case.example.id)
        others = self.others.get(case.example.id, ()) if self.states[row] else ()  # else it would sway
        return {
            **cases.view(case, self.rules),
            "decision": cases.decided(mine, self.void.get(row, "")) if mine else None,
            "others": [cases.decided(one, reviewed.void(case.example, case.trace, one)) for one in others],
            "disagree": bool(self.states[row]) and not decisions.agree(self._all(row)),
            "undo": bool(self.ledger.undo),
        }

    def _check(self, row: int, think: str, answer: str) -> dict[str, Any]:
        case = self.index.case(row)
        reasons = reviewed.check(case.example, case.found, self.index.knowledge, think, answer, self.rules)
        return {"reasons": [clean(one) for one in reasons], **cases.read(think, case, said=True)}


def open_desk(index: Index, decided: Path, reviewer: str) -> Desk:
    """A desk over `index`; decisions lie in the folder `decided`, a file a reviewer."""
    ledger = decisions.Ledger.open(decided, reviewer)
    others = decisions.read(path for path in decisions.paths(str(decided)) if path != ledger.path)
    return Desk(index, ledger, others)
