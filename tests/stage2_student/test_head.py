"""The tiled head against dense autograd: values, gradients, any shape, any tiling, and what models do to their logits.

Tiles are made tiny here (a few numbers each), so that every case crosses tile borders in both directions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shared.errors import TidecacheError
from stage2_student import head as head_module
from stage2_student.head import Head, argmax_and_logp, gather_logits

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "LEAST_COLUMNS", 3)
    monkeypatch.setattr(head_module, "TILE_BYTES_CPU", 48)


def dense(
    hidden_ND: Tensor, head: Head, row_M: Tensor, id_M: Tensor, temperatures: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """The definition, with all logits at once."""
    logits_NV = hidden_ND @ head.weight_VD.t()
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V
    logits_NV = logits_NV * head.scale
    if head.soft_cap is not None:
        logits_NV = head.soft_cap * torch.tanh(logits_NV / head.soft_cap)
    log_z = [torch.logsumexp(logits_NV / t, dim=1) for t in temperatures]
    return logits_NV[row_M, id_M], torch.stack(log_z, dim=1) if log_z else logits_NV.new_zeros(len(hidden_ND), 0)


class Case:
    """Random inputs of given shapes; the losses are random linear forms of both outputs."""

    def __init__(
        self,
        seed: int,
        rows: int,
        vocabulary: int,
        pairs: int,
        temperatures: tuple[float, ...],
        dtype: torch.dtype = torch.float64,
        bias: bool = True,
        soft_cap: float | None = None,
        scale: float = 1.0,
        width: int = 5,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.temperatures = temperatures
        self.hidden = normal(rows, width).requires_grad_()
        self.weight = normal(vocabulary, width).requires_grad_()
        self.bias = normal(vocabulary).requires_grad_() if bias else None
        self.row_M = torch.randint(0, max(rows, 1), (pairs if rows else 0,), generator=generator)
        self.id_M = torch.randint(0, vocabulary, (len(self.row_M),), generator=generator)
        self.head = Head(self.weight, self.bias, soft_cap, scale)
        self.upstream = normal(len(self.row_M)), normal(rows, len(temperatures))

    def run(self, function: Any) -> tuple[list[Tensor], list[Tensor]]:
        outputs = function(self.hidden, self.head, self.row_M, self.id_M, self.temperatures)
        leaves = [x for x in (self.hidden, self.weight, self.bias) if x is not None]
        loss = sum(((x * g).sum() for x, g in zip(outputs, self.upstream, strict=True)), start=self.hidden.sum() * 0.0)
        return [x.detach() for x in outputs], list(torch.autograd.grad(loss, leaves, allow_unused=True))

    def check(self, **tolerance: float) -> None:
        found, expected = self.run(gather_logits), self.run(dense)
        for some, others in zip(found, expected, strict=True):
            for one, other in zip(some, others, strict=True):
                other = torch.zeros_like(one) if other is None else other  # unused: no row, no pair
                torch.testing.assert_close(one if one is not None else torch.zeros_like(other), other, **tolerance)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 9),
    vocabulary=st.integers(1, 23),
    pairs=st.integers(0, 30),
    temperatures=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), max_size=3).map(tuple),
    bias=st.booleans(),
    soft_cap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_equals_dense_autograd(**shape: Any) -> None:
    Case(**shape).check(rtol=1e-9, atol=1e-11)


def test_gradcheck() -> None:
    case = Case(3, 6, 11, 14, (1.0, 2.0), soft_cap=3.0, scale=0.7)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return gather_logits(hidden, Head(weight, bias, 3.0, 0.7), case.row_M, case.id_M, case.temperatures)

    assert torch.autograd.gradcheck(function, (case.hidden, case.weight, case.bias))


def test_float32_at_a_real_tile_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "LEAST_COLUMNS", 512)
    monkeypatch.setattr(head_module, "TILE_BYTES_CPU", 1 << 20)
    case = Case(1, 600, 2000, 3000, (1.0, 2.0), dtype=torch.float32, bias=False, width=32)
    case.check(rtol=1e-5, atol=1e-4)  # gradients sum over 600 rows and reach 50


def test_large_logits_do_not_overflow() -> None:
    hidden_ND = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight_VD = torch.linspace(-1, 1, 17)[:, None].requires_grad_()
    logit_M, log_z_NT = gather_logits(hidden_ND, Head(weight_VD), torch.tensor([0]), torch.tensor([16]), (1.0, 2.0))
    torch.testing.assert_close(log_z_NT[:, 0], torch.tensor([300.0, 300.0]))
    (logit_M.sum() - log_z_NT.sum()).backward()
    assert bool(hidden_ND.grad.isfinite().all())
    assert bool(weight_VD.grad.isfinite().all())


def test_tiles_stay_in_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the number of rows or the vocabulary, forward or backward."""
    sizes = []
    original = Head._tile

    def spy(self: Head, scaled_ND: Tensor, columns: slice) -> Tensor:
        tile_NV = original(self, scaled_ND, columns)
        sizes.append(tile_NV.numel() * tile_NV.itemsize)
        return tile_NV

    monkeypatch.setattr(Head, "_tile", spy)
    for rows, vocabulary in ((1, 5), (40, 5), (7, 300), (200, 70)):
        sizes.clear()
        case = Case(0, rows, vocabulary, 20, (1.0,))
        case.run(gather_logits)
        assert max(sizes) <= 48
        # Forward and backward compute every logit once each.
        assert sum(sizes) == 2 * rows * vocabulary * 8


