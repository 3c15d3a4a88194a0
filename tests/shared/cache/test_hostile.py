"""Caches made to do harm, with digests that agree: refused in one line by whatever reads them, or harmless."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache import open_cache, parquet
from shared.cache.manifest import seal
from shared.errors import TidecacheError
from tests.shared.cache import resealed, synthetic
from tests.shared.cache.resealed import WAYS, command, edit, outcome

NAN, INFINITY = float("nan"), float("inf")
READERS = ("iter_draws", "stream", "verify")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "sound"
    synthetic.build(path, documents=4, per_shard=2, draws=2, drop=(), tail_samples=2)
    return path


def refuse(root: Path, capsys, *words: str, ways=READERS) -> None:
    """Every way says one line that holds one of the words, or (a way that is not in `ways`) takes the cache; so do the
    commands, with exit code 1 and no traceback.
    """
    for name, way in WAYS.items():
        message = outcome(way, root)
        assert message is not None or name not in ways, name
        if message is not None:
            assert any(word in message for word in words), (name, message)
            assert_one_line(message)
    for name in ("verify", "inspect"):
        code, out, err = command(capsys, "cache", name, root)
        if name in ways:
            assert code == 1, name
        assert code in (0, 1)
        assert "Traceback" not in err + out
        for line in err.splitlines():
            assert line.startswith(("error: ", "problem: ")), line
            assert_one_line(line)


def assert_one_line(message: str) -> None:
    assert message.isprintable(), message
    assert len(message) < 1000


def test_the_sound_cache_is_taken(folder, capsys) -> None:
    for name, way in WAYS.items():
        assert outcome(way, folder) is None, name
    assert command(capsys, "cache", "verify", folder)[0] == 0


# --- rows --------------------------------------------------------------------------------------------------------


def first(value):
    """Change the first element of the first row that has one, through a list column."""

    def change(values, done=[]):  # noqa: B006
        if not values or done:
            return values
        done.append(1)
        return [value(values[0]) if callable(value) else value, *values[1:]]

    return change


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("trainable", pa.bool_())]))

ROWS = [
    ("likelihoods", edit("masked", lambda v: [*v, True]), "one `masked` per chunk"),
    ("likelihoods", edit("masked", lambda v: v[1:]), "one `masked` per chunk"),
    ("likelihoods", edit("masked", lambda v: []), "one `masked` per chunk"),
    ("likelihoods", edit("masked", lambda v: [not x for x in v]), "one `split` per masked chunk"),
    ("likelihoods", edit("masked", lambda v: None), "found nulls"),
    ("likelihoods", edit("masked", lambda v: [int(x) for x in v], pa.list_(pa.int32())), "expected list"),
    ("likelihoods", edit("split", lambda v: v[1:] if v else [True]), "one `split` per masked chunk"),
    ("likelihoods", edit("compdemo_gold_logp", lambda v: [*v, -1.0]), "one per token"),
    ("likelihoods", edit("compdemo_gold_logp", first(NAN)), "finite numbers up to 0"),
    ("likelihoods", edit("compdemo_gold_logp", first(-INFINITY)), "finite numbers up to 0"),
    ("likelihoods", edit("compdemo_gold_logp", first(0.5)), "finite numbers up to 0"),
    ("likelihoods", edit("compdemo_gold_logp", first(lambda x: None)), "found nulls"),
    ("likelihoods", edit("compdemo_gold_logp", lambda v: v, pa.list_(pa.float64())), "expected list"),
    ("likelihoods", edit("compdemo_topk_ids", first(-1)), "ids of the vocabulary"),
    ("likelihoods", edit("compdemo_topk_ids", first(synthetic.VOCABULARY)), "ids of the vocabulary"),
    ("likelihoods", edit("compdemo_topk_ids", first(2**31 - 1)), "ids of the vocabulary"),
    ("likelihoods", edit("compdemo_topk_ids", lambda v: v, pa.list_(pa.int64())), "expected list"),
    ("likelihoods", edit("compdemo_topk_ids", lambda v: v * 2), "k per token"),
    ("likelihoods", edit("compdemo_topk_logp", first(-50.0)), "descending"),
    ("likelihoods", edit("compdemo_topk_logp", first(NAN)), "finite numbers up to 0"),
    ("likelihoods", edit("compdemo_topk_logp", lambda v: v[:-1]), "k per masked chunk"),
    ("likelihoods", edit("compdemo_log_z", first(INFINITY)), "finite numbers"),
    ("likelihoods", edit("compdemo_log_z", lambda v: v + v), "temperature other than 1"),
    ("likelihoods", edit("compdemo_tail_ids", first(-7)), "ids of the vocabulary"),
    ("likelihoods", edit("compdemo_tail_ids", lambda v: v[1:]), "one per sample"),
    ("likelihoods", edit("compdemo_tail_logp", first(7.0)), "finite numbers up to 0"),
    ("likelihoods", edit("compdemo_tail_logp", lambda v: [*v, -1.0]), "one per sample"),
    ("likelihoods", edit("timestep", lambda t: NAN), "timesteps above 0"),
    ("likelihoods", edit("timestep", lambda t: -t), "timesteps above 0"),
    ("likelihoods", edit("timestep", lambda t: 0.0), "timesteps above 0"),
    ("likelihoods", edit("timestep", lambda t: t + 1.0), "timesteps above 0"),
    ("likelihoods", edit("timestep", lambda t: None), "nulls"),
    ("likelihoods", edit("draw", lambda k: k + 2), "not in the shard's range"),
    ("likelihoods", edit("draw", lambda k: -1), "not in the shard's range"),
    ("likelihoods", edit("draw", lambda k: 0), "a draw is there twice"),
    ("likelihoods", edit("draw", lambda k: k, pa.int64()), "expected int32"),
    ("likelihoods", edit("position", lambda p: 1 - p), "not in order"),
    ("likelihoods", edit("position", lambda p: p + 2**40), "not in the shard's range"),
    ("likelihoods", edit("position", lambda p: -p - 1), "not in the shard's range"),
    ("likelihoods", edit("document", lambda d: "\x1b[31m" + d), "no document"),
    ("likelihoods", edit("document", lambda d: d.encode() + b"\xff", pa.binary()), "expected string"),
    ("likelihoods", lambda table: table.drop_columns(["split"]), "expected the column split"),
    ("likelihoods", lambda table: table.append_column("split", table["split"]), "split"),
    ("documents", edit("document", lambda d: d[:-1]), "32 hexadecimal digits"),
    ("documents", edit("document", lambda d: "\x1b[2J" + d[4:]), "32 hexadecimal digits"),
    ("documents", edit("document", lambda d: "0" * 32), "twice"),
    ("documents", edit("position", lambda p: p + 99), "range"),
    ("documents", edit("position", lambda p: 1 - p), "not after the one before"),
    ("documents", edit("position", lambda p: -1), "range"),
    ("documents", edit("chunk_message", first(1)), "message that is not there"),
    ("documents", edit("chunk_message", first(-1)), "message that is not there"),
    ("documents", edit("chunk_start", first(-1)), "not within its message"),
    ("documents", edit("chunk_start", first(2**31 - 1)), "not within its message"),
    ("documents", edit("chunk_stop", first(2**31 - 1)), "not within its message"),
    ("documents", edit("chunk_stop", first(0)), "without bytes"),
    ("documents", edit("chunk_start", lambda v: [0] * len(v)), "overlap"),
    ("documents", edit("chunk_stop", lambda v: v[1:]), "one chunk_stop per chunk"),
    ("documents", edit("token_count", first(0)), "without bytes or tokens"),
    ("documents", edit("token_count", first(-3)), "without bytes or tokens"),
    ("documents", edit("token_count", first(2**31 - 1)), "as many token ids"),
    ("documents", edit("token_count", lambda v: [*v, 1]), "one token_count per chunk"),
    ("documents", edit("token_ids", first(-1)), "ids of the vocabulary"),
    ("documents", edit("token_ids", first(synthetic.VOCABULARY)), "ids of the vocabulary"),
    ("documents", edit("token_ids", lambda v: v[:-1]), "as many token ids"),
    ("documents", edit("messages", lambda v: None), "nulls"),
    ("documents", edit("messages", lambda v: [None]), "nulls"),
    ("documents", edit("messages", lambda v: []), "message that is not there"),
    ("documents", edit("messages", lambda v: [{**v[0], "content": None}]), "nulls"),
    ("documents", edit("messages", lambda v: [{**v[0], "content": ""}]), "not within its message"),
    ("documents", edit("name", lambda v: None), "nulls"),
    ("documents", edit("chat", lambda v: None), "nulls"),
    ("vocabulary", edit("id", lambda v: v + 1), "in order"),
    ("vocabulary", edit("id", lambda v: 0), "in order"),
    ("vocabulary", lambda table: table.slice(0, 100), "in order"),
    ("vocabulary", edit("bytes", lambda v: None), "nulls"),
    ("vocabulary", edit("bytes", lambda v: v * 5000), "tokens of at most"),
    ("vocabulary", edit("bytes", lambda v: v.decode("latin-1"), pa.string()), "expected binary"),
]


@pytest.mark.parametrize(
    ("which", "change", "word"), ROWS, ids=[f"{n}-{w}-{m[:24]}" for n, (w, _, m) in enumerate(ROWS)]
)
def test_rows_that_do_not_fit(folder, tmp_path, capsys, which, change, word) -> None:
    refuse(resealed.rows(folder, tmp_path / "hostile", which, change), capsys, word)


# --- the manifest ------------------------------------------------------------------------------------------------


def at(*path, value):
    """Set what stands at a path into the JSON."""

    def change(data):
        for part in path[:-1]:
            data = data[part]
        data[path[-1]] = value

    return change


def without(*path):
    def change(data):
        for part in path[:-1]:
            data = data[part]
        del data[path[-1]]

    return change


SHARD = ("shards", 0)
LIKELIHOODS = (*SHARD, "likelihoods", 0)
PATHS = (
    "../sound/teacher_vocab.parquet", "shards/../../sound/manifest.json", "/etc/passwd", "//host/share/x", "~/x",
    "shards\\..\\x", "C:\\x", "C:x", "\\\\host\\share", "a\x00b", "a\nb", "\x1b[31mred", "", ".", "..", "./a", "a/../b", "a//b",
    "a/", ".hidden", "-x", "shards/-x", "shards/.x", "a" * 300, "a/" * 5000 + "a", "ü", "a b", "file:///etc/passwd",
    "http://127.0.0.1/x", 7, None, True, [], {}, ["a"],
)  # fmt: skip
MANIFESTS = [
    *((at(*place, "path", value=path), "lead out of it") for path in PATHS for place in (LIKELIHOODS,)),
    *((at(*place, "path", value="../x"), "lead out of it") for place in (("vocabulary",), (*SHARD, "documents"))),
    *(
        (at(*LIKELIHOODS, name, value=value), "expected a whole number")
        for name in ("rows", "size_bytes")
        for value in (True, -1, 1.0, 0.5, "8", None, [], 2**63, 10**400, 1 << 31)
    ),
    *((at(*LIKELIHOODS, "digest", value=value), "expected text like") for value in ("", "0" * 31, "g" * 32, 7, None)),
    *((at(*LIKELIHOODS, "columns", value=value), "expected") for value in ("document", [7], ["a b"], ["\x1b[0m"], {})),
    (at(*LIKELIHOODS, "columns", value=["document"] * 300), "a list of 0 to 256 values"),
    (at(*SHARD, "likelihoods", value=[]), "a list of 1 to 64 values"),
    (at(*SHARD, "likelihoods", value={}), "expected a list"),
    (at(*SHARD, "documents", value=[]), "expected an object"),
    *(
        (at(*SHARD, "range", "documents", value=v), "expected")
        for v in ([0], [0, 2, 3], [-1, 2], [0, True], "ab", None)
    ),
    *((at(*SHARD, "range", "draws", value=v), "expected") for v in ([0, 0], [2, 1], [0, 2**31], [0.0, 2.0], [0, 1e3])),
    (at(*SHARD, "range", "documents", value=[5, 2]), "a first number below the next"),
    *((at(*SHARD, "batch_tokens", value=v), "expected a whole number") for v in (True, 1.5, -4, "x")),
    *((at(*SHARD, "counts", "draws", value=v), "expected a whole number") for v in (True, -1, 4.0, 10**30)),
    (at(*SHARD, "counts", "draws", value=5), "do not follow"),
    *((at(*SHARD, "counts", "timesteps", value=v), "10 values") for v in ([], [0] * 9, [0] * 11, 3, None)),
    (at(*SHARD, "counts", "timesteps", value=[-1] + [0] * 9), "expected a whole number"),
    *((at(*SHARD, "counts", "dropped", value=v), "expected") for v in ([], {"a": True}, {"a\x1b[0m": 1}, {"a": -1})),
    (at(*SHARD, "counts", "dropped", value={f"{i}": 1 for i in range(2000)}), "at most 1000 entries"),
    (at(*SHARD, "counts", "more", value=1), "do not follow"),
    *(
        (at(*SHARD, "content", value=v), "expected text like")
        for v in ("", "0x" + "0" * 62, "1_0" + "0" * 61, 5, "z" * 64)
    ),
    *((at(*SHARD, "fingerprint", value=v), "expected text like") for v in ("", 5, "\x1b" * 32)),
    (at(*SHARD, "fingerprint", value="0" * 32), "belongs to another cache"),
    (at(*SHARD, "corpus", value="\x1b]0;title\x07"), "expected text like"),
    (at(*SHARD, value=[]), "expected an object"),
    *((at("shards", value=v), "expected a list") for v in ({}, None, "shards", 3)),
    (lambda data: data["shards"].append(data["shards"][0]), "hold the same draws"),
    (lambda data: data["shards"].reverse(), "do not follow"),
    *((at("widened_from", value=v), "widened_from") for v in (["x"], [7], "0" * 32, [["0" * 32]], ["0" * 32] * 100)),
    *((at("format", value=v), "digest") for v in (0, -1, 1.0, True, "1", None, [1])),
    (at("format", value=10**300), "install a newer tidecache"),
    *((without(name), name) for name in ("shards", "spec", "vocabulary", "widened_from")),
    (without(*SHARD, "counts"), "counts"),
    (without(*LIKELIHOODS, "rows"), "rows"),
    (at("totals", "draws", value=9), "do not follow"),
    (at("totals", "draws", value=8.0), "do not follow"),
    (at("content", value="0" * 64), "do not follow"),
    (at("fingerprint", value="0" * 32), "do not follow"),
    (at("spec", value=[]), "spec"),
    *((at("spec", "k", value=v), "k: expected") for v in (True, 4.0, "4", None, -4, 0, 2**40, [4])),
    *((at("spec", "seed", value=v), "seed: expected") for v in (True, 0.5, "0", None, 2**63, 10**400)),
    *((at("spec", "epsilon", value=v), "epsilon: expected") for v in (True, "0", None, -0.5, 10**400)),
    *((at("spec", "temperatures", value=v), "temperatures") for v in ([1.0, True], [1.0, "2"], [1.0] * 100, [], 1.0)),
    *((at("spec", "contexts", value=v), "contexts") for v in ([], ["demo"], [7], [["plain"]])),
    *((at("spec", "lanes", value=v), "lanes") for v in ([], ["topk"], ["gold", "x\x1b[0m"])),
    *((at("spec", "tail_samples", value=v), "tail_samples: expected") for v in (True, -1, 2.0, 2**40)),
    *((at("spec", "teacher", "vocabulary", value=v), "teacher.vocabulary") for v in (True, -1, "500", 2**31, 1e9)),
    *((at("spec", "teacher", "name", value=v), "teacher.name") for v in ("\x1b[31mred", "a\nb", "x" * 2000, 5, None)),
    *((at("spec", "students", 0, "name", value=v), "students.0.name") for v in ("\x1b[2J", "\u202e", 5)),
    (at("spec", "codec", value="\x1b[0m"), "codec"),
    (at("spec", "more", value=1), "spec"),
    (at("spec", "teacher", "more\x1b[0m", value=1), "spec"),
    (without("spec", "teacher", "name"), "spec"),
    (without("spec", "k"), None),  # a default takes its place, so the spec is another
]


@pytest.mark.parametrize("number", range(len(MANIFESTS)))
def test_what_a_manifest_may_not_say(folder, tmp_path, capsys, number) -> None:
    change, word = MANIFESTS[number]
    root = resealed.manifest(folder, tmp_path / "hostile", change)
    refuse(root, capsys, word or "", ways=WAYS)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 100_000, "lists and objects"),
        ("[" * 900 + "]" * 900, "object"),
        ('{"format":' * 100_000, "lists and objects"),
        ("[" * 900, "expected JSON"),
        ("", "expected JSON"),
        ("\x00" * 100, "expected JSON"),
        ("1e999", "expected a JSON object"),
        ("9" * 10_000, "expected JSON"),
        ('{"format": 1, "x": NaN}', "NaN"),
        ('{"format": 1, "x": -Infinity}', "Infinity"),
        ('{"format": 1, "x": 1e999}', "digest"),
        ('{"format": 1, "format": 1}', "digest"),
        ("\ufeff{}", "digest"),
        ("\ud800", "expected JSON"),
    ],
)
def test_json_that_is_none_of_ours(tmp_path, capsys, text, word) -> None:
    root = tmp_path / "hostile"
    root.mkdir()
    (root / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refuse(root, capsys, word, "digest", ways=WAYS)


def test_a_key_that_stands_there_twice(folder, tmp_path, capsys) -> None:
    """Parsers take one of the two, and not all the same."""
    for name in ("manifest.json", "shards/00000000-00000002.draws-0000-0002.json"):
        root = resealed.copy_of(folder, tmp_path / name.replace("/", "-"))
        text = (root / name).read_text()
        (root / name).write_text(text.replace(' "content":', ' "content": "0",\n "content":', 1))
        assert json.loads((root / name).read_text()) == json.loads(text)
        refuse(root, capsys, "digest", ways=WAYS if name == "manifest.json" else ("verify",))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (at("counts", "draws", value=True), "expected a whole number"),
        (at("likelihoods", 0, "path", value="../x"), "lead out of it"),
        (at("range", "draws", value=[0, 5]), "expected the receipt of this shard"),
        (at("more", value=1), "fields of its own"),
        (at("content", value="0" * 64), "the manifest says otherwise"),
    ],
)
def test_what_a_receipt_may_not_say(folder, tmp_path, capsys, change, word) -> None:
    root = resealed.copy_of(folder, tmp_path / "hostile")
    path = root / "shards/00000000-00000002.draws-0000-0002.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_bytes(seal(data))
    refuse(root, capsys, word, ways=("verify",))
    resumed = outcome(
        lambda path: synthetic.build(path, documents=4, per_shard=2, draws=2, drop=(), tail_samples=2), root
    )
    assert word in (resumed or "the manifest says otherwise")  # a capture refuses the receipt too


def test_many_shards_that_overlap_are_found_at_once(folder, tmp_path) -> None:
    """Two thousand draw ranges over the same documents, the last of which overlaps."""
    ranges = [[n, n + 1] for n in range(2000)] + [[1000, 1001]]

    def change(data):
        shard = data["shards"][0]
        data["shards"] = [{**shard, "range": {"documents": [0, 2], "draws": draws}} for draws in ranges]

    with pytest.raises(TidecacheError, match="hold the same draws"):
        open_cache(resealed.manifest(folder, tmp_path / "hostile", change))


@pytest.mark.parametrize("value", [None, [], {}, "x", [[0.0]], [["a"] * 2] * 10, [0.0], [[0.0] * 3] * 10, "[" * 1000])
def test_statistics_that_do_not_fit(folder, tmp_path, capsys, value) -> None:
    """A footer's figures reach the screen, and would be broadcast to any shape."""

    def change(data: bytes) -> bytes:
        table = pq.read_table(pa.BufferReader(data))
        footer = parquet.footer_of(table.schema.metadata)
        footer["statistics"]["compdemo"]["tail_mass_BT"] = value
        return parquet.encode(table, footer)

    root = resealed.data_file(folder, tmp_path / "hostile", "likelihoods", change)
    refuse(root, capsys, "no statistics that fit", ways=("inspect",))
