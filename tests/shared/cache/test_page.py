"""`tidecache cache inspect --html`: one page, safe whatever the documents hold, and working in a real browser."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from shared.cache import open_cache
from shared.cache.commands import app
from shared.cache.excerpts import END_MARK, HIDDEN, MARK, MAX_CANDIDATES, plain, read_excerpts, visible
from shared.cache.inspect import inspect_cache
from shared.cache.page import PARTS, page, write_page
from shared.cache.records import ShardRange
from shared.cache.vocabulary import TeacherVocabulary
from shared.cache.writer import CacheWriter
from shared.documents import Chunks, Encoded, Message, PreparedDocument, RawDocument
from shared.errors import TidecacheError
from tests import browser
from tests.shared.cache import synthetic

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\x1b[31mred\x1b[0m \x00\x07 tab\t",
    "abc\u202edlrow\u2066\u200b\ufeff",
    "é€😀 e\u0301\ue000fake\ue001\r\n",
    "&lt;b&gt; ' \" ` ${alert(1)} $TITLE <!-- -->",
)


def byte_document(position: int, text: str, role: str = "text", name: str = "") -> PreparedDocument:
    """A document whose tokens are single bytes, so that chunks of 1 to 5 bytes end inside characters."""
    data = text.encode()
    raw = RawDocument(name or f"document {position}", (Message(role, text, True),), role != "text")
    edges = np.arange(len(data) + 1)
    encoded = Encoded(
        np.frombuffer(data, np.uint8).astype(np.int64), edges, ((0, len(data)),), np.ones(len(data), bool)
    )
    cuts = np.unique(np.r_[0, np.cumsum(np.random.default_rng(position).integers(1, 6, len(data))).clip(max=len(data))])
    zeros_C = np.zeros(len(cuts) - 1, dtype=np.int64)
    chunks = Chunks(zeros_C, cuts[:-1], cuts[1:])
    return PreparedDocument(raw.key, raw.name, raw.messages, raw.chat, False, chunks, encoded, (encoded,))


def hostile_cache(folder: Path, **changes) -> Path:
    """Documents, names, roles and candidates full of what could end an element, hide, or run."""
    words = synthetic.vocabulary()
    token_bytes = list(words.token_bytes)
    token_bytes[300:306] = [text.encode() for text in HOSTILE]
    token_bytes[306:308] = [b"\xe2\x82", b""]
    vocabulary = TeacherVocabulary(words.name, words.digest, token_bytes, words.special_V)
    writer = CacheWriter.open(folder, synthetic.spec(contexts=("compdemo", "plain"), **changes), vocabulary)
    documents = [byte_document(i, text * 4, name=f"{text} of {i}") for i, text in enumerate(HOSTILE)]
    documents.append(byte_document(len(HOSTILE), "".join(HOSTILE), role="<assistant>\u202e"))
    records = [synthetic.draw(writer.spec, p, d, k) for p, d in enumerate(documents) for k in range(3)]
    for r in records:
        for scores in r.contexts.values() if "topk" in writer.spec.lanes else ():
            scores.topk_ids[::3] = 300 + np.arange(len(scores.topk_ids[::3])) % 8
    writer.write_shard(ShardRange(0, len(documents), 0, 3), list(enumerate(documents)), [], records, "corpus", 4096)
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hostile_cache(tmp_path_factory.mktemp("hostile") / "<b>cache</b>\u202e")


class Elements(HTMLParser):
    """What a parser makes of a page: start tags, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def parsed(text: str) -> Elements:
    found = Elements()
    found.feed(text)
    return found


