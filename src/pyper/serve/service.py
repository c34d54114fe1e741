"""What the endpoints do, without HTTP: from a typed body to sequences of the engine."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyper.data import TextTokenizer
from pyper.data.chat_template import ChatTemplate
from pyper.generate import Request, SamplingConfig
from pyper.mixture import Mixture
from pyper.serve.answers import Answer, ChatAnswer, CompletionAnswer, TokenNames, Usage
from pyper.serve.api_error import bad_request
from pyper.serve.bodies import (
    MAX_CHOICES,
    MAX_INPUTS,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    Sampling,
)
from pyper.serve.embeddings import embed, embedding_object
from pyper.serve.engine_thread import EngineThread
from pyper.serve.generation import Generation
from pyper.serve.model_names import ModelNames
from pyper.serve.prompts import check_tokens, encode_messages, encode_text

_DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's; a chat goes on until the document or the context ends."""


@dataclass(frozen=True)
class Begun:
    """A request that the engine has accepted."""

    answer: Answer
    generation: Generation
    usage: Usage
    n_choices: int


@dataclass(frozen=True)
class Service:
    """One mixture and its engine. The methods raise ApiError, and PromptError from the engine."""

    mixture: Mixture
    tokenizer: TextTokenizer
    template: ChatTemplate
    names: ModelNames
    engine: EngineThread

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.mixture.settings.seq_len

    def _token_names(self) -> TokenNames:
        return TokenNames(self.tokenizer, self.mixture.settings.stop_ids)

    async def complete(self, body: CompletionBody) -> Begun:
        """Begin to answer /v1/completions."""
        expert = self.names.expert_of(body.model)
        limit = body.max_tokens or min(_DEFAULT_COMPLETION_TOKENS, self.context)
        self._check_size(limit, len(body.prompt) * (body.n or 1))
        prompts = [
            await self._tokens(p, "prompt", body.truncate_prompt_tokens) for p in body.prompt
        ]
        answer = CompletionAnswer(
            body.model, self.names.experts, self._token_names(), body.logprobs is not None
        )
        return await self._begin(answer, body, prompts, expert, body.logprobs, limit)

    async def chat(self, body: ChatBody) -> Begun:
        """Begin to answer /v1/chat/completions."""
        expert = self.names.expert_of(body.model)
        limit = body.max_completion_tokens or body.max_tokens or self.context
        self._check_size(limit, body.n or 1)
        messages = [{"role": m.role, "content": m.text} for m in body.messages]
        if mark := self.template.end_mark:
            body = body.model_copy(update={"stop": [*body.stop, mark]})
        prompt = await asyncio.to_thread(
            encode_messages,
            self.tokenizer,
            self.template,
            messages,
            self.context,
            keep=body.truncate_prompt_tokens,
        )
        answer = ChatAnswer(
            body.model, self.names.experts, self._token_names(), bool(body.logprobs)
        )
        return await self._begin(answer, body, [prompt], expert, body.n_logprobs, limit)

    async def embed(self, body: EmbeddingBody) -> dict[str, Any]:
        """Answer /v1/embeddings; texts are read one by one, others go on in between."""
        expert = self.names.expert_of(body.model)
        if len(body.input) > MAX_INPUTS:
            raise bad_request(f"`input` may hold {MAX_INPUTS} texts", "input")
        # Read, not written after: a text may fill the context.
        texts = [await self._tokens(x, "input", None, context=self.context + 1) for x in body.input]
        vectors = await self.engine.call([partial(embed, self.mixture, t, expert) for t in texts])
        if body.dimensions not in (None, len(vectors[0])):
            raise bad_request(f"`dimensions` can only be {len(vectors[0])}", "dimensions")
        encoding = body.encoding_format or "float"
        data = [embedding_object(i, vector, encoding) for i, vector in enumerate(vectors)]
        n_tokens = sum(len(tokens) for tokens in texts)
        return {
            "object": "list",
            "data": data,
            "model": body.model,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }

    async def _tokens(
        self, prompt: str | list[int], param: str, keep: int | None, context: int | None = None
    ) -> tuple[int, ...]:
        context = context or self.context
        if isinstance(prompt, str):
            # In a thread: a megabyte takes a while, and the others want their tokens.
            return await asyncio.to_thread(
                encode_text, self.tokenizer, prompt, context, keep=keep, param=param
            )
        return check_tokens(self.tokenizer, prompt, context, keep=keep, param=param)

    def _check_size(self, max_tokens: int, n_choices: int) -> None:
        """Before any text is encoded: a request may hold a hundred thousand."""
        if max_tokens > self.context:
            raise bad_request(
                f"`max_tokens` is {max_tokens:,}, the context holds {self.context:,}", "max_tokens"
            )
        if n_choices > MAX_CHOICES:
            raise bad_request(f"prompts × `n` may be {MAX_CHOICES}, not {n_choices}", "n")

    async def _begin(
        self,
        answer: Answer,
        body: Sampling,
        prompts: Sequence[tuple[int, ...]],
        expert: int | None,
        n_logprobs: int | None,
        limit: int,
    ) -> Begun:
        seed = secrets.randbits(62) if body.seed is None else body.seed
        requests = [
            Request(prompt, _sampling(body, limit, seed + place), expert, n_logprobs or 0)
            for prompt in prompts
            for place in range(body.n or 1)
        ]
        generation = await self.engine.submit(requests)
        usage = Usage(sum(len(prompt) for prompt in prompts))
        return Begun(answer, generation, usage, len(requests))


def _sampling(body: Sampling, max_new_tokens: int, seed: int) -> SamplingConfig:
    """The body's settings; what it leaves out is as in OpenAI's interface, not as in Pyper's."""
    return SamplingConfig(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        stop=tuple(body.stop),
        seed=seed % 2**63,
    )
