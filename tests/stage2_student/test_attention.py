"""The block-diffusion mask against its definition, and real models run with it: no leaks, no padding, no NaN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shared.errors import TidecacheError
from stage2_student.attention import block_diffusion_mask, check_attention
from tests.stage2_student import dense
from tests.stage2_student.packed import noisy_hidden

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 64,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
}
LENGTHS, BLOCKS, DRAWS = st.integers(1, 13), st.integers(1, 15), st.integers(1, 3)


@given(LENGTHS, BLOCKS, DRAWS)
def test_mask_by_definition(length: int, block_size: int, draws: int) -> None:
    found = block_diffusion_mask(length, block_size, draws)
    size = (draws + 1) * length
    assert found.dtype == torch.bool
    assert found.shape == (size, size)
    assert torch.equal(found, dense.mask_of(length, block_size, draws))


def test_one_draw_is_the_default() -> None:
    assert torch.equal(block_diffusion_mask(6, 4), block_diffusion_mask(6, 4, draws=1))


def small_model(kind: type = Qwen3ForCausalLM, config: Any = None, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config or Qwen3Config(**SMALL, **options)).eval()
    with torch.no_grad():  # sharp attention, so that a wrong mask shows
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def random_ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(1, 60, shape, generator=torch.Generator().manual_seed(seed))


def hidden_of(model: PreTrainedModel, noisy: Tensor, clean: Tensor, block_size: int = 4) -> Tensor:
    """One draw of one document without padding, [L, D]."""
    length_B = torch.tensor([len(clean)])
    return noisy_hidden(model, noisy[None, None], clean[None], length_B, block_size)[0, 0].detach()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_and_packing_change_nothing(implementation: str) -> None:
    model = small_model(attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    lengths, length, draws = [11, 5, 8], 11, 2
    clean_BL, noisy_BKL = random_ids(1, 3, length), random_ids(2, 3, draws, length)
    found = noisy_hidden(model, noisy_BKL, clean_BL, torch.tensor(lengths), 4).detach()
    assert found.shape == (3, draws, length, 64)
    assert bool(found.isfinite().all())
    for row, real in enumerate(lengths):
        for draw in range(draws):
            alone = hidden_of(model, noisy_BKL[row, draw, :real], clean_BL[row, :real])
            torch.testing.assert_close(found[row, draw, :real], alone, rtol=1e-3, atol=1e-4)


def test_gradients_are_finite_and_ignore_padding() -> None:
    model = small_model()
    lengths = torch.tensor([9, 4])
    clean_BL, noisy_BL = random_ids(1, 2, 9), random_ids(2, 2, 9)

    def gradient(padding: int) -> dict[str, Tensor]:
        clean, noisy = clean_BL.clone(), noisy_BL.clone()
        clean[1, 4:], noisy[1, 4:] = padding, padding
        model.zero_grad()
        hidden = noisy_hidden(model, noisy[:, None], clean, lengths, 4)[:, 0]
        (hidden[0].sum() + (hidden[1, :4] ** 2).sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    one, other = gradient(0), gradient(59)
    for name, grad in one.items():
        assert bool(grad.isfinite().all()), name
        torch.testing.assert_close(grad, other[name], rtol=1e-3, atol=1e-4, msg=name)


def test_what_each_noisy_token_depends_on() -> None:
    """Change one token at a time; exactly the noisy tokens that may depend on it change."""
    model = small_model()
    length, block = 10, 4
    noisy, clean = random_ids(3, length), random_ids(4, length)
    before = hidden_of(model, noisy, clean, block)
    blocks = torch.arange(length) // block
    for place in range(length):
        changed = clean.clone()
        changed[place] = 0
        moved = (hidden_of(model, noisy, changed, block) - before).abs().amax(dim=1) > 1e-6
        assert moved.tolist() == (blocks > blocks[place]).tolist()
        changed = noisy.clone()
        changed[place] = 0
        moved = (hidden_of(model, changed, clean, block) - before).abs().amax(dim=1) > 1e-6
        assert moved.tolist() == (blocks == blocks[place]).tolist()


def test_both_halves_have_the_same_positions() -> None:
    """With one block and no clean context the noisy half is plain bidirectional attention at positions 0 … L − 1."""
    model = small_model()
    noisy, clean = random_ids(5, 7), random_ids(6, 7)
    open_mask = torch.zeros(1, 1, 7, 7)
    expected = model.base_model(input_ids=noisy[None], attention_mask=open_mask).last_hidden_state[0]
    torch.testing.assert_close(hidden_of(model, noisy, clean, 16), expected.detach(), rtol=1e-3, atol=1e-4)
    # Second block: the same as a bidirectional window after a clean prefix, at the positions it really has.
    both = torch.cat([clean[:4], noisy[4:]])
    mask = torch.zeros(1, 1, 7, 7)
    mask[..., :4, 4:] = torch.finfo(torch.float32).min
    expected = model.base_model(input_ids=both[None], attention_mask=mask).last_hidden_state[0, 4:]
    torch.testing.assert_close(hidden_of(model, noisy, clean, 4)[4:], expected.detach(), rtol=1e-3, atol=1e-4)


def test_plain_models_are_accepted() -> None:
    check_attention(small_model())
    check_attention(small_model(LlamaForCausalLM, LlamaConfig(**SMALL)))
    check_attention(small_model(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=None)))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param((MistralForCausalLM, MistralConfig(**SMALL, sliding_window=8)), id="mistral"),
        pytest.param((Qwen3ForCausalLM, None), id="qwen3"),
    ],
)
def test_a_window_is_full_attention_up_to_its_length_and_refused_beyond(model: tuple[type, Any]) -> None:
    kind, config = model
    windowed = small_model(
        kind, config, **({} if config else {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1})
    )
    check_attention(windowed)
    noisy, clean = torch.arange(8), torch.arange(20, 28)
    found = hidden_of(windowed, noisy, clean, 4)
    plain = copy.deepcopy(windowed)
    plain.config.sliding_window = None
    for module in plain.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = None
    torch.testing.assert_close(found, hidden_of(plain, noisy, clean, 4))
    with pytest.raises(TidecacheError, match=r"a row has 9 tokens .* sliding window of 8"):
        hidden_of(windowed, torch.arange(9), torch.arange(20, 29), 4)


def test_attention_that_the_mask_does_not_describe_is_refused() -> None:
    model = small_model()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(TidecacheError, match="layers of chunked_attention"):
        check_attention(model)
    capped = Gemma2Config(**SMALL, layer_types=["full_attention"] * 2, attn_logit_softcapping=30.0)
    model = small_model(Gemma2ForCausalLM, capped)
    model.config._attn_implementation = "eager"
    check_attention(model)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(TidecacheError, match="eager"):
        check_attention(model)
    model = small_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TidecacheError, match="sdpa or eager, found 'flash_attention_2'"):
        check_attention(model)
