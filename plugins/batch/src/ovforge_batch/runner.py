"""What a process of a batch does: one pipeline, loaded once, and one item after another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovforge import Pipeline
from ovforge.config import PipelineConfig
from ovforge.errors import ConfigError, InputError, OvforgeError
from ovforge.store import Cache, scratch_folder
from ovforge_batch.outputs import Remote

__all__ = ["Runner"]


class Runner:
    """Makes the results of items. `order` is what all have in common, as JSON (see `Order.as_json`).

    `cache` replaces the one that the order names, on a machine that has one of its own. Raises OvforgeError if the
    pipeline cannot be loaded.
    """

    def __init__(self, order: Mapping[str, Any], cache: Cache | None = None) -> None:
        config = PipelineConfig.of(order["config"], where=order["where"])
        kept: Cache | str | None = cache if cache is not None and order["cache"] else order["cache"]
        self._pipeline = Pipeline.from_config(config, base=Path(order["base"]), cache=kept)
        self._folder = Path(order["folder"]) if order["folder"] else None
        self._remote = Remote(order["url"]) if order["url"] else None

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Return what came of an item: {"files", "seconds", "warnings"}, or {"error", "again"}.

        `item` holds inputs, seed, and the name of the result's file. If the order names neither folder nor URL, the
        answer also has `content`: name -> bytes. `again` says that another try may help: the inputs are not at fault.
        """
        try:
            if self._folder is not None:
                return self._made(item, self._folder)
            with scratch_folder() as folder:
                return self._sent(self._made(item, folder), folder)
        except OvforgeError as error:
            return {"error": str(error), "again": not isinstance(error, InputError | ConfigError)}
        except (OSError, MemoryError, RuntimeError) as error:
            return {"error": f"{type(error).__name__}: {error}", "again": True}

    def _made(self, item: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        pipeline, inputs = self._pipeline, item["inputs"]
        if "seed" in pipeline.inputs_model.model_fields and {**pipeline.config.input, **inputs}.get("seed") is None:
            inputs = {**inputs, "seed": item["seed"]}
        result = pipeline(**inputs)
        files = result.save(folder / item["file"])
        return {
            "files": [file.relative_to(folder).as_posix() for file in files],
            "seconds": round(result.timings.whole(), 4),
            "warnings": [warning.replace(f"{folder}/", "") for warning in result.warnings],
        }

    def _sent(self, answer: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Write the files of a folder behind the URL, or put them into the answer."""
        if self._remote is None:
            return {**answer, "content": {name: (folder / name).read_bytes() for name in answer["files"]}}
        for name in answer["files"]:
            self._remote.write(name, (folder / name).read_bytes())
        return answer
