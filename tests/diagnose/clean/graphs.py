"""Sets, graphs and mixtures: samples of several sizes in one tensor."""

import torch
import torch.nn.functional as F
from program import Program
from torch import nn


def _graph(nodes=40, edges=160):
    return torch.randint(nodes, (2, edges))


class Convolution(nn.Module):
    """Each node's neighbours, averaged: messages by index_add."""

    def __init__(self, inside, outside):
        super().__init__()
        self.own, self.other = nn.Linear(inside, outside), nn.Linear(inside, outside, bias=False)

    def forward(self, x, edges):
        source, target = edges
        total = torch.zeros_like(x).index_add(0, target, x[source])
        count = torch.zeros(len(x), 1).index_add(0, target, torch.ones(len(target), 1)).clamp(min=1)
        return self.own(x) + self.other(total / count)


def graph_convolution() -> Program:
    """Nodes are the samples of one graph, and depend on each other by design; a mask says which count."""

    class GCN(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = Convolution(16, 32), Convolution(32, 4)

        def forward(self, x, edges):
            x = F.dropout(F.relu(self.conv1(x, edges)), 0.5, training=self.training)
            return self.conv2(x, edges)

    def loss(logits, target):
        y, mask = target
        return F.cross_entropy(logits[mask], y[mask])

    model = GCN()
    batch = (torch.randn(40, 16), _graph()), (torch.randint(4, (40,)), torch.rand(40) < 0.5)
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4))


def graph_classification() -> Program:
    """Eight graphs in one, read out per graph."""

    class GIN(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp1 = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
            self.mlp2 = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
            self.out = nn.Linear(32, 3)

        def forward(self, x, edges, graph):
            for mlp in (self.mlp1, self.mlp2):
                x = mlp(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))
            pooled = torch.zeros(8, 32).index_add(0, graph, x) / 5
            return self.out(pooled)

    edges = torch.randint(5, (2, 96)) + 5 * torch.arange(8).repeat_interleave(12)
    batch = (torch.randn(40, 6), edges, torch.arange(8).repeat_interleave(5)), torch.randint(3, (8,))
    model = GIN()
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def graph_attention() -> Program:
    """A softmax over the edges into each node, by scatter."""

    class GAT(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.a = nn.Linear(16, 32, bias=False), nn.Linear(64, 1, bias=False)
            self.out = nn.Linear(32, 4)

        def forward(self, x, edges):
            h = self.w(x)
            s, t = edges
            e = F.leaky_relu(self.a(torch.cat([h[s], h[t]], 1)).squeeze(1), 0.2)
            e = torch.exp(e - e.max())
            total = torch.zeros(len(x)).index_add(0, t, e)
            alpha = e / (total[t] + 1e-9)
            return self.out(F.elu(torch.zeros_like(h).index_add(0, t, alpha[:, None] * h[s])))

    model = GAT()
    batch = (torch.randn(40, 16), _graph()), torch.randint(4, (40,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=5e-3))


def deep_sets() -> Program:
    """A sum over the elements of a set, divided by a constant."""

    class DeepSets(nn.Module):
        def __init__(self):
            super().__init__()
            self.phi = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32))
            self.rho = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, x, mask):
            return self.rho((self.phi(x) * mask[..., None]).sum(1) / 10).squeeze(1)

    x, mask = torch.randn(32, 10, 3), (torch.rand(32, 10) < 0.8).float()
    model = DeepSets()
    y = (x.norm(dim=2) * mask).amax(1)
    return Program(model, nn.MSELoss(), (x, mask, y), torch.optim.Adam(model.parameters(), lr=1e-3))


def point_cloud() -> Program:
    """PointNet: shared layers as convolutions of width 1, a maximum over points."""

    class PointNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv1d(3, 32, 1), nn.Conv1d(32, 64, 1)
            self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(32), nn.BatchNorm1d(64), nn.BatchNorm1d(32)
            self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, 10)

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = self.bn2(self.conv2(x)).max(2)[0]
            return self.fc2(F.relu(self.bn3(self.fc1(x))))

    model = PointNet()
    batch = torch.rand(16, 3, 50) * 2 - 1, torch.randint(10, (16,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))


def mixture_of_experts() -> Program:
    """Each sample goes to its best two of four experts; not every expert has work in every batch."""

    class MoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(10, 4)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 10)) for _ in range(4)
            )
            self.out = nn.Linear(10, 3)

        def forward(self, x):
            values, chosen = self.gate(x).topk(2, dim=1)
            weights = F.softmax(values, dim=1)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                rows, place = torch.where(chosen == i)
                if len(rows):
                    y = y.index_add(0, rows, weights[rows, place, None] * expert(x[rows]))
            return self.out(x + y)

    model = MoE()
    batch = torch.randn(48, 10), torch.randint(3, (48,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.AdamW(model.parameters(), lr=1e-3))


def switch_with_load_balance() -> Program:
    """One expert a token, and a second loss over the whole batch that evens the load."""

    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(16, 4)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            p = F.softmax(self.router(x), dim=-1)
            best, index = p.max(-1)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                at = index == i
                y[at] = expert(x[at])
            balance = 4 * (F.one_hot(index, 4).float().mean((0, 1)) * p.mean((0, 1))).sum()
            return self.head((x + y * best.unsqueeze(-1)).mean(1)), balance

    def loss(output, target):
        logits, balance = output
        return F.cross_entropy(logits, target) + 0.01 * balance

    model = Switch()
    batch = torch.randn(16, 6, 16), torch.randint(5, (16,))
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-3))
