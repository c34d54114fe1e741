"""An imported model ends its answers with tokens of its own, and they are no part of them."""

from pathlib import Path

from generate.test_writing_text import BYTES, scripted
from pyper.stages.merge import save_single
from serve.small_server import serving

BODY = {"model": "folder", "temperature": 0, "max_tokens": 20}


def test_a_stop_token_ends_an_answer_and_is_not_shown(tmp_path: Path) -> None:
    mixture = scripted("abé€dz")
    changes = {
        "stop_ids": tuple(BYTES.encode("d")),
        "tokenizer_fingerprint": BYTES.fingerprint,
        "bos_id": BYTES.bos_id,
    }
    settings = mixture.settings.model_copy(update=changes)
    save_single(
        tmp_path / "folder", mixture.expert(0), settings, BYTES, "{{ messages[0].content }}"
    )
    with serving(tmp_path / "folder") as server:
        body = BODY | {"messages": [{"role": "user", "content": "a"}], "logprobs": True}
        (choice,) = server.post("/v1/chat/completions", body).json()["choices"]
        assert choice["message"]["content"] == "bé€"
        assert choice["finish_reason"] == "stop"
        assert len(choice["logprobs"]["content"]) == len("bé€".encode())
        body = BODY | {"prompt": "ab", "logprobs": 1}
        (choice,) = server.post("/v1/completions", body).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("é€", "stop")
        assert len(choice["logprobs"]["tokens"]) == len("é€".encode())
