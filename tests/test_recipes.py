"""Recipes: a quantizer of any plugin with other defaults, under a name of their own."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ovforge import Plugins, hookimpl
from ovforge.config import PipelineConfig
from ovforge.config.pipeline import Use
from ovforge.config.schema import config_schema
from ovforge.contracts import QuantizerExtension, RecipeExtension, Report
from ovforge.errors import ConfigError, PluginError
from ovforge.plugins.catalogue import Registry
from ovforge.run.identity import step_dependencies
from ovforge.run.resolution import make_step
from ovforge.run.session import Session


class Scope(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    names: tuple[str, ...] = ()
    check: bool = True


class Options(BaseModel):
    """What the other plugin's quantizer takes; one of them has no default."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    limit: float = Field(gt=0, le=1, description="How far it may go.")
    mode: Literal["int8", "int4"] = Field("int8", description="The type.")
    roles: tuple[str, ...] = Field((), description="Models.")
    scope: Scope = Field(default_factory=Scope, description="What stays.")

    @model_validator(mode="after")
    def _together(self) -> Options:
        if self.mode == "int4" and self.limit > 0.5:
            raise ValueError("int4 goes no further than 0.5")
        return self


class Quantizer:
    def __init__(self, options: Options) -> None:
        self.options = options

    def quantize(self, *_: Any) -> Report:
        return Report(notes=[str(self.options)])


def module(name: str, *extensions: Any) -> types.ModuleType:
    made = types.ModuleType(name)

    @hookimpl
    def ovforge_quantizers() -> Iterator[Any]:
        yield from extensions

    made.ovforge_quantizers = ovforge_quantizers  # type: ignore[attr-defined]
    return made


WORKER = QuantizerExtension(
    name="round",
    summary="Rounds",
    config=Options,
    factory=Quantizer,
    needs=lambda o: "inputs" if o.roles else "nothing",
)


def recipe(**options: Any) -> RecipeExtension:
    return RecipeExtension(name="mine", summary="Recipe: mine", quantizer="round", options=options)


def plugins(*recipes: RecipeExtension, worker: bool = True, version: str = "1") -> Plugins:
    made = Plugins(Registry({}), found=())
    made.register(module("recipes", *recipes), "recipes", "7")
    if worker:
        made.register(module("worker", WORKER), "worker", version)
    return made


def step(found: Plugins, use: str, **options: Any) -> Any:
    return make_step(Session(found), "quantizer", Use(use, **options), "quantize.0", Path())


OURS = {"limit": 0.4, "mode": "int4", "roles": ["unet"], "scope": {"names": ["a"], "check": False}}


def test_a_recipe_is_its_quantizer_with_other_defaults() -> None:
    found = plugins(recipe(**OURS))
    ours, plain = step(found, "mine"), step(found, "round", **OURS)
    assert ours.chosen.options.model_dump() == plain.chosen.options.model_dump()
    assert isinstance(ours.chosen.options, Options) and isinstance(ours.chosen.options.scope, Scope)
    assert ours.chosen.extension.create(ours.chosen.options).quantize().notes == [str(plain.chosen.options)]
    assert ours.chosen.extension.needed(ours.chosen.options) == "inputs"
    without = step(found, "mine", roles=[]).chosen
    assert without.extension.needed(without.options) == "nothing"


def test_every_option_can_still_be_set() -> None:
    found = plugins(recipe(**OURS))
    changed = step(found, "mine", mode="int8", scope={"names": ["b"]}).chosen.options
    assert (changed.mode, changed.limit) == ("int8", 0.4)
    assert changed.scope == Scope(names=("b",))
    with pytest.raises(ConfigError, match="mine.*\n?.*mod"):
        step(found, "mine", mod="int8")
    with pytest.raises(ConfigError, match="no further than 0.5"):
        step(found, "mine", limit=0.9)


def test_the_cache_goes_by_who_does_the_work() -> None:
    """By the quantizer's plugin and version, not by the recipe's name: the same options are the same result."""

    def key(found: Plugins, use: str, **options: Any) -> dict[str, Any]:
        pipeline: Any = types.SimpleNamespace(protection=None, driver=None)
        return step_dependencies(step(found, use, **options), "models", pipeline)

    found = plugins(recipe(**OURS))
    assert key(found, "mine") == key(found, "round", **OURS)
    assert key(found, "mine")["plugin"] == "worker" and key(found, "mine")["version"].startswith("1+")
    assert key(found, "mine") != key(found, "mine", roles=["vae_decoder"])
    assert key(found, "mine") != key(plugins(recipe(**OURS), version="2"), "mine")


def test_lists_and_the_schema_know_recipes() -> None:
    found = plugins(recipe(**OURS))
    offers = {offer.extension.name: offer for offer in found.all("quantizer")}
    assert offers["mine"].plugin == "recipes" and offers["mine"].extension.summary == "Recipe: mine"
    [status] = [status for status in found.statuses() if status.name == "recipes"]
    assert status.provides == {"quantizer": {"mine": "Recipe: mine"}}
    choices = config_schema(found)["properties"]["quantize"]["items"]["anyOf"]
    table = next(c for c in choices if c.get("properties", {}).get("use", {}).get("const") == "mine")
    assert table["required"] == ["use"], "what the recipe sets need not be given"
    assert table["properties"]["mode"]["default"] == "int4"
    assert table["properties"]["mode"]["description"] == "The type."
    assert PipelineConfig.of({"task": "x", "load": "y", "quantize": ["mine"]}).quantize[0].use == "mine"


def test_without_its_quantizer_a_recipe_says_so_and_the_rest_goes_on() -> None:
    other = QuantizerExtension(name="other", summary="Another", factory=Quantizer)
    found = plugins(recipe(**OURS), worker=False)
    found.register(module("more", other), "more")
    with pytest.raises(PluginError, match=r"recipe 'mine' of recipes, quantizer 'round'"):
        found.find("quantizer", "mine")
    assert [offer.extension.name for offer in found.all("quantizer")] == ["other"]


def test_what_a_recipe_gets_wrong_is_said() -> None:
    with pytest.raises(PluginError, match="plain data"):
        recipe(scope=Scope())
    with pytest.raises(PluginError, match="no option 'mod'"):
        step(plugins(recipe(mod="int4")), "mine")
    with pytest.raises(ConfigError, match=r"(?s)mine.*mode"):
        step(plugins(recipe(limit=0.4, mode="int3")), "mine")
    of_a_recipe = RecipeExtension(name="theirs", summary="Recipe", quantizer="mine", options={})
    with pytest.raises(PluginError, match="which is a recipe, too"):
        plugins(recipe(**OURS), of_a_recipe).find("quantizer", "theirs")
