"""OpenAI-compatible routes over a `Scheduler`: models, completions, chat completions, and tokens of a text.

Clients written for OpenAI's API work unchanged. Features that this server lacks (tools, images) are refused in
OpenAI's error format, never ignored. A client that disconnects cancels its request. Only this file and its
neighbours openai_*.py know OpenAI's field names. They know nothing of the page.
"""

import asyncio
import contextlib
import hmac
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse

from smollm_jax.runtime.errors import require
from smollm_jax.serving.jobs import Asked
from smollm_jax.serving.limits import MOST_NEW, checked_choices, checked_stops, checked_top
from smollm_jax.serving.openai_choices import (
    ChatForm,
    Choice,
    CompletionForm,
    Form,
    Part,
    Prompt,
    Token,
    TokenTexts,
    body_of,
    usage,
)
from smollm_jax.serving.openai_errors import Body, add_error_handlers, unless_disconnected
from smollm_jax.serving.openai_prompts import Prompts
from smollm_jax.serving.openai_schema import (
    SAMPLING_FIELDS,
    BaseRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from smollm_jax.serving.openai_stream import events_of, gathered, with_end
from smollm_jax.serving.scheduler import Scheduler

DEFAULT_TOKENS = 128


class Routes:
    """The route handlers of one scheduler and the public name of its model."""

    def __init__(self, scheduler: Scheduler, model: str):
        self.scheduler, self.model, self.prompts = scheduler, model, Prompts(scheduler)
        self._created, tokenizer = int(time.time()), scheduler.completer.tokenizer
        texts = TokenTexts(tokenizer)
        self._completion, self._chat = CompletionForm(texts), ChatForm(texts, scheduler.completer.stop_ids)

    async def health(self) -> Body:
        """Tell that requests are served."""
        if self.scheduler.is_closed:
            raise HTTPException(503, "the model has stopped; start the server again")
        return {"status": "ok"}

    async def models(self) -> Body:
        """List the model."""
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, name: str) -> Body:
        """Describe the model."""
        self._check_model(name)
        return self._card()

    def _card(self) -> Body:
        card = {"id": self.model, "object": "model", "created": self._created, "owned_by": "smollm-jax"}
        return card | {"context_length": self.scheduler.completer.context}

    async def completions(self, asked: CompletionRequest, request: Request) -> Any:
        """Continue prompts, which are texts or token ids, and score them if asked."""
        self._check_model(asked.model)
        top = checked_top(asked.logprobs, "logprobs")
        require(asked.best_of in (None, asked.n), f"best_of={asked.best_of!r:.40} must be n; all texts are sent")
        work = self.scheduler.in_turn(self.prompts.of, asked, top is not None)
        prompts = await unless_disconnected(request, work)
        return await self._answer(prompts, asked, asked.max_tokens, request, self._completion, top)

    async def chat_completions(self, asked: ChatRequest, request: Request) -> Any:
        """Write the assistant's next turn under the model's chat template."""
        self._check_model(asked.model)
        top = checked_top(asked.top_logprobs, "top_logprobs")
        require(asked.logprobs or not top, "top_logprobs needs logprobs: true")
        messages = [message.as_turn() for message in asked.messages]
        work = self.scheduler.in_turn(self.scheduler.encode_chat, messages, asked.special_tokens, chat=True)
        prompts = [Prompt(await unless_disconnected(request, work), "", [])]
        longest = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
        return await self._answer(prompts, asked, longest, request, self._chat, top if asked.logprobs else None)

    async def no_chat(self) -> Any:
        """Refuse a chat with a model that has no chat template."""
        raise HTTPException(404, f"{self.model!r} has no chat template; its texts are at /v1/completions")

    async def tokenize(self, asked: TokenizeRequest, request: Request) -> Body:
        """Return the ids of a text."""
        self._check_model(asked.model)
        ids = await unless_disconnected(request, self.scheduler.in_turn(self.prompts.tokens, asked))
        return {"count": len(ids), "max_model_len": self.scheduler.completer.context, "tokens": ids}

    async def detokenize(self, asked: DetokenizeRequest, request: Request) -> Body:
        """Return the text of ids, special tokens included."""
        self._check_model(asked.model)
        work = self.scheduler.in_turn(self.prompts.text, asked.tokens)
        return {"prompt": await unless_disconnected(request, work)}

    async def tokenizer_info(self) -> Body:
        """Return the names of special tokens and the chat template, from which clients render conversations."""
        tokenizer = self.scheduler.completer.tokenizer
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
        return about | {"model_max_length": self.scheduler.completer.context} | tokenizer.named_tokens

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self.model):
            raise HTTPException(404, f"model {name!r:.100} is not served here; use {self.model!r}")

    async def _answer(  # noqa: PLR0917
        self, prompts: list[Prompt], asked: BaseRequest, longest: Any, request: Request, form: Form,
        top: int | None,
    ) -> Any:  # fmt: skip
        choices = self._choices(prompts, asked, longest, top)
        head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.model}
        parts = self._parts(choices, request.client.host if request.client else "")
        prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        if not asked.stream:
            whole = gathered(parts, len(choices))
            texts = await unless_disconnected(request, whole)
            counts = usage(prompt_tokens, sum(part.made for part in texts))
            body = await asyncio.to_thread(body_of, head | {"object": form.object}, form, texts, top, counts)
            return Response(body, media_type="application/json")
        # wait for the first part before sending status 200, so that an error has its own status
        first = await unless_disconnected(request, anext(parts))
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        events = events_of(head | {"object": form.chunk}, form, first, parts, top)
        ends = with_end(events, head | {"object": form.chunk}, prompt_tokens, with_usage=with_usage)
        return StreamingResponse(ends, media_type="text/event-stream")

    def _choices(self, prompts: list[Prompt], asked: BaseRequest, longest: Any, top: int | None) -> list[Choice]:
        """Return the texts to write, all of them within the limits. Raises `UserError`."""
        n, echo = checked_choices(asked.n, len(prompts)), getattr(asked, "echo", False)
        most = self.scheduler.max_new_tokens
        longest = min(DEFAULT_TOKENS, most) if longest is None else longest
        only_prompt = echo and longest == 0 and longest is not False
        numbers = asked.model_dump(include=SAMPLING_FIELDS) | {"logit_bias": asked.logit_bias}
        sampling = self.scheduler.sampling(max_new_tokens=1 if only_prompt else longest, **numbers)
        new, enough = len(prompts) * n * sampling.max_new_tokens, MOST_NEW * most
        require(new <= enough, f"all texts have {new:,} new tokens at most; a request may have {enough:,}")
        stop, choices = checked_stops(asked.stop or None), list[Choice]()
        for prompt in prompts:
            for i in range(n):
                # without a seed, equal prompts have other texts
                seed = (sampling.seed + (len(choices) if asked.seed is None else i)) % 2**32
                own = None if only_prompt else replace(sampling, seed=seed)
                choices.append(
                    Choice(index=len(choices), prompt=prompt, sampling=own, stop=stop, echo=echo, top=top)
                )
        return choices

    async def _parts(self, choices: Sequence[Choice], client: str) -> AsyncGenerator[Part, None]:
        """Yield the parts of all choices as they come. As many are queued at a time as the model has slots."""
        async with (
            self.scheduler.request(client) as asked,
            contextlib.aclosing(self._parts_with(choices, client, asked)) as parts,
        ):
            async for part in parts:
                yield part

    async def _parts_with(
        self, choices: Sequence[Choice], client: str, asked: Asked
    ) -> AsyncGenerator[Part, None]:
        found: asyncio.Queue[Part | Exception | None] = asyncio.Queue()
        gate = asyncio.Semaphore(self.scheduler.turns.count)

        async def write(choice: Choice) -> None:
            try:
                async with gate, contextlib.aclosing(self._parts_of(choice, client, asked)) as parts:
                    async for part in parts:
                        found.put_nowait(part)
                found.put_nowait(None)
            except Exception as error:
                found.put_nowait(error)

        tasks = [asyncio.create_task(write(choice)) for choice in choices]
        try:
            going = len(tasks)
            while going:
                part = await found.get()
                if isinstance(part, Exception):
                    raise part
                going -= part is None
                if part is not None:
                    yield part
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _parts_of(self, choice: Choice, client: str, asked: Asked) -> AsyncGenerator[Part, None]:
        prompt, scheduler, echoes = choice.prompt, self.scheduler, choice.echo and choice.scored
        text, begun = (prompt.text if choice.echo else ""), len(prompt.text if choice.echo else "")
        tokens, read = [Token(prompt.ids[0], 0, None)] if echoes else [], 1
        if choice.sampling is None:
            scored = await scheduler.score(prompt.ids, client=client, asked=asked) if echoes else []
            tokens += map(Token, prompt.ids[1:], prompt.offsets[1:], scored or [])
            yield Part(choice.index, text, tokens, 0, "length")
            return
        chunks = scheduler.stream(
            prompt.ids, choice.sampling, choice.stop, client=client, asked=asked, scored=choice.scored,
            reads_scores=echoes,
        )  # fmt: skip
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                for score in chunk.prompt_scores:
                    tokens.append(Token(prompt.ids[read], prompt.offsets[read], score))
                    read += 1
                tokens += [Token(one.id, one.offset + begun, one.score) for one in chunk.scored]
                yield Part(choice.index, text + chunk.text, tokens, chunk.tokens, chunk.reason)
                text, tokens = "", []


def add_routes(app: FastAPI, scheduler: Scheduler, *, model: str, api_key: str | None) -> None:
    """Add the routes and OpenAI's error format to `app`. With a key, every route but /health requires the key."""

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")

    routes, router = Routes(scheduler, model), APIRouter(dependencies=[Depends(check_key)])
    app.get("/health")(routes.health)
    router.get("/v1/models")(routes.models)
    router.get("/v1/models/{name:path}")(routes.one_model)
    router.post("/v1/completions")(routes.completions)
    router.post("/v1/chat/completions")(routes.chat_completions if scheduler.has_chat else routes.no_chat)
    router.post("/tokenize")(routes.tokenize)
    router.post("/detokenize")(routes.detokenize)
    router.get("/tokenizer_info")(routes.tokenizer_info)
    app.include_router(router)
    add_error_handlers(app)
