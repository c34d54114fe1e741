"""How `generate` of `transformers` goes along with caches of Pyper's own."""

from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .pyper_layers import History

# What `transformers` calls what a model remembers of a text: `cache` from release 5.24 on.
_FIELDS = CausalLMOutputWithPast.__dataclass_fields__
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"


class TextMemory:
    """The tokens that a cache belongs to, and what `generate` asks of a cache."""

    is_compileable, is_linear = False, (False,)

    def __init__(self) -> None:
        self.history: History | None = None

    def get_seq_length(self) -> int:
        return 0 if self.history is None else self.history.tokens.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from row `beam_idx[i]`."""
        self.history = History(self.history.tokens[beam_idx], self.history.real[beam_idx])


class OwnCacheGenerationMixin(GenerationMixin):
    """Reads what its cache does not hold yet."""

    _is_stateful = True  # the cache cannot go back: no assisted decoding

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, cache=None, **kwargs
    ):
        cache = past_key_values if cache is None else cache
        read = 0 if cache is None else cache.get_seq_length()
        return {
            "input_ids": input_ids[:, read:],
            "attention_mask": attention_mask,
            CACHE: cache,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }

    def output(
        self, logits: Tensor, labels: Tensor | None, cache: TextMemory | None, as_dict: bool
    ):
        """Logits (B, T, V), the loss where there are labels, and the cache."""
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return out if as_dict else out.to_tuple()
