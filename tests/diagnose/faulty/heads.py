"""The last activation does not go with the loss."""

import torch
import torch.nn.functional as F
from clean.vision import ResNet
from program import Program, fault
from torch import nn


def _rows(n=32, features=20):
    return torch.randn(n, features)


def _mlp(outputs, *end):
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs), *end)


def _adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


@fault("C01")
def softmax_layer_before_cross_entropy() -> Program:
    """nn.Softmax as the last layer, then CrossEntropyLoss."""
    model = _mlp(10, nn.Softmax(dim=1))
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.randint(10, (32,))), _adam(model))


@fault("C01")
def softmax_in_forward() -> Program:
    """F.softmax at the end of a CNN's forward, then F.cross_entropy."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
            self.fc1, self.fc2 = nn.Linear(16 * 16, 32), nn.Linear(32, 10)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            x = F.max_pool2d(F.relu(self.conv2(x)), 2)
            x = F.relu(self.fc1(x.view(-1, 16 * 16)))
            return F.softmax(self.fc2(x), dim=-1)

    model = Net()
    return Program(model, F.cross_entropy, (torch.rand(32, 1, 16, 16), torch.randint(10, (32,))), _adam(model))


@fault("C01")
def softmax_over_channels_of_masks() -> Program:
    """A segmentation net that returns probabilities for a cross-entropy over (N, K, H, W)."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 6, 1), nn.Softmax(dim=1))
    y = torch.randint(6, (4, 16, 16))
    y[:, :2] = 255
    return Program(model, nn.CrossEntropyLoss(ignore_index=255), (torch.randn(4, 3, 16, 16), y), _adam(model))


@fault("C01")
def softmax_by_hand() -> Program:
    """exp and a division by the sum, written out, in front of the loss."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = _mlp(5)

        def forward(self, x):
            e = torch.exp(self.layers(x))
            return e / e.sum(dim=1, keepdim=True)

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.randint(5, (32,))), _adam(model))


@fault("C01")
def next_token_probabilities() -> Program:
    """A language model that returns softmax(logits), flattened into the cross-entropy."""

    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.gru, self.out = nn.Embedding(50, 16), nn.GRU(16, 32, batch_first=True), nn.Linear(32, 50)

        def forward(self, tokens):
            return self.out(self.gru(self.embed(tokens))[0]).softmax(-1)

    tokens = torch.randint(50, (8, 13))
    model = LM()
    return Program(
        model,
        lambda p, y: F.cross_entropy(p.reshape(-1, 50), y.reshape(-1)),
        (tokens[:, :-1], tokens[:, 1:]),
        _adam(model),
    )


@fault("C01")
def softmax_inside_the_head_of_a_resnet() -> Program:
    """A pretrained net's fc is replaced by Linear and Softmax."""
    model = ResNet()
    model.fc = nn.Sequential(nn.Linear(32, 7), nn.Softmax(dim=1))
    batch = torch.randn(16, 3, 16, 16), torch.randint(7, (16,))
    return Program(model, nn.CrossEntropyLoss(label_smoothing=0.1), batch, _adam(model))


@fault("C01")
def softmax_in_one_of_two_heads() -> Program:
    """Two tasks: the second one's probabilities go into its cross-entropy."""

    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(20, 32), nn.Linear(32, 4), nn.Linear(32, 6)

        def forward(self, x):
            x = F.relu(self.body(x))
            return self.a(x), torch.softmax(self.b(x), 1)

    def loss(out, y):
        return F.cross_entropy(out[0], y[0]) + F.cross_entropy(out[1], y[1])

    model = Tasks()
    return Program(model, loss, (_rows(), (torch.randint(4, (32,)), torch.randint(6, (32,)))), _adam(model))


@fault("C02")
def log_softmax_twice() -> Program:
    """LogSoftmax and CrossEntropyLoss: harmless, and an info."""
    model = _mlp(5, nn.LogSoftmax(dim=1))
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.randint(5, (32,))), _adam(model))


@fault("C02b")
def sigmoid_before_cross_entropy() -> Program:
    """A sigmoid on every class, then CrossEntropyLoss."""
    model = _mlp(3, nn.Sigmoid())
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.randint(3, (32,))), _adam(model))


