"""The names that requests may ask for: the mixture, and each of its experts."""

from collections.abc import Iterator
from typing import Any

from pyper.serve.api_error import ApiError


class ModelNames:
    """`NAME` is the mixture, `NAME/expert-0` … its experts; nothing else exists."""

    def __init__(self, name: str, experts: tuple[str, ...], context: int, created: int) -> None:
        self.name, self.experts = name, experts
        self._context, self._created = context, created
        self._index: dict[str, int | None] = {name: None}
        self._index |= {f"{name}/expert-{i}": i for i in range(len(experts))}

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def expert_of(self, model: str) -> int | None:
        """The expert that a name pins; None for the mixture. Raises ApiError 404."""
        if model not in self._index:
            shown = ascii(model[:80])[1:-1]
            raise ApiError(
                404,
                f"there is no model `{shown}`; GET /v1/models lists them",
                param="model",
                code="model_not_found",
            )
        return self._index[model]

    def describe(self, model: str) -> dict[str, Any]:
        """One entry of /v1/models. Raises ApiError 404."""
        expert = self.expert_of(model)
        writes = self.experts if expert is None else (self.experts[expert],)
        return {
            "id": model,
            "object": "model",
            "created": self._created,
            "owned_by": "pyper",
            "max_model_len": self._context,
            "pyper": {"experts": list(writes)},
        }

    def describe_all(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self.describe(model) for model in self]}
