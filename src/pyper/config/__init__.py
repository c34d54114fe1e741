"""Run files: typed, frozen and strict. Nothing here imports torch."""

from pyper.config.data import DataConfig, PrepareConfig
from pyper.config.expert import ExpertConfig, RopeScaling
from pyper.config.load import load_run, parse_run, read_toml
from pyper.config.mixture import EvaluateConfig, MixtureConfig
from pyper.config.presets import list_presets, preset_path
from pyper.config.run import ExpertOverride, RunConfig, RunSection, TrackConfig
from pyper.config.sparse import SparseConfig
from pyper.config.train import EarlyStoppingConfig, TrainConfig

__all__ = [
    "DataConfig",
    "EarlyStoppingConfig",
    "EvaluateConfig",
    "ExpertConfig",
    "ExpertOverride",
    "MixtureConfig",
    "PrepareConfig",
    "RopeScaling",
    "RunConfig",
    "RunSection",
    "SparseConfig",
    "TrackConfig",
    "TrainConfig",
    "list_presets",
    "load_run",
    "parse_run",
    "preset_path",
    "read_toml",
]
