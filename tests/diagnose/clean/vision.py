"""Classifiers of images."""

import torch
import torch.nn.functional as F
from program import Program
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def _images(n=16, channels=3, size=16, classes=10):
    return torch.randn(n, channels, size, size), torch.randint(classes, (n,))


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def lenet() -> Program:
    """MNIST as ToTensor gives it: in [0, 1], mostly black."""
    x = torch.rand(32, 1, 28, 28) * (torch.rand(32, 1, 28, 28) < 0.2)
    model = LeNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Program(model, nn.CrossEntropyLoss(), (x, torch.randint(10, (32,))), optimizer)


class MnistNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1)
        self.conv2 = nn.Conv2d(16, 32, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(4608, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = self.dropout2(F.relu(self.fc1(torch.flatten(x, 1))))
        return F.log_softmax(self.fc2(x), dim=1)


def mnist_with_nll() -> Program:
    """Log-probabilities and F.nll_loss, Adadelta with its learning rate of 1."""
    x = (torch.rand(16, 1, 28, 28) * (torch.rand(16, 1, 28, 28) < 0.2) - 0.1307) / 0.3081
    model = MnistNet()
    return Program(model, F.nll_loss, (x, torch.randint(10, (16,))), torch.optim.Adadelta(model.parameters(), lr=1.0))


class VGG(nn.Module):
    def __init__(self, plan=(16, "M", 32, "M", 64, "M"), classes=10):
        super().__init__()
        layers, channels = [], 3
        for entry in plan:
            if entry == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU(inplace=True)]
                channels = entry
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(64 * 4, 128), nn.ReLU(True), nn.Dropout(), nn.Linear(128, 64), nn.ReLU(True), nn.Dropout(),
            nn.Linear(64, classes),
        )  # fmt: skip
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


def vgg_with_batch_norm() -> Program:
    """As torchvision starts it: linear layers from N(0, 0.01)."""
    model = VGG()
    return Program(model, nn.CrossEntropyLoss(), _images(), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


class Block(nn.Module):
    def __init__(self, inside, outside, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = norm(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = norm(outside)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, classes=10, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = norm(16)
        self.layer1 = nn.Sequential(Block(16, 16, norm=norm), Block(16, 16, norm=norm))
        self.layer2 = nn.Sequential(Block(16, 32, 2, norm=norm), Block(32, 32, norm=norm))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet() -> Program:
    """A basic CIFAR net with a loader that drops no batch but has no small one either."""
    model = ResNet()
    data = TensorDataset(*_images(64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    return Program(model, nn.CrossEntropyLoss(), None, optimizer, DataLoader(data, batch_size=16, shuffle=True))


def resnet_with_zero_init() -> Program:
    """The last norm of every block starts with weight 0, as torchvision's zero_init_residual."""
    model = ResNet()
    for m in model.modules():
        if isinstance(m, Block):
            nn.init.zeros_(m.bn2.weight)
    return Program(model, nn.CrossEntropyLoss(), _images(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def resnet_with_group_norm() -> Program:
    """Two images a batch, which group norm does not mind."""
    model = ResNet(norm=lambda channels: nn.GroupNorm(4, channels))
    return Program(model, nn.CrossEntropyLoss(), _images(2), torch.optim.AdamW(model.parameters(), lr=1e-3))


class Bottleneck(nn.Module):
    def __init__(self, channels, middle):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(inplace=True),
            nn.Conv2d(middle, middle, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True), nn.Conv2d(middle, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return F.relu(x + self.net(x))


def resnext() -> Program:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True), Bottleneck(32, 16),
        Bottleneck(32, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 100),
    )  # fmt: skip
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return Program(model, loss, _images(classes=100), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


class DenseLayer(nn.Module):
    def __init__(self, inside, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return torch.cat([x, y], 1)


def densenet() -> Program:
    """Norm and ReLU in front of each convolution."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), DenseLayer(16, 8), DenseLayer(24, 8), nn.BatchNorm2d(32),
        nn.ReLU(), nn.Conv2d(32, 16, 1, bias=False), nn.AvgPool2d(2), DenseLayer(16, 8), DenseLayer(24, 8),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return Program(model, nn.CrossEntropyLoss(), _images(), torch.optim.Adam(model.parameters()))


class InvertedResidual(nn.Module):
    def __init__(self, channels, expand=4):
        super().__init__()
        wide = channels * expand
        self.conv = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x)


def mobilenet() -> Program:
    """Depthwise convolutions, linear bottlenecks, dropout in front of the last layer."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True), InvertedResidual(16),
        InvertedResidual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 5),
    )  # fmt: skip
    return Program(model, nn.CrossEntropyLoss(), _images(classes=5), torch.optim.RMSprop(model.parameters(), lr=1e-3))


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x):
        s = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(s))))


def efficientnet_with_squeeze_excite() -> Program:
    """A gate of one value per channel, SiLU, stochastic depth by hand."""

    class MBConv(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
            self.bn, self.se = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01), SqueezeExcite(channels)

        def forward(self, x):
            y = self.se(F.silu(self.bn(self.conv(x))))
            if self.training:
                keep = (torch.rand(len(x), 1, 1, 1) < 0.8).float() / 0.8
                y = y * keep
            return x + y

    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), MBConv(16), MBConv(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 10),
    )  # fmt: skip
    return Program(model, nn.CrossEntropyLoss(), _images(), torch.optim.AdamW(model.parameters(), lr=2e-3))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(1e-6 * torch.ones(channels))

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(y)))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


