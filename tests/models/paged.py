"""A paged KV pool driven by hand: what an executor does with a Decoder, small enough to read at a glance."""

from __future__ import annotations

import torch

from kvarn.models.spec import Decoder, ForwardBatch, KVMemory


class PagedRunner:
    """Runs sequences through a decoder. Blocks are dealt in shuffled order, so that nothing can rely on neighbours."""

    def __init__(
        self, decoder: Decoder, num_blocks: int = 256, block_size: int = 16, kv_dtype: torch.dtype | None = None
    ) -> None:
        spec = decoder.spec
        self.decoder = decoder
        self.block_size = block_size
        shape, dtype = spec.kv_block(block_size, kv_dtype or spec.dtype)
        self.kv = KVMemory(
            torch.full((num_blocks, *shape), 99, dtype=dtype),
            torch.full((num_blocks, block_size), -1, dtype=torch.int32),
        )
        generator = torch.Generator().manual_seed(7)
        self.free = torch.randperm(num_blocks, generator=generator).tolist()
        self.blocks: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}

    def step(self, chunks: dict[int, list[int]], every_row: bool = False, no_rows: bool = False) -> torch.Tensor:
        """Compute the next tokens of each sequence; logits of each one's last row, of every row, or of none."""
        tokens, positions, slots, starts, last = [], [], [], [0], []
        for sequence, chunk in chunks.items():
            begin = self.computed.get(sequence, 0)
            blocks = self.blocks.setdefault(sequence, [])
            while len(blocks) * self.block_size < begin + len(chunk):
                blocks.append(self.free.pop())
            for position in range(begin, begin + len(chunk)):
                block, offset = blocks[position // self.block_size], position % self.block_size
                positions.append(position)
                slots.append(block * self.block_size + offset)
                self.kv.slot_positions[block, offset] = position
            tokens += chunk
            starts.append(len(tokens))
            last.append(len(tokens) - 1)
            self.computed[sequence] = begin + len(chunk)
        widest = max(len(self.blocks[sequence]) for sequence in chunks)
        table = [self.blocks[sequence] + [0] * (widest - len(self.blocks[sequence])) for sequence in chunks]
        return self.decoder.forward(
            ForwardBatch(
                tokens=torch.tensor(tokens),
                positions=torch.tensor(positions, dtype=torch.int32),
                slots=torch.tensor(slots, dtype=torch.int32),
                block_tables=torch.tensor(table, dtype=torch.int32),
                kv_slots=torch.tensor([self.computed[sequence] for sequence in chunks], dtype=torch.int32),
                query_starts=torch.tensor(starts, dtype=torch.int32),
                logit_rows=torch.arange(len(tokens)) if every_row else torch.tensor([] if no_rows else last).long(),
            ),
            self.kv,
        )

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """Greedy continuation of one sequence."""
        sequence, output, chunk = len(self.blocks), list[int](), prompt
        for _ in range(count):
            output.append(int(self.step({sequence: chunk})[0].argmax()))
            chunk = output[-1:]
        return output