def test_hostile_text_adds_no_element_and_no_hidden_character(folder):
    text = page(inspect_cache(folder), read_excerpts(open_cache(folder), 7))
    found = parsed(text)
    assert len(found.scripts) == 2
    assert found.scripts[1].strip() == (PARTS / "page.js").read_text().strip()
    assert not [tag for tag, attributes in found.tags if tag == "img" or any(a.startswith("on") for a in attributes)]
    assert not [c for c in text if c in "\x1b\x00\x07\u202e\u2066\u200b\ufeff\ue000"]
    addresses = [a[name] for _, a in found.tags for name in ("src", "href") if name in a]
    assert not [address for address in addresses if not address.startswith("#")]
    assert "http" not in text.lower().replace("http-equiv", "")
    data = json.loads(found.scripts[0])
    assert len(data["documents"]) == 7
    assert not [s for s in data["strings"] if set(s) & set("\x1b\x00\u202e")]


def test_the_reader_gets_what_the_cache_holds(folder):
    cache = open_cache(folder)
    data = read_excerpts(cache, 7)
    draws = {(d.stored.position, d.draw, x): d for x in cache.spec.contexts for d in cache.iter_draws(context=x)}
    seen = 0
    for document in data["documents"]:
        stored = draws[document["position"], 0, "plain"].stored
        for message, content in zip(document["messages"], stored.contents, strict=True):
            parts = {chunk: text for text, chunk in message["parts"] if chunk >= 0}
            assert list(parts) == list(range(len(stored.chunks)))
            assert [parts[c] for c in parts] == [visible(stored.chunk_bytes(c)) for c in parts]
            assert content == b"".join(stored.chunk_bytes(c) for c in parts)
        for shown in document["draws"]:
            for context, scores in shown["contexts"].items():
                draw = draws[document["position"], shown["draw"], context]
                seen += 1
                assert shown["masked"] == draw.chunks.tolist()
                assert shown["split"] == draw.split.astype(int).tolist()
                assert scores["gold"] == pytest.approx(draw.gold_logp.tolist(), abs=6e-4)
                for m, candidates in enumerate(draw.candidates):
                    row = scores["best"][m]
                    assert [data["strings"][i] for i in row[::2]] == [
                        visible(b) for b, _ in candidates[:MAX_CANDIDATES]
                    ]
                    assert row[1::2] == pytest.approx(np.exp([x for _, x in candidates[:MAX_CANDIDATES]]), rel=6e-3)
                    gold = draw.stored.chunk_bytes(int(draw.chunks[m]))
                    if scores["rank"][m] >= 0:
                        assert candidates[scores["rank"][m]][0] == gold
    assert seen == 7 * 3 * 2


@given(st.binary(max_size=60))
def test_visible_text_hides_nothing_and_loses_nothing(data):
    import unicodedata

    shown = visible(data)
    back = b""
    for part in re.split(f"({MARK}[^{END_MARK}]*{END_MARK})", shown):
        if not part.startswith(MARK):
            assert not [c for c in part if c not in "\n\t" and unicodedata.category(c) in HIDDEN]
            back += part.encode()
        elif part[1:-1] == "ESC":
            back += b"\x1b"
        elif part[1:3] == "U+":
            back += chr(int(part[3:-1], 16)).encode()
        else:
            back += bytes([int(part[1:-1], 16)])
    assert back == data
    assert MARK not in plain(data.decode("utf-8", "replace"))


def test_long_documents_and_prompts_are_shown_in_part(tmp_path):
    writer = CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    prepared = synthetic.document(0, 900)
    prompt = Message("user", "é" * 5000, False)
    own = prepared.chunks
    long = PreparedDocument(
        RawDocument("long", (prompt, *prepared.messages), True).key, "long", (prompt, *prepared.messages), True, False,
        Chunks(own.message_C + 1, own.start_C, own.stop_C),
        Encoded(prepared.teacher.ids_L, prepared.teacher.edges, ((0, 0), prepared.teacher.spans[0]), prepared.teacher.trainable_L),
        prepared.students,
    )  # fmt: skip
    record = synthetic.draw(writer.spec, 0, long, 1)
    writer.write_shard(ShardRange(0, 1, 1, 2), [(0, long)], [], [record], "corpus", 4096)
    writer.finish()
    [document] = read_excerpts(open_cache(tmp_path), 3)["documents"]
    assert document["chunks"] == [400, 900]
    [[text, chunk]] = document["messages"][0]["parts"]
    assert chunk == -1
    assert "bytes left out" in text
    assert len(text) < 1700
    assert "\ufffd" not in text
    assert {c for _, c in document["messages"][1]["parts"]} == set(range(400))
    assert max(document["draws"][0]["masked"]) < 400


