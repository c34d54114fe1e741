"""A small model to measure, and a cache of data sets that nothing outlives."""

from pathlib import Path

import pytest

from serve import small_server


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts over bytes; with a router of their own, the loops by hand are short."""
    return small_server.save_small_mixture(tmp_path_factory.mktemp("measured"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are converted once and kept; and nobody asks the network."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
