"""Hugging Face and ModelScope, played by small servers on 127.0.0.1 that speak their protocols."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from io import BytesIO
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request

import numpy as np
import pytest
from fake_hub import COMMIT, LONGEST_S, REPO, FakeHub, Fault, git_sha1, serving, sha256
from published import PUBLISHED
from random_model import RandomModel

from halfbyte.errors import (
    DoesNotFitError,
    HalfbyteError,
    IntegrityError,
    InvalidInputError,
    NetworkError,
    UnsupportedError,
)
from halfbyte.families import family_of, spec_of
from halfbyte.formats import hub, safetensors
from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.formats.gguf import GGUFFile
from halfbyte.formats.hub import headers
from halfbyte.formats.hub.client import Patience, Site, _Redirects
from halfbyte.formats.hub.listing import is_wanted
from halfbyte.formats.hub.names import parse_name, pick
from halfbyte.formats.reference import demo_path, locate
from halfbyte.planner.cards import card
from halfbyte.planner.opening import model_of
from halfbyte.planner.solve import Goal, solve
from halfbyte.specs import recipe_of

QUICK = Patience(timeout_s=5.0, attempts=3, asks=3, pause_s=0.01, longest_wait_s=1.0)
CHECKPOINT = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 1000,
    "tokenizer.json": "{} // ä".encode(),
    "empty.txt": b"",
}
IMPATIENT = Patience(timeout_s=0.3, attempts=3, asks=3, pause_s=0.01, longest_wait_s=1.0)
HUBS: tuple[hub.HubId, ...] = ("huggingface", "modelscope")
PULL = "import sys; from halfbyte.cli import main; sys.argv = ['halfbyte', *sys.argv[1:]]; main()"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[FakeHub]:
    """A hub with a checkpoint, and files that nobody should fetch."""
    files = {
        **CHECKPOINT,
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"print()",
        "sub/model.safetensors": b"other",
        "../escape.json": b"{}",
        "/etc/escape.json": b"{}",
        "a/../../escape.gguf": b"{}",
        "..gguf": b"",
        ".gitattributes": b"",
    }
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(FakeHub(files=files)) as state:
        monkeypatch.setenv("HF_ENDPOINT", state.hub)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", state.hub + "/")
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
        monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "halfbyte"))
        yield state


@pytest.fixture
def large(fake: FakeHub) -> bytes:
    """The repository becomes one GGUF of 3 MB; these are its bytes."""
    data = os.urandom(3_000_000)
    fake.files = {"only.gguf": data}
    return data


def pull(name: str = REPO, patience: Patience = QUICK, kind: hub.HubId = "huggingface") -> Path:
    return hub.pull(name, hub=kind, patience=patience)


def partial(tmp_path: Path) -> Path:
    (part,) = tmp_path.rglob("*.part")
    return part


@pytest.mark.parametrize("kind", HUBS)
def test_pull_fetches_data_only_and_once(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: hub.HubId
) -> None:
    seen: list[tuple[int, int]] = []
    path = hub.pull(REPO, lambda *done: seen.append(done), hub=kind, patience=QUICK)
    names = set(CHECKPOINT)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == CHECKPOINT
    assert seen[-1][0] == seen[-1][1] == sum(len(data) for data in CHECKPOINT.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert fake.fetched() == sorted(names - {"empty.txt"}) and not list(tmp_path.rglob("*escape*"))
    assert hub.verify_hub(REPO, hub=kind, patience=QUICK) == len(names)
    assert pull(kind=kind) == path and len(fake.fetched()) == len(names) - 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(fake.requests)
    assert pull(kind=kind) == path and len(fake.requests) == asked
    with pytest.raises(NetworkError, match="only the hub can say"):
        hub.verify_hub(REPO, hub=kind)


def test_a_name_means_a_checkpoint(fake: FakeHub, stories260k: Path) -> None:
    fake.files = {file.name: file.read_bytes() for file in stories260k.iterdir()}
    path = locate(REPO)
    assert path == pull() and read(path).spec == read(stories260k).spec


@pytest.mark.parametrize("kind", HUBS)
def test_credentials_stay_with_the_hub(fake: FakeHub, kind: hub.HubId) -> None:
    """The store is another origin; the hub's own redirects keep the token."""
    pull(kind=kind)
    token = {"huggingface": ("Bearer hf_secret", ""), "modelscope": ("Bearer ms_secret",)}[kind]
    here = {asked.authorization for asked in fake.requests if asked.server == "hub"}
    assert here == {token[0]}
    away = [asked for asked in fake.requests if asked.server == "store"]
    assert away and {(asked.authorization, asked.cookie) for asked in away} == {("", "")}
    cookies = {asked.cookie for asked in fake.requests if asked.server == "hub"}
    assert cookies == {"m_session_id=ms_secret" if kind == "modelscope" else ""}


