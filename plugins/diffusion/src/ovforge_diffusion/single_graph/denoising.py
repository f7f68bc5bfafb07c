"""The steps of a run inside a graph: as a loop whose body holds the denoiser once, or one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from ovforge.errors import ModelError
from ovforge_diffusion.architectures.base import Architecture
from ovforge_diffusion.single_graph.joining import constant, converted, join, part, reshaped, rows_of, shape_of
from ovforge_diffusion.single_graph.loops import Body
from ovforge_diffusion.single_graph.sampler import LinearSampler

__all__ = ["Guided", "Network", "in_a_loop", "one_after_another"]

Array = NDArray[np.float32]
Values = Mapping[str, ov.Output]


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance: by `scale`, float32 (1,), in the calls that `acts` marks with 1, float32 (calls,).

    Outside of them the prediction is that of the prompt alone. `rescale` as in `ovforge_diffusion.guidance`.
    """

    scale: ov.Output
    acts: Array
    rescale: float


@dataclass(frozen=True)
class Network:
    """A denoiser, and how often the latents stand in its batch: once for each half."""

    model: ov.Model
    architecture: Architecture
    halves: int

    @property
    def role(self) -> str:
        """Its role."""
        return self.architecture.denoiser

    def check(self, timesteps: Array) -> None:
        """Raise ModelError for timesteps that its input would round."""
        kind = self._timestep().get_element_type()
        if kind.is_integral() and (timesteps % 1).any():
            raise ModelError(
                f"the scheduler's timesteps have fractions, and it takes {kind.get_type_name()}",
                where=self.role,
                hint="Leave optimize = false out, or add the transform 'exact-timesteps'.",
            )

    def predict(
        self, seen: ov.Output, timestep: ov.Output, values: Values, scale: ov.Output | None, rescale: float
    ) -> ov.Output:
        """Return the guided prediction for latents (pictures, ...) at a timestep, float32 (1,)."""
        sample = seen if self.halves == 1 else ops.concat([seen] * self.halves, 0).output(0)
        inputs = {self.architecture.sample: sample, "timestep": self._told(timestep, sample), **values}
        output = converted(join(self.model, self.role, inputs).values[0], ov.Type.f32)
        # Models that were converted for any size leave open which one they give back, even if it is fixed.
        shape = [side.get_length() if side.is_static else -1 for side in sample.get_partial_shape()]
        axis, own = self.architecture.channel_axis, self.architecture.given_channels
        output = reshaped(output, [*shape[:axis], own or shape[axis], *shape[axis + 1 :]])
        if own and own != shape[axis]:  # what comes after them is a variance, which no sampling method takes
            output = part(output, 0, shape[axis], axis)
        if scale is None:
            return output
        without, along = (ops.split(output, constant(0), 2).output(half) for half in (0, 1))
        guided = ops.add(without, ops.multiply(ops.subtract(along, without), scale))
        if rescale:
            ratio = ops.divide(_deviation(along), _deviation(guided.output(0)))
            factor = ops.add(ops.multiply(ratio, _single(rescale)), _single(1 - rescale))
            guided = ops.multiply(guided, factor)
        if self.architecture.keeps_norm:
            guided = ops.multiply(guided, ops.divide(_norm(along), _norm(guided.output(0))))
        return guided.output(0)

    def _timestep(self) -> ov.Output:
        for port in self.model.inputs:
            if "timestep" in port.names:
                return port
        raise ModelError("it has no input 'timestep'", where=self.role, hint="Convert the model again.")

    def _told(self, timestep: ov.Output, sample: ov.Output) -> ov.Output:
        """Return a timestep in the shape that the network takes: none, one for all, or one for each row."""
        shape = self._timestep().get_partial_shape()
        if shape.rank.is_static and not len(shape):
            return ops.squeeze(timestep, constant([0])).output(0)
        fixed = shape[0].get_length() if shape.rank.is_static and shape[0].is_static else None
        if fixed == 1 or (fixed is None and not self.architecture.timestep_rows):
            return timestep
        rows = constant([fixed]) if fixed else rows_of(sample)
        return ops.broadcast(timestep, rows).output(0)


def in_a_loop(
    network: Network,
    sampler: LinearSampler,
    latents: ov.Output,
    noise: ov.Output | None,
    values: Values,
    guided: Guided | None,
) -> ov.Output:
    """Return the last latents of a run that begins with noise `latents`, (pictures, ...); `noise` is (draws, ...).

    The loop hands on all latents of the run at once, (calls + 1, pictures, ...), as far as they are known by then: each
    call takes its own, and adds what its prediction gives to each that comes later. So it remembers as many predictions
    as a method wants, and the sums are in float32 whatever the network computes in.
    """
    body = Body()
    network = replace(network, model=_with_plain_norms(network.model))
    rank = len(latents.get_partial_shape())
    wide = [-1, *[1] * rank]
    first = ops.multiply(_column(sampler.start, rank), ops.unsqueeze(latents, constant([0])))
    state = body.parameter(first.output(0))
    place = body.sliced(np.arange(sampler.calls, dtype=np.int64))
    scale = body.sliced(sampler.scales)
    weights = body.sliced(np.ascontiguousarray(sampler.outputs.T))
    timestep = body.sliced(sampler.timesteps)
    seen = ops.multiply(ops.squeeze(ops.gather(state, place, constant(0)), constant([0])), scale).output(0)
    inside = {name: body.invariant(value) for name, value in values.items()}
    strength = None
    if guided is not None:
        acts, whole = body.sliced(guided.acts), body.invariant(guided.scale)
        strength = ops.add(ops.multiply(acts, ops.subtract(whole, _single(1))), _single(1)).output(0)
    output = network.predict(seen, timestep, inside, strength, guided.rescale if guided else 0.0)
    column = ops.reshape(weights, constant(wide), False)
    following = ops.add(state, ops.multiply(column, ops.unsqueeze(output, constant([0]))))
    if noise is not None:
        for rows, column_weights in _noise_by_call(sampler, noise):
            drawn = body.sliced_value(rows)
            column = ops.reshape(body.sliced(column_weights), constant(wide), False)
            following = ops.add(following, ops.multiply(column, drawn))
    end = body.run(sampler.calls, first.output(0), following.output(0))
    return ops.squeeze(part(end, -1, 2**31 - 1, 0), constant([0])).output(0)


