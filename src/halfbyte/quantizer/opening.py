"""Opening a model by name, quantized on the way where that is asked for.

The quantized model is kept in the cache folder under the identity of its source, the recipe and
the method, so that the work is done once.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from halfbyte import __version__, env
from halfbyte.formats.checkpoint import Checkpoint, Source, read, write_gguf
from halfbyte.formats.fingerprint import check_target
from halfbyte.formats.manifest import check_sizes, identity
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import drafter_beside, locate
from halfbyte.specs import AUTO, Method, Recipe, paired_layers, recipe_of


def open_source(
    model: str,
    *,
    recipe: str | None = None,
    method: Method = "search",
    progress: Progress | None = None,
) -> Source:
    """The source of a model; a manifest beside it is checked first (sizes and headers).

    In schemes that no GGUF has, it is quantized each time, tensor by tensor, and not kept.
    """
    path = locate(model, progress)
    check_sizes(path)
    source = read(path)
    if recipe is None:
        return source
    kept = _place(path, recipe_of(recipe), method)
    if kept.exists():
        return read(kept)
    quantized = _quantized(source, recipe_of(recipe), method)
    if any(scheme.ggml_type is None for scheme in quantized.schemes.values()):
        return quantized
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(quantized, kept, progress=progress)
    return read(kept)


def _quantized(source: Checkpoint, recipe: Recipe, method: Method) -> Source:
    # Brings torch, which running does without.
    from halfbyte.quantizer.pipeline import Quantized, refuse_decoded
    from halfbyte.quantizer.recovered import Recovered

    found = Recovered(source, recipe)
    quantized = Quantized(found, found.recipe, method=method)
    refuse_decoded(source, quantized.schemes)
    return quantized


def open_drafter(
    reference: str,
    target: Source,
    place: Path,
    *,
    recipe: str | None = None,
    method: Method = "search",
    progress: Progress | None = None,
) -> Source | None:
    """The drafter of a target that lies in `place`; "auto" is the one beside it, None without one.

    A recipe quantizes it unless it is quantized already. Raises `InvalidInputError` for a drafter
    of another target.
    """
    path = drafter_beside(place) if reference == AUTO else locate(reference, progress)
    if path is None:
        return None
    source = open_source(str(path))
    paired_layers(source.spec, target.spec)
    check_target(source, target)
    if recipe is None or any(not scheme.is_float for scheme in source.schemes.values()):
        return source
    return open_source(str(path), recipe=recipe, method=method, progress=progress)


def _place(path: Path, recipe: Recipe, method: Method) -> Path:
    facts = [identity(path), recipe.rules, method, __version__]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return env.cache_dir() / f"{path.stem}-{recipe.name}-{key}.gguf"