def test_nothing_is_asked_but_the_listing_and_the_files(fake: FakeHub, large: bytes) -> None:
    pull()
    assert [asked.method for asked in fake.requests] == ["GET"] * 3
    assert [asked.path for asked in fake.requests] == [
        f"/api/models/{REPO}/revision/main",
        f"/{REPO}/resolve/{COMMIT}/only.gguf",
        "/bytes/only.gguf",
    ]


def test_the_cache_is_that_of_other_programs(fake: FakeHub, tmp_path: Path) -> None:
    library = pytest.importorskip("huggingface_hub")
    path = pull()
    cache = tmp_path / "hf" / "hub"
    assert library.try_to_load_from_cache(REPO, "config.json", cache_dir=cache) == str(
        path / "config.json"
    )
    (repo,) = library.scan_cache_dir(cache).repos
    assert repo.repo_id == REPO and {tuple(r.refs) for r in repo.revisions} == {("main",)}
    blob = (path / "model.safetensors").resolve()
    assert blob.name == sha256(fake.files["model.safetensors"])
    assert (path / "config.json").resolve().name == git_sha1(fake.files["config.json"])


def test_where_the_cache_lies(
    fake: FakeHub, large: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pull().is_relative_to(tmp_path / "hf" / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert pull().is_relative_to(tmp_path / "elsewhere")
    assert pull(kind="modelscope").is_relative_to(tmp_path / "halfbyte" / "modelscope")


def test_a_stored_login(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_stored\n")
    pull()
    assert {asked.authorization for asked in fake.requests if asked.server == "hub"} == {
        "Bearer hf_stored"
    }


@pytest.mark.parametrize("kind", HUBS)
def test_killed_in_the_middle_and_resumed(fake: FakeHub, tmp_path: Path, kind: hub.HubId) -> None:
    """A process dies with a third of the file; the next one asks for the other two."""
    data = os.urandom(3_000_000)
    fake.files = {"only.gguf": data}
    fake.faults = [Fault(after=1_000_000, stall=True)]
    command = [sys.executable, "-c", PULL, "pull", REPO, "--from", kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: sum(part.stat().st_size for part in tmp_path.rglob("*.part")) > 900_000)
    finally:
        process.kill()
        process.communicate()
    have = partial(tmp_path).stat().st_size
    assert partial(tmp_path).read_bytes() == data[:have] and have <= 1_000_000
    seen: list[int] = []
    path = hub.pull(REPO, lambda done, _: seen.append(done), hub=kind, patience=QUICK)
    assert [asked.range for asked in fake.transfers()] == ["", f"bytes={have}-"]
    assert path.read_bytes() == data and seen[0] > have and not list(tmp_path.rglob("*.part"))
    assert hub.verify_hub(REPO, hub=kind) == 1


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < deadline, "the other process never got there"
        time.sleep(0.01)


def test_one_process_fetches_and_the_other_waits(fake: FakeHub, large: bytes) -> None:
    fake.faults = [Fault(after=1_000_000, stall=True)]
    command = [sys.executable, "-c", PULL, "pull", REPO, "--json"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    wait_for(lambda: sum("/api/" in asked.path for asked in fake.requests) == 2)
    fake.released.set()
    results = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert results[0] == results[1] and Path(results[0]["path"]).read_bytes() == large
    ranges = [asked.range for asked in fake.transfers()]
    assert ranges == ["", "bytes=1000000-"], "the bytes came once"


@pytest.mark.parametrize("stall", [False, True], ids=["broken off", "silent"])
def test_a_transfer_that_stops_goes_on(fake: FakeHub, large: bytes, stall: bool) -> None:
    fake.faults = [Fault(after=500_000, stall=stall), Fault(after=700_000, stall=stall)]
    assert pull(patience=IMPATIENT if stall else QUICK).read_bytes() == large
    assert [asked.range for asked in fake.transfers()] == ["", "bytes=500000-", "bytes=1200000-"]


def test_failures_are_counted_since_the_last_progress(fake: FakeHub, large: bytes) -> None:
    """Five interruptions, each after more than a mebibyte or close, and patience for three."""
    fake.files["only.gguf"] = big = large * 2
    fake.faults = [Fault(after=1_100_000) for _ in range(5)]
    assert pull().read_bytes() == big and len(fake.transfers()) == 6


def test_a_few_bytes_are_no_progress(fake: FakeHub, large: bytes) -> None:
    fake.faults = [Fault(after=1000)] * 20
    with pytest.raises(NetworkError, match="broke off"):
        pull()
    assert [asked.range for asked in fake.transfers()] == ["", "bytes=1000-", "bytes=2000-"]


@pytest.mark.parametrize("fault", [Fault(after=0, stall=True), Fault(after=0), Fault(status=503)])
def test_no_progress_ends(fake: FakeHub, large: bytes, tmp_path: Path, fault: Fault) -> None:
    fake.faults = [Fault(after=1_000_000)] + [fault] * 20
    with pytest.raises(NetworkError, match="what has arrived is kept") as caught:
        pull(patience=IMPATIENT)
    assert ("nothing came for too long" in caught.value.what) is fault.stall
    assert len(fake.transfers()) == 3
    assert partial(tmp_path).read_bytes() == large[:1_000_000]
    fake.faults.clear()
    assert pull().read_bytes() == large and fake.transfers()[-1].range == "bytes=1000000-"


def test_a_server_without_ranges_starts_over(fake: FakeHub, large: bytes) -> None:
    fake.ranges = False
    fake.faults = [Fault(after=1_000_000)]
    assert pull().read_bytes() == large


def test_a_server_that_never_gets_further_ends(fake: FakeHub, large: bytes) -> None:
    fake.ranges = False
    fake.faults = [Fault(after=2_900_000) for _ in range(20)]
    with pytest.raises(NetworkError, match="broke off, 100000 bytes short"):
        pull()
    assert len(fake.transfers()) <= 4


@pytest.mark.parametrize("size", [2_000_000, 4_000_000], ids=["another's bytes", "too long"])
def test_a_wrong_part_is_found_out(fake: FakeHub, large: bytes, tmp_path: Path, size: int) -> None:
    fake.faults = [Fault(status=404)]
    with pytest.raises(NetworkError):
        pull()
    partial(tmp_path).write_bytes(bytes(size))
    if size < len(large):
        with pytest.raises(IntegrityError, match="it was removed"):
            pull()
    assert pull().read_bytes() == large


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_not_what_the_hub_said(fake: FakeHub, name: str, kind: hub.HubId) -> None:
    wrong = bytearray(fake.files[name])
    wrong[-1] ^= 1
    fake.sent = {name: bytes(wrong)}
    with pytest.raises(IntegrityError, match=rf"{name}: .* the hub says \w+, found \w+"):
        pull(kind=kind)
    fake.sent = {}
    path = pull(kind=kind) / name
    assert path.read_bytes() == fake.files[name], "the wrong file was removed"


def test_damage_in_the_cache(fake: FakeHub) -> None:
    file = pull() / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.resolve().write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors: sha256.*\n.*remove .* pull"):
        hub.verify_hub(REPO)
    file.resolve().unlink()
    with pytest.raises(IntegrityError, match="not in the cache"):
        hub.verify_hub(REPO)
    file.resolve().write_bytes(b"short")
    assert (pull() / file.name).read_bytes() == fake.files[file.name]


def test_a_gguf_is_picked_by_its_scheme(fake: FakeHub) -> None:
    names = ("x-Q4_0.gguf", "x-Q4_0_4_4.gguf", "x-q8_0.gguf", "mmproj-x-Q4_0.gguf")
    fake.files = {name: name.encode() for name in names} | {"config.json": b"{}"}
    assert pull(f"{REPO}:q4_0").name == "x-Q4_0.gguf"
    assert pull(f"{REPO}:Q8_0").read_bytes() == b"x-q8_0.gguf"
    assert fake.fetched() == ["x-Q4_0.gguf", "x-q8_0.gguf"]
    for reference in (REPO, f"{REPO}:Q6_K"):
        with pytest.raises(InvalidInputError, match=r"pick one as maker/model:TAG .*x-Q4_0\.gguf"):
            pull(reference)
    fake.files = {"only.gguf": b"only", "mmproj.gguf": b"eyes"}
    assert pull().name == "only.gguf"


@pytest.mark.parametrize("kind", HUBS)
def test_a_split_gguf_is_taken_whole(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, kind: hub.HubId
) -> None:
    parts = [f"Q6_K/x-Q6_K-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    fake.files = {name: name.encode() for name in [*reversed(parts), "x-Q4_0.gguf"]}
    path = pull(f"{REPO}:Q6_K", kind=kind)
    assert path.as_posix().endswith(parts[0])
    assert sorted(file.name for file in path.parent.iterdir()) == [name[5:] for name in parts]
    assert [file.read_bytes().decode() for file in sorted(path.parent.iterdir())] == parts
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull(f"{REPO}:Q6_K", kind=kind) == path
    with pytest.raises(NetworkError, match="not in the cache"):
        pull(f"{REPO}:Q4_0", kind=kind)


def test_a_split_gguf_with_a_part_missing() -> None:
    names = ["x-00001-of-00003.gguf", "x-00003-of-00003.gguf"]
    with pytest.raises(IntegrityError, match="2 of the 3 parts of x are there"):
        pick(names, None, REPO)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("config.json", True),
        ("a/b/x.gguf", True),
        ("a/b/c/x.gguf", False),
        ("a/config.json", False),
        ("pytorch_model.bin", False),
        ("modeling.py", False),
        ("../x.gguf", False),
        ("a/../x.gguf", False),
        ("./x.gguf", False),
        ("/x.gguf", False),
        ("a//x.gguf", False),
        ("a/.x.gguf", False),
        ("a\\x.gguf", False),
        ("x\n.gguf", False),
        ("x\0.gguf", False),
        ("-x.gguf", False),
        (".gguf", False),
        ("", False),
    ],
)
def test_names_that_are_taken(name: str, taken: bool) -> None:
    assert is_wanted(name) is taken


def test_revisions(fake: FakeHub, large: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {pull(f"{REPO}@{revision}:only") for revision in ("v2", COMMIT)}
    assert len(paths) == 1 and len(fake.transfers()) == 1
    with pytest.raises(NetworkError, match="404"):
        pull(f"{REPO}@v3")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert {pull(f"{REPO}@{revision}") for revision in ("v2", COMMIT)} == paths
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE forbids"):
        pull(REPO)
    name = parse_name("a/b@v1.2:Q4_0")
    assert (name.repo, name.revision, name.tag) == ("a/b", "v1.2", "Q4_0")


@pytest.mark.parametrize("kind", HUBS)
@pytest.mark.parametrize(
    ("status", "code", "hint"),
    [
        (401, "RepoNotFound", "set {token}"),
        (401, "GatedRepo", "accept its licence at {page}, then set {token}"),
        (403, "GatedRepo", "accept its licence at {page}"),
        (403, "", "accept the model's licence at {page}"),
        (404, "RepoNotFound", "check the name"),
        (429, "", "wait some minutes"),
        (503, "", "try again later"),
    ],
)
def test_refusals(fake: FakeHub, status: int, code: str, hint: str, kind: hub.HubId) -> None:
    """A refusal is final; a hub that is busy or broken is asked again."""
    fake.refusals = [Fault(status=status, headers={"X-Error-Code": code})] * 20
    with pytest.raises(NetworkError) as caught:
        pull(kind=kind)
    assert str(status) in caught.value.what and caught.value.where == REPO
    token = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[kind]
    page = fake.hub + {"huggingface": "/", "modelscope": "/models/"}[kind] + REPO
    assert hint.format(token=token, page=page) in str(caught.value.hint)
    assert "secret" not in str(caught.value)
    assert len(fake.requests) == (3 if status in (429, 503) else 1)


def test_a_gated_model_shows_its_list_and_refuses_its_files(fake: FakeHub, large: bytes) -> None:
    fake.faults = [Fault(status=403, headers={"X-Error-Code": "GatedRepo"})]
    with pytest.raises(NetworkError, match=r"gated \(403\)\n.*accept its licence at http"):
        pull()
    assert pull().read_bytes() == large


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_passes_is_waited_for(fake: FakeHub, large: bytes, status: int) -> None:
    fake.refusals = [Fault(status=status, headers={"Retry-After": "0"})]
    fake.faults = [Fault(status=status), Fault(after=1_500_000), Fault(status=status)]
    assert pull().read_bytes() == large
    assert [asked.range for asked in fake.transfers()][-1] == "bytes=1500000-"


def test_retry_after_is_obeyed_within_bounds(
    fake: FakeHub, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("halfbyte.formats.hub.client.sleep", slept.append)
    fake.refusals = [Fault(status=429, headers={"Retry-After": "7"}), Fault(status=429)]
    pull(patience=Patience(pause_s=2.0, longest_wait_s=60.0))
    assert slept == [7.0, 4.0], "the hub's word, then our own pauses"
    fake.refusals = [Fault(status=429, headers={"Retry-After": "600"})]
    with pytest.raises(NetworkError, match=r"429[\s\S]*wait 10 min"):
        pull()
    assert slept == [7.0, 4.0] and not fake.refusals


@pytest.mark.parametrize("kind", HUBS)
def test_no_hub_at_all(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, kind: hub.HubId) -> None:
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match=r"127\.0\.0\.1:9: cannot be reached"):
        pull(kind=kind)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE forbids"):
        pull(kind=kind)
    assert fake.requests == []


@pytest.mark.parametrize("address", ["nowhere", "ftp://127.0.0.1", "file:///etc", "http://"])
def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(InvalidInputError, match=r"HF_ENDPOINT.*is no address"):
        pull()


def test_a_token_that_is_none(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_se\ncret")
    with pytest.raises(InvalidInputError, match="HF_TOKEN") as caught:
        pull()
    assert "cret" not in str(caught.value) and fake.requests == []


def test_too_small_a_disk(fake: FakeHub, large: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still to come must fit, not what is there already."""

    class Usage:
        free = 2_500_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(DoesNotFitError):
        pull()
    assert fake.fetched() == []


def test_a_disk_that_only_the_rest_fits(
    fake: FakeHub, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 2_500_000

    fake.faults = [Fault(after=1_000_000), Fault(status=404)]
    with pytest.raises(NetworkError):
        pull()
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    assert pull().read_bytes() == large


def test_a_cache_that_cannot_be_written(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "hf"))
    with pytest.raises(InvalidInputError, match="cannot be written"):
        pull()


@pytest.mark.parametrize("kind", HUBS)
def test_a_listing_without_hashes(fake: FakeHub, tmp_path: Path, kind: hub.HubId) -> None:
    fake.hashes = False
    with pytest.raises(IntegrityError, match="no usable size and hash"):
        pull(kind=kind)
    assert fake.fetched() == []


def test_listings_without_end(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.filler = 10_001
    with pytest.raises(UnsupportedError, match="at most 10000"):
        pull()
    monkeypatch.setattr("halfbyte.formats.hub.client.LARGEST_ANSWER", 100_000)
    with pytest.raises(IntegrityError, match="over 100000 bytes"):
        pull()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"sha": "main", "siblings": []}',
        b'{"siblings": 3}',
        b'{"Data": null, "Message": "busy"}',
        b'{"Data": {"Files": {}}}',
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("kind", HUBS)
def test_answers_that_are_none(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, answer: bytes, kind: hub.HubId
) -> None:
    fake.refusals = []
    monkeypatch.setattr(json, "dumps", lambda _: answer.decode())
    with pytest.raises(IntegrityError) as caught:
        pull(kind=kind)
    assert caught.value.where == REPO


def test_a_redirect_to_what_is_no_hub(fake: FakeHub, large: bytes) -> None:
    fake.store = "ftp://127.0.0.1"
    with pytest.raises(NetworkError, match=r"redirected to ftp://127\.0\.0\.1"):
        pull()


def test_tls_is_not_given_up() -> None:
    site = Site(
        title="",
        endpoint="https://hub.test",
        pages="",
        credentials={"Authorization": "Bearer secret"},
        endpoint_variable="",
        token_variable="",
    )
    redirects, request = _Redirects(site), Request("https://hub.test/x")
    with pytest.raises(URLError, match="redirected to http://"):
        redirects.redirect_request(request, BytesIO(), 302, "", {}, "http://hub.test/y")
    for url, kept in (("https://hub.test:443/y", True), ("https://hub.test:444/y", False)):
        onward = redirects.redirect_request(request, BytesIO(), 302, "", {}, url)
        assert onward is not None and onward.has_header("Authorization") is kept


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "name",
        "a/b/c",
        "../x",
        "a/..",
        "a/b:",
        "a/b:..",
        "-a/b",
        "a/b c",
        "/etc/none",
        "a--b/c",
        "a/b@",
        "a/b@..",
        "a/b@x/y",
        "a/b:Q4@v1",
    ],
)
def test_what_is_no_reference(reference: str) -> None:
    with pytest.raises(InvalidInputError, match="no name on the hub"):
        pull(reference)


def test_paths_that_exist_are_themselves(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path


def test_every_failure_says_what_to_do(fake: FakeHub) -> None:
    for status in (400, 401, 403, 404, 410, 429, 451, 500):
        fake.refusals = [Fault(status=status)] * 3
        with pytest.raises(HalfbyteError) as caught:
            pull()
        assert caught.value.hint and caught.value.exit_code == 5
        fake.refusals.clear()


@pytest.fixture
def gguf(fake: FakeHub) -> bytes:
    """The repository becomes the demo as a GGUF, with 64 MB behind the last tensor."""
    data = demo_path().read_bytes() + bytes(64_000_000)
    fake.files = {"model-q4_0.gguf": data}
    return data


@pytest.fixture
def weights(fake: FakeHub, tmp_path: Path) -> int:
    """The repository becomes two shards of a Llama of 25 M weights; how many bytes these have."""
    config = {
        **PUBLISHED["llama-3.2-1b"][0],
        "num_hidden_layers": 1,
        "vocab_size": 4096,
        "intermediate_size": 1024,
    }
    spec = spec_of(config)
    names = family_of(spec).names(spec)
    tensors = [(f"model.{names[t.name].hf}", t.shape) for t in spec.tensors()]
    files: dict[str, bytes] = {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}"}
    index: dict[str, str] = {}
    for number, part in enumerate((tensors[:3], tensors[3:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        safetensors.write(
            tmp_path / shard,
            layout={name: ("BF16", shape) for name, shape in part},
            tensors=((name, np.zeros(shape, np.uint16)) for name, shape in part),
        )
        files[shard] = (tmp_path / shard).read_bytes()
        index |= dict.fromkeys((name for name, _ in part), shard)
    fake.files = {**files, safetensors.INDEX: json.dumps({"weight_map": index}).encode()}
    return 2 * spec.parameters


@pytest.mark.parametrize("kind", HUBS)
def test_an_outline_of_a_gguf_is_its_header(fake: FakeHub, gguf: bytes, kind: hub.HubId) -> None:
    path = hub.outlined(REPO, hub=kind, patience=QUICK)
    outline, model = read(path), read(demo_path())
    assert outline.spec == model.spec
    assert outline.schemes == model.schemes
    assert outline.pieces is not None
    assert path.stat().st_size == len(gguf)
    assert fake.served <= 4 * GGUFFile(demo_path()).header_bytes + headers.FIRST
    assert path.stat().st_blocks * 512 < 2_000_000
    asked = len(fake.transfers())
    assert hub.outlined(REPO, hub=kind, patience=QUICK) == path
    assert len(fake.transfers()) == asked


def test_an_outline_of_shards_is_their_headers(fake: FakeHub, weights: int) -> None:
    path = hub.outlined(REPO, patience=QUICK)
    outline = read(path)
    assert sum(outline.schemes[t.name].bytes(t.shape) for t in outline.spec.tensors()) == weights
    assert outline.pieces is not None
    assert weights > 50_000_000 > 50 * fake.served
    assert not any(asked.path.endswith("tokenizer.json") for asked in fake.transfers())


def test_a_plan_of_a_name_fetches_headers_only(fake: FakeHub, weights: int) -> None:
    model = model_of(REPO)
    assert model.name == REPO
    assert not model.quantized
    plan, others = solve(model, card("rtx-3060"), Goal())
    assert plan.fits and len(others) > 1
    assert fake.served < 1_000_000


def test_divisors_of_a_gguf_are_in_its_outline(fake: FakeHub, tmp_path: Path) -> None:
    spec = spec_of({**PUBLISHED["llama-3.2-1b"][0], "num_hidden_layers": 1, "vocab_size": 256})
    assert spec.layers[0].attention.rope.divisors is not None
    model = RandomModel(spec, recipe_of("q4_0"), seed=0, assets=None)
    write_gguf(model, tmp_path / "x.gguf")
    fake.files = {"x.gguf": (tmp_path / "x.gguf").read_bytes()}
    outline = read(hub.outlined(REPO, patience=QUICK))
    assert outline.spec == spec
    assert outline.pieces is None


def test_what_was_pulled_is_its_own_outline(fake: FakeHub, gguf: bytes) -> None:
    path = pull()
    fake.requests.clear()
    assert hub.outlined(REPO, patience=QUICK) == path
    assert not fake.transfers()


def test_an_outline_needs_a_hub_that_serves_parts(fake: FakeHub, gguf: bytes) -> None:
    fake.ranges = False
    fake.files["model-q4_0.gguf"] = gguf[:8_000_000]
    with pytest.raises(NetworkError, match="serves no part") as caught:
        hub.outlined(REPO, patience=QUICK)
    assert "pull" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.gguf", b"GGUF" + bytes(100), "big-endian"),
        ("a.gguf", b"", "GGUF|empty|header"),
        ("a.gguf", b"PK" * 400_000, "not a GGUF"),
        ("model.safetensors", b"\xff" * 400_000, "claims"),
        ("model.safetensors", b"123", "no safetensors"),
    ],
)
def test_a_wrong_header_is_an_error(fake: FakeHub, name: str, data: bytes, expected: str) -> None:
    fake.files = {name: data}
    with pytest.raises(HalfbyteError, match=expected):
        read(hub.outlined(REPO, patience=QUICK))