@fault("C02b")
def tanh_before_cross_entropy() -> Program:
    """An LSTM's classifier whose scores pass through tanh."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(4, 32, batch_first=True), nn.Linear(32, 5)

        def forward(self, x):
            return torch.tanh(self.out(self.lstm(x)[0][:, -1]))

    model = Net()
    return Program(model, nn.CrossEntropyLoss(), (torch.randn(16, 9, 4), torch.randint(5, (16,))), _adam(model))


@fault("C03")
def nll_of_logits() -> Program:
    """NLLLoss, and no log_softmax anywhere."""
    model = _mlp(10)
    return Program(model, nn.NLLLoss(), (_rows(), torch.randint(10, (32,))), _adam(model))


@fault("C03")
def nll_of_probabilities() -> Program:
    """NLLLoss of a softmax: the loss is negative, and falls to -1."""
    model = _mlp(10, nn.Softmax(dim=1))
    return Program(model, nn.NLLLoss(), (_rows(), torch.randint(10, (32,))), _adam(model))


@fault("C03")
def nll_of_masks() -> Program:
    """F.nll_loss on the scores of a segmentation net."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))
    return Program(model, F.nll_loss, (torch.randn(4, 3, 12, 12), torch.randint(4, (4, 12, 12))), _adam(model))


@fault("C03", "C28")
def log_softmax_over_the_batch() -> Program:
    """log_softmax(dim=0) in front of NLLLoss: each class is a distribution over samples."""
    model = _mlp(4, nn.LogSoftmax(dim=0))
    return Program(model, nn.NLLLoss(), (_rows(), torch.randint(4, (32,))), _adam(model))


@fault("C04")
def sigmoid_before_bce_with_logits() -> Program:
    """nn.Sigmoid, then BCEWithLogitsLoss."""
    model = _mlp(1, nn.Sigmoid())
    return Program(model, nn.BCEWithLogitsLoss(), (_rows(), torch.randint(2, (32, 1)).float()), _adam(model))


@fault("C04")
def discriminator_with_sigmoid() -> Program:
    """A DCGAN's discriminator ends in a sigmoid, and the loss has been replaced by the one with logits."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32),
        nn.LeakyReLU(0.2), nn.Conv2d(32, 1, 2), nn.Sigmoid(), nn.Flatten(0),
    )  # fmt: skip
    batch = torch.rand(16, 1, 8, 8) * 2 - 1, torch.cat([torch.ones(8), torch.zeros(8)])
    return Program(model, nn.BCEWithLogitsLoss(), batch, torch.optim.Adam(model.parameters(), 2e-4, (0.5, 0.999)))


@fault("C04")
def softmax_for_several_labels() -> Program:
    """Several labels a sample: a softmax, which lets only one of them be likely, and a second sigmoid."""
    model = _mlp(8, nn.Softmax(dim=1))
    return Program(model, nn.BCEWithLogitsLoss(), (_rows(), (torch.rand(32, 8) < 0.3).float()), _adam(model))


@fault("C04")
def mask_through_two_sigmoids() -> Program:
    """torch.sigmoid in a U-Net's forward, and a loss with logits outside."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 1)

        def forward(self, x):
            return torch.sigmoid(self.b(F.relu(self.a(x))))

    model = Net()
    y = (torch.rand(4, 1, 12, 12) < 0.3).float()
    return Program(model, nn.BCEWithLogitsLoss(), (torch.randn(4, 1, 12, 12), y), _adam(model))


@fault("C04b", also=("C08",))
def bce_of_logits() -> Program:
    """BCELoss on a linear layer: torch raises as soon as a value is outside of [0, 1]."""
    model = _mlp(1)
    return Program(model, nn.BCELoss(), (_rows(), torch.randint(2, (32, 1)).float()), _adam(model))


@fault("C04b")
def bce_of_relu() -> Program:
    """BCELoss on a ReLU, whose values happen to be below 1 on this batch."""
    model = _mlp(1, nn.ReLU())
    return Program(model, nn.BCELoss(), (_rows(), torch.randint(2, (32, 1)).float()), _adam(model))


@fault("C04b")
def bce_of_tanh() -> Program:
    """The generator's tanh was copied into the discriminator."""
    model = _mlp(1, nn.Tanh())
    return Program(model, nn.BCELoss(), (_rows(), torch.randint(2, (32, 1)).float()), _adam(model))


@fault("C05")
def cross_entropy_of_one_unit() -> Program:
    """A binary problem, one output unit, and CrossEntropyLoss: the loss is 0 from the start."""
    model = _mlp(1)
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.zeros(32, dtype=torch.long)), _adam(model))


@fault("C05", also=("C06",))
def cross_entropy_of_one_unit_with_float_targets() -> Program:
    """The same with (N, 1) targets of 0.0 and 1.0, which torch takes for probabilities."""
    model = _mlp(1)
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.randint(2, (32, 1)).float()), _adam(model))


