"""The llm command, as it comes, by its file of further OpenAI-like models. Prints ok, or fails."""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

base, model = sys.argv[1], sys.argv[2]
llm = str(Path(sys.executable).parent / "llm")
with tempfile.TemporaryDirectory() as home:
    Path(home, "extra-openai-models.yaml").write_text(
        f"- model_id: local\n  model_name: {model}\n  api_base: {base}/v1\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": home, "OPENAI_API_KEY": "none"}
    for more in ([], ["--no-stream"]):
        done = subprocess.run(
            [llm, "-m", "local", *more, "-o", "max_tokens", "20", "-o", "seed", "3", "Who?"],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    logs = subprocess.run([llm, "logs", "--json", "-n", "1"], env=environment, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert '"input_tokens"' in logs.stdout
print("ok", version("llm"))
