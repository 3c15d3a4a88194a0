"""The transformers backend gives a plain dense float32 model's log-probabilities, and refuses what it cannot run.

The reference runs one sequence at a time, without padding, with a mask written out by loops, and takes full logits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import TidecacheError
from stage1_teacher.backends import ScoreRequest, load
from stage1_teacher.head import top_tokens
from stage1_teacher.weights import weights_digest
from tests.stage1_teacher.models import MASK_ID, VOCABULARY, random_requests, reference_logp, save_model

TOLERANCE = 2e-5
LENGTHS = (5, 17, 64, 33, 1, 40, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "qwen3")


def compare(
    teacher, requests: list[ScoreRequest], folder: Path, layout: str, block: int, shift: bool, k: int = 8
) -> None:
    scores = teacher.score(requests, k)
    logp_NV = torch.cat([reference_logp(folder, r, layout, block, shift, teacher.vocabulary) for r in requests])
    gold_N = torch.tensor([g for r in requests for g in r.gold_ids])
    assert scores.gold_logp_N.shape == (len(gold_N),)
    assert scores.gold_logp_N.dtype == scores.topk_logp_NK.dtype == scores.log_z_NT.dtype == torch.float32
    torch.testing.assert_close(
        scores.gold_logp_N.double(), logp_NV.gather(1, gold_N[:, None])[:, 0], rtol=0, atol=TOLERANCE
    )
    value_NK, id_NK = logp_NV.topk(k + 1)
    torch.testing.assert_close(scores.topk_logp_NK.double(), value_NK[:, :k], rtol=0, atol=TOLERANCE)
    apart_NK = (value_NK[:, :-1] - value_NK[:, 1:]) > 2 * TOLERANCE
    untied_NK = apart_NK & torch.cat([torch.ones(len(gold_N), 1, dtype=torch.bool), apart_NK[:, :-1]], 1)
    assert untied_NK.float().mean() > 0.9
    assert torch.equal(scores.topk_ids_NK[untied_NK], id_NK[:, :k][untied_NK])
    for column, temperature in enumerate(teacher.temperatures):
        torch.testing.assert_close(
            scores.log_z_NT[:, column].double(), torch.logsumexp(logp_NV / temperature, 1), rtol=0, atol=TOLERANCE
        )
    assert torch.all(scores.log_z_NT[:, teacher.temperatures.index(1.0)] == 0)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("layout", ["full", "block-causal", "bd3lm", "reordered"])
def test_matches_the_dense_reference(folder: Path, layout: str, shift: bool) -> None:
    """Unequal lengths in one batch, against each alone: so padding leaks nowhere either."""
    teacher = load(folder, layout=layout, block_size=8, logit_shift=shift, mask_id=MASK_ID)
    requests = random_requests(np.random.default_rng(1), LENGTHS, first=int(shift))
    compare(teacher, requests, folder, layout, 8, shift)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"tied": False}),
        ("llama", {"tied": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"tied": False}),
        ("granite", {"logits_scaling": 3.0, "attention_multiplier": 0.2}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_other_architectures_and_heads(tmp_path: Path, kind: str, config: dict) -> None:
    """Untied heads, biases and logit scales are applied."""
    folder = save_model(tmp_path / kind, kind, **config)
    teacher = load(folder, layout="bd3lm", block_size=16)
    compare(teacher, random_requests(np.random.default_rng(2), (20, 9)), folder, "bd3lm", 16, False)


def test_block_causal_matches_the_layouts_of_one_block(folder: Path) -> None:
    """One block over everything is `full`; blocks of one token are causal attention: the model's own default."""
    from transformers import AutoModelForCausalLM

    requests = random_requests(np.random.default_rng(3), (24, 31))
    whole = load(folder, layout="block-causal", block_size=512).score(requests, 4)
    full = load(folder, layout="full").score(requests, 4)
    torch.testing.assert_close(whole.gold_logp_N, full.gold_logp_N, rtol=0, atol=TOLERANCE)
    causal = load(folder, layout="block-causal", block_size=1).score(requests[:1], 4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logp_LV = model(torch.tensor([requests[0].token_ids])).logits[0].log_softmax(-1)
    expected = logp_LV[requests[0].positions, requests[0].gold_ids]
    torch.testing.assert_close(causal.gold_logp_N, expected, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(full.gold_logp_N[: len(expected)], expected, atol=0.1)


@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_budgets_agree_and_repeat_exactly(folder: Path, budget: int) -> None:
    requests = random_requests(np.random.default_rng(4), LENGTHS)
    teacher = load(folder, layout="bd3lm", block_size=8, batch_tokens=budget)
    first, again = teacher.score(requests, 8), teacher.score(requests, 8)
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name)), name
    other = load(folder, layout="bd3lm", block_size=8, batch_tokens=256).score(requests, 8)
    torch.testing.assert_close(first.gold_logp_N, other.gold_logp_N, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(first.topk_logp_NK, other.topk_logp_NK, rtol=0, atol=TOLERANCE)


def test_lists_arrays_and_tensors_are_the_same(folder: Path) -> None:
    (request,) = random_requests(np.random.default_rng(5), (20,))
    teacher = load(folder)
    expected = teacher.score([request], 4).gold_logp_N
    fields = (request.token_ids, request.positions, request.gold_ids, request.clean_ids)
    for kind in (np.array, torch.tensor, tuple):
        assert torch.equal(teacher.score([ScoreRequest(*map(kind, fields))], 4).gold_logp_N, expected)


def test_nothing_to_score(folder: Path) -> None:
    teacher = load(folder)
    assert teacher.score([], 4).gold_logp_N.shape == (0,)
    (request,) = random_requests(np.random.default_rng(6), (12,))
    alone = teacher.score([request], 4)
    among = teacher.score([ScoreRequest([2, 3], [], []), request, ScoreRequest([4], [], [])], 4)
    torch.testing.assert_close(among.gold_logp_N, alone.gold_logp_N, rtol=0, atol=0)


def test_only_rows_that_the_tokenizer_knows(tmp_path: Path) -> None:
    """Heads are often padded to a round size; the log-softmax leaves such rows out."""
    from shared.tokenization import TextTokenizer
    from tests.conftest import TINY_TEACHER

    known = TextTokenizer.load(TINY_TEACHER)
    folder = save_model(tmp_path / "padded", vocabulary=known.vocabulary + 64, tokenizer=True)
    teacher = load(folder)
    assert teacher.vocabulary == known.vocabulary
    assert teacher.mask_id == known.mask_id
    compare(teacher, random_requests(np.random.default_rng(7), (12,), known.vocabulary), folder, "full", 32, False)


def test_top_tokens_with_ties_and_odd_widths() -> None:
    rng = np.random.default_rng(8)
    for width in (5, 64, 1000, 4099):
        x = torch.from_numpy(rng.integers(0, 50, (20, width))).float()
        x[:, width // 2 :] += torch.from_numpy(rng.random((20, width - width // 2))).float()
        values, ids = top_tokens(x, 5)
        assert torch.equal(values, x.sort(descending=True).values[:, :5])
        assert torch.equal(x.gather(1, ids), values)
        tied = values[:, 1:] == values[:, :-1]
        assert torch.all(ids[:, 1:][tied] > ids[:, :-1][tied])
        assert all(len(set(row)) == 5 for row in ids.tolist())


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ScoreRequest([2] * 600, [0], [2]), ["600", "512"]),
        (ScoreRequest([2, 3], [2], [3]), ["positions", "[0, 2)"]),
        (ScoreRequest([2, 3], [-1], [3]), ["positions"]),
        (ScoreRequest([2, 3], [1], [VOCABULARY]), ["gold_ids", str(VOCABULARY)]),
        (ScoreRequest([2, -3], [1], [3]), ["token_ids"]),
        (ScoreRequest([2, 3], [1], [3, 4]), ["1 positions", "2 gold"]),
        (ScoreRequest([], [], []), ["no tokens"]),
    ],
)
def test_bad_requests_are_refused(folder: Path, request_: ScoreRequest, words: list[str]) -> None:
    with pytest.raises(TidecacheError) as error:
        load(folder).score([ScoreRequest([2], [0], [2]), request_], 4)
    for word in ["request 1", *words]:
        assert word in str(error.value)


