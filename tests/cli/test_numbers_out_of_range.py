"""Numbers that no option can take: exit code 2, and a line that names option, range and value."""

from pathlib import Path

import pytest

from cli.conftest import Refused

CASES = [
    ("train RUN", "--jobs", ["0", "-1", "257"], ("`jobs`", "1|256")),
    ("train RUN --dry-run", "--jobs", ["0"], ("`jobs`", "1")),
    ("prepare TEXTS -o NEW", "--vocab-size", ["10", "-1", "1000001"],
     ("`vocab_size`", "257|1000000")),
    ("prepare TEXTS -o NEW", "--valid-fraction", ["nan", "inf", "-0.1", "0.5"],
     ("`valid_fraction`", "finite|0.5|equal to 0")),
    ("prepare TEXTS -o NEW", "--test-fraction", ["nan", "-1"], ("`test_fraction`", "finite|0")),
    ("prepare TEXTS -o NEW", "--min-chars", ["0"], ("`min_chars`", "1")),
    ("prepare TEXTS -o NEW", "--workers", ["-1", "1025"], ("`workers`", "0|1024")),
    ("serve RUN --port 0", "--shutdown-seconds", ["nan", "inf", "-1"],
     ("`--shutdown-seconds`", "0 or more")),
    ("merge RUN -o NEW --upcycle 2", "--noise", ["nan", "inf", "-1"], ("`--noise`", "0 or more")),
    ("merge RUN -o NEW", "--top-k", ["9"], ("`--top-k`", "[1, 2]")),
    ("export RUN -o NEW", "--shard-gb", ["nan", "inf", "-1", "0"], ("`--shard-gb`", "more than 0")),
    ("inspect --plan RUN", "--mfu", ["nan", "inf", "-1", "0", "1.5"], ("`--mfu`", "(0, 1]")),
    ("inspect --plan RUN", "--tflops", ["nan", "inf", "-1", "0"], ("`--tflops`", "more than 0")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "option", "value", "said"),
    [(command, option, v, said) for command, option, values, said in CASES for v in values],
)
def test_a_number_out_of_range_is_wrong_usage(
    refused: Refused,
    finished_run: Path,
    texts_folder: Path,
    tmp_path: Path,
    command: str,
    option: str,
    value: str,
    said: tuple[str, str],
) -> None:
    places = {"RUN": finished_run, "TEXTS": texts_folder, "NEW": tmp_path / "new"}
    typed = [str(places.get(word, word)) for word in command.split()]
    error, hint = refused(*typed, option, value, code=2)
    name, limits = said
    assert error.startswith(name)
    assert any(limit in error for limit in limits.split("|")), error
    assert f"not {value}" in error
    assert option in hint or name == f"`{option}`"
    assert list(tmp_path.iterdir()) == []


def test_the_same_number_in_a_run_file_is_not_an_option(refused: Refused, run_file: Path) -> None:
    error, hint = refused("train", run_file, "--set", "run.jobs=0")
    assert error.startswith("`run.jobs`")
    assert "in the run file" in hint
