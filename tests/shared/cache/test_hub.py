"""`tidecache cache push` and `pull`, against a local server that speaks the Hub's endpoints."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.cache import open_cache, pushing
from shared.cache.card import BEGIN, END, updated_card
from shared.cache.manifest import derive, read_manifest, seal
from shared.cache.pulling import STAGING, pull_cache
from shared.cache.pushing import push_cache
from shared.cache.verify import verify
from shared.errors import TidecacheError
from tests.conftest import ROOT
from tests.shared.cache import fake_hub, synthetic
from tests.shared.cache.fake_hub import READ_ONLY, TOKEN, Hub
from tests.shared.cache.test_slicing import HELD, capture
from tests.shared.cache.test_writer import snapshot

REPO = "me/likelihoods"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "cache"
    capture(folder, 8, 2)
    capture(folder / "held-out", 4, 2, offset=HELD)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with fake_hub.serve() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        template = found.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def pushed_files(hub: Hub) -> dict[str, bytes]:
    return {n: data for n, data in hub.files(REPO).items() if n not in (".gitattributes", "README.md")}


def test_what_is_pulled_is_what_was_pushed(hub: Hub, cache: Path, tmp_path: Path) -> None:
    pushed = push_cache(cache, REPO)
    assert pushed.url == f"{hub.address}/datasets/{REPO}"
    assert hub.repositories[REPO].private
    assert pushed_files(hub) == snapshot(cache)
    assert {n for n in hub.files(REPO) if n.endswith(".parquet")} == {
        str(p.relative_to(cache)) for p in cache.rglob("*.parquet")
    }
    assert hub.requests["PUT_store"] > 5  # large files go one by one
    seen: list[int] = []
    pulled = pull_cache(REPO, tmp_path / "out", watch=seen.append)
    assert snapshot(tmp_path / "out") == snapshot(cache)
    assert verify(tmp_path / "out").problems == ()
    assert pulled.manifest.content == read_manifest(cache).content
    sizes = [read_manifest(folder).totals.size_bytes for folder in (cache, cache / "held-out")]
    assert sum(seen) == sum(sizes)


def test_nothing_is_sent_or_loaded_twice(hub: Hub, cache: Path, tmp_path: Path) -> None:
    push_cache(cache, REPO)
    commits = len(hub.repositories[REPO].commits)
    assert push_cache(cache, REPO).files == 0
    assert len(hub.repositories[REPO].commits) == commits
    pull_cache(REPO, tmp_path / "out")
    loads = hub.requests["GET|HEAD_load"]
    assert pull_cache(REPO, tmp_path / "out").files == 0
    assert hub.requests["GET|HEAD_load"] == loads


def test_a_cache_that_has_grown(hub: Hub, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "grown")
    push_cache(cache, REPO)
    pull_cache(REPO, tmp_path / "out")
    capture(tmp_path / "grown", 8, 4, draw_ranges=2)
    assert push_cache(tmp_path / "grown", REPO).files == 4  # two likelihoods files and two receipts
    assert pull_cache(REPO, tmp_path / "out").files == 2
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "grown")
    with pytest.raises(TidecacheError, match=r"2 shards that .* does not have"):
        push_cache(cache, REPO)


def test_the_manifest_comes_with_the_last_commit(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push that fails on the way leaves a repository without a cache, and goes on later."""
    monkeypatch.setattr(pushing, "FILES_PER_COMMIT", 3)
    for after in (2, 1):
        hub.fail_commits_after = hub.requests["POST_commit"] + after
        with pytest.raises(TidecacheError, match="the Hub answers with an error"):
            push_cache(cache, REPO)
        assert "manifest.json" not in hub.files(REPO)
    with pytest.raises(TidecacheError, match="holds no cache"):
        pull_cache(REPO, tmp_path / "out")
    hub.fail_commits_after = 10**9
    push_cache(cache, REPO)
    assert pushed_files(hub) == snapshot(cache)


