"""Fuzz one target with atheris: python fuzz/run.py TARGET [libFuzzer flags].

A target is a file in targets/ with `one_input(data)`. Whatever the bytes are, it ends soon, in
memory that the bytes can account for, and raises nothing but a `HalfbyteError`; a breach of that,
or of an `assert` in the target, is a finding. The corpus in corpus/TARGET is only read; inputs that
reach new code, and findings, are left in build/fuzz. A finding that was mended goes into the
corpus, which replay.py runs without atheris.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import atheris

HERE = Path(__file__).parent
LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=20000", "-print_final_stats=1")


def main() -> None:
    target, *flags = sys.argv[1:]
    with atheris.instrument_imports(include=["halfbyte", "targets", "jinja2"]):
        one_input = import_module(f"targets.{target}").one_input
        from halfbyte.errors import HalfbyteError

    def guarded(data: bytes) -> None:
        with suppress(HalfbyteError):
            one_input(data)

    found = HERE.parent / "build" / "fuzz" / target
    found.mkdir(parents=True, exist_ok=True)
    places = (f"-artifact_prefix={found}-", str(found), str(HERE / "corpus" / target))
    atheris.Setup([sys.argv[0], *LIMITS, *flags, *places], guarded)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
