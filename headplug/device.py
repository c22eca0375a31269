"""Where to compute."""

from __future__ import annotations

import torch

from headplug.errors import OptionError


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """A device by name; "auto" is a GPU where there is one.

    Raises:
        OptionError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device {str(name)!r} cannot be used ({reason}); use auto, cpu or cuda."
        ) from None
    return device
