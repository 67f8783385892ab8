"""The facts of a model, from its files; whatever fails is a fact, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from halfbyte.errors import HalfbyteError, IntegrityError
from halfbyte.formats import manifest, safetensors
from halfbyte.formats.checkpoint import Checkpoint, StoredTensor, read
from halfbyte.formats.documents import read_json
from halfbyte.formats.fingerprint import fingerprint
from halfbyte.formats.gguf_parts import GGUFModel, part_paths
from halfbyte.formats.hub.cache import check_blob
from halfbyte.formats.packed import packed_parts
from halfbyte.formats.packed.settings import settings_of
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import drafter_beside, is_drafter_file
from halfbyte.kernels.cpu import CPUOps
from halfbyte.planner.doctor.model_facts import Drafter, Integrity, ModelFacts, Refusal, Text
from halfbyte.text.assets import TextAssets
from halfbyte.text.huggingface import leading_token
from halfbyte.text.metadata import PREFIX
from halfbyte.text.splitters import splitter_of

SHORT = 64  # values of metadata that are longer are vocabularies
BOS_KEY = f"{PREFIX}add_bos_token"
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of a model, and the opened checkpoint where it can be read."""

    facts: ModelFacts
    source: Checkpoint | None


def model_facts(
    path: Path, name: str, *, progress: Progress | None = None, hashing: bool = True
) -> Model:
    """Reads headers and small files; with `hashing` every byte, if anything says what it should
    be, without only sizes and headers."""
    config, metadata, stored = _described(path)
    settings = _attempt(lambda: settings_of(config)).value
    source = _attempt(lambda: read(path))
    text = _attempt(lambda: None if source.value is None else _text(path, source.value, metadata))
    integrity, integrity_text = _integrity(path, progress, hashing=hashing)
    facts = ModelFacts(
        name=name,
        spec=None if source.value is None else source.value.spec,
        refusal=source.refusal,
        integrity=integrity,
        integrity_text=integrity_text,
        config=config,
        metadata=metadata,
        tokenizer_config=_json(path, "tokenizer_config.json"),
        files=tuple(sorted(file.name for file in path.iterdir()))
        if path.is_dir()
        else (path.name,),
        stored=_counts(stored.values()),
        packed=len(packed_parts(stored)),
        packing=None if settings is None else settings.get("quant_method"),
        text=text.value,
        text_refusal=text.refusal,
        drafter=_drafter(path, source.value),
        lacks=None if source.value is None else CPUOps.lacks(source.value.spec),
    )
    return Model(facts, source.value)


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[Value]):
    """What came of an attempt."""

    value: Value | None
    refusal: Refusal | None = None


def _attempt(attempt: Callable[[], Value]) -> _Outcome[Value]:
    try:
        return _Outcome(attempt())
    except HalfbyteError as error:
        where = f"{Path(error.where).name}: " if error.where else ""
        return _Outcome(None, Refusal(what=f"{where}{error.what}", hint=error.hint or ""))
    except (OSError, ImportError, ValueError) as error:
        return _Outcome(None, Refusal(what=f"{type(error).__name__}: {error}"))


def _described(
    path: Path,
) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, StoredTensor]]:
    """config.json, or the short values of a GGUF's metadata; and what tensors there are."""
    if path.is_dir() and (path / "config.json").exists():
        files = _attempt(lambda: safetensors.open_directory(path)).value or {}
        stored = {name: file.infos[name] for name, file in files.items()}
        return _json(path, "config.json"), {}, stored
    model = _attempt(lambda: GGUFModel(_gguf(path))).value
    if model is None:
        return {}, {}, {}
    short = {key: value for key, value in model.metadata.items() if _is_short(value)}
    return {}, short, {name: file.infos[name] for name, file in model.places.items()}


def _gguf(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(file for file in path.glob("*.gguf") if not is_drafter_file(file))
    return files[0] if files else path / "model.gguf"


def _is_short(value: Any) -> bool:
    return not isinstance(value, list | str) or len(value) <= SHORT


def _json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    if not path.is_dir() or not file.is_file():
        return {}
    return _attempt(lambda: read_json(file)).value or {}


def _counts(tensors: Iterable[StoredTensor]) -> dict[str, int]:
    """How many matrices are stored in each scheme, the most common first."""
    names = (_scheme(tensor) for tensor in tensors if len(tensor.shape) > 1)
    return dict(Counter(names).most_common())


def _scheme(tensor: StoredTensor) -> str:
    try:
        return tensor.scheme.name
    except HalfbyteError:
        return "of another type"


def _text(path: Path, source: Checkpoint, metadata: Mapping[str, Any]) -> Text | None:
    assets = source.assets
    if assets is None:
        return None
    from halfbyte.text.chat import Chat
    from halfbyte.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(assets)
    chat = Chat(tokenizer, assets)
    stated = assets.generation.eos_ids
    kind = assets.vocabulary.model
    return Text(
        kind=kind,
        bos=None if assets.bos_id is None else assets.token(assets.bos_id),
        says_bos=_says_bos(path, metadata),
        adds_bos=assets.add_bos and assets.bos_id is not None,
        needs_bos=kind != "gpt2" or splitter_of(assets.vocabulary.pre).adds_bos,
        template_bos=chat.writes_bos,
        stated_stops=_tokens(assets, stated),
        template_stops=_tokens(assets, chat.stop_ids - set(stated)),
        closing=(chat.closing.split() or [""])[0],
        closing_is_token=chat.closing_id is not None,
        marks=tuple(
            tokenizer.token(index) for index in chat.grammar.ids if tokenizer.is_special(index)
        ),
    )


def _tokens(assets: TextAssets, ids: Iterable[int]) -> dict[int, str]:
    return {index: assets.token(index) for index in sorted(ids)}


def _says_bos(path: Path, metadata: Mapping[str, Any]) -> bool | None:
    if BOS_KEY in metadata:
        return bool(metadata[BOS_KEY])
    if leading_token(_json(path, "tokenizer.json")) is not None:
        return True
    stated = _json(path, "tokenizer_config.json").get("add_bos_token")
    return None if stated is None else bool(stated)


def _integrity(path: Path, progress: Progress | None, *, hashing: bool) -> tuple[Integrity, str]:
    """Against the manifest, else against the hub's hashes, which are the names of cached files."""
    try:
        if not hashing:
            known = manifest.check_sizes(path)
            return ("whole", "sizes and headers as the manifest says") if known else ("unasked", "")
        if manifest.described(path):
            return "whole", f"{_files(manifest.verify(path, progress))} as the manifest says"
        files = sorted(path.iterdir()) if path.is_dir() else part_paths(path)
        checked = sum(check_blob(file) for file in files if file.is_file())
    except IntegrityError as error:
        where = f"{Path(error.where).name}: " if error.where else ""
        return "altered", f"{where}{error.what}"
    if checked:
        return "whole", f"{_files(checked)} with the hash that the hub gave"
    return "unknown", ""


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _drafter(path: Path, target: Checkpoint | None) -> Drafter | None:
    place = drafter_beside(path)
    if place is None or target is None or target.spec.drafter is not None:
        return None
    source = _attempt(lambda: read(place))
    spec = None if source.value is None else source.value.spec
    made_for = None if spec is None or spec.drafter is None else spec.drafter.target
    return Drafter(
        name=place.name,
        spec=spec,
        refusal=source.refusal,
        made_for=made_for,
        target=None if made_for is None else _attempt(lambda: fingerprint(target)).value,
    )
