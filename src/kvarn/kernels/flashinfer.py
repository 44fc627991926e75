"""FlashInfer's paged attention, for CUDA devices where that package is installed.

FlashInfer works in two parts: a plan cuts the work of all sequences into pieces of like size, on the host, and is then
run by every layer. In: block tables, slots and rows of a step's sequences as host tensors (`PlannedAttention.step`).
While that step lasts, the operator `kvarn::paged_attention` runs by its plans, one for each kind of layer, made when
the first layer of that kind is reached.

It takes what FlashInfer computes: bfloat16 queries and cache, heads of 64, 128 or 256 elements, no sinks. All else goes
to `fallback`, and so does all that runs outside a step: plans are made on the host, so a CUDA graph cannot hold one.

Source: Ye et al., FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving, 2025.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

_HEAD_DIMS: Final = frozenset({64, 128, 256})
_WORKSPACE_BYTES: Final = 128 * 2**20
"""What FlashInfer recommends for the partial results of sequences cut into pieces."""
_LEAST_CAPABILITY: Final = (8, 0)
"""Compute capability that has bfloat16."""


@dataclass(frozen=True)
class PagedRows:
    """Rows and slots of the sequences of a step as FlashInfer takes them: int32 tensors in host memory."""

    query_starts: Tensor
    """[S + 1]"""
    block_starts: Tensor
    """[S + 1]: where each sequence's blocks start in `blocks`."""
    blocks: Tensor
    """All sequences' blocks, one sequence after another."""
    last_block_slots: Tensor
    """[S]: slots in the last block of each sequence, 1 to block_size."""
    block_size: int

    @classmethod
    def of(cls, block_tables: Tensor, kv_slots: Tensor, query_starts: Tensor, block_size: int) -> PagedRows:
        """Arguments as for `kvarn.kernels.ops.paged_attention`; every sequence has at least one slot."""
        counts = (kv_slots + (block_size - 1)) // block_size
        starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, out=starts[1:])
        used = torch.arange(block_tables.shape[1]) < counts[:, None]
        last_block_slots = (kv_slots - 1) % block_size + 1
        return cls(query_starts, starts, block_tables[used], last_block_slots, block_size)

    @property
    def are_decodes(self) -> bool:
        """Whether every sequence has one row."""
        return int(self.query_starts[-1]) == len(self.last_block_slots)


class _Kind(NamedTuple):
    """Layers with one plan."""

    decodes: bool
    scale: float
    window: int
    softcap: float


@dataclass
class _Planner:
    """A FlashInfer wrapper, and when its last plan had left the host."""

    wrapper: Any
    sent: torch.cuda.Event | None = field(default=None)


_current: ContextVar[PlannedAttention | None] = ContextVar("kvarn_planned_attention", default=None)


class PlannedAttention:
    """Plans for one step after another on `device`. Nothing is imported or allocated before the first plan."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._workspace = torch.empty(0)
        self._planners: dict[_Kind, _Planner] = {}
        self._planned: set[_Kind] = set()
        self._rows: PagedRows | None = None

    @contextmanager
    def step(self, rows: PagedRows) -> Iterator[None]:
        """Within: `kvarn::paged_attention` is about `rows`.

        Slot i of every sequence holds position i, and its rows are at its last positions, in order: the mask that
        FlashInfer calls causal.
        """
        self._rows = rows
        self._planned.clear()
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def attend(self, query: Tensor, kv: Tensor, scale: float, window: int, softcap: float) -> Tensor:
        """[T, Hq, D]; arguments as for `kvarn.kernels.ops.paged_attention`."""
        assert self._rows is not None
        kind = _Kind(self._rows.are_decodes, scale, window, softcap)
        if kind not in self._planners:
            self._planners[kind] = _Planner(self._wrapper(kind.decodes))
        planner = self._planners[kind]
        if kind not in self._planned:
            self._plan(planner, kind, self._rows, query, kv)
            self._planned.add(kind)
        attended: Tensor = planner.wrapper.run(query, kv)
        return attended

    def _wrapper(self, decodes: bool) -> Any:
        import flashinfer

        if not len(self._workspace):  # wrappers run one after another: they share it
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        if decodes:  # on tensor cores, where any number of query heads may share a KV head
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "HND", use_tensor_cores=True)
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")

    def _plan(self, planner: _Planner, kind: _Kind, rows: PagedRows, query: Tensor, kv: Tensor) -> None:
        if planner.sent is not None:  # the wrapper keeps a plan in one piece of page-locked memory
            planner.sent.synchronize()
        shape = (query.shape[1], kv.shape[2], query.shape[2], rows.block_size)
        options = {
            "sm_scale": kind.scale,
            "window_left": kind.window - 1,  # how many positions before its own; -1 for all
            "logits_soft_cap": kind.softcap,
            "q_data_type": query.dtype,
            "kv_data_type": kv.dtype,
        }
        if kind.decodes:
            planner.wrapper.plan(rows.block_starts, rows.blocks, rows.last_block_slots, *shape, **options)
        else:
            planner.wrapper.plan(
                rows.query_starts, rows.block_starts, rows.blocks, rows.last_block_slots, *shape, causal=True, **options
            )
        if self._device.type == "cuda":
            planner.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            planner.sent.record()


def is_installed(device: torch.device) -> bool:
    """Whether the package is there and `device` can run it."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
        and importlib.util.find_spec("flashinfer") is not None
    )


def or_else(fallback: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An implementation of `kvarn::paged_attention`: by the plans of the current step, or by `fallback`."""

    def paged_attention(
        query: Tensor,
        kv: Tensor,
        slot_positions: Tensor,
        block_tables: Tensor,
        kv_slots: Tensor,
        query_starts: Tensor,
        positions: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        step = _current.get()
        fits = query.dtype == kv.dtype == torch.bfloat16 and query.shape[2] in _HEAD_DIMS and sinks is None
        if step is not None and fits:
            return step.attend(query, kv, scale, window, softcap)
        return fallback(
            query, kv, slot_positions, block_tables, kv_slots, query_starts, positions, scale, window, softcap, sinks
        )

    return paged_attention
