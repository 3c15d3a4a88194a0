"""Packs against the dense way: which tokens are there, who sees whom, what comes out and its gradients, by every kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shared.cache.reader import Cache
from shared.tokenization import TextTokenizer
from stage2_student import adapters, families, kernels
from stage2_student.attention import masked_hidden
from stage2_student.batch import Batch, Collator
from stage2_student.config import load_recipe, resolve
from stage2_student.data import RowMaker
from stage2_student.losses import Counts, total
from stage2_student.model import Student, TrainableStudent, load_student
from stage2_student.packing import CLEAN, Group, Layout
from tests.stage2_student import dense, synthetic
from tests.stage2_student.test_families import FAMILIES

CPU = torch.device("cpu")


@st.composite
def groups_of(draw: Any) -> tuple[list[Group], int]:
    """Up to three documents of up to three draws, and a block size; masks from none to all."""
    size = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        shape = (draw(st.integers(1, 3)), draw(st.integers(1, 17)))
        masked_ML = rng.random(shape) < draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
        groups.append(Group(draw(st.integers(0, size - 1)), masked_ML))
    return groups, size


@settings(deadline=None, max_examples=200)
@given(groups_of())
def test_the_layout_holds_what_is_needed_and_sees_what_it_should(case: tuple[list[Group], int]) -> None:
    groups, size = case
    layout = Layout.of(groups, size, CPU)
    row, column, draw = layout.row_T.tolist(), layout.column_T.tolist(), layout.draw_T.tolist()
    assert 0 < layout.tokens <= sum(g.masked_ML.size + g.masked_ML.shape[1] for g in groups)
    assert [d != CLEAN for d in draw] == [i < layout.noisy for i in range(layout.tokens)]
    place = {(r, c, d == CLEAN): i for i, (r, c, d) in enumerate(zip(row, column, draw, strict=True))}
    assert len(place) == layout.tokens  # no token twice
    every = torch.arange(layout.tokens)
    seen_TT = layout.sees(every[:, None], every[None, :])

    first, places = 0, []
    masked_N = [(r, c) for r, c in enumerate_masked(groups)]
    assert layout.places(groups, size).tolist() == [place[r, c, False] for r, c in masked_N]
    covered = torch.zeros_like(seen_TT)
    for group in groups:
        draws, length = group.masked_ML.shape
        expected = dense.mask_of(length, size, draws, group.offset)
        rows = range(first, first + draws)
        flat = {(r, c, False): (r - first) * length + c for r in rows for c in range(length)}
        flat |= {(first, c, True): draws * length + c for c in range(length)}
        mine = [(i, flat[key]) for key, i in place.items() if key in flat]
        at, of = torch.tensor([i for i, _ in mine]), torch.tensor([j for _, j in mine])
        if mine:
            assert torch.equal(seen_TT[at][:, at], expected[of][:, of])
            covered[at[:, None], at[None, :]] = True
        # Whatever a masked token looks at, directly or through others, is in the pack.
        wanted = {(r - first) * length + c for r, c in masked_N if r in rows}
        while more := {k for q in wanted for k in expected[q].nonzero()[:, 0].tolist()} - wanted:
            wanted |= more
        assert wanted <= set(of.tolist() if mine else [])
        places += [i for i, _ in mine]
        first += draws
    assert sorted(places) == list(range(layout.tokens))
    assert not bool(seen_TT[~covered].any())  # no token sees another document's


def enumerate_masked(groups: list[Group]) -> list[tuple[int, int]]:
    found, first = [], 0
    for group in groups:
        found += [(first + int(m), int(c)) for m, c in zip(*np.nonzero(group.masked_ML), strict=True)]
        first += len(group.masked_ML)
    return found


@settings(deadline=None, max_examples=60)
@given(groups_of(), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.integers(0, 2**31))
def test_kernels_agree(case: tuple[list[Group], int], heads: tuple[int, int], seed: int) -> None:
    """`split` against `dense` in float64: values and gradients, of all tokens and of noisy queries alone."""
    layout = Layout.of(*case, CPU)
    generator = torch.Generator().manual_seed(seed)
    shape = (1, heads[0], layout.tokens, 16)
    query, key, value = (
        torch.randn(1, h, layout.tokens, 16, dtype=torch.float64, generator=generator).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    )
    for queries in (layout.tokens, layout.noisy):
        direction = torch.randn(shape, dtype=torch.float64, generator=generator).transpose(1, 2)[:, :queries]
        found = []
        for kernel in (kernels.split, lambda *a: kernels.dense(nn.Module(), *a)):
            output = kernel(query[:, :, :queries], key, value, layout, 0.3)
            assert output.shape == (1, queries, heads[0], 16)
            found.append((output, *torch.autograd.grad((output * direction).sum(), (query, key, value))))
        for ours, reference in zip(*found, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-11)


def test_block_masks_are_those_of_torch() -> None:
    rng = np.random.default_rng(0)
    groups = [Group(3, rng.random((2, 900)) < 0.4), Group(0, rng.random((1, 700)) < 0.01)]
    for size in (16, 256):
        layout = Layout.of(groups, size, CPU)
        for queries in (layout.tokens, layout.noisy):
            found = kernels.block_mask(layout, queries)
            expected = create_block_mask(
                lambda _b, _h, q, k, at=layout: at.sees(q, k), None, None, queries, layout.tokens, "cpu"
            )
            assert found.shape == expected.shape
            for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), name
            assert torch.equal(found.to_dense(), expected.to_dense())


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_flex_attention_agrees(softcap: float | None) -> None:
    """FlexAttention, compiled as on a GPU, has a forward pass on a CPU: the same to 1e-4 (issue: where both run)."""
    rng = np.random.default_rng(0)
    groups = [Group(3, rng.random((2, 150)) < 0.4), Group(0, rng.random((1, 64)) < 0.4)]
    layout = Layout.of(groups, 16, CPU)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, layout.tokens, 32, generator=generator) for h in (4, 2, 2))
    with torch.no_grad():
        for queries in (layout.tokens, layout.noisy):
            part = query[:, :, :queries]
            found = kernels.flex(part, key, value, layout, 0.2, softcap)
            expected = kernels.dense(nn.Module(), part, key, value, layout, 0.2, softcap)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            if softcap is None:
                split = kernels.split(part, key, value, layout, 0.2)
                torch.testing.assert_close(found, split, rtol=1e-4, atol=1e-4)


def test_a_layout_and_its_block_masks_are_made_once_per_shape() -> None:
    masked = np.random.default_rng(0).random((2, 40)) < 0.5
    one, same = (Layout.of([Group(0, m)], 8, CPU) for m in (masked, masked[:, ::-1]))
    assert one is same  # the same blocks are in use
    assert Layout.of([Group(1, masked)], 8, CPU) is not one


# Whole models


def family(kind: str, **changes: Any) -> PreTrainedModel:
    """A random tiny model in float64."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 60, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **(shape | FAMILIES[kind] | changes))
    how = families.attention_implementation(config)
    return AutoModelForCausalLM.from_config(config, attn_implementation=how).double()  # type: ignore[no-any-return]


