"""Rows of a matrix that stays in its file are those of the matrix read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvarn.errors import ModelError
from kvarn.models.embedding import Embedding
from kvarn.models.weights import Weights

NAME = "model.embed_tokens.weight"


def weights(folder: Path, dtype: torch.dtype) -> tuple[Weights, torch.Tensor]:
    matrix = torch.randn(50, 12).to(dtype)
    save_file({"before": torch.zeros(3, dtype=torch.uint8), NAME: matrix, "z": torch.ones(5)}, folder / "m.safetensors")
    return Weights(folder), matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_matrix(dtype: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    files, matrix = weights(tmp_path, dtype)
    tokens = torch.tensor([49, 0, 7, 7])
    rows = Embedding(files.mapped(NAME, (50, 12)), wanted)(tokens)
    assert rows.dtype == wanted and torch.equal(rows, matrix[tokens].to(wanted))


def test_rows_may_be_changed_without_changing_the_matrix(tmp_path: Path) -> None:
    files, matrix = weights(tmp_path, torch.bfloat16)
    embedding = Embedding(files.mapped(NAME, (50, 12)), torch.bfloat16)
    embedding(torch.tensor([3])).zero_()
    assert torch.equal(embedding(torch.tensor([3])), matrix[3:4])
    assert torch.equal(Weights(tmp_path).get(NAME, (50, 12)), matrix)


def test_what_is_missing_or_of_another_shape_is_told(tmp_path: Path) -> None:
    files, _ = weights(tmp_path, torch.float16)
    with pytest.raises(ModelError, match="no tensor 'other'"):
        files.mapped("other", (50, 12))
    with pytest.raises(ModelError, match="shape"):
        files.mapped(NAME, (12, 50))
    with pytest.raises(ModelError, match="shape"):
        files.mapped(NAME, (5, 12))


def test_a_token_the_matrix_does_not_have_is_refused(tmp_path: Path) -> None:
    files, _ = weights(tmp_path, torch.float16)
    with pytest.raises(IndexError):
        Embedding(files.mapped(NAME, (50, 12)), torch.float32)(torch.tensor([50]))
