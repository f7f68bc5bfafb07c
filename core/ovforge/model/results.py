"""What a task returns: outputs, timings, and provenance from which the same result can be made again."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.errors import InputError
from ovforge.store.documents import parse_object
from ovforge.store.files import atomic_write

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

__all__ = ["ImagesResult", "Provenance", "Result", "Timings", "read_provenance"]

PNG_KEY = "ovforge"

_PROVENANCE = {"base": str} | dict.fromkeys(
    ("config", "inputs", "digests", "versions", "precision", "device", "controls", "adapters"), dict
)
"""What a reader of provenance uses, by kind."""

_PROVENANCE_LIMIT = 16 * 2**20

Provenance = dict[str, Any]
"""JSON-able: config, inputs (with the seeds drawn), versions, content digests, device and the precision that ran."""


class Timings:
    """Wall-clock seconds by dotted name, one entry a call: "denoise.unet" is a part of "denoise"."""

    def __init__(self) -> None:
        self.spans: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add a measured duration."""
        self.spans.setdefault(name, []).append(seconds)

    def total(self, name: str) -> float:
        """Return the sum of a name's durations, 0.0 where there is none."""
        return sum(self.spans.get(name, ()))

    def merged(self, other: Timings) -> Timings:
        """Return both together."""
        both = Timings()
        for timings in (self, other):
            for name, seconds in timings.spans.items():
                both.spans.setdefault(name, []).extend(seconds)
        return both

    def __str__(self) -> str:
        width = max((len(name) for name in self.spans), default=0)
        return "\n".join(
            f"{name:<{width}}  {sum(spans):8.3f} s" + (f"  ({len(spans)} x)" if len(spans) > 1 else "")
            for name, spans in self.spans.items()
        )


@dataclass
class Result:
    """What every task returns. `warnings` are things the user should know, such as a prompt that was cut."""

    timings: Timings = field(default_factory=Timings)
    provenance: Provenance = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def save(self, path: Path | str) -> list[Path]:
        """Write the result to `path`, atomically; return the files written."""
        raise NotImplementedError


@dataclass
class ImagesResult(Result):
    """Pictures, with the seed of each, and the latents they were decoded from.

    `latents` are float32 (pictures, channels, height, width). A run that ends before the last step has no pictures.
    """

    images: Sequence[Image.Image] = ()
    seeds: Sequence[int] = ()
    latents: NDArray[np.float32] | None = None

    def save(self, path: Path | str) -> list[Path]:
        """Write pictures; `x.png` becomes `x-1.png`, `x-2.png`... where there are several. `x.npy` gets the latents.

        A PNG carries the provenance of its own picture (one seed) in its metadata.
        """
        target = Path(path)
        if target.suffix.lower() == ".npy" and self.latents is not None:
            atomic_write(target, _npy(self.latents))
            return [target]
        if not self.images:
            raise InputError("there are latents and no picture", where=str(target), hint="Name a .npy file instead.")
        several = len(self.images) > 1
        written = []
        for number, image in enumerate(self.images, start=1):
            file = target.with_stem(f"{target.stem}-{number}") if several else target
            atomic_write(file, self._encode(number - 1, image, file.suffix.lower()))
            written.append(file)
        return written

    def _encode(self, position: int, image: Image.Image, suffix: str) -> bytes:
        from PIL import Image as Pillow
        from PIL.PngImagePlugin import PngInfo

        Pillow.init()
        if suffix not in Pillow.EXTENSION:
            raise InputError(f"unknown picture format {suffix!r}", where="output", hint="Use .png, .jpg or .webp.")
        buffer = io.BytesIO()
        if suffix == ".png":
            metadata = PngInfo()
            metadata.add_itxt(PNG_KEY, json.dumps(self.provenance_of(position), sort_keys=True))
            image.save(buffer, "PNG", pnginfo=metadata)
        else:
            image.save(buffer, Pillow.EXTENSION[suffix])
        return buffer.getvalue()

    def provenance_of(self, position: int) -> Provenance:
        """Return the provenance of one picture, from which it alone is made again."""
        if len(self.images) == 1:
            return self.provenance
        inputs = {**self.provenance.get("inputs", {}), "seed": self.seeds[position], "count": 1}
        return {**self.provenance, "inputs": inputs}


def _npy(array: NDArray[np.float32]) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def read_provenance(path: Path) -> Provenance:
    """Return the provenance in a PNG that ovforge wrote. Raises InputError where there is none."""
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with Pillow.open(path) as image:
            text = image.info.get(PNG_KEY)
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path)) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        raise InputError(f"not a readable picture: {error}", where=str(path)) from error
    if not isinstance(text, str):
        raise InputError(
            "the picture carries no ovforge provenance",
            where=str(path),
            hint="Only PNG files that ovforge wrote, and no other program has saved again, can be run.",
        )
    value = parse_object(text, f"{path}: its provenance", size=_PROVENANCE_LIMIT, error=InputError)
    for key, kind in _PROVENANCE.items():
        if key in value and not isinstance(value[key], kind):
            raise InputError(f"the picture's provenance is damaged: {key} is not a {kind.__name__}", where=str(path))
    if "config" not in value or "inputs" not in value:
        raise InputError("the picture's provenance is damaged: it has no config or no inputs", where=str(path))
    return value