@fault("C06")
def softmax_of_one_unit() -> Program:
    """Softmax on a single unit and a squared error: the output is 1 for every sample."""
    model = _mlp(1, nn.Softmax(dim=1))
    return Program(model, nn.MSELoss(), (_rows(), torch.randint(2, (32, 1)).float()), _adam(model))


@fault("C06")
def softmax_of_one_unit_with_bce() -> Program:
    """Softmax on a single unit and BCELoss."""
    model = _mlp(1, nn.Softmax(dim=-1))
    return Program(model, nn.BCELoss(), (_rows(), torch.randint(2, (32, 1)).float()), _adam(model))


@fault("C06", "C28", also=("C03",))
def softmax_over_the_wrong_dimension() -> Program:
    """Sequence outputs (N, 1, K), and softmax over dimension 1."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out = nn.GRU(6, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x):
            return F.log_softmax(self.out(self.gru(x)[0][:, -1:]), dim=1)

    model = Net()
    batch = torch.randn(16, 8, 6), torch.randint(4, (16,))
    return Program(model, lambda out, y: F.nll_loss(out.squeeze(1), y), batch, _adam(model))


@fault("C10")
def relu_before_cross_entropy() -> Program:
    """An activation behind every layer, the last one too."""
    model = _mlp(6, nn.ReLU())
    return Program(model, nn.CrossEntropyLoss(), (_rows(), torch.randint(6, (32,))), _adam(model))


@fault("C10")
def relu_before_bce_with_logits() -> Program:
    """A ReLU in front of BCEWithLogitsLoss: no probability is below one half."""
    model = _mlp(1, nn.ReLU())
    return Program(model, nn.BCEWithLogitsLoss(), (_rows(), torch.randint(2, (32, 1)).float()), _adam(model))


@fault("C10b")
def squared_error_of_classes() -> Program:
    """Softmax and MSELoss against one-hot rows."""
    model = _mlp(10, nn.Softmax(dim=1))
    y = F.one_hot(torch.randint(10, (32,)), 10).float()
    return Program(model, nn.MSELoss(), (_rows(), y), _adam(model))


@fault("C08")
def sigmoid_for_real_values() -> Program:
    """A regression whose head ends in a sigmoid; targets go to 30."""
    model = _mlp(1, nn.Sigmoid())
    return Program(model, nn.MSELoss(), (_rows(), 30 * torch.rand(32, 1)), _adam(model))


@fault("C08", also=("C14",))
def tanh_for_pixels() -> Program:
    """An autoencoder with a tanh head for pixels from 0 to 255."""
    x = torch.randint(256, (16, 64)).float()
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64), nn.Tanh())
    return Program(model, nn.MSELoss(), (x, x), _adam(model))


@fault("C08")
def relu_for_signed_targets() -> Program:
    """A ReLU at the end of a regression of values on both sides of 0."""
    model = _mlp(1, nn.ReLU())
    return Program(model, nn.L1Loss(), (_rows(), torch.randn(32, 1)), _adam(model))


@fault("C08")
def softmax_for_regression() -> Program:
    """Four unrelated targets through a softmax, copied from a classifier."""
    model = _mlp(4, nn.Softmax(dim=1))
    return Program(model, nn.SmoothL1Loss(), (_rows(), torch.randn(32, 4)), _adam(model))


@fault("C08")
def labels_of_one_and_two() -> Program:
    """BCEWithLogitsLoss with labels 1 and 2, as the file has them: the loss falls below 0."""
    model = _mlp(1)
    return Program(model, nn.BCEWithLogitsLoss(), (_rows(), torch.randint(1, 3, (32, 1)).float()), _adam(model))


@fault("C08")
def labels_of_minus_one_and_one() -> Program:
    """BCEWithLogitsLoss with labels -1 and 1."""
    model = _mlp(1)
    return Program(model, nn.BCEWithLogitsLoss(), (_rows(), torch.randint(2, (32, 1)).float() * 2 - 1), _adam(model))


@fault("C08", also=("C00",))
def image_of_another_range() -> Program:
    """An autoencoder with sigmoid and BCE, on images normalized to mean 0: torch raises."""
    x = torch.randn(16, 64)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64), nn.Sigmoid())
    return Program(model, nn.BCELoss(), (x, x), _adam(model))


@fault("C08")
def images_normalized_for_a_sigmoid() -> Program:
    """The same with a squared error, which torch takes silently."""
    x = torch.randn(16, 64)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64), nn.Sigmoid())
    return Program(model, nn.MSELoss(), (x, x), _adam(model))
