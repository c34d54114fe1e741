"""Run as a program, it reads an exported folder as a stranger would: with `transformers` alone.

python reload.py FOLDER TOKENS OUT: next to the logits (B, T, V) of the tokens (B, T), in float32,
OUT gets the ids of the text that TOKENS holds, as the folder's own tokenizer gives them.
"""

import json
import sys
from typing import Any


def main() -> None:
    """See the head of this file."""
    sys.modules["pyper"] = None  # type: ignore[assignment]  # whoever imports it fails
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, given, out = sys.argv[1:]
    tensors = load_file(given)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = bytes(tensors["text"].tolist()).decode()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        sys.exit(f"weights and architecture differ: {json.dumps(wrong)[:2000]}")
    with torch.no_grad():
        logits = torch.cat([model.eval()(row[None]).logits for row in tensors["tokens"]])
    save_file({"logits": logits, "ids": torch.tensor(tokenizer(text)["input_ids"])}, out)


if __name__ == "__main__":
    main()
