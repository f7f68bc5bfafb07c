"""Models of every format that OpenVINO reads, from bytes in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ovforge.errors import ModelError
from ovforge.model.memory import large_pages, memory_folder

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.model.sources import Source

__all__ = ["read_from_memory", "tensor_of"]


def read_from_memory(source: Source, file: PurePosixPath) -> ov.Model:
    """Read a model file without a path; "." is TensorFlow's SavedModel. Raises RuntimeError or ModelError."""
    from ovforge.model.runtime import core

    beside = {".xml": ".bin", ".pdmodel": ".pdiparams"}.get(file.suffix)
    weights = file.with_suffix(beside).as_posix() if beside else ""
    if file.suffix == ".xml" and weights in source.files():
        # First all bytes, then the parser: a source may find out while reading that a file is not what it should be.
        data = tensor_of(source, weights)
        try:
            xml = source.read(file.as_posix()).decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{file} is not XML: {error}", where=source.name) from error
        return core().read_model(xml, data)
    if file.suffix == ".xml":
        return core().read_model(source.read(file.as_posix()))
    if file.suffix == ".pdmodel":
        return core().read_model(source.read(file.as_posix()), source.read(weights))
    if file.suffix == ".onnx":
        return core().read_model(_whole_onnx(source, file))
    # TensorFlow's readers open paths only.
    with memory_folder(f"reading {file.name if file.name else 'a SavedModel'}") as memory:
        for path in source.files() if file.name == "" else [file.as_posix()]:
            memory.put(source, path)
        return core().read_model(memory.root / file)


def tensor_of(source: Source, path: str) -> ov.Tensor:
    """Return a file as a tensor of bytes, read (and decrypted) right into it."""
    import openvino as ov

    tensor = ov.Tensor(ov.Type.u8, ov.Shape([source.files()[path]]))
    if tensor.byte_size:
        large_pages(tensor.data.ctypes.data, tensor.byte_size)
        source.read_into(path, memoryview(tensor.data))
    return tensor


def _whole_onnx(source: Source, file: PurePosixPath) -> bytes:
    """Return an ONNX file with the weights inside that it keeps in other files.

    Read from memory, the runtime would look for those in the current folder.
    """
    data = source.read(file.as_posix())
    if b"\x0a\x08location" not in data:  # the entry of TensorProto.external_data that names a file
        return data
    try:
        import onnx
    except ImportError as error:
        raise ModelError(
            f"{file} keeps its weights in other files, and reading those from memory needs the package onnx",
            where=source.name,
            hint="Run: pip install onnx; or convert the model to OpenVINO IR before it is encrypted.",
        ) from error
    files: dict[str, bytes] = {}
    try:
        model = onnx.load_model_from_string(data)
        for tensor in _tensors(model.graph):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                info = onnx.external_data_helper.ExternalDataInfo(tensor)
                path = (file.parent / info.location).as_posix()
                weights = files.setdefault(path, files.get(path) or source.read(path))
                begin = info.offset or 0
                end = begin + info.length if info.length else len(weights)
                if not 0 <= begin <= end <= len(weights):
                    raise ModelError(f"{path} has no bytes {begin} to {end}", where=source.name)
                tensor.raw_data = weights[begin:end]
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        return bytes(model.SerializeToString())
    except ModelError:
        raise
    except Exception as error:  # protobuf's, for a damaged file or one of more than 2 GB
        raise ModelError(
            f"{file} with its weights cannot be read from memory: {error}",
            where=source.name,
            hint="Convert the model to OpenVINO IR before it is encrypted.",
        ) from error


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield every tensor of an ONNX graph that may lie in another file, in the graphs inside it, too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
