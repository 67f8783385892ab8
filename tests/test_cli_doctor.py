"""Contracts: `doctor` and `top` end to end, on sound models and on copies with something wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from commandline import Halfbyte

from halfbyte.formats.reference import demo_path
from halfbyte.planner.doctor.redaction import Redaction

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"


def findings(document: dict[str, Any], name: str) -> list[str]:
    return [
        f"{it['severity']}: {it['finding']}" for it in document["findings"] if it["name"] == name
    ]


def test_a_sound_model_on_this_machine(halfbyte: Halfbyte) -> None:
    outcome = halfbyte("doctor", "demo", "--json")
    document = outcome.document
    assert document["schema"] == "halfbyte.doctor/1" and document["model"] == "demo"
    assert findings(document, "hashes") == ["ok: 1 file as the manifest says"]
    assert document["machine"]["memory"]["total"] > 0
    model = [it for it in document["findings"] if it["subject"] == "model"]
    assert {it["severity"] for it in model} <= {"ok", "note"}
    plan = document["expected"]["plan"]
    assert plan["model"] == "demo" and plan["setup"]["context"] == 4096
    bandwidth = document["machine"]["bandwidth"]
    if bandwidth is not None:
        assert 0 < plan["tokens_per_s"][1] <= plan["tokens_per_s"][0]
    assert outcome.code == (3 if document["worst"] == "fault" else 0)


def test_a_page_for_people(halfbyte: Halfbyte) -> None:
    page = halfbyte("doctor", "demo", "--quick", "--context", "1k").out
    assert "\nmodel demo\n" in page and "expected: demo, as it is stored, context 1024" in page
    assert "next: halfbyte run demo --context 1024" in page
    assert "sizes and headers as the manifest says" in page
    assert "fix: " in page


def test_torch_is_not_started(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom halfbyte.cli import cli\n"
        "cli.main(['doctor', 'demo', '--quick'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    if Path("/proc/driver/nvidia").exists() or Path("/dev/dxg").exists():
        pytest.skip("there is a card")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _edit(file: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / file
        path.chmod(0o644)
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return apply


def _without(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def _of_another_target(folder: Path) -> None:
    shutil.copy(demo_path(), folder / "drafter.gguf")


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1000)


def _few_stops(folder: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["eos_token_id"] = [1]

    _edit("generation_config.json", change)(folder)


def _rope(kind: str, theta: float) -> Callable[[Path], None]:
    def change(document: dict[str, Any]) -> None:
        document["text_config"]["rope_parameters"][kind]["rope_theta"] = theta

    return _edit("config.json", change)


# what is done to a copy of the trained model, the check that finds it, what it says, the exit code
PLANTED = [
    (_rope("sliding_attention", 1e6), "rope", "warning: all sliding layers: rope base is 1e+06", 0),
    (_rope("full_attention", 1e4), "rope", "warning: all full layers: rope base is 10000", 0),
    (_few_stops, "stops", "warning: the template ends answers with 50 '<|tool_response>', 106", 0),
    (
        _edit("config.json", lambda it: it.update(dtype="float16")),
        "dtype",
        "warning: config.json asks for float16",
        0,
    ),
    (
        _edit("config.json", lambda it: it.update(auto_map={"AutoModel": "modeling_x.X"})),
        "remote-code",
        "note: asks for code",
        0,
    ),
    (
        _edit("config.json", lambda it: it.update(quantization_config={"quant_method": "gptq",
              "bits": 4, "group_size": 128, "desc_act": False, "sym": True})),
        "quantization",
        "warning: config.json says quantized by gptq",
        0,
    ),
    (
        _edit("tokenizer_config.json", lambda it: it.update(model_max_length=512)),
        "context",
        "note: the tokenizer says 512",
        0,
    ),
    (_of_another_target, "drafter", "warning: drafter.gguf: the model is no drafter", 0),
    (_without("tokenizer.json"), "text-assets", "fault: there is no tokenizer", 3),
    (_without("model.safetensors"), "readable", "fault: ", 3),
    (_cut, "readable", "fault: ", 3),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "name", "says", "code"), PLANTED)
def test_what_is_planted_in_files_is_found(
    halfbyte: Halfbyte,
    tiny_gemma4: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    name: str,
    says: str,
    code: int,
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_gemma4, copy)
    damage(copy)
    outcome = halfbyte("doctor", copy, "--json", "--quick")
    told = findings(outcome.document, name)
    assert any(it.startswith(says) for it in told), outcome.document["findings"]
    assert outcome.code == code


def test_the_trained_model_is_sound(halfbyte: Halfbyte, tiny_gemma4: Path) -> None:
    document = halfbyte("doctor", tiny_gemma4, "--json", "--quick").document
    model = [it for it in document["findings"] if it["subject"] == "model"]
    assert {it["severity"] for it in model} == {"ok", "note"}
    assert any("no '<bos>' is put" in it for it in findings(document, "bos"))


def test_an_altered_byte_is_a_fault(halfbyte: Halfbyte, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    for source in (demo_path(), demo_path().with_name("model.gguf.manifest.json")):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    path = tmp_path / "model.gguf"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    outcome = halfbyte("doctor", path)
    assert outcome.code == 3 and "sha256" in outcome.out
    assert halfbyte("doctor", path, "--quick").code == 0


def test_a_file_of_the_hubs_cache_is_hashed_against_its_name(
    halfbyte: Halfbyte, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hashlib import sha256

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--jane--private-thing"
    data = demo_path().read_bytes()
    blob = repo / "blobs" / sha256(data).hexdigest()
    link = repo / "snapshots" / ("0" * 40) / "model.gguf"
    for folder in (blob.parent, link.parent, repo / "refs"):
        folder.mkdir(parents=True)
    blob.write_bytes(data)
    link.symlink_to(blob)
    (repo / "refs" / "main").write_text("0" * 40)
    document = halfbyte("doctor", "jane/private-thing", "--json").document
    assert findings(document, "hashes") == ["ok: 1 file with the hash that the hub gave"]
    blob.write_bytes(data[:-1] + b"!")
    document = halfbyte("doctor", "jane/private-thing", "--json").document
    assert findings(document, "hashes")[0].startswith("fault: model.gguf: ")
    absent = halfbyte("doctor", "jane/nothing-here")
    assert absent.code == 2 and "halfbyte pull jane/nothing-here" in absent.err


def test_a_context_beyond_the_model(halfbyte: Halfbyte) -> None:
    outcome = halfbyte("doctor", "demo", "--quick", "--context", "1m", "--json")
    assert outcome.code == 3
    assert findings(outcome.document, "context") == [
        "fault: a context of 1048576 is beyond the model's 4096 positions"
    ]
    assert "beyond the model's 4096" in outcome.document["expected"]["refusal"]
    drafted = halfbyte("doctor", "demo", "--quick", "--context", "4k", "--draft", "4", "--json")
    assert "4 drafts reach beyond" in findings(drafted.document, "context")[0]


def test_a_bundle_holds_no_secrets(
    halfbyte: Halfbyte, tmp_path: Path, tiny_gemma4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "janes-home"
    copy = home / "work" / "secret-project"
    shutil.copytree(tiny_gemma4, copy)
    _edit(
        "config.json",
        lambda it: it.update(
            _name_or_path="jane/secret-origin",
            note=f"fetched with {TOKEN}",
            api_key="0123456789",
            url="https://jane:hunter22@hub.example/x",
        ),
    )(copy)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("HF_TOKEN", "plain-looking-secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "another-plain-one")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{home}/lib")
    bundle = tmp_path / "report.zip"
    outcome = halfbyte("doctor", copy, "--quick", "--bundle", bundle)
    assert outcome.code == 0 and "look through it" in outcome.err
    with ZipFile(bundle) as opened:
        texts = {name: opened.read(name).decode() for name in opened.namelist()}
    assert set(texts) == {"README.txt", "doctor.json", "machine.json", "model.json"}
    for secret in (TOKEN, "plain-looking-secret", "another-plain-one", "hunter22", "0123456789",
                   "janes-home", "secret-project", "secret-origin"):  # fmt: skip
        assert not [name for name, text in texts.items() if secret in text], secret
    model = json.loads(texts["model.json"])
    assert model["config"]["text_config"]["hidden_size"] == 256
    assert json.loads(texts["doctor.json"])["model"] == "MODEL"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"token {TOKEN}.", "token [removed]."),
        ("Authorization: Bearer abcdef123456", "Authorization: [removed]"),
        ("api_key=abcdef1234&x=1", "[removed]&x=1"),
        ("https://jane:pw@host/x", "https://[removed]@host/x"),
        ("/home/jane/models and /home/bob", "~/models and ~"),
        ("/data/m/config.json, /data/more", "MODEL/config.json, /data/more"),
        ("jane has janes", "USER has janes"),
        ("tokenizer has 8192 tokens", "tokenizer has 8192 tokens"),
        ("eos_token: <eos>", "eos_token: <eos>"),
    ],
)
def test_redaction(text: str, left: str) -> None:
    redaction = Redaction(names={"jane": "USER"}, folders={"/data/m": "MODEL"})
    assert redaction.text(text) == left


def test_a_broken_installation_is_examined(tmp_path: Path) -> None:
    """Without torch and without the native kernels, the machine and a model are examined."""
    code = (
        "import sys\nsys.modules['torch'] = None\nsys.modules['halfbyte._cpu'] = None\n"
        "from halfbyte.cli import cli\n"
        "cli.main(['doctor', 'demo', '--quick'], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "the reference op set" in done.stdout and "expected: demo" in done.stdout, done.stderr


def test_top_sets_the_plan_beside_what_is_taken(halfbyte: Halfbyte, tmp_path: Path) -> None:
    from halfbyte.llm import LLM

    nothing = halfbyte("top", "--count", 1)
    assert nothing.code == 0 and ("no model is loaded" in nothing.out or "pid" in nothing.out)
    llm = LLM("demo")
    csv = tmp_path / "memory.csv"
    ours = ("--pid", os.getpid())
    outcome = halfbyte("top", *ours, "--count", 2, "--interval", "0.05", "--csv", csv)
    assert "model demo" in outcome.out and "planned" in outcome.out
    lines = csv.read_text().splitlines()
    assert lines[0].startswith("time,pid,name,planned_bytes") and len(lines) == 3
    document = halfbyte("top", "--json").document
    (sample,) = [it for it in document["samples"] if it["name"] == "demo"]
    assert document["schema"] == "halfbyte.top/1"
    assert sample["planned_bytes"] == llm.memory.planned_bytes
    assert 0 < sample["measured_bytes"] <= sample["resident_bytes"] <= sample["peak_bytes"]
    assert llm.memory.peak_bytes > 0 and llm.memory.card_bytes == 0
    gone = halfbyte("top", "--pid", 2**22 - 1, "--count", 1)
    assert gone.code == 2 and "no process" in gone.err
