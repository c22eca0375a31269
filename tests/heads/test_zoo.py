"""The rows of `headplug heads`, also where a head cannot be built."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headplug import describe_head, list_heads
from headplug.cli import main
from headplug.heads.zoo import summarise


@pytest.mark.parametrize("width", [1, 64, 2048])
def test_every_row_has_the_same_kinds_of_values(width: int) -> None:
    for name in list_heads():
        row = summarise(describe_head(name), width)
        assert isinstance(row["layers"], str)
        assert isinstance(row["dims"], str)
        assert isinstance(row["params_trainable"], int) == bool(row["dims"])
        assert json.loads(json.dumps(row)) == row


def test_head_that_cannot_be_built_says_why_in_the_table(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["headplug", "heads", "--input-dim", "64"])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines.keys() == {"name", *list_heads()}
    assert "there are only input_dim=64)" in lines["directclr"]
    assert " 64-4096-256 " in lines["byol"]