def convnext() -> Program:
    """Layer norm over channels by a permutation; the residual branches start at 1e-6."""

    class ConvNeXt(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 24, 4, 4)
            self.blocks = nn.Sequential(ConvNeXtBlock(24), ConvNeXtBlock(24))
            self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)

        def forward(self, x):
            return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))

    model = ConvNeXt()
    return Program(
        model, nn.CrossEntropyLoss(), _images(size=32), torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    )


class VisionTransformer(nn.Module):
    def __init__(self, size=16, patch=4, width=32, depth=2, heads=4, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width).normal_(std=0.02))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.encoder(x))[:, 0])


def vision_transformer() -> Program:
    """The class token and the head of a ViT; the token starts at zero."""
    model = VisionTransformer()
    return Program(
        model, nn.CrossEntropyLoss(), _images(), torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    )


def vision_transformer_zero_head() -> Program:
    """The head starts at zero, as in fine-tuning of ViTs: all else gets its gradient from the second step on."""
    model = VisionTransformer()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return Program(
        model, nn.CrossEntropyLoss(), _images(), torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    )


class Mixer(nn.Module):
    def __init__(self, tokens=16, width=32):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


def mlp_mixer() -> Program:
    """Mixes positions, which are not samples, by transposing."""

    class MLPMixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 4, 4)
            self.blocks = nn.Sequential(Mixer(), Mixer())
            self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

        def forward(self, x):
            x = self.stem(x).flatten(2).transpose(1, 2)
            return self.head(self.norm(self.blocks(x)).mean(1))

    model = MLPMixer()
    return Program(model, nn.CrossEntropyLoss(), _images(), torch.optim.Adam(model.parameters(), lr=1e-3))


def inception_with_auxiliary_head() -> Program:
    """Branches that are concatenated, and two cross-entropies."""

    class Inception(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            self.branch1 = nn.Conv2d(16, 8, 1)
            self.branch3 = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1))
            self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(16, 8, 1))
            self.aux, self.fc = nn.Linear(16, 10), nn.Linear(32, 10)

        def forward(self, x):
            x = self.stem(x)
            aux = self.aux(x.mean((2, 3)))
            x = torch.cat([self.branch1(x), self.branch3(x), self.pool(x)], 1)
            return self.fc(F.relu(x).mean((2, 3))), aux

    def loss(output, target):
        logits, aux = output
        return F.cross_entropy(logits, target) + 0.4 * F.cross_entropy(aux, target)

    model = Inception()
    return Program(model, loss, _images(), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))


def bytes_scaled_inside() -> Program:
    """Images come as bytes, and the model normalizes them itself."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
            self.conv = nn.Conv2d(3, 16, 3, 2, 1)
            self.fc = nn.Linear(16, 10)

        def forward(self, x):
            x = (x.float() / 255 - self.mean) / self.std
            return self.fc(F.relu(self.conv(x)).mean((2, 3)))

    model = Net()
    x = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8)
    return Program(model, nn.CrossEntropyLoss(), (x, torch.randint(10, (16,))), torch.optim.Adam(model.parameters()))


def multi_label_images() -> Program:
    """Several labels an image, few of them, with weights for the positive ones."""
    model = ResNet(classes=20)
    y = (torch.rand(16, 20) < 0.1).float()
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.full((20,), 5.0))
    return Program(model, loss, (_images()[0], y), torch.optim.Adam(model.parameters(), lr=1e-3))


def video_3d() -> Program:
    """Three-dimensional convolutions over frames."""
    model = nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1, bias=False), nn.BatchNorm3d(16), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(16, 6),
    )  # fmt: skip
    batch = torch.randn(4, 3, 4, 8, 8), torch.randint(6, (4,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def frames_folded_into_the_batch() -> Program:
    """The 2-d net runs on N*T frames, and their features are averaged per clip: views that mix no samples."""

    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            n, t = x.shape[:2]
            features = self.cnn(x.view(n * t, *x.shape[2:])).view(n, t, -1)
            return self.fc(features.mean(1))

    model = Clip()
    batch = torch.randn(6, 5, 3, 12, 12), torch.randint(4, (6,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))
