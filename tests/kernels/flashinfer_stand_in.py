"""What kvarn calls of FlashInfer, in plain torch and without a GPU: computed from nothing but what a plan was given.

It knows no slot positions: a sequence is its pages and the length of the last one, its rows are its last tokens.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

PARAMETERS: Final = {
    "BatchDecodeWithPagedKVCacheWrapper.__init__": (
        "self float_workspace_buffer kv_layout use_cuda_graph use_tensor_cores paged_kv_indptr_buffer "
        "paged_kv_indices_buffer paged_kv_last_page_len_buffer backend jit_args"
    ),
    "BatchDecodeWithPagedKVCacheWrapper.plan": (
        "self indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size pos_encoding_mode window_left "
        "window_right logits_soft_cap q_data_type kv_data_type o_data_type data_type sm_scale rope_scale rope_theta "
        "non_blocking block_tables seq_lens fixed_split_size disable_split_kv q_len_per_req is_causal"
    ),
    "BatchDecodeWithPagedKVCacheWrapper.run": (
        "self q paged_kv_cache args q_scale k_scale v_scale out lse return_lse enable_pdl window_left sinks "
        "q_len_per_req skip_softmax_threshold_scale_factor kv_cache_sf"
    ),
    "BatchPrefillWithPagedKVCacheWrapper.__init__": (
        "self float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf paged_kv_indptr_buf paged_kv_indices_buf "
        "paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf backend jit_args jit_kwargs variant_owns_mask"
    ),
    "BatchPrefillWithPagedKVCacheWrapper.plan": (
        "self qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk "
        "page_size head_dim_vo custom_mask packed_custom_mask causal pos_encoding_mode use_fp16_qk_reduction sm_scale "
        "window_left logits_soft_cap rope_scale rope_theta q_data_type kv_data_type o_data_type non_blocking "
        "prefix_len_ptr token_pos_in_items_ptr token_pos_in_items_len max_item_len_ptr seq_lens seq_lens_q "
        "block_tables max_token_per_sequence max_sequence_kv fixed_split_size disable_split_kv uniform_q_len"
    ),
    "BatchPrefillWithPagedKVCacheWrapper.run": (
        "self q paged_kv_cache args q_scale k_scale v_scale out lse return_lse lse_base lse_layout enable_pdl "
        "window_left sinks kv_cache_sf skip_softmax_threshold_scale_factor use_fp16_softmax uses_spcompress"
    ),
}
"""Names and order of all parameters in flashinfer-python 0.7.2."""


class BatchPrefillWithPagedKVCacheWrapper:
    """Plans and runs are counted in `calls`, over all wrappers."""

    calls: Final[list[str]] = []

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "HND"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        for array in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert array.dtype == torch.int32
            assert array.device.type == "cpu"
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert qo_indptr[0] == paged_kv_indptr[0] == 0
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        assert paged_kv_last_page_len.min() >= 1
        assert paged_kv_last_page_len.max() <= page_size
        self.starts, self.page_starts = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self.pages, self.last = paged_kv_indices.long(), paged_kv_last_page_len.tolist()
        self.shapes = ((num_qo_heads, head_dim_qk), (num_kv_heads, page_size, head_dim_qk))
        self.dtypes = (q_data_type, kv_data_type)
        self.causal, self.window_left = causal, window_left
        self.scale, self.cap = sm_scale or head_dim_qk**-0.5, logits_soft_cap or 0.0
        self.calls.append("plan")

    def run(self, q: Tensor, paged_kv_cache: Tensor) -> Tensor:
        assert (q.dtype, paged_kv_cache.dtype) == self.dtypes
        assert (q.shape[1:], paged_kv_cache.shape[2:]) == self.shapes
        assert q.shape[0] == self.starts[-1]
        self.calls.append("run")
        group = q.shape[1] // paged_kv_cache.shape[2]
        out = torch.empty(q.shape, dtype=q.dtype)
        for sequence, last in enumerate(self.last):
            pages = self.pages[self.page_starts[sequence] : self.page_starts[sequence + 1]]
            length = (len(pages) - 1) * paged_kv_cache.shape[3] + last
            both = paged_kv_cache[pages].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
            key, value = both.repeat_interleave(group, dim=1)
            rows = q[self.starts[sequence] : self.starts[sequence + 1]].float()
            logits = torch.einsum("rhd,hsd->hrs", rows, key) * self.scale
            if self.cap > 0:
                logits = self.cap * torch.tanh(logits / self.cap)
            at = torch.arange(length - len(rows), length)[:, None]
            behind = at - torch.arange(length)[None, :]
            hidden = behind < 0 if self.causal else torch.zeros_like(behind, dtype=torch.bool)
            if self.window_left >= 0:
                hidden = hidden | (behind > self.window_left)
            weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
            out[self.starts[sequence] : self.starts[sequence + 1]] = torch.einsum("hrs,hsd->rhd", weights, value)
        return out


class BatchDecodeWithPagedKVCacheWrapper(BatchPrefillWithPagedKVCacheWrapper):
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, use_tensor_cores: bool) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_tensor_cores

    def plan(  # type: ignore[override]
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        """A row a sequence."""
        super().plan(
            torch.arange(len(indptr), dtype=torch.int32), indptr, indices, last_page_len, num_qo_heads, num_kv_heads,
            head_dim, page_size, window_left=window_left, logits_soft_cap=logits_soft_cap, q_data_type=q_data_type,
            kv_data_type=kv_data_type, sm_scale=sm_scale,
        )  # fmt: skip
