"""Loading: what is wrong with a model's files is said by name; what fits is loaded in the dtype that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvarn.errors import CapacityError, ModelError
from kvarn.models import loader
from kvarn.models.loader import load_decoder
from kvarn.models.sources import ModelFiles
from tests.models.paged import PagedRunner
from tests.models.tiny import SIZES, save_model


@pytest.fixture
def llama(tmp_path: Path) -> ModelFiles:
    return save_model(transformers.LlamaConfig(**SIZES), tmp_path / "llama")


@pytest.fixture
def gpt2(tmp_path: Path) -> ModelFiles:
    return save_model(transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4), tmp_path / "gpt2")


def change(files: ModelFiles, name: str, tensor: torch.Tensor | None) -> None:
    """Replace or drop one tensor."""
    path = files.folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_spec_is_the_model_s(llama: ModelFiles) -> None:
    spec = load_decoder(llama, precision="bfloat16").spec
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (3, 4, 2, 16)
    assert (spec.vocab_size, spec.max_context, spec.eos_tokens) == (199, 256, {2})
    assert spec.kv_bytes_per_token == 2 * 3 * 2 * 16 * 2


def test_progress_goes_from_nothing_to_all(llama: ModelFiles) -> None:
    seen: list[float] = []
    load_decoder(llama, precision="float32", progress=lambda stage, fraction: seen.append(fraction))
    assert seen == sorted(seen) and (seen[0], seen[-1]) == (0.0, 1.0)


def test_sharded_weights_are_one_model(llama: ModelFiles) -> None:
    tokens = {0: list(range(3, 40))}
    whole = PagedRunner(load_decoder(llama, precision="float32")).step(tokens)
    transformers.AutoModelForCausalLM.from_pretrained(llama.folder).save_pretrained(llama.folder, max_shard_size="50KB")
    (llama.folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(llama.folder.glob("*.safetensors"))) > 1
    torch.testing.assert_close(PagedRunner(load_decoder(llama, precision="float32")).step(tokens), whole)
    next(llama.folder.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="lacks model-0"):
        load_decoder(llama, precision="float32")


def test_a_missing_tensor_is_named(llama: ModelFiles) -> None:
    change(llama, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_decoder(llama, precision="float32")


def test_a_mis_shaped_tensor_is_named_with_both_shapes(llama: ModelFiles) -> None:
    change(llama, "model.norm.weight", torch.ones(63))
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*\[63\].*\[64\]"):
        load_decoder(llama, precision="float32")


@pytest.mark.parametrize("tensor", [None, torch.ones(65)])
def test_the_same_holds_for_models_of_transformers(gpt2: ModelFiles, tensor: torch.Tensor | None) -> None:
    change(gpt2, "transformer.ln_f.weight", tensor)
    with pytest.raises(ModelError, match=r"ln_f\.weight"):
        load_decoder(gpt2, precision="float32")


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_safetensors_are_named(llama: ModelFiles, keep: int) -> None:
    path = llama.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_decoder(llama, precision="float32")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"architectures": ["LlamaForCausalLM"]}', '{"model_type": "nothing"}', "{}"]
)
def test_a_broken_config_is_a_model_error(llama: ModelFiles, text: str) -> None:
    (llama.folder / "config.json").write_text(text)
    with pytest.raises(ModelError):
        load_decoder(llama, precision="float32")


def test_impossible_sizes_in_a_config_are_a_model_error(llama: ModelFiles) -> None:
    path = llama.folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in (("num_attention_heads", 0), ("hidden_size", "many"), ("num_hidden_layers", None)):
        path.write_text(json.dumps(config | {key: value, "head_dim": None}))
        with pytest.raises(ModelError):
            load_decoder(llama, precision="float32")


def test_too_little_memory_is_told_before_loading(llama: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "free_bytes", lambda device: 100_000)
    with pytest.raises(CapacityError, match="memory on cpu"):
        load_decoder(llama, precision="float32")


def test_unknown_dtypes_and_devices_are_told(llama: ModelFiles) -> None:
    with pytest.raises(ModelError, match="auto, float32, bfloat16, int8, int4"):
        load_decoder(llama, precision="int3")  # type: ignore[arg-type]
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ModelError, match="expected cpu, cuda"):
            load_decoder(llama, device=device)


def test_an_eos_list_of_the_generation_config_wins(llama: ModelFiles) -> None:
    (llama.folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_decoder(llama, precision="float32").spec.eos_tokens == {5, 6}
