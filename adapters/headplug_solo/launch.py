"""`headplug-solo SCRIPT ...`: runs a script as Python does, with the heads of its methods swapped.

For scripts without Hydra, which has its own way (see `hydra_plugins`), and for other processes of
theirs. The script is the main module, with its own arguments, path and file; solo-learn is not
imported before the script does so itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from headplug.errors import HeadplugError, OptionError, UnknownNameError
from headplug_solo.config import ENVIRONMENT, merged
from headplug_solo.patch import arm, made

SCRIPT = "HEADPLUG_SOLO_SCRIPT"
USAGE = """usage: headplug-solo [--headplug FILE.yaml | --headplug KEY=VALUE ...] SCRIPT ...

Runs one of solo-learn's scripts, or yours, with the head that its config (or the args.json that it
loads) asks for in a block `headplug:`. Where a script has no config, give the block here:

  headplug-solo main_knn.py --pretrained_checkpoint_dir DIR ...
  headplug-solo --headplug head.name=reweighting --headplug head.kappa=1.02 train.py ...
  headplug-solo --headplug head.yaml train.py ...
  headplug-solo --headplug probe.every_n_epochs=5 --headplug probe.probes=[knn,ridge] train.py ...
"""


def main() -> None:
    """The console script; exits with 2 for a mistake in what was typed."""
    try:
        items, rest = _take_options(sys.argv[1:])
        if not rest or rest[0] in ("-h", "--help"):
            print(USAGE, end="")
            sys.exit(0 if rest else 2)
        if not Path(rest[0]).is_file():
            raise UnknownNameError(f"there is no script {rest[0]!r}; check the path.")
        os.environ.pop(ENVIRONMENT, None)
        if items:
            os.environ[ENVIRONMENT] = json.dumps(_block(items))
    except HeadplugError as error:
        _give_up(error)
    os.environ[SCRIPT] = os.path.abspath(rest[0])
    module = ModuleType("__main__")
    module.__spec__ = importlib.util.find_spec("headplug_solo.again")
    sys.modules["__main__"] = module
    run(rest[0], rest[1:], vars(module))


def run(script: str, arguments: Sequence[str], namespace: dict[str, Any]) -> None:
    """Runs a script in a namespace, which is the main module's, as `python SCRIPT ...` would.

    Raises:
        SystemExit: With 2, after one line, where headplug refuses.
    """
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(script).resolve().parent)
    watch()
    namespace.update(__file__=os.path.abspath(script), __package__=None, __doc__=None)
    code = compile(Path(script).read_bytes(), script, "exec", dont_inherit=True)
    try:
        exec(code, namespace)
        if ENVIRONMENT in os.environ and namespace["__name__"] == "__main__":
            _refuse_idle(script)
    except HeadplugError as error:
        _give_up(error)


def watch() -> None:
    """Arms solo-learn's methods as soon as they are imported."""
    if "solo.methods" in sys.modules:
        arm()
    else:
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Leaves the finding of `solo.methods` to the others, and acts once it is there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The module as others find it, but for what its import does at the end."""
        if name != "solo.methods":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                arm()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _take_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of `--headplug`, wherever it stands, and the rest, which is the script's."""
    items, rest, given = [], [], iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name != "--headplug":
            rest.append(argument)
        elif item := value if equals else next(given, ""):
            items.append(item)
        else:
            raise OptionError("--headplug needs a value: FILE.yaml, or e.g. head.name=reweighting.")
    return items, rest


def _block(items: Sequence[str]) -> dict[str, Any]:
    """The block that files and `key=value` items make together; later ones win."""
    import yaml  # type: ignore[import-untyped]  # Lightning brings it

    block: dict[str, Any] = {}
    for item in items:
        keys, equals, value = item.partition("=")
        try:
            new = yaml.safe_load(value if equals else Path(item).read_text("utf-8"))
        except FileNotFoundError:
            raise UnknownNameError(
                f"--headplug {item}: there is no such file, and it is no KEY=VALUE either."
            ) from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise OptionError(f"--headplug {item} cannot be read: {error}") from None
        if not equals and isinstance(new, dict) and list(new) == ["headplug"]:
            new = new["headplug"]
        for key in reversed(keys.split(".") if equals else []):
            new = {key: new}
        if not isinstance(new, dict):
            raise OptionError(f"--headplug {item} must hold a block such as `head: {{name: ...}}`.")
        block = merged(block, new)
    return block


def _refuse_idle(script: str) -> None:
    if not made:
        raise HeadplugError(
            f"{script} made no solo-learn method, so --headplug changed nothing. Give it a script "
            "that does, or leave --headplug out."
        )


def _give_up(error: HeadplugError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
