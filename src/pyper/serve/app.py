"""The endpoints."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pyper import __version__
from pyper.errors import PromptError, PyperError, TokenizerError
from pyper.serve.api_error import ApiError, bad_request, error_body
from pyper.serve.bodies import Body, ChatBody, CompletionBody, EmbeddingBody
from pyper.serve.guard import App, Guard
from pyper.serve.metrics import CONTENT_TYPE, Metrics
from pyper.serve.model_names import ModelNames
from pyper.serve.reading import receive_body
from pyper.serve.replies import (
    JsonResponse,
    reply_in_parts,
    reply_whole,
    unless_disconnected,
)
from pyper.serve.service import Begun, Service
from pyper.serve.settings import ServeSettings

_PAGE = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
_PAGE |= {"/page.css": ("page.css", "text/css")}


def build_app(service: Service, settings: ServeSettings) -> App:
    """The ASGI app of one mixture. Its lifespan starts and stops the engine's thread."""
    metrics = Metrics(service.names.experts, lambda: service.engine.stats)
    service.engine.observe = metrics.count_tokens
    service.engine.observe_first = metrics.observe_first_token

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.stop()

    app = FastAPI(
        title="Pyper",
        version=__version__,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be built from the Host header
        lifespan=lifespan,
    )
    _add_models(app, service, settings)
    _add_operations(app, service, metrics)
    _add_page(app)
    _add_errors(app)
    return Guard(app, settings, metrics.count_request)


def _add_models(app: FastAPI, service: Service, settings: ServeSettings) -> None:
    engine, limits, names = service.engine, settings.limits, service.names

    @app.post("/v1/completions", openapi_extra=_takes(CompletionBody, names))
    async def completions(request: Request) -> Response:
        body = await receive_body(request, CompletionBody, limits)
        return await _reply(request, body, await service.complete(body))

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatBody, names))
    async def chat_completions(request: Request) -> Response:
        body = await receive_body(request, ChatBody, limits)
        return await _reply(request, body, await service.chat(body))

    async def _reply(request: Request, body: CompletionBody | ChatBody, begun: Begun) -> Response:
        if not body.stream:
            return await reply_whole(request, begun, engine)
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return reply_in_parts(begun, engine, with_usage=with_usage)

    @app.post("/v1/embeddings", openapi_extra=_takes(EmbeddingBody, names))
    async def embeddings(request: Request) -> Response:
        body = await receive_body(request, EmbeddingBody, limits)
        return JsonResponse(await unless_disconnected(request, service.embed(body)))

    @app.get("/v1/models")
    async def models() -> Response:
        return JsonResponse(names.describe_all())

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        return JsonResponse(names.describe(model))


def _add_operations(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        engine = service.engine
        state = {"status": "ok" if engine.is_alive else "failed", "model": service.names.name}
        counts = {"running": engine.stats.running, "waiting": engine.n_waiting}
        return JsonResponse(state | counts, 200 if engine.is_alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.to_text(), headers={"content-type": CONTENT_TYPE})


def _add_page(app: FastAPI) -> None:
    folder = resources.files("pyper.serve") / "page"

    def serve(path: str, name: str, media_type: str) -> None:
        content = (folder / name).read_bytes()

        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=f"{media_type}; charset=utf-8")

    for path, (name, media_type) in _PAGE.items():
        serve(path, name, media_type)


def _takes(body: type[Body], names: ModelNames) -> dict[str, Any]:
    """For the OpenAPI description: bodies are read strictly and by hand, FastAPI sees none."""
    schema = body.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    schema["properties"]["model"]["enum"] = list(names)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """Without `$ref`: pydantic's lead to a place that the whole document does not have."""
    if isinstance(schema, list):
        return [_inlined(item, parts) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rsplit("/", 1)[1]], parts)
    return {key: _inlined(value, parts) for key, value in schema.items()}


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return JsonResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(PromptError)
    @app.exception_handler(TokenizerError)  # a text that this model's tokenizer cannot encode
    async def prompt_error(request: Request, error: PyperError) -> Response:
        return JsonResponse(bad_request(f"{error.message}: {error.hint}").body(), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = {
            404: "there is nothing here; see /v1/models and docs/serving.md",
            405: f"{request.method} is not possible here",
        }.get(error.status_code, str(error.detail))
        body = error_body(error.status_code, message)
        return JsonResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; /metrics counts it

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return JsonResponse(error_body(500, "the server failed on this request"), 500)
