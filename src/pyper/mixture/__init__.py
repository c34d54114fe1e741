"""Domains, routers, and experts joined into one language model."""

from pyper.mixture.discovery import Domains, assign_documents, discover_unigram
from pyper.mixture.expert_folder import build_expert, load_expert
from pyper.mixture.mixture import Mixture
from pyper.mixture.router import LMRouter, PrefixRouter, UnigramRouter
from pyper.mixture.settings import MixtureSettings
from pyper.mixture.store import ExpertSource, find_mixture, load_mixture, save_mixture

__all__ = [
    "Domains",
    "ExpertSource",
    "LMRouter",
    "Mixture",
    "MixtureSettings",
    "PrefixRouter",
    "UnigramRouter",
    "assign_documents",
    "build_expert",
    "discover_unigram",
    "find_mixture",
    "load_expert",
    "load_mixture",
    "save_mixture",
]
