"""What loaders share that convert torch modules: weights without pickles, and ov.Models with the same bytes each time.

Torch and its friends are imported inside functions: a converted model runs without them.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from ovforge.errors import ModelError, PluginError
from ovforge.model import Source
from ovforge.store import parse_object, scratch_folder
from ovforge_convert.streaming import (
    EXACT,
    SMALL,
    Stored,
    Weight,
    keeping_compressed,
    noting_layers,
    place_weights,
)

if TYPE_CHECKING:
    import openvino as ov

__all__ = [
    "Port",
    "convert_module",
    "convert_tokenizer",
    "need",
    "pretrained",
    "quiet",
    "read_pickle",
    "read_safetensors",
    "settle_names",
]

_COUNTED = re.compile(r"[A-Z]\w*_\d+(\.\d+)*(_compressed)?")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"


def need(module: str, install: str) -> Any:
    """Import `module`. Raises PluginError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PluginError(f"converting a model needs {module}: {error}", hint=f"Run: {install}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of tracing, and what transformers logs and draws, to themselves."""
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


# -- weights ------------------------------------------------------------------------------------------------------


def read_safetensors(source: Source, hint: str) -> dict[str, Any]:
    """Return name -> torch tensor of a transformers folder: model.safetensors, or the shards that its index names.

    Half precision becomes float32. Raises ModelError, with `hint`, if there are none, or the file is damaged.
    """
    files = source.files()
    if _INDEX in files:
        try:
            names = set(parse_object(source.read(_INDEX), f"{source.name}: {_INDEX}")["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError("no valid index of weights", where=f"{source.name}: {_INDEX}") from error
        paths = sorted(str(name) for name in names)
    else:
        paths = [_WEIGHTS]
    weights: dict[str, Any] = {}
    for path in paths:
        if path not in files:
            raise ModelError(f"{path} is missing", where=source.name, hint=hint)
        weights |= _tensors(source, path)
    return {name: _checked(tensor, name, source) for name, tensor in weights.items()}


def _tensors(source: Source, path: str) -> dict[str, Any]:
    """Return a file's tensors, mapped if the file is plain."""
    safetensors = importlib.import_module("safetensors")
    torch_files = importlib.import_module("safetensors.torch")
    try:
        local = source.local(path)
        return dict(torch_files.load(source.read(path)) if local is None else torch_files.load_file(local))
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}",
            where=source.name,
            hint="The file is cut off or damaged: fetch it again.",
        ) from error


def read_pickle(source: Source, path: str) -> dict[str, Any]:
    """Return the state dict of a torch file, opened with weights_only: no code of it is run.

    Raises ModelError for a file that holds anything but tensors in plain containers.
    """
    import io
    import pickle

    import torch

    local = source.local(path)
    try:
        loaded = torch.load(local or io.BytesIO(source.read(path)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path} cannot be read as weights: {str(error).splitlines()[0] if str(error) else error!r}",
            where=source.name,
            hint="It is damaged, or holds more than weights, which is not opened: it could run code.",
        ) from error
    state = loaded.get("model", loaded.get("state_dict", loaded)) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} is not a dictionary of weights", where=source.name)
    return {str(name): _checked(tensor, str(name), source) for name, tensor in state.items()}


def _checked(tensor: Any, name: str, source: Source) -> Any:
    """Return a tensor, in float32 where it was shorter. Refuses NaN and infinity; a sum is enough to see them."""
    import torch

    if not tensor.is_floating_point():
        return tensor
    if tensor.element_size() != 4:
        tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise ModelError(
            f"{name} holds NaN or infinity", where=source.name, hint="The model is damaged: fetch it again."
        )
    return tensor


def pretrained(kind: str, config: Mapping[str, Any], weights: dict[str, Any], where: str) -> Any:
    """Return a transformers module of class `kind` for evaluation: every weight given, and nothing left over.

    transformers itself understands the names that its older versions wrote. Raises ModelError if config and weights
    do not belong together.
    """
    transformers = importlib.import_module("transformers")
    cls = getattr(transformers, kind)
    hint = "config.json and weights must come from one model: fetch both again."
    with quiet():
        try:
            settings = cls.config_class.from_dict(dict(config))
            settings.dtype = None  # the type of the stored weights: parts of a model would be made in it
        except Exception as error:  # whatever a class raises on a config, the config is what is wrong
            raise ModelError(f"no {kind} can be made of its config: {error}", where=where) from error
        try:
            model, found = cls.from_pretrained(
                None, config=settings, state_dict=weights, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except Exception as error:
            raise ModelError(f"no {kind} can be made of its config and weights: {error}", where=where) from error
    problems = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    problems += [f"{name} belongs nowhere" for name in sorted(found["unexpected_keys"])]
    problems += [f"{name} is {list(given)}, not {list(want)}" for name, given, want in sorted(found["mismatched_keys"])]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"the weights do not fit the config: {'; '.join(problems[:3])}{more}", where=where, hint=hint)
    return model.eval()


