"""Attention to shared KV: the reference is held to keys turned to their places, native versions to the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from kvarn.kernels import ops, reference
from tests.kernels.paged import PagedCase, Sequence
from tests.kernels.shared import TABLE_POSITIONS, cos_sin, make_shared_case, shared_cases
from tests.kernels.test_paged_attention import INT8_TOLERANCE, TOLERANCE

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def round_case(
    agents: int, shared_slots: int, dtype: torch.dtype = torch.float32, int8: bool = False, **options: Any
) -> PagedCase:
    """A decode step of agents with histories of their own, each at the end of what it shares with all the others."""
    case = make_shared_case(
        [Sequence(20 + 3 * i, 1) for i in range(agents)], [shared_slots, shared_slots], most_viewers=0, rotary=64,
        factor=1.0, seed=agents, dtype=dtype, kv_heads=3, group=3, head_dim=64, block_size=16, holes=0.0,
        permuted=False, fused=True, options=options, int8=int8,
    )  # fmt: skip
    each = torch.arange(agents, dtype=torch.int32)
    case.tensors |= {
        "rows": each.repeat(2),
        "row_starts": torch.tensor([0, agents, 2 * agents], dtype=torch.int32),
        "shifts": torch.cat([20 + each, 30 - 4 * each]),
        "positions": case.tensors["kv_slots"] + 2 * shared_slots,
    }
    return case


def prefill_case(
    chunks: list[int], segments: int, dtype: torch.dtype = torch.float32, int8: bool = False, *, holes: float = 0.0,
    left_out: bool = False, each: int = 64, **options: Any,
) -> PagedCase:  # fmt: skip
    """Agents with chunks of so many rows, at positions among segments which each has in another order.

    `left_out`: rows are in those views only of which they can see something.
    """
    own, agents = 24, len(chunks)
    case = make_shared_case(
        [Sequence(own, rows) for rows in chunks], [each] * segments, most_viewers=0, rotary=64, factor=1.0,
        seed=sum(chunks), dtype=dtype, kv_heads=3, group=3, head_dim=64, block_size=16, holes=holes, permuted=False,
        fused=True, options=options, int8=int8,
    )  # fmt: skip
    t = case.tensors
    end = own + segments * each
    t["positions"] = torch.cat([own - 4 + torch.arange(n) * (end - own + 8) // n if n > 1 else torch.tensor([end])
                                for n in chunks]).int()  # fmt: skip
    starts = t["query_starts"].tolist()
    rows, shifts, row_starts = [], [], [0]
    for view in range(segments):
        for agent in range(agents):
            shift = own + (view + agent) % segments * each - 3 * (agent == 1)
            of_agent = torch.arange(starts[agent], starts[agent + 1])
            if left_out:
                of_agent = of_agent[t["positions"][of_agent] >= shift]
            rows.append(of_agent)
            shifts.append(torch.full_like(of_agent, shift))
        row_starts.append(sum(map(len, rows)))
    t |= {
        "rows": torch.cat(rows).int(), "shifts": torch.cat(shifts).int(),
        "row_starts": torch.tensor(row_starts, dtype=torch.int32), "cos_sin": cos_sin(64, positions=600),
    }  # fmt: skip
    return case


def assert_like_reference(case: PagedCase) -> None:
    expected = case.run(reference.shared_attention, torch.float32)
    got = case.run(ops.shared_attention)
    assert got.dtype == case.tensors["query"].dtype and got.is_contiguous()
    tolerance = INT8_TOLERANCE if case.tensors["kv"].dtype == torch.uint8 else TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), expected, **tolerance)


def turned(key: Tensor, shift: int, table: Tensor) -> Tensor:
    """Keys [..., D] rotated by `shift` more positions, in float64."""
    half = table.shape[1] // 2
    angles = torch.atan2(table[1, half:].double(), table[1, :half].double()) * shift
    first, second, rest = key.split([half, half, key.shape[-1] - 2 * half], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attention_over_turned_keys(case: PagedCase) -> Tensor:
    """Row by row, over copies of all its slots, those of views rotated for where they stand, in float64."""
    t, options = case.tensors, case.options
    block_size = t["slot_positions"].shape[1]

    def slots_of(table: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.arange(int(count))
        blocks, offsets = table[at // block_size].long(), at % block_size
        return t["kv"][blocks, 0, :, offsets].double(), t["kv"][blocks, 1, :, offsets].double(), (
            t["slot_positions"][blocks, offsets]
        )  # fmt: skip

    out = torch.zeros(t["query"].shape, dtype=torch.float64)
    for row, position in enumerate(t["positions"].tolist()):
        sequence = int((t["query_starts"] <= row).sum()) - 1
        parts = [(*slots_of(t["block_tables"][sequence], t["kv_slots"][sequence]), 0)]
        for entry in (t["rows"] == row).nonzero().flatten().tolist():
            view = int((t["row_starts"] <= entry).sum()) - 1
            parts.append((*slots_of(t["view_tables"][view], t["view_slots"][view]), int(t["shifts"][entry])))
        keys, values = [], []
        for key, value, at, shift in parts:
            stands = at + shift
            seen = (at >= 0) & (stands <= position)
            if options.get("window"):
                seen &= position - stands < options["window"]
            keys.append(turned(key[seen], shift, t["cos_sin"]))
            values.append(value[seen])
        heads = t["query"].shape[1]
        key, value = (torch.cat(p).repeat_interleave(heads // p[0].shape[1], dim=1) for p in (keys, values))
        logits = torch.einsum("hd,shd->hs", t["query"][row].double(), key) * case.scale
        if options.get("softcap"):
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        if options.get("sinks") is not None:
            logits = torch.cat([logits, options["sinks"].double()[:, None]], dim=1)
        if len(key):
            out[row] = torch.einsum("hs,shd->hd", logits.softmax(1)[:, : len(key)], value)
    return out


@given(case=shared_cases(dtypes=(torch.float32,), most_rows=5))
@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
def test_reference_equals_attention_over_keys_turned_to_where_they_stand(case: PagedCase) -> None:
    """E8: whatever the shifts, holes, window, cap, sinks, rotated width and factor of the table."""
    got = case.run(reference.shared_attention).double()
    torch.testing.assert_close(got, attention_over_turned_keys(case), atol=1e-5, rtol=1e-5)


@given(case=shared_cases(int8=True))
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
def test_native_equals_reference(variant: str, case: PagedCase) -> None:
    """Whatever the shapes, strides, dtype, views, shifts, holes, window, cap and sinks."""
    assert_like_reference(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("agents", [2, 6, 16])
def test_views_split_over_threads_equal_reference(
    variant: str, three_threads: None, agents: int, dtype: torch.dtype, int8: bool
) -> None:
    """Few rows and many (decode's way and prefill's), with views long enough to be cut."""
    for options in ({}, {"window": 900, "softcap": 20.0, "sinks": True}):
        assert_like_reference(round_case(agents, 700, dtype, int8, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_chunks_of_prompts_and_decode_rows_in_views_equal_reference(
    variant: str, dtype: torch.dtype, int8: bool
) -> None:
    """Of chunks that are several tiles, cut in the middle of segments, and of rows too few to be a chunk."""
    for options in ({}, {"left_out": True, "holes": 0.2}, {"window": 90, "softcap": 20.0, "sinks": True}):
        assert_like_reference(prefill_case([110, 1, 4, 30, 3, 1], 4, dtype, int8, **options))


@pytest.mark.parametrize("int8", [False, True])
def test_chunks_whose_views_are_split_over_threads_equal_reference(
    variant: str, three_threads: None, int8: bool
) -> None:
    """One chunk alone, where own slots and views are cut into pieces for several tasks."""
    for options in ({}, {"window": 300, "sinks": True}):
        for chunks in ([5], [50], [20, 1]):
            assert_like_reference(prefill_case(chunks, 3, torch.bfloat16, int8, each=170, **options))


@pytest.mark.parametrize("int8", [False, True])
def test_chunks_are_the_same_whether_rows_that_see_nothing_of_a_view_are_in_it(variant: str, int8: bool) -> None:
    got = [
        prefill_case([110, 1, 9], 4, torch.bfloat16, int8, left_out=left_out).run(ops.shared_attention)
        for left_out in (False, True)
    ]
    chunks = [*range(110), *range(111, 120)]
    assert torch.equal(got[0][chunks], got[1][chunks])


@pytest.mark.parametrize("int8", [False, True])
def test_rows_of_a_chunk_that_look_at_different_views_equal_reference(variant: str, int8: bool) -> None:
    """Another shift for one row, one row missing, one twice: such rows do not go through views together."""
    for change in ("shift", "missing", "twice", "twice and missing"):
        case = prefill_case([60, 12], 3, torch.bfloat16, int8)
        t = case.tensors
        last = int(t["row_starts"][1]) - 1  # the last row of a chunk, which sees all
        if change == "shift":
            t["shifts"][last] -= 7
        elif change == "missing":
            t["rows"][last] = 0
        elif change == "twice":
            t["rows"][last - 12] = t["rows"][last]
        else:
            t["rows"][last - 1] = t["rows"][last]
        assert_like_reference(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_chunks_without_views_get_the_bits_of_paged_attention(
    variant: str, three_threads: None, dtype: torch.dtype, int8: bool
) -> None:
    """Beside chunks and decode rows that have some; so do rows before everything that is shared."""
    case = prefill_case([60, 50, 1, 1], 3, dtype, int8)
    t = case.tensors
    views = ("view_tables", "view_slots", "row_starts", "rows", "shifts", "cos_sin")
    plain = PagedCase({n: v for n, v in t.items() if n not in views}, case.scale, case.options)
    expected = plain.run(ops.paged_attention)
    t["rows"] = torch.where((t["rows"] >= 60) & (t["rows"] < 111), t["rows"] % 48, t["rows"]).int()
    got = case.run(ops.shared_attention)
    assert torch.equal(got[60:111], expected[60:111])
    assert not torch.isclose(got[111].float(), expected[111].float()).all()
    t["shifts"].fill_(500)
    assert torch.equal(case.run(ops.shared_attention), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_rows_without_views_get_the_bits_of_paged_attention(variant: str, dtype: torch.dtype, int8: bool) -> None:
    case = round_case(6, 40, dtype, int8, sinks=True)
    views = ("view_tables", "view_slots", "row_starts", "rows", "shifts", "cos_sin")
    plain = PagedCase({n: v for n, v in case.tensors.items() if n not in views}, case.scale, case.options)
    expected = plain.run(ops.paged_attention)
    case.tensors |= {"rows": case.tensors["rows"] % 2}
    got = case.run(ops.shared_attention)
    assert torch.equal(got[2:], expected[2:])
    assert not torch.isclose(got[:2].float(), expected[:2].float()).all()
    nobody = torch.zeros(0, dtype=torch.int32)
    case.tensors |= {"rows": nobody, "shifts": nobody, "row_starts": torch.zeros(3, dtype=torch.int32)}
    assert torch.equal(case.run(ops.shared_attention), expected)
    case.tensors |= {"view_tables": torch.zeros(0, 0).int(), "view_slots": nobody, "row_starts": nobody.new_zeros(1)}
    assert torch.equal(case.run(ops.shared_attention), expected)
    torch.testing.assert_close(case.run(reference.shared_attention), plain.run(reference.paged_attention))


@pytest.mark.parametrize("agents", [3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_behind_a_row_does_not_change_it(variant: str, agents: int, dtype: torch.dtype) -> None:
    """E9: not even when rows of the same view see it."""
    case = round_case(agents, 60, dtype)
    t = case.tensors
    t["positions"] = (40 + 5 * torch.arange(agents)).int()
    before = case.run(ops.shared_attention)
    for view in range(2):
        entries = slice(*t["row_starts"][view : view + 2].tolist())
        reach = t["positions"][t["rows"][entries].long()] - t["shifts"][entries]  # the last slot that each row sees
        first = int(reach.sort().values[agents // 2]) + 1
        for slot in range(max(first, 0), 60):
            t["kv"][t["view_tables"][view, slot // 16].long(), :, :, slot % 16] += 3
        blind = t["rows"][entries][reach < first].long()
        after = case.run(ops.shared_attention)
        seeing = torch.ones(agents, dtype=torch.bool)
        seeing[blind] = False
        assert len(blind) and seeing.any()
        assert torch.equal(after[blind], before[blind])
        assert (after[seeing] != before[seeing]).any(dim=(1, 2)).all()
        before = after


def test_rows_that_see_nothing_anywhere_give_zeros(variant: str) -> None:
    case = round_case(4, 40)
    case.tensors["kv_slots"].zero_()
    case.tensors["positions"] = torch.tensor([5, 100, 10, 100], dtype=torch.int32)
    case.tensors["shifts"] = torch.tensor([6, 20, 100, 20] * 2, dtype=torch.int32)
    for options in ({}, {"sinks": torch.zeros(9)}, {"window": 300}):
        case.options = options
        for got in (case.run(ops.shared_attention), case.run(reference.shared_attention)):
            assert got[[0, 2]].eq(0).all() and got[[1, 3]].ne(0).any()


@pytest.mark.parametrize(
    ("argument", "replacement", "message"),
    [
        ("view_tables", torch.full((2, 5), 99, dtype=torch.int32), r"view_tables.*got 99"),
        ("view_slots", torch.tensor([40, 4000], dtype=torch.int32), r"view_slots.*got 4000"),
        ("row_starts", torch.tensor([0, 3, 7], dtype=torch.int32), "rows that look at views, 8"),
        ("row_starts", torch.tensor([0, 8], dtype=torch.int32), "views plus one"),
        ("rows", torch.full((8,), 4, dtype=torch.int32), r"rows.*got 4"),
        ("shifts", torch.full((8,), TABLE_POSITIONS, dtype=torch.int32), rf"shifts.*got {TABLE_POSITIONS}"),
        ("shifts", torch.full((8,), -TABLE_POSITIONS, dtype=torch.int32), rf"shifts.*got -{TABLE_POSITIONS}"),
        ("shifts", torch.zeros(7, dtype=torch.int32), r"shifts.*rows"),
        ("shifts", torch.zeros(8), "int32"),
        ("cos_sin", torch.zeros(50, 66), "head dimension"),
    ],
)
def test_wrong_arguments_are_named(argument: str, replacement: Tensor, message: str) -> None:
    case = round_case(4, 40)
    case.tensors[argument] = replacement
    with pytest.raises(RuntimeError, match=message):
        case.run(ops.shared_attention)
