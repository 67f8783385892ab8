"""What is taken out of a report before it is shown to strangers.

Tokens and keys, where a model came from, the home folder, the names of user and machine, and the
folders and names that the caller gives. It is done to values, before they are written:
a secret cannot hide in the escapes of JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Access tokens as their makers write them: Hugging Face, OpenAI, GitHub, ModelScope, AWS, bearers;
# and whatever follows a word for a secret, or stands between a protocol and an @.
SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{8,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}"
    r"|\bgithub_pat_\w{16,}|\bms-[0-9a-f-]{20,}|\bAKIA[0-9A-Z]{12,}"
    r"|(?i:bearer)\s+[\w.~+/=-]{8,}"
    r"|(?i:(?:token|api_?key|password|passwd|secret)[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&]{6,}"
)
CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
# Keys whose values go: secrets, and where a model came from.
SECRET_KEYS = re.compile(
    r"(?i)^(?:.*_)?(?:access_token|api_?key|password|secret|auth_token|_name_or_path)$"
    r"|^general\.(?:name|basename|author|organization|finetune|.*(?:url|repo|doi|uuid|base_model).*)$"
)
HOMES = re.compile(r"/(?:home|Users)/[^/\s:\"']+")
GONE = "[removed]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Redaction:
    """`secrets` are strings that must not be seen; `names` are replaced by what stands for them,
    where they stand as words, and `folders` wherever they stand, the longest first."""

    secrets: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    folders: Mapping[str, str] = field(default_factory=dict[str, str])

    def of(self, value: Any) -> Any:
        """The same JSON value without them; keys are redacted, too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                self.text(str(key)): GONE if SECRET_KEYS.match(str(key)) and item else self.of(item)
                for key, item in value.items()
            }
        if isinstance(value, Iterable) and not isinstance(value, bytes):
            return [self.of(item) for item in value]
        return value

    def text(self, text: str) -> str:
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, GONE)
        text = CREDENTIALS.sub(f"{GONE}@", SECRETS.sub(GONE, text))
        for folder in sorted(self.folders, key=len, reverse=True):
            text = re.sub(rf"{re.escape(folder)}(?![\w.-])", self.folders[folder], text)
        text = HOMES.sub("~", text)
        for name, stand_in in self.names.items():
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", stand_in, text)
        return text
