"""Data sets by name, `hf:owner/name[/config][:split]`: the one source that is not on this disk.

Only what the user names is asked for. The commit that the name stands for is looked up first and
read from then on, so that both passes over the text, and the manifest, mean the same data.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyper.errors import DataError, MissingExtraError

PREFIX = "hf:"
_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"hf:({_PART}/{_PART})(?:/({_PART}))?(?::([\w.-]+))?")


@dataclass(frozen=True, slots=True)
class HubName:
    """What a user named; `config` and `split` where they did."""

    name: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        return f"{PREFIX}{self.name}{config}" + (f":{self.split}" if self.split else "")


@dataclass(frozen=True, slots=True)
class HubSplit:
    """One split of one commit of a data set."""

    name: HubName
    commit: str

    def sha256(self) -> str:
        """Stands for the content: a commit never changes."""
        return hashlib.sha256(f"{self.name}@{self.commit}".encode()).hexdigest()

    def rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Records and their places, as they arrive. Raises DataError when they stop coming."""
        datasets = _datasets(self.name)
        try:
            stream = datasets.load_dataset(
                self.name.name,
                self.name.config,
                split=self.name.split,
                revision=self.commit,
                streaming=True,
            )
            for number, record in enumerate(stream):
                yield record, f":{number}"
        except Exception as error:  # of the network, of the hub, of the formats behind it
            raise _unreachable(self.name, error) from error


def parse_name(text: str) -> HubName:
    """Read `hf:owner/name[/config][:split]`. Raises DataError when it is something else."""
    found = _NAME.fullmatch(text)
    if found is None:
        raise DataError(
            f"`{text}` is not the name of a data set",
            hint="write `hf:owner/name`, `hf:owner/name/config` or `hf:owner/name:train`",
        )
    return HubName(*found.groups())


def find_splits(name: HubName) -> list[HubSplit]:
    """The split that was named, or all of them. Asks the hub. Raises DataError, MissingExtraError.

    The DataError names the configs or splits there are where the one that was named is none.
    """
    datasets = _datasets(name)
    try:
        from huggingface_hub import HfApi

        commit = str(HfApi().dataset_info(name.name).sha)
        configs = datasets.get_dataset_config_names(name.name, revision=commit)
        config = _choose(name, "config", name.config, configs)
        splits = datasets.get_dataset_split_names(name.name, config, revision=commit)
    except DataError:
        raise
    except Exception as error:
        raise _unreachable(name, error) from error
    wanted = splits if name.split is None else [_choose(name, "split", name.split, splits)]
    return [HubSplit(HubName(name.name, config, split), commit) for split in wanted]


def _choose(name: HubName, what: str, given: str | None, there: list[str]) -> str:
    if given is None and len(there) == 1:
        return there[0]
    if given is None and "default" in there:
        return "default"
    if given not in there or given is None:
        said = f"has several {what}s" if given is None else f"has no {what} `{given}`"
        raise DataError(f"{name} {said}", hint=f"name one of {', '.join(there[:40])}")
    return given


def _datasets(name: HubName) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", extra="data", needed_for=f"reading {name}") from None
    return datasets


def _unreachable(name: HubName, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"cannot read {name}: {reason}",
        hint="check the name and the network; offline, name a folder or files that are here "
        "(`save_to_disk`, .parquet, .jsonl)",
    )
