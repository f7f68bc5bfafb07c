"""What a task returns: outputs, timings, and provenance from which the same result can be made again.

Nothing else asks what kind a result is: it says itself how it is saved, printed, shown and compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ovforge.errors import InputError, PluginError, as_path
from ovforge.store.documents import parse_object
from ovforge.store.files import atomic_folder, atomic_write
from ovforge.store.folders import MARKER, check_replaceable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

__all__ = [
    "OWN_METRIC",
    "PICTURE_SUFFIXES",
    "ImagesResult",
    "Provenance",
    "Result",
    "TimingRow",
    "Timings",
    "provenance_options",
    "read_provenance",
    "values_as_json",
]

PNG_KEY = "ovforge"

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
"""Files that pictures are written to, the default first."""

OWN_METRIC = "task"
"""Name of the measure that a result, or its task, has of its own: 1 if two results are equal, less if they differ."""

_EXIF_FORMATS = ("JPEG", "WEBP", "TIFF")
_EXIF, _USER_COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
"""Tags of the Exif standard (CIPA DC-008): its own folder of tags, UserComment, and the code of its character set."""

_DESCRIPTION = 0x010E
"""Tag ImageDescription of TIFF, to which Pillow writes no Exif folder."""

_EXIF_LIMIT = 65_000
"""Bytes that a JPEG's Exif segment holds, less what the tags themselves take."""
_PROVENANCE = {"base": str} | dict.fromkeys(
    ("config", "inputs", "digests", "versions", "precision", "device", "controls", "adapters"), dict
)
"""What a reader of provenance uses, by kind."""

_PROVENANCE_LIMIT = 16 * 2**20

Provenance = dict[str, Any]
"""JSON-able: config, inputs (with the seeds drawn), versions, content digests, device and the precision that ran."""


@dataclass(frozen=True, slots=True)
class TimingRow:
    """A line of a table of timings: `depth` counts the names that it is a part of, `count` how often it was measured.

    `side_by_side` says that it ran at the same time as other parts of the same whole, which their sum exceeds.
    """

    name: str
    depth: int
    seconds: float
    count: int
    side_by_side: bool = False


class Timings:
    """Wall-clock seconds by dotted name, one entry a call: "denoise.unet" is a part of "denoise".

    `elapsed` is the time that the whole took, 0 if nobody measured it.
    """

    def __init__(self) -> None:
        self.spans: dict[str, list[float]] = {}
        self.elapsed = 0.0

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
        """Return the sum of a name's durations, 0.0 if it has none."""
        return sum(self.spans.get(name, ()))

    def whole(self) -> float:
        """Return the seconds of the whole: as measured, or the sum of what is a part of nothing."""
        return self.elapsed or sum(self.total(name) for name in self.spans if self._above(name) is None)

    def merged(self, other: Timings) -> Timings:
        """Return both together."""
        both = Timings()
        for timings in (self, other):
            for name, seconds in timings.spans.items():
                both.spans.setdefault(name, []).extend(seconds)
        both.elapsed = self.elapsed + other.elapsed
        return both

    def rows(self) -> list[TimingRow]:
        """Return a table: each name before its parts, otherwise in the order in which they were first measured."""
        return list(self._rows(None, 0))

    def _rows(self, above: str | None, depth: int) -> Iterator[TimingRow]:
        names = [name for name in self.spans if self._above(name) == above]
        # Parts end before the whole does, so a whole's place is that of its first part.
        names.sort(key=lambda name: min(n for n, other in enumerate(self.spans) if f"{other}.".startswith(f"{name}.")))
        room = self.total(above) if above else float("inf")
        overlap = sum(map(self.total, names)) > 1.005 * room
        for name in names:
            yield TimingRow(name, depth, self.total(name), len(self.spans[name]), overlap)
            yield from self._rows(name, depth + 1)

    def _above(self, name: str) -> str | None:
        """Return the nearest measured name that this one is a part of."""
        while "." in name:
            name = name.rpartition(".")[0]
            if name in self.spans:
                return name
        return None

    def __str__(self) -> str:
        rows = self.rows()
        titles = [f"{'  ' * row.depth}{row.name}" for row in rows]
        width = max(map(len, [*titles, "total"]))
        lines = [
            f"{title:<{width}}  {row.seconds:8.3f} s"
            + (f"  ({row.count} x)" if row.count > 1 else "")
            + ("  side by side" if row.side_by_side else "")
            for title, row in zip(titles, rows, strict=True)
        ]
        return "\n".join([*lines, f"{'total':<{width}}  {self.whole():8.3f} s"])