def test_requests_that_the_traits_rule_out(folder: Path) -> None:
    with pytest.raises(TidecacheError, match=r"logit shift, position 0"):
        load(folder, logit_shift=True).score([ScoreRequest([2, 3], [0], [2])], 4)
    with pytest.raises(TidecacheError, match=r"bd3lm needs clean_ids, one for each of its 2 tokens, found none"):
        load(folder, layout="bd3lm").score([ScoreRequest([2, 3], [0], [2])], 4)
    with pytest.raises(TidecacheError, match=r"found 301"):
        load(folder).score([ScoreRequest([2, 3], [0], [2])], 301)


def test_nan_from_the_teacher_names_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TidecacheError, match=r"broken.*not finite"):
        load(folder)
    teacher = load(save_model(tmp_path / "later", tied=False))
    teacher._decoder.embed_tokens.weight[77] = float("nan")
    teacher.score([ScoreRequest([2, 3], [0], [2])], 4)
    with pytest.raises(TidecacheError, match=r"later.*not finite"):
        teacher.score([ScoreRequest([2, 77], [0], [2])], 4)


def test_missing_tensors_are_never_invented(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "hole")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TidecacheError, match=r"lacks 1 tensor.*layers\.1\.mlp\.down_proj\.weight"):
        load(folder)
    weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 96)
    save_file(weights | {"mystery": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TidecacheError, match=r"besides 1 tensor.*mystery"):
        load(folder)
    save_file(weights | {"model.norm.weight": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TidecacheError, match=r"hole"):
        load(folder)


def test_what_cannot_be_loaded(tmp_path: Path, folder: Path) -> None:
    for path, words in (
        (tmp_path / "nowhere", "no such folder"),
        ("mobi16b", "presets: .*tiny"),
    ):
        with pytest.raises(TidecacheError, match=words):
            load(path)
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(TidecacheError, match="'abacus'"):
        load(tmp_path)
    for flags, words in (
        ({"layout": "diagonal"}, "full, block-causal, bd3lm, reordered"),
        ({"backend": "jax"}, "transformers"),
        ({"dtype": "int8"}, "float32, bfloat16, float16"),
        ({"block_size": 0}, "block_size"),
        ({"temperatures": (1.0, 0.0)}, "temperatures"),
        ({"mask_id": VOCABULARY}, "--mask-id"),
    ):
        with pytest.raises(TidecacheError, match=words):
            load(folder, **flags)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TidecacheError, match=r"config\.json"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["mamba", "bloom", "gpt2"])
def test_attention_that_ignores_the_mask_is_refused(tmp_path: Path, kind: str) -> None:
    """A recurrent model, and two whose tokens know their place otherwise than by position ids: refused or right."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
        "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 2},
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    }[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=VOCABULARY, **shape)).save_pretrained(
        tmp_path / kind
    )
    requests = random_requests(np.random.default_rng(9), (14, 6))
    try:
        teacher = load(tmp_path / kind, layout="bd3lm", block_size=4)
    except TidecacheError as error:
        assert kind in str(error)
    else:
        compare(teacher, requests, tmp_path / kind, "bd3lm", 4, False)


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TidecacheError, match="window of 128 tokens"):
        load(save_model(tmp_path / "mistral", "mistral", sliding_window=128))


def test_digest_is_of_content(tmp_path: Path, folder: Path) -> None:
    """The same tensors in other files have the same digest; one changed number has another."""
    weights = load_file(folder / "model.safetensors")
    parts = tmp_path / "parts"
    parts.mkdir()
    names = sorted(weights, reverse=True)
    shards = {"b.safetensors": names[:5], "a.safetensors": names[5:]}
    for file, members in shards.items():
        save_file({n: weights[n] for n in members}, parts / file)
    index = {"metadata": {}, "weight_map": {n: f for f, members in shards.items() for n in members}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_digest(parts) == weights_digest(folder)
    weights["model.norm.weight"][0] += 1e-3
    (tmp_path / "changed").mkdir()
    save_file(weights, tmp_path / "changed" / "model.safetensors")
    assert weights_digest(tmp_path / "changed") != weights_digest(folder)
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "changed" / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(TidecacheError, match="cut short"):
        weights_digest(tmp_path / "changed")


def test_preset_files(tmp_path: Path, folder: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(
        f'checkpoint = "{folder}"\nlayout = "block-causal"\nblock_size = 4\nlogit_shift = true\nmask_id = 7\n'
    )
    teacher = load(preset)
    assert (teacher.name, teacher.layout, teacher.block_size, teacher.logit_shift, teacher.mask_id) == (
        "mine", "block-causal", 4, True, 7,
    )  # fmt: skip
    assert load(preset, block_size=32, logit_shift=False).block_size == 32
    assert load(preset, block_size=32, logit_shift=False).logit_shift is False
    for text, words in (
        ("layout = 'full'", "`checkpoint` is missing"),
        ("checkpoint = 'x'\nblocks = 3", "unknown field 'blocks'"),
        ("checkpoint = 'x'\nblock_size = '3'", "block_size: expected int"),
        ("checkpoint = ", "not a TOML file"),
    ):
        preset.write_text(text)
        with pytest.raises(TidecacheError, match=words):
            load(preset)