def test_frozen_tensors_get_no_gradient() -> None:
    case = Case(2, 4, 9, 6, (1.0,))
    frozen = Head(case.weight.detach(), case.bias.detach())
    logit_M, log_z_NT = gather_logits(case.hidden, frozen, case.row_M, case.id_M, (1.0,))
    grad = torch.autograd.grad(logit_M.sum() + log_z_NT.sum(), case.hidden)[0]
    logit_M, log_z_NT = dense(case.hidden, frozen, case.row_M, case.id_M, (1.0,))
    torch.testing.assert_close(grad, torch.autograd.grad(logit_M.sum() + log_z_NT.sum(), case.hidden)[0])
    detached = Case(2, 4, 9, 6, (1.0,))
    logit_M, log_z_NT = gather_logits(detached.hidden.detach(), detached.head, detached.row_M, detached.id_M, (1.0,))
    assert torch.autograd.grad(logit_M.sum() + log_z_NT.sum(), detached.weight)[0].shape == detached.weight.shape


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_gives_float32_results(autocast: bool) -> None:
    """As near as bfloat16 factors allow; sums, exponentials and gradients of the normaliser stay in float32."""
    case = Case(4, 8, 40, 20, (1.0, 2.0), dtype=torch.float32, bias=False)
    half = Head(case.weight.detach().bfloat16().requires_grad_()) if not autocast else case.head
    hidden = case.hidden if autocast else case.hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logit_M, log_z_NT = gather_logits(hidden, half, case.row_M, case.id_M, case.temperatures)
    assert logit_M.dtype == log_z_NT.dtype == torch.float32
    rounded = Head(case.weight.detach().bfloat16().float())
    expected = dense(case.hidden.detach().bfloat16().float(), rounded, case.row_M, case.id_M, case.temperatures)
    torch.testing.assert_close(logit_M, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_z_NT, expected[1], rtol=1e-5, atol=1e-5)
    (logit_M.sum() + log_z_NT.sum()).backward()
    assert hidden.grad.dtype == hidden.dtype
    assert half.weight_VD.grad.dtype == half.weight_VD.dtype
    assert bool(half.weight_VD.grad.isfinite().all())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 23), st.sampled_from([None, 2.0]))
def test_argmax(seed: int, rows: int, vocabulary: int, soft_cap: float | None) -> None:
    case = Case(seed, rows, vocabulary, 0, (), soft_cap=soft_cap)
    id_N, logp_N = argmax_and_logp(case.hidden, case.head)
    every = torch.arange(vocabulary).repeat(rows)
    logits_NV = dense(case.hidden, case.head, torch.arange(rows).repeat_interleave(vocabulary), every, ())[0]
    log_p_NV = torch.log_softmax(logits_NV.view(rows, vocabulary), dim=1)
    assert id_N.tolist() == log_p_NV.argmax(dim=1).tolist()
    torch.testing.assert_close(logp_N, log_p_NV.amax(dim=1).detach())


def test_equal_logits_give_the_first_id() -> None:
    id_N, logp_N = argmax_and_logp(torch.ones(3, 2), Head(torch.ones(50, 2)))
    assert id_N.tolist() == [0, 0, 0]
    torch.testing.assert_close(logp_N, -torch.log(torch.tensor(50.0)).expand(3))


# Heads of models


def small_model(kind: type, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():  # large enough logits that a cap or a scale shows
        model.get_output_embeddings().weight.normal_(0, 1.0)
    return model.train()


@pytest.mark.parametrize(
    ("kind", "config", "soft_cap", "scale"),
    [
        (Qwen3ForCausalLM, Qwen3Config(**SMALL, tie_word_embeddings=True), None, 1.0),
        (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=False), None, 1.0),
        (Gemma2ForCausalLM, Gemma2Config(**SMALL, final_logit_softcapping=5.0), 5.0, 1.0),
        (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=8.0), None, 1 / 8),
        (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25), None, 0.25),
    ],
)
def test_heads_of_model_families(kind: type, config: Any, soft_cap: float | None, scale: float) -> None:
    model = small_model(kind, config)
    head = Head.of(model)
    assert (head.soft_cap, head.scale) == (soft_cap, scale)
    assert head.weight_VD is model.get_output_embeddings().weight
    assert model.training  # the check leaves the model as it was
    ids = torch.arange(6)[None]
    expected_NV = torch.log_softmax(model(input_ids=ids).logits[0], dim=1)
    hidden_ND = model.base_model(input_ids=ids).last_hidden_state[0]
    row_M, id_M = torch.arange(6).repeat_interleave(101), torch.arange(101).repeat(6)
    logit_M, log_z_NT = gather_logits(hidden_ND, head, row_M, id_M, (1.0,))
    torch.testing.assert_close(logit_M.view(6, 101) - log_z_NT, expected_NV, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_not_understood_is_refused() -> None:
    config = FalconH1Config(**SMALL, lm_head_multiplier=0.5, mamba_d_ssm=64, mamba_n_heads=2, mamba_d_head=32)
    with pytest.raises(TidecacheError, match="FalconH1ForCausalLM changes its logits"):
        Head.of(small_model(FalconH1ForCausalLM, config))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(TidecacheError, match="Qwen3Model has no linear head"):
        Head.of(Qwen3ForCausalLM(Qwen3Config(**SMALL)).model)


def test_tied_weights_collect_both_gradients() -> None:
    """The whole of a model's gradient equals that of its own dense logits, embedding and head being one tensor."""
    model = small_model(Qwen3ForCausalLM, Qwen3Config(**SMALL, tie_word_embeddings=True))
    ids = torch.arange(10, 18)[None]
    target_N = torch.arange(20, 28)
    torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0], target_N).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden_ND = model.base_model(input_ids=ids).last_hidden_state[0]
    logit_N, log_z_NT = gather_logits(hidden_ND, Head.of(model), torch.arange(8), target_N, (1.0,))
    (log_z_NT[:, 0] - logit_N).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
