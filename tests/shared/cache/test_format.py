"""Rounding, tables and content digests."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cache import codec, format
from shared.cache.records import ContextScores, StoredDocument
from shared.documents import Chunks, Message
from tests.shared.cache import synthetic

LOGPS = st.lists(st.floats(-200.0, -(2.0**-60), width=32), min_size=1, max_size=50).map(
    lambda v: np.array(v, np.float32)
)


@given(LOGPS, st.integers(2, 24))
def test_rounding_is_to_nearest(values, bits):
    rounded = codec.round_significant(values, bits)
    mantissa, _ = np.frexp(rounded.astype(np.float64))
    np.testing.assert_array_equal(mantissa * 2.0**bits, np.rint(mantissa * 2.0**bits))
    unit = 2.0 ** (np.frexp(values.astype(np.float64))[1] - bits)
    assert (np.abs(rounded.astype(np.float64) - values) <= unit / 2).all()
    np.testing.assert_array_equal(codec.round_significant(rounded, bits), rounded)


@given(LOGPS)
def test_the_stated_errors_hold(values):
    """docs/cache-format.md: 2^-11 of the value; 0.004 nats for values from −8 to −16."""
    error = np.abs(codec.round_significant(values, codec.LOGP_BITS).astype(np.float64) - values)
    assert (error <= np.abs(values) * 2.0**-11).all()
    assert (error[np.abs(values) <= 16.0] <= 0.004).all()


@given(LOGPS)
def test_rounding_keeps_the_order(values):
    assert (np.diff(codec.round_significant(np.sort(values), codec.LOGP_BITS)) >= 0).all()


def test_rounding_ties_to_even():
    ties = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, -(1 + 2.0**-11)], dtype=np.float32)
    np.testing.assert_array_equal(codec.round_significant(ties, 11), np.array([1, 1 + 2 * 2.0**-10, -1], np.float32))


def test_zero_stays_zero():
    np.testing.assert_array_equal(codec.round_significant(np.zeros(2, np.float32), 11), 0.0)


def rows(spec, documents=3, draws=2):
    prepared = [(p, synthetic.document(p)) for p in range(documents)]
    stored = [format.stored_document(p, d) for p, d in prepared]
    records = [
        (s, synthetic.draw(spec, p, d, k)) for s, (p, d) in zip(stored, prepared, strict=True) for k in range(draws)
    ]
    return stored, [
        (s, dataclasses.replace(r, contexts={x: format.stored_scores(spec, c) for x, c in r.contexts.items()}))
        for s, r in records
    ]


def assert_same_scores(a: ContextScores, b: ContextScores) -> None:
    for field in dataclasses.fields(ContextScores):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert (left is None) == (right is None), field.name
        if left is not None:
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"contexts": ("compdemo", "plain")},
        {"lanes": ("gold",), "contexts": ("plain",)},
        {"temperatures": (2.0, 1.0, 0.5), "k": 1},
        {"temperatures": (1.0,)},
        {"codec": "packed", "contexts": ("compdemo", "plain"), "tail_samples": 3},
        {"codec": "packed", "temperatures": (2.0, 1.0, 0.5), "k": 1},
        {"codec": "packed", "temperatures": (1.0,), "k": 9},
        {"codec": "packed", "lanes": ("gold",)},
    ],
    ids=str,
)
def test_tables_round_trip(changes):
    spec = synthetic.spec(**changes)
    stored, records = rows(spec)
    documents = format.documents_of(format.documents_table(stored))
    for before, after in zip(stored, documents, strict=True):
        assert format.document_digest(before) == format.document_digest(after)
        assert (before.name, before.position) == (after.name, after.position)
    table = format.likelihoods_table(spec, records)
    draws = format.draws_of(table, spec, {d.key: d for d in documents}, spec.contexts[0], synthetic.vocabulary())
    for (_, record), draw in zip(records, draws, strict=True):
        assert (record.draw, record.timestep) == (draw.draw, draw.timestep)
        np.testing.assert_array_equal(np.flatnonzero(record.masked_C), draw.chunks)
        np.testing.assert_array_equal(record.split_M, draw.split)
        assert set(draw.scores) == set(spec.contexts)
        for context in spec.contexts:
            assert_same_scores(record.contexts[context], draw.scores[context])


def test_gold_logp_is_the_sum_over_a_chunks_tokens():
    spec = synthetic.spec()
    stored, records = rows(spec)
    table = format.likelihoods_table(spec, records)
    for draw in format.draws_of(table, spec, {d.key: d for d in stored}, "compdemo", synthetic.vocabulary()):
        tokens = iter(draw.scores["compdemo"].gold_logp_N.tolist())
        expected = [sum(next(tokens) for _ in range(n)) for n in draw.token_count_M.tolist()]
        np.testing.assert_allclose(draw.gold_logp, expected, rtol=1e-6)


def test_candidates_spell_their_ids():
    spec = synthetic.spec()
    stored, records = rows(spec)
    words = synthetic.vocabulary().token_bytes
    table = format.likelihoods_table(spec, records)
    for draw in format.draws_of(table, spec, {d.key: d for d in stored}, "compdemo", synthetic.vocabulary()):
        ids = iter(draw.scores["compdemo"].topk_ids.tolist())
        for n, fillings in zip(draw.token_count_M.tolist(), draw.candidates, strict=True):
            assert [text for text, _ in fillings] == [
                b"".join(words[next(ids)] for _ in range(n)) for _ in range(spec.k)
            ]
            logps = [logp for _, logp in fillings]
            assert logps == sorted(logps, reverse=True)


def test_every_part_of_a_row_changes_its_digest():
    spec = synthetic.spec()
    records = rows(spec, 1, 1)[1]
    document, record = records[0]
    tail = {"tail_ids": np.arange(3, dtype=np.int32), "tail_logp": -np.ones(3, np.float32)}
    scores = dataclasses.replace(record.contexts["compdemo"], **tail)
    base = (
        spec,
        format.document_digest(document),
        record.draw,
        record.timestep,
        record.masked_C,
        record.split_M,
        record.contexts | {"compdemo": scores},
    )

    def changed(array):
        copy = array.copy()
        copy.flat[-1] = copy.flat[-1] + 1 if copy.dtype != bool else not copy.flat[-1]
        return copy

    digests = [format.draw_digest(*base)]
    for index, value in (
        (1, b"other" * 6),
        (2, 1),
        (3, 0.25),
        (4, changed(record.masked_C)),
        (5, changed(record.split_M)),
    ):
        digests.append(format.draw_digest(*base[:index], value, *base[index + 1 :]))
    for field in dataclasses.fields(ContextScores):
        other = dataclasses.replace(scores, **{field.name: changed(getattr(scores, field.name))})
        digests.append(format.draw_digest(*base[:6], {"compdemo": other}))
    digests.append(format.draw_digest(*base[:6], {"plain": scores}))
    assert len(set(digests)) == len(digests)


def test_every_part_of_a_document_changes_its_digest():
    document = format.stored_document(0, synthetic.document(0))
    chunks = document.chunks
    others = [
        {"key": "0" * 32},
        {"chat": True},
        {"cut": not document.cut},
        {"messages": (dataclasses.replace(document.messages[0], trainable=False),)},
        {"chunks": dataclasses.replace(chunks, stop_C=chunks.stop_C + 1)},
        {"chunks": dataclasses.replace(chunks, start_C=chunks.start_C + 1)},
        {"chunks": dataclasses.replace(chunks, message_C=chunks.message_C + 1)},
        {"token_ids_N": document.token_ids_N + 1},
        {"token_count_C": document.token_count_C + 1},
    ]
    digests = [format.document_digest(dataclasses.replace(document, **o)) for o in [{}, *others]]
    assert len(set(digests)) == len(digests)
    assert format.document_digest(dataclasses.replace(document, name="other", position=9)) == digests[0]


def test_content_digest_is_pinned():
    """Within format 1 the digest of given rows never changes."""
    spec = synthetic.spec(contexts=("compdemo", "plain"), k=2)
    chunks = Chunks(np.array([0, 0, 1]), np.array([0, 3, 0]), np.array([3, 7, 4]))
    messages = (Message("user", "naïve ab", True), Message("assistant", "done", True))
    ids_N, count_C = np.array([5, 6, 7, 8], np.int32), np.array([1, 2, 1])
    document = StoredDocument("0f" * 16, "a name", 3, messages, True, False, chunks, ids_N, count_C)
    scores = ContextScores(
        gold_logp_N=np.array([-0.5, -1.25, -8.0], np.float32),
        log_z_MT=np.array([[0.0, 1.5], [0.0, 2.25]], np.float32),
        topk_ids=np.array([6, 7, 9, 1, 8, 2], np.int32),
        topk_logp_MK=np.array([[-1.75, -3.0], [-0.125, -8.0]], np.float32),
    )
    digest = format.document_digest(document)
    masked_C, split_M = np.array([False, True, True]), np.array([True, False])
    row = format.draw_digest(spec, digest, 2, 0.625, masked_C, split_M, {"compdemo": scores, "plain": scores})
    assert digest.hex() == "6fc97a58b5725c2a455c28dcd54a16e61c0a8b180d558ddff8c25007f21e0eb8"
    assert format.sum_digests([row, row]) == "70499fedb364471bd9214848e8cca4d45bf2fe5c12ab212850d078502d09d040"
