"""To and from the checkpoints of `transformers`: the only place that knows foreign names."""

from pyper.export.families import FAMILIES, Family, family_of
from pyper.export.hf_expert import export_expert
from pyper.export.hf_tokenizer import export_tokenizer

__all__ = ["FAMILIES", "Family", "export_expert", "export_tokenizer", "family_of"]
