"""Outputs at every place of an image: masks, boxes, depth, key points."""

import torch
import torch.nn.functional as F
from program import Program
from torch import nn


class DoubleConv(nn.Sequential):
    def __init__(self, inside, outside):
        super().__init__(
            nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    def __init__(self, channels=3, classes=5):
        super().__init__()
        self.down1, self.down2, self.bottom = DoubleConv(channels, 8), DoubleConv(8, 16), DoubleConv(16, 32)
        self.up1, self.merge1 = nn.ConvTranspose2d(32, 16, 2, 2), DoubleConv(32, 16)
        self.up2, self.merge2 = nn.ConvTranspose2d(16, 8, 2, 2), DoubleConv(16, 8)
        self.out = nn.Conv2d(8, classes, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        x = self.merge1(torch.cat([self.up1(c), b], 1))
        x = self.merge2(torch.cat([self.up2(x), a], 1))
        return self.out(x)


def unet_with_ignored_border() -> Program:
    """Pixels with label 255 do not count."""
    model = UNet()
    y = torch.randint(5, (4, 16, 16))
    y[:, 0] = 255
    loss = nn.CrossEntropyLoss(ignore_index=255)
    return Program(model, loss, (torch.randn(4, 3, 16, 16), y), torch.optim.Adam(model.parameters(), lr=1e-3))


def binary_mask_with_dice() -> Program:
    """BCE on logits plus a Dice loss on their sigmoid, both on purpose."""

    def loss(logits, mask):
        p = torch.sigmoid(logits)
        overlap = (p * mask).sum((1, 2, 3))
        dice = 1 - (2 * overlap + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
        return F.binary_cross_entropy_with_logits(logits, mask) + dice.mean()

    model = UNet(1, 1)
    y = torch.zeros(4, 1, 16, 16)
    y[:, :, 4:9, 5:12] = 1
    return Program(model, loss, (torch.randn(4, 1, 16, 16), y), torch.optim.Adam(model.parameters(), lr=1e-3))


def fcn_with_two_heads() -> Program:
    """A dict of outputs as torchvision's segmentation models give it, with an auxiliary head."""

    class FCN(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(
                nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            )  # fmt: skip
            self.head = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(16, 4, 1))
            self.aux = nn.Conv2d(32, 4, 1)

        def forward(self, x):
            features = self.backbone(x)

            def up(y):
                return F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False)

            return {"out": up(self.head(features)), "aux": up(self.aux(features))}

    def loss(outputs, target):
        return F.cross_entropy(outputs["out"], target) + 0.5 * F.cross_entropy(outputs["aux"], target)

    model = FCN()
    batch = torch.randn(4, 3, 16, 16), torch.randint(4, (4, 16, 16))
    return Program(model, loss, batch, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))


def depth() -> Program:
    """Positive distances through a softplus, compared in logarithms."""

    def loss(d, target):
        g = torch.log(d + 1e-6) - torch.log(target)
        return torch.sqrt((g**2).mean() - 0.85 * g.mean() ** 2)

    model = nn.Sequential(UNet(3, 1), nn.Softplus())
    batch = torch.randn(4, 3, 16, 16), 0.5 + 4 * torch.rand(4, 1, 16, 16)
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-4))


def detector() -> Program:
    """Classes and boxes at every anchor; boxes count where there is an object only."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(
                nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
                nn.GroupNorm(4, 32), nn.ReLU(),
            )  # fmt: skip
            self.classes, self.boxes = nn.Conv2d(32, 3 * 4, 3, padding=1), nn.Conv2d(32, 3 * 4, 3, padding=1)

        def forward(self, x):
            f = self.backbone(x)
            n = len(x)
            return {
                "logits": self.classes(f).view(n, 3, 4, -1).permute(0, 3, 1, 2).reshape(n, -1, 4),
                "boxes": self.boxes(f).view(n, 3, 4, -1).permute(0, 3, 1, 2).reshape(n, -1, 4),
            }

    def loss(out, target):
        positive = target["labels"] > 0
        classification = F.cross_entropy(out["logits"].flatten(0, 1), target["labels"].flatten())
        boxes = F.smooth_l1_loss(out["boxes"][positive], target["boxes"][positive])
        return classification + boxes

    labels = torch.randint(4, (4, 48)) * (torch.rand(4, 48) < 0.3)
    model = Detector()
    batch = torch.randn(4, 3, 16, 16), {"labels": labels, "boxes": torch.randn(4, 48, 4)}
    return Program(model, loss, batch, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))


def detector_with_focal_prior() -> Program:
    """The bias of the head starts so that all is background with 99 %, as RetinaNet's: a sum divided by objects."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
            self.logits = nn.Conv2d(16, 6, 3, padding=1)
            nn.init.normal_(self.logits.weight, std=0.01)
            nn.init.constant_(self.logits.bias, -4.595)

        def forward(self, x):
            return self.logits(self.body(x))

    def loss(logits, target):
        p = torch.sigmoid(logits)
        ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        p_t = p * target + (1 - p) * (1 - target)
        alpha = 0.25 * target + 0.75 * (1 - target)
        return (alpha * (1 - p_t) ** 2 * ce).sum() / target.sum().clamp(min=1)

    model = Head()
    batch = torch.randn(4, 3, 16, 16), (torch.rand(4, 6, 4, 4) < 0.03).float()
    return Program(model, loss, batch, torch.optim.AdamW(model.parameters(), lr=1e-4))


def key_points() -> Program:
    """Heat maps with a Gaussian at each point and a squared error."""
    model = UNet(3, 4)
    at = torch.randint(3, 13, (4, 4, 2)).float()
    rows, columns = torch.arange(16.0).view(1, 1, 16, 1), torch.arange(16.0).view(1, 1, 1, 16)
    y = torch.exp(-((rows - at[..., 0, None, None]) ** 2 + (columns - at[..., 1, None, None]) ** 2) / 4)
    return Program(model, nn.MSELoss(), (torch.randn(4, 3, 16, 16), y), torch.optim.Adam(model.parameters(), lr=1e-3))


def super_resolution() -> Program:
    """Pixel shuffle and an L1 loss in [0, 1]."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip
    high = torch.rand(8, 3, 16, 16)
    low = F.avg_pool2d(high, 2)
    return Program(model, nn.L1Loss(), (low, high), torch.optim.Adam(model.parameters(), lr=1e-4))


def denoiser() -> Program:
    """Predicts the noise and subtracts it."""

    class DnCNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1),
            )  # fmt: skip

        def forward(self, x):
            return x - self.net(x)

    model = DnCNN()
    y = torch.rand(8, 1, 16, 16)
    return Program(
        model, nn.MSELoss(), (y + 0.1 * torch.randn_like(y), y), torch.optim.Adam(model.parameters(), lr=1e-3)
    )
