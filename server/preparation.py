"""What a request asks for, held to the model's limits and resolved: every parameter with its value, every problem.

In two stages: `problems` needs no tokens and takes no time; `resolve` comes after admission.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from server.engine.messages import Ready
from server.engine.request import SamplingParams
from server.generation import ErrorCode, GenerationRequest, GrammarKind, Problem, Refusal
from server.speech import Speech
from server.text.grammar import GrammarProblem, compile_grammar
from server.text.template import TemplateError, message_problems
from server.text.tokenizer import ModelText
from server.text.tools import ToolFormat, call_grammar

# What a parameter is when neither the request nor the model's generation_config.json says.
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}

DEFAULT_MAX_NEW_TOKENS = 256  # where there is room

MAX_COMPILED = 256
_INLINE_CHARACTERS = 2048  # a text up to this long is tokenized on the event loop: a thread would take longer


def context_of(ready: Ready) -> int:
    """Tokens of one sequence: what the model allows, or what the cache holds (the last token needs no place)."""
    return min(ready.max_model_len, ready.num_blocks * ready.block_size + 1)


@dataclass(frozen=True, slots=True)
class Preparation:
    """Borrows everything: the engine's limits, the model's text side, threads for long texts, and for grammars.

    compiled: grammars that were found sound lately, by what was sent.
    """

    ready: Ready
    text: ModelText
    executor: Executor
    compiler: Executor
    compiled: dict[str, str]

    def problems(self, request: GenerationRequest) -> list[Problem]:
        """What is wrong with a request that the model's limits show without tokenizing."""
        ready, text = self.ready, self.text
        found: list[Problem] = []
        context, vocabulary = context_of(ready), ready.vocab_size
        if request.max_new_tokens is not None and request.max_new_tokens >= context:
            found.append(
                Problem(
                    "max_new_tokens",
                    f"max_new_tokens must leave room for a prompt in the context of {context} tokens.",
                    request.max_new_tokens,
                    f"1 to {context - 1}",
                )
            )
        if request.top_k is not None and request.top_k > vocabulary:
            text_top_k = f"top_k must not exceed the vocabulary of {vocabulary} tokens."
            found.append(Problem("top_k", text_top_k, request.top_k, f"0 to {vocabulary}; 0 is off"))
        for name, ids in (
            ("prompt_token_ids", request.prompt_token_ids or ()),
            ("stop_token_ids", request.stop_token_ids),
            ("logit_bias", request.logit_bias),
            ("allowed_token_ids", request.allowed_token_ids),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
                bad = next(token_id for token_id in ids if not 0 <= token_id < vocabulary)
                message = f"{name} must be ids in the vocabulary; {bad} is not."
                found.append(Problem(name, message, bad, f"0 to {vocabulary - 1}"))
        for name in ("logprobs", "prompt_logprobs", "explain"):
            wanted = getattr(request, name)
            if wanted is not None and wanted > vocabulary:
                message = f"{name} must not exceed the vocabulary of {vocabulary} tokens."
                found.append(Problem(name, message, wanted, f"up to {vocabulary}"))
        ending = {*request.stop_token_ids, *(() if request.ignore_eos else ready.eos_token_ids)}
        if request.allowed_token_ids and request.min_new_tokens and not set(request.allowed_token_ids) - ending:
            message = "allowed_token_ids must hold a token that does not end the text, as min_new_tokens asks for some."
            found.append(Problem("allowed_token_ids", message, None, "another token id"))
        if request.tools and request.tool_choice == "auto" and text.tool_format is None:
            message = "This model's chat template knows no tools: tool_choice may be required, or a function."
            found.append(Problem("tools", message, None, "[]"))
        if request.grammar is not None:
            found += _against_a_grammar(request, request.grammar[0])
        elif self._calls_as_declared(request) is not None:
            found += _against_a_grammar(request, "tools of which one must be called, or that are strict")
        if request.messages is not None:
            if text.template is None:
                message = "This model has no chat template: send the whole text as `prompt`."
                found.append(Problem("messages", message, None, "prompt or prompt_token_ids"))
            for where, allowed in message_problems(request.messages):
                found.append(Problem(where, f"{where} must be {allowed}.", None, allowed))
        return found

    async def resolve(self, request: GenerationRequest) -> tuple[list[int], SamplingParams]:
        """The prompt's tokens, and every parameter with its value. Raises Refusal."""
        prompt = await self.prompt(request)
        return prompt, self.params(request, prompt, await self.grammar(request))

    async def prompt(self, request: GenerationRequest) -> list[int]:
        """Template and tokens; a long text in a thread, where the tokenizer lets others run. Raises Refusal."""
        ids = await self._encoded(request)
        kept = request.truncate_prompt_tokens
        return ids if kept is None else ids[-kept:]

    async def _encoded(self, request: GenerationRequest) -> list[int]:
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)

        def encode() -> list[int]:
            if request.messages is not None:
                return self.text.encode_messages(request.messages, request.tools)
            return self.text.encode(request.prompt or "", request.add_special_tokens)

        size = len(request.prompt or "") + sum(_content_size(message) for message in request.messages or ())
        try:
            if size <= _INLINE_CHARACTERS:
                return encode()
            return await asyncio.get_running_loop().run_in_executor(self.executor, encode)
        except TemplateError as error:
            raise Refusal("invalid_request", [Problem("messages", f"{error}")]) from error

    def prompt_text(self, request: GenerationRequest, prompt: list[int]) -> str:
        """What `echo` puts in front: the text that was sent, else that of the tokens."""
        if request.prompt is not None and request.truncate_prompt_tokens is None:
            return request.prompt
        return self.text.decode(prompt, request.skip_special_tokens)

    async def grammar(self, request: GenerationRequest) -> str:
        """The request's grammar, compiled in a thread; "" without one. Raises Refusal: `unsupported_grammar` for one
        that may be right and is not carried out."""
        wanted = request.grammar or self._calls_as_declared(request)
        if wanted is None:
            return ""
        kind, value = wanted
        key = json.dumps([kind, value])
        found = self.compiled.get(key)
        if found is None:
            try:
                loop = asyncio.get_running_loop()
                found = await loop.run_in_executor(self.compiler, compile_grammar, kind, value)
            except GrammarProblem as problem:
                code: ErrorCode = "unsupported_grammar" if problem.unsupported else "invalid_request"
                found_in = Problem(kind, f"{problem}", None, "another grammar")
                if request.grammar is None:
                    found_in = Problem("tools", f"tools: their {problem}", None, "other parameters of the functions")
                raise Refusal(code, [found_in]) from problem
            self.compiled[key] = found
            if len(self.compiled) > MAX_COMPILED:
                del self.compiled[next(iter(self.compiled))]
        return found

    def _calls_as_declared(self, request: GenerationRequest) -> tuple[GrammarKind, str] | None:
        """The grammar of answers that must call a tool, or must call as a strict tool declares."""
        demanded = request.tool_choice != "auto"
        if not request.tools or not (demanded or any(tool["function"].get("strict") for tool in request.tools)):
            return None
        named = request.tool_choice.partition("function:")[2]
        tools = [tool for tool in request.tools if not named or tool["function"]["name"] == named]
        parallel = request.parallel_tool_calls and not named
        return "grammar", call_grammar(self.tool_format, tools, parallel, free_text=not demanded)

    @property
    def tool_format(self) -> ToolFormat:
        """How calls are written: as the model knows it, or where its template knows no tools, as most do."""
        return self.text.tool_format or "hermes"

    def speech(self, request: GenerationRequest, prompt: list[int]) -> Speech | None:
        """What tells reasoning and calls from text; None where the text is only text."""
        thinks = self.text.thinks and request.grammar is None and not (request.tools and request.tool_choice != "auto")
        if not request.chat or not (thinks or request.tools):
            return None
        end = self.text.decode(prompt[-8:], skip_special_tokens=False).rstrip()
        form = self.tool_format if request.tools else None
        return Speech(request.n, form, thinks, inside=end.endswith("<think>"))

    def params(self, request: GenerationRequest, prompt: list[int], grammar: str = "") -> SamplingParams:
        """Every parameter with its value. Raises Refusal for what only the tokens show."""
        max_new_tokens = self._max_new_tokens(request, prompt)
        if request.min_new_tokens > max_new_tokens:
            message = f"min_new_tokens must not exceed max_new_tokens, which is {max_new_tokens} here."
            raise Refusal(
                "invalid_request",
                [Problem("min_new_tokens", message, request.min_new_tokens, f"0 to {max_new_tokens}")],
            )
        defaults = {**DEFAULTS, **self.text.generation_defaults}

        def value(name: str) -> float:
            given = getattr(request, name)
            return float(defaults[name] if given is None else given)

        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=request.min_new_tokens,
            temperature=value("temperature"),
            top_k=max(0, int(value("top_k"))),
            top_p=value("top_p"),
            min_p=request.min_p,
            typical_p=value("typical_p"),
            repetition_penalty=value("repetition_penalty"),
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=request.seed if request.seed is not None else secrets.randbelow(2**53),
            logit_bias=tuple(sorted(request.logit_bias.items())),
            stop_token_ids=request.stop_token_ids,
            ignore_eos=request.ignore_eos,
            allowed_token_ids=tuple(sorted(set(request.allowed_token_ids))),
            bad_words=self._bad_words(request.bad_words),
            grammar=grammar,
            num_logprobs=request.logprobs,
            num_prompt_logprobs=request.prompt_logprobs,
            explain=request.explain,
        )

    def _max_new_tokens(self, request: GenerationRequest, prompt: list[int]) -> int:
        """As asked for, or as much as there is room for. Raises Refusal."""
        param = "messages" if request.messages is not None else "prompt"
        param = "prompt_token_ids" if request.prompt_token_ids is not None else param
        if not prompt:
            message = "The prompt is empty: at least one token is needed."
            raise Refusal("invalid_request", [Problem(param, message, None, "at least one token")])
        context = context_of(self.ready)
        room = context - len(prompt)
        wanted = request.max_new_tokens
        if room < 1 or (wanted or 0) > room:
            message = f"The prompt has {len(prompt)} tokens"
            message += f" and max_new_tokens is {wanted}" if wanted is not None else ""
            message += f"; together with at least one new token they may be {context} at most."
            if room >= 1:
                message = (
                    f"The prompt's {len(prompt)} tokens and max_new_tokens {wanted} exceed the context of {context}."
                )
                problem = Problem("max_new_tokens", message, wanted, f"1 to {room}")
            else:
                problem = Problem(param, message, len(prompt), f"up to {context - 1} tokens")
            raise Refusal("context_length_exceeded", [problem])
        return wanted if wanted is not None else min(DEFAULT_MAX_NEW_TOKENS, room)

    def _bad_words(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Each as its tokens at the begin of a text and in the middle of one: after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, " " + word.lstrip(" ")):
                ids = tuple(self.text.encode(text, add_special_tokens=False))
                if ids:
                    found[ids] = None
        return tuple(found)


def _against_a_grammar(request: GenerationRequest, kind: str) -> list[Problem]:
    """What would end an output before its grammar does, or leave it nothing: whatever stops is a match."""
    given = {
        "stop": request.stop,
        "stop_token_ids": request.stop_token_ids,
        "ignore_eos": request.ignore_eos,
        "allowed_token_ids": request.allowed_token_ids,
    }
    why = "where the grammar says when the text ends"
    return [
        Problem(name, f"{name} cannot be combined with {kind}, {why}.", None, "leave it out")
        for name, value in given.items()
        if value
    ]


def effective_parameters(params: SamplingParams) -> dict[str, Any]:
    """Every resolved parameter of sampling by its name in requests: the answer to `dry_run`."""
    shown = dataclasses.asdict(params)
    shown["logprobs"] = shown.pop("num_logprobs")
    shown["prompt_logprobs"] = shown.pop("num_prompt_logprobs")
    shown["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias}
    shown["allowed_token_ids"] = list(params.allowed_token_ids) or None
    del shown["bad_words"], shown["grammar"]  # as tokens and rules they are not what was sent
    return shown


def _content_size(message: dict[str, Any]) -> int:
    content = message.get("content") or ""
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)
