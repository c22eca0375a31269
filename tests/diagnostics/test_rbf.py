from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from headplug import create_head
from headplug.diagnostics import separation
from headplug.errors import OptionError, SlotError


def numpys(layer, sign):
    c = layer.kernels_centers.detach().double().numpy()
    s = np.exp(sign * layer.log_shapes.detach().double().numpy())
    terms = []
    for i in range(len(c)):
        for j in range(len(c)):
            if i != j:
                d = np.linalg.norm(c[i] - c[j])
                d = d / (np.sqrt(s[i] ** 2 + s[j] ** 2 + 1e-8) * np.sqrt(c.shape[1]))
                terms.append(d**2 * np.exp(-(d**2)))
    return np.mean(terms)


@pytest.mark.parametrize(("widths", "sign"), [("authors", 1), ("kernel", -1)])
def test_separation_of_every_layer_follows_its_definition(widths, sign):
    torch.manual_seed(0)
    head = create_head("rbf", input_dim=8, output_dim=4, num_kernels=6, num_layers=3)
    rows = separation(nn.Sequential(nn.Linear(8, 8), head), widths)
    assert json.loads(json.dumps(rows)) == rows
    layers = head.rbf_layers
    assert [row["layer"] for row in rows] == ["1.layers.1", "1.layers.3"]
    for row, layer in zip(rows, layers, strict=True):
        assert row["sns"] == pytest.approx(numpys(layer, sign), rel=1e-9)
        assert (row["kernels"], row["features"], row["widths"]) == (6, 8, widths)
    if widths == "authors":
        assert rows[-1]["sns"] == pytest.approx(head.separation(), rel=1e-5)


def test_layers_of_other_packages_are_known_by_their_parameters():
    layer = nn.Module()
    layer.kernels_centers = nn.Parameter(torch.randn(5, 3))
    layer.log_shapes = nn.Parameter(torch.zeros(5))
    [row] = separation(layer)
    assert row["sns"] == pytest.approx(numpys(layer, 1))


def test_what_has_no_separation_says_why():
    one = create_head("rbf", input_dim=8, output_dim=4, num_kernels=1)
    [row] = separation(one)
    assert row["sns"] is None
    assert row["why"] == {"sns": "the layer has one kernel."}
    broken = create_head("rbf", input_dim=8, output_dim=4, num_kernels=3)
    nn.init.constant_(broken.rbf_layers[0].kernels_centers, torch.nan)
    assert separation(broken)[0]["why"] == {"sns": "its parameters are not finite."}
    with pytest.raises(SlotError, match=r"has no RBF layer.*create_head"):
        separation(create_head("simclr", input_dim=8, output_dim=4))
    with pytest.raises(OptionError, match="'authors' or 'kernel', not 'other'"):
        separation(one, "other")