def one_after_another(
    network: Network,
    sampler: LinearSampler,
    latents: ov.Output,
    noise: ov.Output | None,
    values: Values,
    guided: Guided | None,
) -> ov.Output:
    """Return the same without a loop: the denoiser's operations once for each call, its weights once."""
    draws = [] if noise is None else [
        ops.squeeze(part(noise, n, n + 1, 0), constant([0])).output(0) for n in range(sampler.draws)
    ]  # fmt: skip
    outputs: list[ov.Output] = []

    def latents_at(number: int) -> ov.Output:
        weights = [sampler.start[number], *sampler.outputs[number, : len(outputs)], *sampler.noise[number]]
        terms = [
            ops.multiply(term, _single(weight)).output(0)
            for weight, term in zip(weights, [latents, *outputs, *draws], strict=True)
            if weight
        ]
        total = terms[0]
        for term in terms[1:]:
            total = ops.add(total, term).output(0)
        return total

    for call in range(sampler.calls):
        seen = ops.multiply(latents_at(call), _single(sampler.scales[call])).output(0)
        strength = None
        if guided is not None:
            strength = guided.scale if guided.acts[call] else constant(np.ones(1, np.float32))
        told = constant(sampler.timesteps[call : call + 1])
        outputs.append(network.predict(seen, told, values, strength, guided.rescale if guided else 0.0))
    return latents_at(sampler.calls)


def _with_plain_norms(model: ov.Model) -> ov.Model:
    """Return a copy that normalizes groups by plain operations (Wu and He 2018): equal to rounding.

    OpenVINO 2026.4's CPU has a group normalization of known size only as a part of its own fused operations, which it
    makes in no body of a loop.
    """
    copy = model.clone()
    for node in copy.get_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        value, weight, bias = (node.input_value(number) for number in range(3))
        attributes = node.get_attributes()
        groups, rank = int(attributes["num_groups"]), len(value.get_partial_shape())
        flat = ops.reshape(value, constant([0, groups, -1]), True)
        normal = ops.mvn(flat, constant([2]), True, float(attributes["epsilon"]), "INSIDE_SQRT")
        shaped = ops.reshape(normal, shape_of(value), False)
        wide = constant([1, -1, *[1] * (rank - 2)])
        scaled = ops.multiply(shaped, ops.reshape(weight, wide, False))
        moved = ops.add(scaled, ops.reshape(bias, wide, False))
        for user in node.output(0).get_target_inputs():
            user.replace_source_output(moved.output(0))
    return copy


def _noise_by_call(sampler: LinearSampler, noise: ov.Output) -> list[tuple[ov.Output, Array]]:
    """Return draws in the order of calls, (calls, pictures, ...), and their weights, (calls, calls + 1).

    There is one such pair for each draw of a call; calls that draw less get some noise times zero.
    """
    pairs = []
    most = max(sampler.drawn_at.count(call) for call in range(sampler.calls))
    for turn in range(most):
        order, weights = np.zeros(sampler.calls, np.int64), np.zeros((sampler.calls, sampler.calls + 1), np.float32)
        for call in range(sampler.calls):
            own = [draw for draw, at in enumerate(sampler.drawn_at) if at == call]
            if turn < len(own):
                order[call], weights[call] = own[turn], sampler.noise[:, own[turn]]
        pairs.append((ops.gather(noise, constant(order), constant(0)).output(0), weights))
    return pairs


def _column(numbers: Array, rank: int) -> ov.Output:
    return constant(np.ascontiguousarray(numbers.reshape(-1, *[1] * rank)))


def _single(number: float) -> ov.Output:
    return constant(np.array([number], np.float32))


def _norm(value: ov.Output) -> ov.Output:
    """Return the norm along the last axis, (..., 1)."""
    total = ops.reduce_sum(ops.multiply(value, value), constant([-1]), True)
    return ops.maximum(ops.sqrt(total), _single(float(np.finfo(np.float32).tiny))).output(0)


def _deviation(value: ov.Output) -> ov.Output:
    """Return torch's standard deviation of each picture, (pictures, 1, ...): by count - 1."""
    shape = value.get_partial_shape()
    axes = constant(list(range(1, len(shape))))
    count = int(np.prod([side.get_length() for side in list(shape)[1:]]))
    centred = ops.subtract(value, ops.reduce_mean(value, axes, True))
    total = ops.reduce_sum(ops.multiply(centred, centred), axes, True)
    return ops.sqrt(ops.multiply(total, _single(1 / (count - 1)))).output(0)
