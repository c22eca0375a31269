"""SimCLR, BYOL and Barlow Twins as lightly's documentation writes them, and a step of training."""

import copy

import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import nn


class Siamese(nn.Module):
    """A backbone and a projection head that see two views."""

    def __init__(self, backbone, head, criterion):
        super().__init__()
        self.backbone, self.projection_head, self.criterion = backbone, head, criterion

    def projection(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def forward(self, first, second):
        return self.criterion(self.projection(first), self.projection(second))

    def update(self):
        """What a step does before the views are seen."""


class BYOL(Siamese):
    """The same with a predictor and a momentum copy."""

    def __init__(self, backbone, head, criterion, prediction_head):
        super().__init__(backbone, head, criterion)
        self.prediction_head = prediction_head
        self.backbone_momentum = copy.deepcopy(backbone)
        self.projection_head_momentum = copy.deepcopy(head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    @torch.no_grad()
    def target(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1))

    def forward(self, first, second):
        p = [self.prediction_head(self.projection(x)) for x in (first, second)]
        z = [self.target(x) for x in (first, second)]
        return 0.5 * (self.criterion(p[0], z[1]) + self.criterion(p[1], z[0]))

    def update(self):
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)


def build(name, backbone, width, hidden_dim, output_dim):
    """A method with lightly's own head, for a backbone with that many features."""
    dims = hidden_dim, output_dim
    if name == "simclr":
        return Siamese(backbone, SimCLRProjectionHead(width, *dims), NTXentLoss(temperature=0.5))
    if name == "barlow_twins":
        return Siamese(backbone, BarlowTwinsProjectionHead(width, *dims), BarlowTwinsLoss())
    head = BYOLProjectionHead(width, *dims)
    predictor = BYOLPredictionHead(output_dim, *dims)
    return BYOL(backbone, head, NegativeCosineSimilarity(), predictor)


def stepper(model, views, dtype="float32", compiled=False):
    """One step of training, on the next of `views`: two batches of images each."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    loss_of = torch.compile(model) if compiled else model
    low = {"dtype": torch.bfloat16, "enabled": dtype == "bfloat16"}

    def step():
        first, second = next(views)
        model.update()
        with torch.autocast(first.device.type, **low):
            loss = loss_of(first, second)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
