"""LLaDA2-MoE: the oracle's log-probabilities, and each detail of its routing against a slow dense reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import TidecacheError
from stage1_teacher.architectures.llada2 import LLaDA2MoeModelLM, LLaDA2MoeSparse
from stage1_teacher.architectures.llada2_config import LLaDA2MoeConfig
from stage1_teacher.architectures.llada2_parts import LLaDA2MoeRouter
from stage1_teacher.architectures.loading import load_model
from tests.conftest import ORACLES

TINY = ORACLES / "llada2_tiny"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> LLaDA2MoeModelLM:
    return load_model(TINY, "float32", CPU)


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((TINY / "expected.json").read_text())


@torch.inference_mode()
@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_oracle(model: LLaDA2MoeModelLM, expected: dict, experts: str, attention: str) -> None:
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    ids_BL, valid_BL = torch.tensor(expected["input_ids"]), torch.tensor(expected["valid"])
    length = ids_BL.shape[1]
    sees_BLL = (valid_BL[:, None] & valid_BL[:, :, None]) | torch.eye(length, dtype=torch.bool)
    bias = torch.zeros(sees_BLL.shape).masked_fill(~sees_BLL, float("-inf"))[:, None]
    logp = model(ids_BL, attention_mask=bias).logits.log_softmax(-1)
    full = torch.tensor(expected["logprobs_full_attention"])
    assert (logp - full)[valid_BL].abs().max() < 2e-5

    block_L = torch.arange(length) // expected["block_size"]
    bias = torch.zeros(length, length).masked_fill(block_L[:, None] < block_L, float("-inf"))[None, None]
    logp = model(ids_BL[:1], attention_mask=bias).logits.log_softmax(-1)
    assert (logp[0] - torch.tensor(expected["logprobs_block_causal_row0"])).abs().max() < 2e-5


def test_round_trip_keeps_official_names(model: LLaDA2MoeModelLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    ours, official = load_file(tmp_path / "model.safetensors"), load_file(TINY / "model.safetensors")
    assert ours.keys() == official.keys()
    assert all(torch.equal(ours[name], official[name]) for name in official)
    again, model = load_model(tmp_path, "float32", CPU), load_model(TINY, "float32", CPU)
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 8, "topk_group": 4},
        {"num_experts_per_tok": 1},
        {"norm_topk_prob": False},
        {"num_shared_experts": 2},
        {"num_shared_experts": 0},
    ],
    ids=str,
)
@torch.inference_mode()
def test_experts_equal_dense_reference(fields: dict) -> None:
    """Every token through every expert, one by one, with the routing rule written out."""
    torch.manual_seed(5)
    shape = {
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
    }
    config = LLaDA2MoeConfig(**(shape | fields))
    config._experts_implementation = "grouped_mm"
    layer = LLaDA2MoeSparse(config).eval()
    for tensor in layer.state_dict().values():
        tensor.normal_(std=0.5)
    hidden_BLD = torch.randn(2, 9, 16)
    got = layer(hidden_BLD)

    for b in range(2):
        for i in range(9):
            x = hidden_BLD[b, i]
            score = [1 / (1 + float((-(layer.gate.weight[e].double() @ x.double())).exp())) for e in range(8)]
            biased = [s + float(layer.gate.expert_bias[e]) for e, s in enumerate(score)]
            size = 8 // config.n_group
            groups = [sorted(biased[g * size : (g + 1) * size], reverse=True) for g in range(config.n_group)]
            best = sorted(range(config.n_group), key=lambda g: -sum(groups[g][:2]))[: config.topk_group]
            allowed = [e for e in range(8) if e // size in best]
            chosen = sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]
            total = sum(score[e] for e in chosen)
            scale = total if config.norm_topk_prob and len(chosen) > 1 else 1.0
            want = torch.zeros(16, dtype=torch.float64)
            for e in chosen:
                gate, up = (layer.experts.gate_up_proj[e].double() @ x.double()).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                want += config.routed_scaling_factor * score[e] / scale * (layer.experts.down_proj[e].double() @ hidden)
            if layer.shared_experts is not None:
                want += layer.shared_experts.double()(x.double())
                layer.shared_experts.float()
            assert torch.allclose(got[b, i].double(), want, atol=2e-5)


def test_router_is_float32_in_bfloat16_models(tmp_path: Path) -> None:
    """Scores that differ by less than bfloat16 resolves must still be told apart, and the bias keeps its precision."""
    config = LLaDA2MoeConfig(hidden_size=4, num_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1)
    router = LLaDA2MoeRouter(config).bfloat16()
    router.expert_bias = torch.tensor([0.5, 0.5 + 1e-5])
    expert, weight = router(torch.zeros(1, 4, dtype=torch.bfloat16))
    assert int(expert) == 1
    assert weight.dtype == torch.float32
    model = load_model(TINY, "bfloat16", CPU)
    assert model.model.layers[1].mlp.gate.expert_bias.dtype == torch.float32
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16


@torch.inference_mode()
def test_partial_rotary_leaves_the_rest_alone() -> None:
    config = LLaDA2MoeConfig(
        hidden_size=32, num_attention_heads=1, num_key_value_heads=1, head_dim=32, num_hidden_layers=1, vocab_size=8,
        num_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1, rope_theta=600000, pad_token_id=None,
    )  # fmt: skip
    model = LLaDA2MoeModelLM(config)
    cos, _ = model.model.rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None])
    assert cos.shape == (1, 3, 16)
    assert torch.allclose(cos[0, 2, 1], torch.tensor(2 * 600000 ** (-2 / 16)).cos())


def test_unknown_variants_are_refused(tmp_path: Path) -> None:
    fields = json.loads((TINY / "config.json").read_text())
    shutil.copy(TINY / "model.safetensors", tmp_path)
    for change, named in (
        ({"score_function": "softmax"}, "score_function"),
        ({"norm_head": True}, "norm_head"),
        ({"n_group": 3}, "3 equal groups"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(TidecacheError, match=named):
            load_model(tmp_path, "float32", CPU)


def test_one_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = load_file(TINY / "model.safetensors")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    del tensors[name]
    shutil.copy(TINY / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TidecacheError, match=rf"lacks 1 tensor of llada2_moe \(first: {name}\)"):
        load_model(tmp_path, "float32", CPU)
