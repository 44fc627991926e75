"""Results of a benchmark on disk: one JSON file, saved after every engine so that an interrupted run can be resumed."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine

FOLDER = Path(__file__).resolve().parent / "results"
QUICK_FOLDER = FOLDER.parents[1] / ".cache" / "benchmarks"


class Results:
    """`benchmarks/results/NAME.json`: machine, conditions, and whatever each engine gave."""

    def __init__(self, name: str, conditions: dict[str, Any], *, merge: bool, quick: bool = False) -> None:
        """With `merge`, engines of an earlier file under the same machine and conditions are kept.

        `quick` results say that things run, not how fast: they go to a folder of their own.
        """
        self.path = (QUICK_FOLDER if quick else FOLDER) / f"{name}.json"
        here = machine.describe()
        self.data: dict[str, Any] = {"benchmark": name, "machine": here, "conditions": conditions, "engines": {}}
        if merge and self.path.exists():
            old = json.loads(self.path.read_text())
            for part in ("machine", "conditions"):
                if old[part] != json.loads(json.dumps(self.data[part])):
                    raise SystemExit(f"{self.path.name} was made under other {part}; run without --merge to replace it")
            self.data["engines"] = old["engines"]

    def add_session(self, engine: str, session: dict[str, Any], *, first: bool) -> None:
        """Note one session of an engine and save; its `first` in this run replaces what an earlier run left."""
        entry = self.data["engines"].setdefault(engine, {"sessions": []})
        if first:
            entry["sessions"] = []
        entry["sessions"].append({"at": datetime.now(UTC).isoformat(timespec="seconds"), **session})
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        unfinished.replace(self.path)
