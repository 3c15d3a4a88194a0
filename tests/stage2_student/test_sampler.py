"""The sampler: cached = uncached, batches = singles, schedules, block boundaries, seeds, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from shared.errors import TidecacheError
from stage2_student.head import Head
from stage2_student.sampler import SampleOptions, Sampler, Usage
from tests.stage2_student.packed import noisy_hidden

ORACLES = Path(__file__).resolve().parent.parent / "oracles"
torch.set_num_threads(1)
VOCABULARY, MASK, END, BLOCK = 97, 95, 96, 8


def random_model(seed: int, family: str = "qwen3") -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCABULARY + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**shape)) if family == "qwen3" else LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():  # sharp enough that the most likely token changes from place to place
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.12 if "embed" not in name else 0.5)
    return model.eval()


def sampler_of(model: PreTrainedModel, block: int = BLOCK, ends: tuple[int, ...] = (END,)) -> Sampler:
    return Sampler(model, block, MASK, ends, VOCABULARY)


def prompt_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("blocks", ["sequence", "response"])
@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_cached_and_uncached_give_the_same_tokens(blocks: str, threshold: float | None, family: str) -> None:
    distinct = set()
    for seed in range(5):
        sampler = sampler_of(random_model(seed, family), ends=())
        prompt = prompt_of(seed, 3 + 3 * seed)
        found = [
            sampler.sample([prompt], SampleOptions(21, 8, threshold=threshold, blocks=blocks, kv_cache=cached))[0].ids
            for cached in (True, False)
        ]
        assert found[0] == found[1]
        assert len(found[0]) == 21
        distinct.update(found[0])
    assert len(distinct) > 10  # no degenerate repetition that would agree by chance


@pytest.mark.parametrize("blocks", ["sequence", "response"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_batch_of_unequal_prompts_equals_single_runs(blocks: str, temperature: float) -> None:
    sampler = sampler_of(random_model(1), ends=tuple(range(0, 90, 7)))  # likely ends: rows leave at different times
    prompts = [prompt_of(seed, length) for seed, length in enumerate((1, 5, 8, 9, 16, 23, 31, 40))]
    top_p = 0.95 if temperature else 1.0
    options = SampleOptions(32, 12, temperature=temperature, top_p=top_p, blocks=blocks, seed=3)
    together = sampler.sample(prompts, options)
    gained = sampler.usage.tokens_per_forward
    sampler.usage = Usage()
    singles = [sampler.sample([prompt], options)[0] for prompt in prompts]
    assert together == singles
    assert sampler.usage.tokens_per_forward == gained  # waiting for other rows does not count
    assert len({sample.finish for sample in together}) == 2
    assert len({len(sample.ids) for sample in together}) > 3
    random = SampleOptions(12, 4, remasking="random", blocks=blocks, seed=5)
    assert sampler.sample(prompts, random) == [sampler.sample([prompt], random)[0] for prompt in prompts]


def test_the_first_step_sees_what_training_saw() -> None:
    """The first prediction in a block equals the training pass over [x_t, x_0] with that block masked."""
    model = random_model(4)
    prompt = prompt_of(0, 19)
    sampler = sampler_of(model, ends=())
    picked: list[torch.Tensor] = []
    predict = sampler.predict
    sampler.predict = lambda hidden, *rest: (picked.append(hidden), predict(hidden, *rest))[1]  # type: ignore[method-assign]
    response = sampler.sample([prompt], SampleOptions(21, 21))[0].ids
    clean = torch.tensor([prompt + response])
    length = torch.tensor([clean.shape[1]])
    step = 0
    for start, first in ((16, 19), (24, 24), (32, 32)):  # blocks of 8; the first is continued from the prompt
        noisy = clean.clone()
        noisy[:, first : start + 8] = MASK
        hidden = noisy_hidden(model, noisy[:, None], clean, length, BLOCK)[0, 0, first : start + 8]
        torch.testing.assert_close(picked[step], hidden, rtol=1e-4, atol=1e-5)
        step += start + 8 - first


def test_response_blocks_start_where_the_response_starts() -> None:
    model, prompt = random_model(2), prompt_of(3, 13)
    runs = {
        b: sampler_of(model, ends=()).sample([prompt], SampleOptions(16, 4, blocks=b))[0].ids
        for b in ("sequence", "response")
    }
    assert runs["sequence"] != runs["response"]
    aligned = prompt_of(3, 16)
    runs = {
        b: sampler_of(model, ends=()).sample([aligned], SampleOptions(16, 4, blocks=b))[0].ids
        for b in ("sequence", "response")
    }
    assert runs["sequence"] == runs["response"]


def test_steps_follow_the_schedule_and_the_counts_are_those_of_the_oracle() -> None:
    for case in json.loads((ORACLES / "losses.json").read_text())["cases"]:
        if case["kind"] == "transfer":
            masked, steps = case["inputs"]["masked"], case["inputs"]["steps"]
            options = SampleOptions(masked, steps)
            assert options.block_steps(masked) == case["outputs"]["counts"]
    assert SampleOptions(256, 256).block_steps(32) == [1] * 32
    assert SampleOptions(256, 128).block_steps(32) == [2] * 16
    assert sum(SampleOptions(256, 100).block_steps(32)) == 32
    sampler = sampler_of(random_model(0), ends=())
    sampler.sample([prompt_of(0, 16)], SampleOptions(16, 4))
    usage = sampler.usage
    assert (usage.forwards, usage.tokens) == (4, 16)
    # First pass: the prompt and the first block; then the block; then the finished block with the next one; the block.
    assert usage.positions == (16 + 8) + 8 + (8 + 8) + 8
    assert usage.tokens_per_forward == 4.0
    sampler = sampler_of(random_model(0), ends=())
    sampler.sample([prompt_of(0, 16)], SampleOptions(16, 4, kv_cache=False))
    assert sampler.usage.positions == 24 + 24 + 32 + 32


def test_a_threshold_commits_more_per_pass_and_never_less_than_the_schedule() -> None:
    model, prompt = random_model(6), prompt_of(0, 10)
    forwards = {}
    for threshold in (None, 0.99, 0.6, 1e-6):
        sampler = sampler_of(model, ends=())
        assert len(sampler.sample([prompt], SampleOptions(30, 30, threshold=threshold))[0].ids) == 30
        forwards[threshold] = sampler.usage.forwards
    assert forwards[None] == 30
    assert forwards[1e-6] == 4  # one pass per block: of 6, 8, 8 and 8 tokens
    assert forwards[1e-6] < forwards[0.6] <= forwards[0.99] <= 30


def test_an_end_token_stops_the_row_without_finishing_its_block() -> None:
    sampler = sampler_of(random_model(3), ends=())
    prompt = prompt_of(1, 12)
    whole = sampler.sample([prompt], SampleOptions(32))[0]
    end = whole.ids[9]
    position = whole.ids.index(end)
    stopping = sampler_of(random_model(3), ends=(end,))
    stopped = stopping.sample([prompt], SampleOptions(32))[0]
    assert (stopped.ids, stopped.finish) == (whole.ids[:position], "end")
    assert stopping.usage.forwards < sampler.usage.forwards
    assert whole.finish == "length"


def test_streamed_tokens_are_the_response_and_stop_ends_it() -> None:
    sampler = sampler_of(random_model(5), ends=())
    prompts = [prompt_of(0, 5), prompt_of(1, 17)]
    seen: dict[int, list[int]] = {0: [], 1: []}
    samples = sampler.sample(prompts, SampleOptions(24), on_tokens=lambda row, ids: seen[row].extend(ids))
    assert [seen[0], seen[1]] == [sample.ids for sample in samples]
    stopped = sampler.sample(prompts, SampleOptions(24), stop=lambda ids: len(ids) >= 8)
    assert [sample.finish for sample in stopped] == ["stop", "stop"]
    assert [len(sample.ids) for sample in stopped] == [11, 15]  # to the ends of their blocks
    assert all(a.ids[: len(b.ids)] == b.ids for a, b in zip(samples, stopped, strict=True))


def test_seeds_decide_and_top_p_narrows() -> None:
    sampler, prompt = sampler_of(random_model(7), ends=()), prompt_of(2, 9)
    run = lambda **options: sampler.sample([prompt], SampleOptions(12, temperature=1.0, **options))[0].ids  # noqa: E731
    assert run(seed=1) == run(seed=1)
    assert run(seed=1) != run(seed=2)
    greedy = sampler.sample([prompt], SampleOptions(12))[0].ids
    assert run(seed=1, top_p=1e-6) == greedy
    assert run(seed=1) != greedy


def test_sampled_tokens_follow_the_distribution() -> None:
    sampler = sampler_of(random_model(8))
    logits = torch.randn(VOCABULARY + 3)
    sampler.head = Head(logits[:, None])
    uniform = (torch.arange(4000) + 0.5) / 4000
    options = SampleOptions(1, temperature=0.7)
    ids, confidence = sampler.predict(torch.ones(4000, 1), uniform, options)
    allowed = logits[:VOCABULARY].clone()
    allowed[MASK] = -torch.inf
    expected = (allowed / 0.7).softmax(0)
    counts = torch.bincount(ids, minlength=VOCABULARY) / 4000
    assert float((counts - expected).abs().max()) < 1e-3
    torch.testing.assert_close(confidence, allowed.softmax(0)[ids])
    ids, _ = sampler.predict(torch.ones(4000, 1), uniform, SampleOptions(1, temperature=0.7, top_p=0.5))
    order = expected.argsort(descending=True)
    needed = int((expected[order].cumsum(0) < 0.5).sum()) + 1
    assert set(ids.tolist()) == set(order[:needed].tolist())


def test_the_mask_token_and_unknown_ids_are_never_sampled() -> None:
    sampler = sampler_of(random_model(9), ends=())
    weight = torch.zeros(VOCABULARY + 3, 1)
    weight[MASK], weight[VOCABULARY + 1], weight[7] = 9.0, 8.0, 1.0
    sampler.head = Head(weight)
    assert sampler.predict(torch.ones(3, 1), None, SampleOptions())[0].tolist() == [7, 7, 7]


def test_the_model_is_left_as_it_was() -> None:
    model = random_model(0)
    model.train()
    before = model.config._attn_implementation
    sampler_of(model).sample([prompt_of(0, 4)], SampleOptions(4))
    assert model.training
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[]], {}, "no tokens"),
        ([[1, MASK]], {}, "mask token"),
        ([[1] * 500], {"max_new_tokens": 13}, "context of 512"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(prompts: list[list[int]], options: dict[str, int], words: str) -> None:
    with pytest.raises(TidecacheError, match=words):
        sampler_of(random_model(0)).sample(prompts, SampleOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"remasking": "never"}, {"blocks": "prompt"}, {"max_new_tokens": 0}, {"steps": -1}, {"temperature": -1.0},
        {"top_p": 0.0, "temperature": 1.0}, {"top_p": 0.5}, {"threshold": 0.0},
        {"threshold": 0.9, "remasking": "random"},
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(TidecacheError):
        SampleOptions(**options)  # type: ignore[arg-type]
