"""Chat templates: how a language model that reads prompts was taught to see what somebody says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ovforge.errors import ModelError, PluginError
from ovforge.store import parse_object

__all__ = ["ChatTemplate"]

_SAYING = "\ufdd0"
"""Stands for what somebody says: a code point that stands for nothing."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The template of the tokenizer in the folder `role` of `assets`: chat_template.jinja, or tokenizer_config.json's.

    It is a program of whoever made the model, and runs in jinja2's sandbox, as in transformers: it sees its own inputs
    alone. Raises ModelError for a missing or damaged template, PluginError if the package jinja2 is not installed.
    """

    def __init__(self, assets: Mapping[str, bytes], role: str) -> None:
        config = parse_object(assets.get(f"{role}/tokenizer_config.json", b"{}"), f"{role}/tokenizer_config.json")
        self._where = f"{role}/chat_template.jinja"
        if self._where in assets:
            source = assets[self._where].decode("utf-8", errors="replace")
        else:
            self._where = f"{role}/tokenizer_config.json: chat_template"
            source = _default(config.get("chat_template"), role)
        self._special = {name: _content(config[name]) for name in _SPECIAL if config.get(name)}
        self._template = self._compiled(source)

    def question(self, text: str, *, thinking: bool = True) -> str:
        """Return what a user says, and the beginning of the answer, before or after what the model thinks.

        Raises ModelError for a template that fails.
        """
        messages = [{"role": "user", "content": text}]
        try:
            written: str = self._template.render(
                **self._special, messages=messages, tools=None, documents=None, add_generation_prompt=True,
                enable_thinking=thinking,
            )  # fmt: skip
        except Exception as error:  # a template is a program: it can fail in any way
            raise self._damaged(error) from error
        return written

    def around(self, *, thinking: bool = True) -> tuple[str, str]:
        """Return what stands before and after whatever a user says.

        Raises ModelError for a template that fails, or changes what they say.
        """
        before, found, after = self.question(_SAYING, thinking=thinking).partition(_SAYING)
        if not found or self.question("", thinking=thinking) != before + after:
            raise ModelError(
                "the chat template does not take what somebody says as it is",
                where=self._where,
                hint="Run the pipeline itself, which applies the template to each prompt.",
            )
        return before, after

    def _compiled(self, source: str) -> Any:
        try:
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise PluginError(
                "a model's chat template needs the package jinja2", where=self._where, hint="Run: pip install jinja2"
            ) from error
        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        world.globals["raise_exception"] = _refuse
        try:
            return world.from_string(source)
        except Exception as error:  # beside its own errors, the parser runs out of stack, or of memory
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ModelError:
        return ModelError(
            f"the chat template cannot be applied: {error}",
            where=self._where,
            hint="It may be damaged: fetch the tokenizer again.",
        )


def _default(given: Any, role: str) -> str:
    """Return a template as tokenizer_config.json has it: a text, or several by name."""
    if isinstance(given, list):
        given = next((each.get("template") for each in given if each.get("name") == "default"), None)
    if not isinstance(given, str):
        raise ModelError(
            "the tokenizer has no chat template, without which prompts cannot be exactly those of diffusers",
            where=role,
            hint=f"Put the original model's {role}/chat_template.jinja, or tokenizer_config.json, into that folder.",
        )
    return given


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