def inputs() -> tuple[Tensor, Tensor, list[Group]]:
    """Three documents with three, one and two draws, of different lengths and offsets; one draw has nothing masked."""
    rng = np.random.default_rng(1)
    groups = [Group(o, rng.random((m, n)) < 0.4) for o, m, n in ((0, 3, 21), (3, 1, 11), (2, 2, 16))]
    groups[2].masked_ML[1] = False
    groups[0].masked_ML[:, 10:] &= np.array([[True], [False], [True]])  # draws with different blocks in use
    clean_BL, noisy_BL = np.full((6, 21), 59), np.full((6, 21), 59)
    row = 0
    for group in groups:
        ids_L = rng.integers(1, 58, group.masked_ML.shape[1])
        for masked_L in group.masked_ML:
            clean_BL[row, : len(ids_L)] = ids_L
            noisy_BL[row, : len(ids_L)] = np.where(masked_L, 58, ids_L)
            row += 1
    return torch.from_numpy(noisy_BL), torch.from_numpy(clean_BL), groups


def gradients(model: PreTrainedModel, hidden_ND: Tensor) -> dict[str, Tensor]:
    direction_ND = torch.randn(hidden_ND.shape, dtype=hidden_ND.dtype, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (hidden_ND * direction_ND).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["plain", "uncut", "checkpointed", "lora"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pack_gives_the_dense_passs_hidden_states_and_gradients(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way in ("checkpointed", "lora") and kind not in ("qwen3", "gemma2"):
        pytest.skip("does not depend on the family")
    model = family(kind)
    if way == "uncut":
        monkeypatch.setattr(families, "CUTTABLE", ())
    if way == "checkpointed":
        model.train()
        model.gradient_checkpointing_enable()
    if way == "lora":
        adapters.add_adapters(model, resolve({"lora_rank": 4}, "test"), None, "base")
        model.double()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
    noisy_BL, clean_BL, groups = inputs()
    expected, row = [], 0
    for group in groups:
        draws, length = group.masked_ML.shape
        noisy = [noisy_BL[row + m, :length] for m in range(draws)]
        hidden_MLD = dense.noisy_outputs(model, noisy, clean_BL[row, :length], 4, group.offset)
        expected.append(hidden_MLD[torch.from_numpy(group.masked_ML)])
        row += draws
    expected_ND = torch.cat(expected)
    wanted = gradients(model, expected_ND)
    found_ND = masked_hidden(model, noisy_BL, clean_BL, groups, 4)
    # transformers' norms run in float32 whatever the model's dtype.
    torch.testing.assert_close(found_ND, expected_ND, rtol=1e-5, atol=1e-5)
    found = gradients(model, found_ND)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert float((found[name] - wanted[name]).norm()) < 1e-5 * float(wanted[name].norm()), name
    again_ND = dense.noisy_outputs(model, [noisy_BL[3, :11]], clean_BL[3, :11], 4, 3)  # still a plain model otherwise
    torch.testing.assert_close(again_ND[0, groups[1].masked_ML[0]], expected[1], rtol=1e-5, atol=1e-5)


def test_attention_dropout_is_applied_while_training() -> None:
    model = family("qwen3", attention_dropout=0.5)
    noisy_BL, clean_BL, groups = inputs()
    with torch.no_grad():
        plain = masked_hidden(model.eval(), noisy_BL, clean_BL, groups, 4)
        torch.manual_seed(0)
        dropped = masked_hidden(model.train(), noisy_BL, clean_BL, groups, 4)
        torch.manual_seed(0)
        again = masked_hidden(model, noisy_BL, clean_BL, groups, 4)
    assert torch.equal(dropped, again)
    assert float((dropped - plain).abs().max()) > 0.1


# Whole steps in float32


@pytest.fixture(scope="module")
def draws_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Three documents with four draws each."""
    return synthetic.make_cache(tmp_path_factory.mktemp("packs") / "cache", synthetic.texts(3), draws=4)


def step(student: Student, batches: list[Batch], config: Any) -> tuple[Tensor, Tensor]:
    """Loss and flat gradient of one optimiser step over these micro-batches."""
    student.model.zero_grad(set_to_none=True)
    counts, model = Counts.of(batches, config), TrainableStudent(student.model, config)
    loss = torch.zeros((), device=batches[0].noisy_BL.device)
    for batch in batches:
        part = total(model(batch, 0.4), counts, config)
        part.backward()
        loss += part.detach()
    return loss, torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("recipe", ["reverse-calm-tidal", "events"])
def test_multi_draw_packed_and_plain_batches_are_one_step(recipe: str, draws_cache: Cache, student_folder: Any) -> None:
    """Groups of 3, 1, 2 and 4 draws; the same rows apart; and row by row: the same loss and gradient to 1e-5."""
    config = load_recipe(recipe)
    student = load_student(student_folder)
    temperature = config.temperature if config.uses_events else None
    maker = RowMaker(TextTokenizer.load(student_folder), draws_cache.spec, 16, config.context, temperature=temperature)
    config = replace(config, block_size=16)
    rows = [maker.cached_row(d) for d in sorted(draws_cache.iter_draws(), key=lambda d: (d.document, d.draw))]
    together = [rows[0], rows[1], rows[2], rows[4], rows[8], rows[9]]
    apart = [rows[i] for i in (0, 4, 1, 8, 2, 9)]
    collator = Collator(student.mask_id, student.pad_id)
    batch = collator(together)
    assert [len(group.masked_ML) for group in batch.groups] == [3, 1, 2]
    assert [len(group.masked_ML) for group in collator(apart).groups] == [1] * 6
    expected, gradient = step(student, [collator([row]) for row in apart], config)
    for batches in ([batch], [collator(apart)], [collator(together[:2]), collator(together[2:])]):
        found, found_gradient = step(student, batches, config)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert float((found_gradient - gradient).norm() / gradient.norm()) < 1e-5
    # The row-by-row step against the dense pass with full logits, for the cross-entropy.
    nll, trainable = torch.zeros((), dtype=torch.float64), 0
    for row in apart:
        noisy = torch.from_numpy(np.where(row.masked_L, student.mask_id, row.ids_L))
        clean = torch.from_numpy(row.ids_L)
        with torch.no_grad():
            logits_LV = dense.noisy_outputs(student.model, [noisy], clean, 16, head=True)[0].double()
        gold_L = torch.log_softmax(logits_LV, -1).gather(1, clean[:, None])[:, 0]
        nll = nll - gold_L[torch.from_numpy(row.masked_L)].sum() / float(np.float32(row.timestep) + np.float32(1e-6))
        trainable += row.trainable
    ce_config = replace(config, distill_weight=0.0)
    found, _ = step(student, [batch], ce_config)
    torch.testing.assert_close(found.double(), nll / trainable, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on CUDA alone")
@pytest.mark.parametrize("recipe", ["reverse-calm-tidal", "events"])
def test_flex_attention_trains_as_dense_attention_does(
    recipe: str, draws_cache: Cache, student_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient of a whole step on a GPU in float32, by the kernel chosen there and by `dense`, to 1e-4."""
    student, config = load_student(student_folder), replace(load_recipe(recipe), block_size=16)
    student.model.to("cuda")
    temperature = config.temperature if config.uses_events else None
    maker = RowMaker(TextTokenizer.load(student_folder), draws_cache.spec, 16, config.context, temperature=temperature)
    rows = [maker.cached_row(d) for d in sorted(draws_cache.iter_draws(), key=lambda d: (d.document, d.draw))]
    batch = Collator(student.mask_id, student.pad_id)(rows).to(torch.device("cuda"))
    used = []
    monkeypatch.setattr(kernels, "flex", lambda *a, flex=kernels.flex: used.append(1) or flex(*a))
    found, found_gradient = step(student, [batch], config)
    assert used
    monkeypatch.setattr(kernels, "attend", kernels.dense)
    expected, gradient = step(student, [batch], config)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found_gradient - gradient).norm() / gradient.norm()) < 1e-4
