"""The bundled drafter in llama.cpp: the same drafts are right there.

python bench/build_peer.py && pytest -m peers tests/test_peers_drafting.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.request import Request as Asked
from urllib.request import urlopen

import pytest

from halfbyte.engine import ModelDrafter
from halfbyte.evals.acceptance import accepted
from halfbyte.formats.checkpoint import Checkpoint, read
from halfbyte.formats.reference import demo_path, drafter_beside
from halfbyte.kernels.choice import choose
from halfbyte.models.load import load, load_drafter
from halfbyte.specs import Request
from halfbyte.workflows.rating import Asked as Rated
from halfbyte.workflows.rating import requests

BENCH = Path(__file__).parents[1] / "bench"
DRAFTS, PROMPTS, TOKENS = 4, 32, 64
POINTS = 0.03

pytestmark = pytest.mark.peers


def theirs(target: Path, drafter: Path, asked: list[Request]) -> float:
    """The share of llama.cpp's drafts that its target said, too."""
    sys.path.insert(0, str(BENCH))
    from build_peer import server
    from peer_server import ANSWERING_S, running

    if not server().exists():
        pytest.skip("llama-server is not built: python bench/build_peer.py")
    command = [server(), "-m", target, "-md", drafter, "--spec-type", "draft-mtp", "-np", 1]
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


def test_llama_cpp_accepts_as_many_drafts(shared_data: Path) -> None:
    target = demo_path()
    drafter = drafter_beside(target)
    assert drafter is not None
    source = read(target)
    chats = shared_data / "heldout" / "chat_near.jsonl"
    asked = requests(source, chats, "greedy", Rated(texts={}, prompts=PROMPTS, tokens=TOKENS))
    assert abs(theirs(target, drafter, asked) - ours(source, drafter, asked)) < POINTS
