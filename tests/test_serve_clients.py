"""The clients' own code against our server, unmodified: `make clients` installs them and runs this.

Two environments, since their versions clash (`tests/clients/a.txt`, `b.txt`).
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, serving

from halfbyte.llm import LLM
from halfbyte.specs import LoadOptions

pytestmark = pytest.mark.clients
ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "clients"
TEMPLATE = ROOT / "tests" / "templates" / "gemma4.jinja"


@pytest.fixture(scope="module", params=["plain", "tools"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Served, str]]:
    """With the model's own template, and with one that has a place for tools."""
    template = TEMPLATE.read_text(encoding="utf-8") if request.param == "tools" else None
    llm = LLM("demo", LoadOptions(context=1024, threads=1, parallel=2, spare=1), template=template)
    with serving(llm) as it:
        yield it, request.param


@pytest.mark.parametrize(
    ("environment", "script"),
    [
        ("a", "openai_sdk"),
        ("b", "openai_sdk"),
        ("a", "anthropic_sdk"),
        ("b", "litellm_client"),
        ("b", "langchain_client"),
        ("a", "llm_cli"),
        ("b", "dify_provider"),
    ],
)
def test_client(served: tuple[Served, str], environment: str, script: str):
    python = ROOT / ".clients" / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs {python.parent.parent}: make clients")
    server, kind = served
    command = [python, HERE / f"{script}.py", server.url, "demo", kind]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().splitlines()[-1].startswith("ok"), (
        done.stdout + done.stderr
    )


def test_no_request_of_the_schema_breaks_the_server(served: tuple[Served, str]):
    """schemathesis makes requests of the OpenAPI document, right and wrong ones: no 5xx."""
    program = ROOT / ".clients" / "c" / "bin" / "schemathesis"
    if not program.exists():
        pytest.skip(f"needs {program.parent.parent}: make clients")
    server, _ = served
    command = [program, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--exclude-path", "/api/events", "--max-examples", "30", "--seed", "1"]
    command += ["--request-timeout", "60", "--generation-database", ":memory:"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert server.chat("still there?", max_tokens=1).status == 200
