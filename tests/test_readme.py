"""The README's Python runs as printed."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def test_every_snippet_runs_and_the_first_prints_what_it_says():
    snippets = re.findall(r"```python\n(.*?)```\n(?:```\n(.*?)```)?", README, flags=re.S)
    assert len(snippets) >= 3
    names: dict[str, object] = {}
    for code, expected in snippets:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "README.md", "exec"), names)
        assert out.getvalue() == expected
    assert names["report"].rows
    assert len(names["views"]) == 2


def test_every_command_named_exists():
    from headplug.cli import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    named = set(re.findall(r"(?:`|```\n)headplug ([a-z-]+)", README))
    assert named
    assert named <= known
