"""The clients' own code against `halfbyte serve`, unmodified. `make clients` installs and runs it.

Each in an environment of its own (`tests/clients/*.txt`), since their versions clash. What they
print at the end is which version it was: `pytest -m clients -rA` shows it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from served import commanded

pytestmark = pytest.mark.clients
ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "clients"
TEMPLATE = ROOT / "tests" / "templates" / "gemma4.jinja"
FLAGS = ("--context", 1024, "--threads", 1, "--parallel", 2)


@pytest.fixture(scope="module", params=["plain", "tools"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """With the model's own template, and with one that has a place for tools."""
    template = ("--template", TEMPLATE) if request.param == "tools" else ()
    with commanded(*FLAGS, *template) as command:
        yield command.url, request.param


def installed(environment: str, program: str) -> Path:
    path = ROOT / ".clients" / environment / "bin" / program
    if not path.exists():
        pytest.skip(f"needs {path.parent.parent}: make clients")
    return path


@pytest.mark.parametrize(
    ("environment", "script"),
    [
        ("openai2", "openai_sdk"),
        ("openai3", "openai_sdk"),
        ("openai3", "anthropic_sdk"),
        ("openai2", "litellm_client"),
        ("langchain", "langchain_client"),
        ("openai3", "llm_cli"),
        ("dify", "dify_provider"),
    ],
)
def test_client(served: tuple[str, str], environment: str, script: str):
    python = installed(environment, "python")
    url, kind = served
    command = [python, HERE / f"{script}.py", url, "demo", kind]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("ok ")
    print(script, last.removeprefix("ok "))


def test_no_request_of_the_document_breaks_the_server(served: tuple[str, str]):
    """schemathesis makes requests of the OpenAPI document, right and wrong ones, a bounded number
    of them and the same each time: no 5xx, and no answer that the document does not tell of."""
    program = installed("schemathesis", "schemathesis")
    url, _ = served
    command = [program, "run", f"{url}/openapi.json", "--max-examples", "20", "--seed", "1"]
    for check in ("not_a_server_error", "status_code_conformance", "content_type_conformance"):
        command += ["--checks", check]
    command += ["--exclude-path", "/api/events", "--phases", "examples,coverage,fuzzing"]
    command += ["--request-timeout", "120", "--generation-deterministic"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    with urlopen(f"{url}/health", timeout=60) as reply:
        assert reply.status == 200
