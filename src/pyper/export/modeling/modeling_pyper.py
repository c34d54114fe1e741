"""A transformer, dense or with experts inside its layers, trained by Pyper."""

from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_pyper import PyperConfig
from .pyper_generation import OwnCacheGenerationMixin, TextMemory
from .pyper_layers import Decoder, History, KeyValues


class TextCache(KeyValues, TextMemory):
    """Keys, values and the tokens they belong to."""

    def __init__(self) -> None:
        KeyValues.__init__(self)
        TextMemory.__init__(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.select(beam_idx)


class PyperForCausalLM(PreTrainedModel, OwnCacheGenerationMixin):
    """A causal language model: sparse layers route by thresholds, or by token choice."""

    config_class = PyperConfig
    _keep_in_fp32_modules_strict: ClassVar = {"state"}

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
        return self.output(logits, labels, cache, return_dict)

    def get_input_embeddings(self):
        return self.decoder.embedding