def linear_rgb(colour: str) -> np.ndarray:
    colour = colour.lstrip("#")
    colour = "".join(c * 2 for c in colour) if len(colour) == 3 else colour
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    high, low = sorted((float(linear_rgb(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65), in which a distance of 2.3 is just noticeable."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 0.008856))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


VISION = {  # Machado, Oliveira and Fernandes 2009, complete deficiency; in linear RGB
    "all": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


def themes() -> list[dict[str, str]]:
    parts = (PARTS / "page.css").read_text().split("@media (prefers-color-scheme: dark)", 1)
    return [dict(re.findall(r"--(\w+): (#\w+);", part)) for part in parts]


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_colours_have_the_contrast_that_readers_need(theme):
    """WCAG 2: 4.5 for text, 3 for lines."""
    for step in range(5):
        assert contrast(theme[f"s{step}"], theme[f"t{step}"]) >= 4.5, step
    for ink in ("ink", "soft", "link"):
        assert min(contrast(theme[ink], theme[ground]) for ground in ("paper", "panel")) >= 4.5, ink
    for number in range(7):
        assert contrast(theme[f"c{number}"], theme["paper"]) >= 3, number


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_every_kind_of_colour_vision_tells_the_steps_apart(theme, vision):
    matrix = np.array(VISION[vision])
    steps = [lab(np.clip(matrix @ linear_rgb(theme[f"s{i}"]), 0, 1)) for i in range(5)]
    for a, b in itertools.combinations(range(5), 2):
        assert np.linalg.norm(steps[a] - steps[b]) >= 12, (a, b)


@pytest.mark.parametrize("changes", [{"lanes": ("gold",)}, {"temperatures": (1.0,)}, {"codec": "packed"}])
def test_pages_of_other_caches(tmp_path, changes):
    text = page(inspect_cache(hostile_cache(tmp_path, **changes)), read_excerpts(open_cache(tmp_path), 2))
    assert ("Tail mass" in text) == ("lanes" not in changes)
    assert "compdemo minus plain" in text


def test_a_page_of_a_cache_without_shards_or_documents(tmp_path, folder):
    CacheWriter.open(tmp_path, synthetic.spec(), synthetic.vocabulary())
    assert "No shard is complete yet" in page(inspect_cache(tmp_path), read_excerpts(open_cache(tmp_path), 2))
    assert read_excerpts(open_cache(folder), 0)["documents"] == []


def test_the_command_writes_the_page(folder, tmp_path):
    target = tmp_path / "new" / "page.html"
    done = CliRunner().invoke(app, ["inspect", str(folder), "--html", str(target), "--documents", "3"])
    assert done.exit_code == 0, done.output
    assert f"{target.stat().st_size:,} bytes" in done.output
    both = CliRunner().invoke(app, ["inspect", str(folder), "--json", "--html", str(target), "--documents", "1"])
    assert json.loads(both.stdout)["shards"] == 1
    with pytest.raises(TidecacheError, match="--html"):
        write_page(tmp_path, inspect_cache(folder), 1)


@pytest.mark.slow
def test_in_a_real_browser(folder, tmp_path):
    """Light and dark, wide and narrow; hover, keyboard and touch; no error, no request, no script of a document."""
    target = tmp_path / "page.html"
    write_page(target, inspect_cache(folder), 7)
    browser.chromium()
    asyncio.run(_wide(target, tmp_path / "wide"))
    asyncio.run(_narrow(target, tmp_path / "narrow"))


async def _wide(target: Path, profile: Path) -> None:
    async with browser.tab(profile) as tab:
        await tab.open(target, 1200, 900)
        assert await tab.evaluate("document.documentElement.dataset.ready") == "yes"
        assert "owned" not in await tab.evaluate("document.title")
        assert await tab.evaluate("document.querySelectorAll('#figures svg').length") >= 8
        assert await tab.evaluate("document.getElementById('tip').hidden") is True
        await tab.hover(".chunk")
        candidates = "[...document.querySelectorAll('#tip li:not(.other) .filling')].map((e) => e.textContent)"
        first = await tab.evaluate(candidates)
        assert len(first) >= 4
        assert await tab.evaluate("document.getElementById('tip').hidden") is False
        edges = "[b.left, b.top, innerWidth - b.right, innerHeight - b.bottom]"
        box = f"(() => {{ const b = document.getElementById('tip').getBoundingClientRect(); return {edges}; }})()"
        assert min(await tab.evaluate(box)) >= 0
        await tab.hover("#figures h2")
        assert await tab.evaluate("document.getElementById('tip').hidden") is True
        # The keyboard: one stop for all chunks, arrows between them, Escape closes.
        await tab.evaluate("document.getElementById('filling').focus()")
        await tab.press("Tab")
        await tab.press("ArrowRight")
        assert await tab.evaluate("document.activeElement.dataset.m") == "1"
        assert await tab.evaluate("document.getElementById('tip').hidden") is False
        await tab.press("End")
        count = await tab.evaluate("document.querySelectorAll('.chunk').length")
        assert await tab.evaluate("+document.activeElement.dataset.m") == count - 1
        await tab.press("Escape")
        assert await tab.evaluate("document.getElementById('tip').hidden") is True
        # Every document, draw, context, measure and filling can be shown; what is shown is what the data say.
        shown = await tab.evaluate(
            """(() => {
              const data = JSON.parse(document.getElementById("data").textContent);
              const set = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("change")); };
              let views = 0;
              data.documents.forEach((d, i) => {
                set("document", i);
                d.draws.forEach((draw, j) => {
                  set("draw", j);
                  for (const context of ["compdemo", "plain"])
                  for (const measure of ["gold", "best", "gain"])
                  for (const filling of ["gold", "best", "mask"]) {
                    set("context", context); set("measure", measure); set("filling", filling);
                    const chunks = document.querySelectorAll(".chunk");
                    if (chunks.length !== draw.masked.length) throw new Error(`${chunks.length} chunks, expected ${draw.masked.length}`);
                    chunks.forEach((c, m) => {
                      if (measure !== "gold" || filling !== "gold") return;
                      const p = Math.exp(draw.contexts[context].gold[m]), s = [0.01, 0.1, 0.5, 0.9].filter((x) => p >= x).length;
                      if (!c.classList.contains(`s${s}`)) throw new Error(`chunk ${m}: ${c.className}, expected s${s}`);
                    });
                    views++;
                  }
                });
              });
              return views;
            })()"""
        )
        assert shown == 7 * 3 * 2 * 3 * 3
        assert tab.errors == []
        assert [r for r in tab.requests if r != target.as_uri()] == []
        assert await tab.evaluate("document.querySelectorAll('#text img, #text script, #tip script').length") == 0


async def _narrow(target: Path, profile: Path) -> None:
    async with browser.tab(profile) as tab:
        await tab.open(target, 390, 844, dark=True, phone=True)
        assert await tab.evaluate("document.documentElement.scrollWidth") == 390
        assert await tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        # A chunk at the foot of the window, where the candidates will be, moves up when it is tapped.
        await tab.evaluate("document.querySelector('.chunk').scrollIntoView({block: 'end'})")
        await tab.tap(".chunk", scroll=False)
        assert await tab.evaluate("document.getElementById('tip').hidden") is False
        bottom = "document.querySelector('.chunk.here').getClientRects()[0].bottom"
        assert await tab.evaluate(f"{bottom} <= document.getElementById('tip').getBoundingClientRect().top")
        assert await tab.evaluate("document.querySelectorAll('#tip li').length") >= 5
        await tab.evaluate("new Promise((done) => { scrollTo(0, 1e6); setTimeout(done, 100); })")
        assert await tab.evaluate("document.getElementById('tip').hidden") is True
        assert tab.errors == []