# -- models -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Port:
    """An input of a model: its name, shape (None is open), the shape that it is traced with, and its type."""

    name: str
    shape: tuple[int | None, ...]
    example: tuple[int, ...]
    type: Literal["f32", "i64", "boolean"] = "f32"


def convert_module(
    role: str,
    module: Any,
    forward: Callable[..., Any],
    inputs: Sequence[Port],
    outputs: Sequence[str],
    weights: Stored,
    exact: Callable[[ov.Node], bool] | None = None,
    values: Mapping[str, Weight] | None = None,
    disk: bool = False,
) -> ov.Model:
    """Trace `forward` of a torch module and convert; weights are stored as "f16" or "f32".

    `values` are weights by name that the module itself need not hold: `streamed_names` says for which it can be.
    If there are gigabytes of them and `disk` allows it, they lie in a temporary file that has no name.

    The module itself is traced, with `forward` instead of its own, so that nodes have the names of its parameters.
    With "f16", constants stay in float32 where `exact` says so: by default those of up to 4096 values.
    """
    import openvino as ov
    import torch
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    types = {"f32": torch.float32, "i64": torch.int64, "boolean": torch.bool}
    example = {port.name: torch.ones(port.example, dtype=types[port.type]) for port in inputs}
    own, module.forward = module.forward, forward
    try:
        with torch.no_grad(), quiet():
            with noting_layers(module) as ran:
                traced = TorchScriptPythonDecoder(module, example_input=example, trace_kwargs={"check_trace": False})
            frontend = FrontEndManager().load_by_framework("pytorch")
            # What ov.convert_model does, without its pre-processing step, which takes longer than all the rest.
            loaded = frontend.load(traced)
            for place, port in zip(loaded.get_inputs(), inputs, strict=True):
                loaded.set_partial_shape(place, ov.PartialShape([-1 if side is None else side for side in port.shape]))
                loaded.set_element_type(place, getattr(ov.Type, port.type))
            model = frontend.convert(loaded)
    finally:
        module.forward = own
    if values:
        place_weights(model, values, weights, ran, disk=disk)
    with keeping_compressed(model):
        apply_moc_transformations(model, cf=False)
    for given, port in zip(model.inputs, inputs, strict=True):
        given.get_tensor().set_names({port.name})  # and no names of what the transformations took out
    for result, name in zip(model.outputs, outputs, strict=True):
        result.get_tensor().set_names({name})
    if weights == "f16":
        _halve_weights(model, exact or (lambda constant: constant.data.size <= SMALL))
    settle_names(role, model)
    return model


def _halve_weights(model: ov.Model, exact: Callable[[ov.Node], bool]) -> None:
    """Store weights in float16, all but the float32 constants that are to stay `exact`."""
    import openvino as ov
    from openvino._offline_transformations import compress_model_transformation

    kept = {
        node.get_friendly_name(): node.data.copy()
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
        and node.get_element_type() == ov.Type.f32
        and (node.get_friendly_name().endswith(EXACT) or exact(node))
    }
    compress_model_transformation(model)
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if name in kept and node.get_type_name() == "Convert":  # it has taken the constant's name
            node.output(0).replace(ov.opset13.constant(kept[name], name=name).output(0))


def settle_names(role: str, model: ov.Model) -> None:
    """Number what OpenVINO named by itself, in order: its own counter runs on through the process."""
    model.set_friendly_name(role)
    for number, node in enumerate(model.get_ordered_ops()):
        name = f"{node.get_type_name()}_{number}"
        if _COUNTED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(name)
        for port in node.outputs():
            names = port.get_tensor().get_names()
            if any(_COUNTED.fullmatch(each) for each in names):
                port.get_tensor().set_names({each for each in names if not _COUNTED.fullmatch(each)} | {name})


def convert_tokenizer(files: Mapping[str, bytes], kind: str, role: str, where: str, install: str) -> ov.Model:
    """Convert a tokenizer of transformers' class `kind`; it neither pads nor cuts.

    transformers reads tokenizers from files alone, so that these few are laid out in a private folder.
    """
    tokenizers = need("openvino_tokenizers", install)
    transformers = need("transformers", install)
    with scratch_folder() as folder:
        for path, data in files.items():
            (folder / PurePosixPath(path).name).write_bytes(data)
        try:
            with quiet():
                tokenizer = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
                model: ov.Model = tokenizers.convert_tokenizer(tokenizer, truncation=False)
        except Exception as error:  # the parsers of vocabularies raise bare Exception
            raise ModelError(
                f"the tokenizer cannot be converted: {error}",
                where=where,
                hint="Its files may be damaged: fetch them again.",
            ) from error
    settle_names(role, model)
    return model
