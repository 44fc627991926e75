"""Every reproduction by its name."""

from __future__ import annotations

from importlib import import_module

from kvarn.errors import KvarnError
from kvarn.reproduce.experiment import Experiment

EXPERIMENTS: dict[str, str] = {
    "tokenflow": "kvarn.reproduce.tokenflow.experiment",
    "tokencake": "kvarn.reproduce.tokencake.experiment",
    "tokendance": "kvarn.reproduce.tokendance.experiment",
}
"""Name -> module whose EXPERIMENT it is; imported when asked for."""


def load_experiment(name: str) -> Experiment:
    """KvarnError that names what there is."""
    if name not in EXPERIMENTS:
        raise KvarnError(f"no reproduction is called {name!r}; there are {', '.join(EXPERIMENTS)}, and all")
    experiment: Experiment = import_module(EXPERIMENTS[name]).EXPERIMENT
    return experiment
