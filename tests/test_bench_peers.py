"""Two programs side by side: what is compared with what, and a run of both on the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from build_peer import server
from peer_server import round_s
from peers import Setting, compared, more_is_better, with_shares
from random_model import RandomModel, numbers, read_config

from halfbyte.families import spec_of
from halfbyte.formats.checkpoint import write_gguf
from halfbyte.formats.reference import demo_path
from halfbyte.specs import recipe_of

PEERS = Path(__file__).resolve().parents[1] / "bench" / "peers.py"
ON, OFF = Setting("on", "512"), Setting("off", "512")


def test_llamacpps_best_setting_counts_row_by_row() -> None:
    ours = [{"decode@0": 60.0, "peak_bytes": 70.0}, {"decode@0": 40.0, "peak_bytes": 70.0}]
    theirs = {
        ON: [{"decode@0": 30.0, "peak_bytes": 140.0}, {"decode@0": 40.0, "peak_bytes": 140.0}],
        OFF: [{"decode@0": 20.0, "peak_bytes": 100.0}, {"decode@0": 25.0, "peak_bytes": 100.0}],
    }
    rows = compared(ours, theirs)
    assert rows["decode@0"] == {
        "halfbyte": 50.0,
        "llama.cpp": 35.0,
        "ratio": 1.5,  # of the rounds' ratios, 2 and 1
        "setting": "flash on, ubatch 512",
    }
    assert rows["peak_bytes"]["ratio"] == 0.7
    assert rows["peak_bytes"]["setting"] == "flash off, ubatch 512"


def test_which_way_is_better() -> None:
    assert all(map(more_is_better, ["prefill@512", "decode@0", "rows@8", "bandwidth_share@0"]))
    assert not any(map(more_is_better, ["load_to_first_token_s", "peak_bytes", "rows@8 / rows@1"]))


def test_a_share_is_of_the_rounds_own_bandwidth() -> None:
    ours = [{"decode@0": 3.0, "step_bytes": 10.0, "read_bandwidth_bytes_per_s": 60.0}]
    theirs = {ON: [{"decode@0": 1.5}]}
    with_shares(ours, theirs)
    assert ours == [{"decode@0": 3.0, "bandwidth_share@0": 0.5}]
    assert theirs == {ON: [{"decode@0": 1.5, "bandwidth_share@0": 0.25}]}


def test_a_round_gives_its_accepted_drafts_and_one_token() -> None:
    timings = {"predicted_n": 100, "predicted_ms": 8000.0, "draft_n_accepted": 60}
    assert round_s(timings) == pytest.approx(0.2)


def run(*arguments: object) -> dict[str, dict[str, float]]:
    """The rows of a short comparison."""
    command = [sys.executable, PEERS, *arguments, "--threads", 1, "--rounds", 1, "--decode", 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["schema"] == "halfbyte.peers/1"
    assert all(row["halfbyte"] > 0 and row["llama.cpp"] > 0 for row in facts["rows"].values())
    return facts["rows"]


@pytest.mark.peers
def test_both_programs_run_the_demo() -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra 'peers'")
    rows = run(demo_path(), "--rows", "prefill@16,decode@0,decode@32,rows@4")
    assert {"prefill@16", "decode@0", "decode@32", "rows@4 / rows@1"} <= rows.keys()
    assert {"start_to_first_token_s", "peak_bytes", "bandwidth_share@0"} <= rows.keys()


@pytest.mark.peers
def test_both_programs_run_rounds_of_drafts(tmp_path: Path) -> None:
    if not server().exists():
        pytest.skip("llama.cpp's server is not built (bench/build_peer.py)")
    for name, path in (("gemma4-1b", "model.gguf"), ("gemma4-1b-assistant", "drafter.gguf")):
        config = read_config(name, layers=2)
        config.get("text_config", config)["vocab_size"] = 2048
        model = RandomModel(spec_of(config), recipe_of("q4_0"), assets=numbers(2048))
        write_gguf(model, tmp_path / path)
    drafts = ("--drafter", tmp_path / "drafter.gguf", "--synthetic-rates", "0.8,0.5")
    rows = run(tmp_path / "model.gguf", "--rows", "decode@0", *drafts, "--depth", 16)
    assert "speculate@16" in rows
