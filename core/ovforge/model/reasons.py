"""What OpenVINO says when it cannot do something: the line that tells, and what to do about it.

Its messages begin with places in its own source, name the check that failed, and give the reason last or in a list.
"""

from __future__ import annotations

import re

from ovforge.errors import ModelError

__all__ = ["OPENVINO_ERRORS", "reading_error", "reason_of"]

OPENVINO_ERRORS = (RuntimeError, UnicodeDecodeError, ValueError)
"""What OpenVINO's bindings raise: UnicodeDecodeError instead of a message that is not text in UTF-8."""

_LONGEST = 300

_NOISE = re.compile(
    r"Exception from|Check '|FrontEnd API failed with|Model wasn't fully converted|Summary:|Loading input model|"
    r"While validating|Conversion is failed for|.* with a message:$|FrontEnd::|Failed operations detailed log"
)
_INSIDE = re.compile(r"^(?:\[[\w ]+\] ?|-- |ir: )+")

_HINTS = (
    (
        r"No conversion rule|No translator|doesn't contain the operation|unsupported opset",
        "OpenVINO does not know this operation: export the model with standard operations, update OpenVINO, or name "
        "the library that has it.",
    ),
    (
        r"outside the base|resolves to|external data|externally stored",
        "Its weights lie in other files: they must be in the model's own folder, whole and of the same export.",
    ),
    (
        r"bin file|weights",
        "The .bin is missing, damaged or cut off, or another model's: copy or convert it again.",
    ),
    (
        r"rank has to be|dynamic|must be static|shape",
        "The graph's shapes do not fit each other or are not known: export it with fixed shapes or ranks.",
    ),
    (
        r"Unable to read the model|can't be parsed|cannot be parsed|no subgraphs|Could not open|parse",
        "It is not a file of this format, or it is damaged or cut off: copy or convert it again.",
    ),
)
_OTHERWISE = "If others can read it, update OpenVINO; else it may be damaged or cut off: copy or convert it again."


def reason_of(error: Exception) -> str:
    """Return the informative line of OpenVINO's message, in at most a few hundred characters."""
    text = error.object.decode("utf-8", "replace") if isinstance(error, UnicodeDecodeError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [_INSIDE.sub("", line) for line in lines if not _NOISE.match(_INSIDE.sub("", line))]
    checks = [match[1] for line in lines if (match := re.match(r"Check '(.+)' failed", line))]
    reason = (telling or checks or lines or ["unknown reason"])[0]
    reason = reason.partition(" Please check that")[0].removesuffix(".")
    return reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..."


def reading_error(error: Exception, path: str, where: str) -> ModelError:
    """Return the ModelError for a model file that OpenVINO could not read."""
    reason = reason_of(error)
    hint = next((hint for pattern, hint in _HINTS if re.search(pattern, reason, re.IGNORECASE)), _OTHERWISE)
    return ModelError(f"{path} cannot be read: {reason}", where=where, hint=hint)
