"""Modelling files that tests load leave nothing behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from export.small_stock import transformers


@pytest.fixture(scope="session", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where `transformers` keeps the modelling files that it loads."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))
        yield folder
