"""A transformer, dense or with experts inside its layers, trained by Pyper."""

from typing import ClassVar

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_pyper import PyperConfig
from .pyper_layers import CACHE, Decoder, History, KeyValues


class TextCache(KeyValues):
    """Keys, values and the tokens they belong to."""

    is_compileable, is_linear = False, (False,)  # `generate` asks

    def __init__(self) -> None:
        super().__init__()
        self.history: History | None = None

    def get_seq_length(self) -> int:
        return 0 if self.history is None else self.history.tokens.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from row `beam_idx[i]`."""
        self.select(beam_idx)
        self.history = History(self.history.tokens[beam_idx], self.history.real[beam_idx])


class PyperForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model: sparse layers route by thresholds, or by token choice."""

    config_class = PyperConfig
    _keep_in_fp32_modules_strict: ClassVar = {"state"}
    _is_stateful = True  # the cache cannot go back: no assisted decoding

    def __init__(self, config: PyperConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.shape)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: TextCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        cache: TextCache | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of input_ids (B, T), which follow what the cache holds.

        Each row is one text; padding (on either side) is where the attention mask is 0.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = TextCache()
        history = History.of(input_ids, attention_mask, cache and cache.history)
        states = self.decoder.states(history, input_ids.shape[1], cache)
        if cache is not None:
            cache.history = history
        logits = self.decoder.logits(states[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return out if return_dict else out.to_tuple()

    def get_input_embeddings(self):
        return self.decoder.embedding

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