def test_damage_on_the_way_is_found_before_the_manifest_is_there(hub: Hub, cache: Path, tmp_path: Path) -> None:
    push_cache(cache, REPO)
    hub.damage = next(n for n in hub.files(REPO) if n.startswith("shards/") and n.endswith("likelihoods.parquet"))
    with pytest.raises(TidecacheError, match="is not what its manifest says"):
        pull_cache(REPO, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    hub.damage = ""
    pull_cache(REPO, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(cache)


def test_damage_here_is_never_pushed(hub: Hub, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "damaged")
    victim = next((tmp_path / "damaged" / "held-out" / "shards").glob("*.parquet"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(TidecacheError, match="cut off or replaced"):
        push_cache(tmp_path / "damaged", REPO)
    assert not hub.repositories


def test_a_half_loaded_file_is_gone_on_with(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    push_cache(cache, REPO)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.cut = 1
    pull_cache(REPO, tmp_path / "out")
    assert hub.ranges  # the rest was asked for, not the whole
    assert snapshot(tmp_path / "out") == snapshot(cache)


def test_revisions(hub: Hub, cache: Path, tmp_path: Path) -> None:
    pushed = push_cache(cache, REPO, public=True, revision="v1")
    assert not hub.repositories[REPO].private
    assert "manifest.json" not in hub.files(REPO, "main")
    with pytest.raises(TidecacheError, match="no revision 'v2'"):
        pull_cache(REPO, tmp_path / "out", "v2")
    pull_cache(REPO, tmp_path / "branch", "v1")
    pull_cache(REPO, tmp_path / "commit", pushed.commit)
    assert snapshot(tmp_path / "branch") == snapshot(tmp_path / "commit") == snapshot(cache)


def test_errors_are_one_line(hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TidecacheError, match="no such dataset repository, or a private one"):
        pull_cache("me/nothing", tmp_path / "out")
    with pytest.raises(TidecacheError, match="expected a repository such as name/dataset"):
        pull_cache("not a name", tmp_path / "out")
    push_cache(cache, REPO)
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    with pytest.raises(TidecacheError, match=r"your token may not do that \(HTTP 403\)"):
        push_cache(cache, "me/other")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TidecacheError, match="a private one that your token does not open"):
        pull_cache(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_caches_are_not_mixed_up(hub: Hub, cache: Path, tmp_path: Path) -> None:
    push_cache(cache, REPO)
    capture(tmp_path / "other", 4, 1, k=2)
    with pytest.raises(TidecacheError, match="different specs \\(k: 2 and 4\\)"):
        push_cache(tmp_path / "other", REPO)
    with pytest.raises(TidecacheError, match="different specs \\(k: 4 and 2\\)"):
        pull_cache(REPO, tmp_path / "other")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("\\documentclass")
    with pytest.raises(TidecacheError, match=r"expected a cache or an empty folder"):
        pull_cache(REPO, tmp_path / "home")
    capture(tmp_path / "more", 12, 2)
    capture(tmp_path / "more" / "held-out", 4, 2, offset=HELD)
    with pytest.raises(TidecacheError, match=r"1 shards that me/likelihoods does not have"):
        pull_cache(REPO, tmp_path / "more")


@pytest.mark.parametrize("name", ["../../outside.parquet", "/tmp/x.parquet", "shards/../../x.parquet", "manifest.json"])
def test_names_that_lead_out_are_refused(hub: Hub, cache: Path, tmp_path: Path, name: str) -> None:
    push_cache(cache, REPO)
    manifest = read_manifest(cache)
    first, *others = manifest.shards
    evil = dataclasses.replace(first, documents=dataclasses.replace(first.documents, path=name))
    files = hub.files(REPO)
    files["manifest.json"] = seal(derive(manifest.spec, manifest.vocabulary, [evil, *others]).to_json())
    files.setdefault(name, b"evil")
    with pytest.raises(TidecacheError, match="refused"):
        pull_cache(REPO, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_a_killed_pull_goes_on(hub: Hub, cache: Path, tmp_path: Path) -> None:
    """Killed before every fifth step on the disk; there is never a manifest without all that it names."""
    push_cache(cache, REPO)
    program = (
        "import sys; from pathlib import Path; from shared.cache.pulling import pull_cache; "
        "from tests.shared.cache.killed_capture import arm; arm(int(sys.argv[2])); "
        f"pull_cache({REPO!r}, Path(sys.argv[1]))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    out = tmp_path / "out"
    for step in (7, 16):
        command = [sys.executable, "-c", program, str(out), str(step)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=60)
        assert done.returncode == -9, done.stderr
        assert not (out / "manifest.json").exists()
        assert (out / STAGING).exists()
    pull_cache(REPO, out)
    assert snapshot(out) == snapshot(cache)


def test_the_card_says_how_to_load_it(hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says works: the repository's files, as `datasets` finds them."""
    import datasets

    push_cache(cache, REPO)
    for name, data in hub.files(REPO).items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_bytes(data)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    load = {"cache_dir": str(tmp_path / "datasets")}
    draws = datasets.load_dataset(str(tmp_path / "repo"), split="train", **load)
    stored = list(open_cache(cache).iter_draws())
    assert [(d["document"], d["draw"]) for d in draws] == [(d.document, d.draw) for d in stored]
    held = datasets.load_dataset(str(tmp_path / "repo"), "documents", split="test", **load)
    assert len(held) == read_manifest(cache / "held-out").totals.documents
    card = hub.files(REPO)["README.md"].decode()
    manifest = read_manifest(cache)
    for part in (
        manifest.content,
        manifest.spec.fingerprint,
        "license_name: not-chosen-yet",
        "| documents | 6, and 3 held out |",
    ):
        assert part in card


def test_a_card_that_people_have_edited_stays(hub: Hub, cache: Path, tmp_path: Path) -> None:
    push_cache(cache, REPO)
    files = hub.files(REPO)
    edited = (
        files["README.md"]
        .decode()
        .replace("license: other", "license: mit")
        .replace("| documents | 6", "| documents | 7")
    )
    files["README.md"] = (edited + "\nOurs.\n").encode()
    push_cache(cache, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert "license: mit" in card
    assert card.endswith("\nOurs.\n")
    assert "| documents | 6" in card  # the middle part is made anew
    hub.files(REPO)["README.md"] = b"---\nlicense: mit\n---\nAll our own.\n"
    push_cache(cache, REPO)
    assert hub.files(REPO)["README.md"].endswith(b"All our own.\n")


def test_a_held_out_part_without_documents_is_no_split(tmp_path: Path) -> None:
    """As a part of a capture has it that no held-out shard fell to."""
    capture(tmp_path / "a", 4, 1)
    capture(tmp_path / "a" / "held-out", 0, 1)
    manifests = {"": read_manifest(tmp_path / "a"), "held-out/": read_manifest(tmp_path / "a" / "held-out")}
    assert "split: test" not in updated_card(None, manifests, REPO)


def test_the_card_takes_no_markup_from_names(tmp_path: Path) -> None:
    synthetic.build(tmp_path, documents=4)
    manifest = read_manifest(tmp_path)
    teacher = dataclasses.replace(manifest.spec.teacher, name='evil"\n---\n<script>|`x`\x1b[31m')
    spec = dataclasses.replace(manifest.spec, teacher=teacher)
    card = updated_card(None, {"": dataclasses.replace(manifest, spec=spec)}, REPO)
    head, body = card.split("\n---\n", 1)
    import yaml

    assert yaml.safe_load(head.removeprefix("---\n"))["license"] == "other"
    assert "<script>" not in body
    assert "\x1b" not in card
    assert card.count(BEGIN) == card.count(END) == 1


def test_the_commands(hub: Hub, cache: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
    }  # fmt: skip

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = (
            f"import sys; sys.argv = ['tidecache', 'cache', *{list(arguments)!r}]; from shared.cli import main; main()"
        )
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = run("push", str(cache), REPO)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/datasets/{REPO}" in done.stdout
    done = run("pull", "me/nothing", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: me/nothing: no such dataset repository")
    assert done.stderr.count("\n") == 1