_COMMON = frozenset({"timings", "provenance", "warnings"})


@dataclass
class Result:
    """What every task returns. `warnings` are things the user should know, such as a prompt that was cut.

    A task's own kind is a dataclass with further fields. As it stands, it is saved as JSON, printed field by field,
    shown as no picture, and compared by equality; what suits it better, it overrides.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".json",)
    """Endings of the files that `save` writes, the default first; "" stands for a folder."""

    timings: Timings = field(default_factory=Timings)
    provenance: Provenance = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def check_path(cls, path: Path | str) -> None:
        """Raise InputError if `save` writes no file with this path's ending."""
        suffix = as_path(path, where="save").suffix.lower()
        if suffix not in cls.suffixes:
            known = ", ".join(known for known in cls.suffixes if known)
            hint = f"Name a file that ends in {known}{', or a folder' if '' in cls.suffixes else ''}."
            raise InputError(f"cannot write {suffix or 'a file without an ending'}", where=str(path), hint=hint)

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        """Raise InputError if `save` must not write this folder: it holds what is not a result of this kind."""
        kinds = {*cls.suffixes, *PICTURE_SUFFIXES}
        for name in sorted(check_replaceable(folder) - {MARKER} if folder.exists() else ()):
            if Path(name).suffix.lower() not in kinds:
                raise InputError(
                    f"holds {name}, which is not a part of such a result and would be replaced",
                    where=str(folder),
                    hint="Name another folder.",
                )

    def save(self, path: Path | str) -> list[Path]:
        """Write the result to `path`, atomically; return the files written.

        A folder that such a result was written to takes the new files in place of the old ones. Raises InputError for
        an ending that is not among `suffixes`, and for a folder that holds something else.
        """
        self.check_path(path)
        files, written = self.files(Path(path)), []
        if Path(path).suffix:
            for file, content in files:
                atomic_write(file, content)
                written.append(file)
            return written
        for folder, parts in groupby(files, key=lambda part: part[0].parent):
            self.check_folder(folder)
            with atomic_folder(folder, replace=True) as temporary:
                for file, content in parts:
                    (temporary / file.name).write_bytes(content)
                    written.append(file)
        return written

    def files(self, path: Path, *, quick: bool = False) -> Iterator[tuple[Path, bytes]]:
        """Yield (path, content) of each file that `save` writes, for those who send them instead.

        Here: JSON with `result` and `provenance`. With `quick`, somebody waits: files may be larger and made sooner. A
        result whose files do not fit into memory overrides `save` instead.
        """
        value = {"result": self.as_json(), "provenance": values_as_json(self.provenance)}
        yield path, (json.dumps(value, indent=1) + "\n").encode()

    def lines(self) -> list[str]:
        """Return what the terminal shows of it, plain text; here: each field, or the text itself of the only one."""
        values = self._values()
        if len(values) == 1 and isinstance(text := next(iter(values.values())), str):
            return text.splitlines()
        return [f"{name.replace('_', ' ')}: {_shown(value)}" for name, value in values.items()]

    def preview(self) -> Image.Image | None:
        """Return one picture (RGB) that shows the result, or None."""
        return None

    def is_empty(self) -> bool:
        """Say whether it holds nothing, such as no text or no box: two empty results say nothing of a model."""
        values = self._values().values()
        return bool(values) and all(value is None or (hasattr(value, "__len__") and not len(value)) for value in values)

    def as_json(self) -> Any:
        """Return its own content for programs, without timings, provenance and warnings."""
        return values_as_json(self._values(), type(self).__name__)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the measures that `compare` takes, the default first; none if there is nothing to compare."""
        return (OWN_METRIC,) if self._values() else ()

    def compare(self, reference: Self, metric: str = OWN_METRIC) -> float:
        """Return how close it comes to another result of the same inputs; higher is closer. Here: 1 if equal, else 0.

        Raises InputError if the two cannot be compared by this metric.
        """
        self._check_metric(metric)
        return float(json.dumps(self.as_json(), sort_keys=True) == json.dumps(reference.as_json(), sort_keys=True))

    @property
    def adjustable(self) -> Mapping[str, Any]:
        """The inputs that `adjusted` takes, with the values that this result was made with; here: none."""
        return {}

    def adjusted(self, **values: Any) -> Self:
        """Return what the same call gives with other values of `adjustable` inputs, without running a model.

        Raises InputError for another input or a wrong value.
        """
        unknown = next(iter(values), "")
        raise InputError(
            "it cannot be changed when the result is there", where=unknown, hint="Call the pipeline again."
        )

    def compact(self) -> Self:
        """Return it without what no comparison needs, since many results may be held at once; here: as it is."""
        return self

    def _values(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _COMMON and not name.startswith("_")}

    def _check_metric(self, metric: str) -> None:
        if metric not in self.metrics:
            known = f"It has {', '.join(self.metrics)}." if self.metrics else "It has none."
            raise InputError(f"{metric!r} is not a metric of this result", where="metric", hint=known)


def values_as_json(value: Any, where: str = "result") -> Any:
    """Return a value as JSON knows it: arrays as lists, paths as text, pictures by their digest.

    Raises PluginError, naming `where`, for a value that has no such form.
    """
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, Mapping):
        return {str(name): values_as_json(part, f"{where}.{name}") for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [values_as_json(part, f"{where}.{n}") for n, part in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((values_as_json(part, where) for part in value), key=repr)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, enum.Enum):
        return values_as_json(value.value, where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value)]
        return {name: values_as_json(getattr(value, name), f"{where}.{name}") for name in names}
    if hasattr(value, "model_dump"):  # a pydantic model, whose values may be anything
        return {name: values_as_json(part, f"{where}.{name}") for name, part in value}
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return values_as_json(value.tolist(), where)
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        from ovforge.model.pictures import picture_name

        return picture_name(value)
    raise PluginError(
        f"a {type(value).__name__} has no form in JSON", where=where, hint="The result's class should define as_json()."
    )


_SHOWN = 400
"""Letters of a value that a line shows."""


def _shown(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(values_as_json(value), ensure_ascii=False)
    except PluginError:
        text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@dataclass
class ImagesResult(Result):
    """Pictures, with the seed of each, and the latents they were decoded from.

    `latents` are float32 (pictures, channels, height, width). A run that ends before the last step has no pictures.
    """

    suffixes: ClassVar[tuple[str, ...]] = (*PICTURE_SUFFIXES, ".npy")

    images: Sequence[Image.Image] = ()
    seeds: Sequence[int] = ()
    latents: NDArray[np.float32] | None = None

    def files(self, path: Path, *, quick: bool = False) -> Iterator[tuple[Path, bytes]]:
        """Yield pictures; `x.png` becomes `x-1.png`, `x-2.png`... if there are several. `x.npy` gets the latents.

        A picture carries its own provenance (one seed) in its metadata, but for .bmp, which has no room for it:
        `warnings` says so. `quick` compresses PNG less.
        """
        if path.suffix.lower() == ".npy":
            if self.latents is None:
                raise InputError("there are no latents", where=str(path), hint="Name a picture: .png, .jpg, .webp.")
            yield path, _npy(self.latents)
            return
        if not self.images:
            raise InputError("there are latents and no picture", where=str(path), hint="Name a .npy file instead.")
        several = len(self.images) > 1
        for number, image in enumerate(self.images, start=1):
            file = path.with_stem(f"{path.stem}-{number}") if several else path
            yield file, self._encode(number - 1, image, file, quick)

    def _encode(self, position: int, image: Image.Image, file: Path, quick: bool) -> bytes:
        from PIL import Image as Pillow

        kind = Pillow.registered_extensions()[file.suffix.lower()]
        options = provenance_options(self.provenance_of(position), kind)
        if not options and self.provenance:
            why = "which has no room for so much" if kind == "JPEG" else "which has no place for it"
            self.warnings.append(f"{file} does not carry what it was made with: it is a {kind} file, {why}")
        if kind == "PNG" and quick:
            options["compress_level"] = 1
        if kind in ("JPEG", "BMP") and image.mode != "L":
            image = image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    def lines(self) -> list[str]:
        """Return nothing: the files are shown."""
        return []

    def preview(self) -> Image.Image | None:
        """Return the first picture."""
        return self.images[0].convert("RGB") if self.images else None

    def is_empty(self) -> bool:
        """Say whether there are neither pictures nor latents."""
        return not self.images and self.latents is None

    def as_json(self) -> Any:
        """Return width and height in pixels, and seed, of each picture."""
        seeds = [*self.seeds, *[None] * (len(self.images) - len(self.seeds))]
        return [
            {"width": image.width, "height": image.height, "seed": seed}
            for image, seed in zip(self.images, seeds, strict=False)
        ]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of `ovforge.model.METRICS`, if there are pictures."""
        from ovforge.model.metrics import METRICS

        return tuple(METRICS) if self.images else ()

    def compare(self, reference: Self, metric: str = "ssim") -> float:
        """Return a metric's mean over the pictures. Raises InputError if they differ in number or size."""
        import numpy as np

        from ovforge.model.metrics import METRICS

        self._check_metric(metric)
        ours, theirs = [image.size for image in self.images], [image.size for image in reference.images]
        if ours != theirs:
            raise InputError(
                f"pictures of {_sizes(ours)} pixels cannot be compared with pictures of {_sizes(theirs)}",
                hint="Compare pictures of one size.",
            )
        pairs = zip(self.images, reference.images, strict=True)
        measure = METRICS[metric].measure
        return statistics.fmean(measure(np.asarray(a.convert("RGB")), np.asarray(b.convert("RGB"))) for a, b in pairs)

    def compact(self) -> Self:
        """Return it without latents, if there are pictures."""
        return dataclasses.replace(self, latents=None) if self.images else self

    def provenance_of(self, position: int) -> Provenance:
        """Return the provenance of one picture, from which it alone is made again."""
        if len(self.images) == 1:
            return self.provenance
        inputs = {**self.provenance.get("inputs", {}), "seed": self.seeds[position], "count": 1}
        return {**self.provenance, "inputs": inputs}


