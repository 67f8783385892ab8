"""A drafter that was just trained for the bundled model, in llama.cpp: the same drafts are right.

python bench/build_peer.py && pytest -m peers tests/test_peers_drafting.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.request import Request as Asked
from urllib.request import urlopen

import pytest
from commandline import Halfbyte

from halfbyte.engine import ModelDrafter
from halfbyte.evals.acceptance import accepted
from halfbyte.formats.checkpoint import Checkpoint, read
from halfbyte.formats.reference import demo_path
from halfbyte.kernels.choice import choose
from halfbyte.models.load import load, load_drafter
from halfbyte.specs import Request
from halfbyte.workflows.rating import Asked as Rated
from halfbyte.workflows.rating import requests

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from build_peer import server
from peer_server import ANSWERING_S, running

pytest.importorskip("llama_cpp", reason="needs the extra 'peers'")
SERVER = server()  # in the cache folder that a test is about to replace
DRAFTS, PROMPTS, TOKENS = 4, 64, 64
POINTS = 0.03

pytestmark = pytest.mark.peers


def theirs(target: Path, drafter: Path, asked: list[Request]) -> float:
    """The share of llama.cpp's drafts that its target said, too."""
    command = [SERVER, "-m", target, "-md", drafter, "--spec-type", "draft-mtp", "-np", 1]
    command += ["--spec-draft-n-max", DRAFTS, "--spec-draft-p-min", 0, "-c", 1024, "-t", 2]
    drafted = right = 0
    with running([*map(str, command)]) as address:
        for request in asked:
            body = {
                "prompt": list(request.prompt_ids),
                "n_predict": request.max_tokens,
                "temperature": 0,
                "cache_prompt": False,
            }
            with urlopen(
                Asked(f"{address}/completion", json.dumps(body).encode()), timeout=ANSWERING_S
            ) as reply:
                timings = json.load(reply)["timings"]
            drafted += timings.get("draft_n", 0)
            right += timings.get("draft_n_accepted", 0)
    return right / drafted


def ours(source: Checkpoint, drafter: Path, asked: list[Request]) -> float:
    decoder = load(source, choose(source.spec))
    model = ModelDrafter(load_drafter(read(drafter), decoder))
    found = accepted(decoder, model, asked, length=DRAFTS, context=1024)
    return sum(found.by_position) / DRAFTS


@pytest.mark.skipif(not SERVER.exists(), reason="needs llama-server: python bench/build_peer.py")
def test_llama_cpp_accepts_as_many_drafts(
    halfbyte: Halfbyte, shared_data: Path, tmp_path: Path
) -> None:
    target, drafter = demo_path(), tmp_path / "demo.drafter.gguf"
    lessons = shared_data / "instruct" / "p3_sample.jsonl"
    made = halfbyte(  # of another width than its target: llama.cpp takes no other
        "draft", "train", target, "-o", drafter, "--data", lessons, "--tokens", "20k",
        "--passes", 2, "--hidden", 128,
    )  # fmt: skip
    assert made.code == 0, made.err
    source = read(target)
    chats = shared_data / "heldout" / "chat_near.jsonl"
    asked = requests(source, chats, "greedy", Rated(texts={}, prompts=PROMPTS, tokens=TOKENS))
    assert abs(theirs(target, drafter, asked) - ours(source, drafter, asked)) < POINTS