def provenance_options(provenance: Provenance, kind: str) -> dict[str, Any]:
    """Return what Pillow's `save` takes for a file of a `kind` to carry its provenance: see `read_provenance`.

    `kind` is Pillow's name of a format, such as PNG. Nothing is returned for one that has no room for it.
    """
    from PIL import Image as Pillow
    from PIL.PngImagePlugin import PngInfo

    # Always ASCII: what a prompt holds must not depend on a reader's idea of character sets.
    text = json.dumps(values_as_json(provenance, "provenance"), sort_keys=True)
    if kind == "PNG":
        chunks = PngInfo()
        chunks.add_itxt(PNG_KEY, text)
        return {"pnginfo": chunks}
    named, exif = f'{{"{PNG_KEY}": {text}}}'.encode(), Pillow.Exif()
    if kind == "GIF":
        return {"comment": named}
    if kind not in _EXIF_FORMATS or (kind == "JPEG" and len(text) >= _EXIF_LIMIT):
        return {}
    if kind == "TIFF":
        exif[_DESCRIPTION] = named.decode()
    else:
        exif.get_ifd(_EXIF)[_USER_COMMENT] = _ASCII + named
    return {"exif": exif}


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes) or "no"


def _npy(array: NDArray[np.float32]) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def read_provenance(path: Path) -> Provenance:
    """Return the provenance in a picture that ovforge wrote. Raises InputError if it has none."""
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with Pillow.open(path) as image:
            text = _stored(image)
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path)) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        raise InputError(f"not a readable picture: {error}", where=str(path)) from error
    if text is None:
        raise InputError(
            "the picture carries no ovforge provenance",
            where=str(path),
            hint="Only .png, .jpg, .webp, .gif and .tif files that ovforge wrote, and no other program has saved "
            "again, can be run.",
        )
    value = parse_object(text, f"{path}: its provenance", size=_PROVENANCE_LIMIT, error=InputError)
    value = value.get(PNG_KEY, value)  # where others write comments, too, it stands under our name
    if not isinstance(value, dict):
        raise InputError("the picture's provenance is damaged: it is not a table", where=str(path))
    for key, kind in _PROVENANCE.items():
        if key in value and not isinstance(value[key], kind):
            raise InputError(f"the picture's provenance is damaged: {key} is not a {kind.__name__}", where=str(path))
    if "config" not in value or "inputs" not in value:
        raise InputError("the picture's provenance is damaged: it has no config or no inputs", where=str(path))
    return value


def _stored(image: Image.Image) -> str | None:
    """Return the text that a picture's metadata holds under our name, or None."""
    text = image.info.get(PNG_KEY)
    if isinstance(text, str):
        return text
    comment = image.info.get("comment") if image.format == "GIF" else _exif_comment(image.getexif(), image.format)
    if isinstance(comment, bytes):
        comment = comment.removeprefix(_ASCII).rstrip(b"\0 ").decode("ascii", "replace")
    return comment if isinstance(comment, str) and comment.startswith(f'{{"{PNG_KEY}": ') else None


def _exif_comment(exif: Image.Exif, kind: str | None) -> Any:
    return exif.get(_DESCRIPTION) if kind == "TIFF" else exif.get_ifd(_EXIF).get(_USER_COMMENT)
