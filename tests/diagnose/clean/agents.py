"""Reinforcement learning: what one update of an agent sees."""

import torch
import torch.nn.functional as F
from program import Program
from torch import nn
from torch.distributions import Categorical, Normal


def _states(n=64):
    return torch.randn(n, 4) * torch.tensor([0.5, 0.6, 0.1, 0.9])


def policy_gradient() -> Program:
    """A softmax head and log-probabilities of what was done: no loss of torch's at all."""

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.affine1, self.dropout, self.affine2 = nn.Linear(4, 64), nn.Dropout(p=0.2), nn.Linear(64, 2)

        def forward(self, x):
            return F.softmax(self.affine2(F.relu(self.dropout(self.affine1(x)))), dim=1)

    def loss(probabilities, target):
        actions, returns = target
        returns = (returns - returns.mean()) / (returns.std() + 1e-8)
        return -(Categorical(probabilities).log_prob(actions) * returns).mean()

    model = Policy()
    batch = _states(), (torch.randint(2, (64,)), 20 + 5 * torch.randn(64))
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=1e-2))


def deep_q() -> Program:
    """The value of the action that was taken, against a frozen target net outside of the model."""
    online = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    target_net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    target_net.load_state_dict(online.state_dict())

    def loss(q, experience):
        action, reward, following, done = experience
        taken = q.gather(1, action)
        with torch.no_grad():
            best = target_net(following).max(1, keepdim=True)[0]
        return F.smooth_l1_loss(taken, reward + 0.99 * best * (1 - done))

    batch = (
        _states(),
        (torch.randint(2, (64, 1)), torch.ones(64, 1), _states(), (torch.rand(64, 1) < 0.1).float()),
    )
    return Program(online, loss, batch, torch.optim.AdamW(online.parameters(), lr=1e-4, amsgrad=True))


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, 2), nn.Linear(64, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 1.0)

    def forward(self, x):
        x = self.body(x)
        return self.actor(x), self.critic(x).squeeze(1)


def proximal_policy() -> Program:
    """Advantages are normalized over the batch, ratios are clipped, the entropy is subtracted: starts near zero."""

    def loss(output, target):
        logits, value = output
        action, old, advantage, returns = target
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy = Categorical(logits=logits)
        ratio = torch.exp(policy.log_prob(action) - old)
        clipped = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        return -clipped + 0.5 * F.mse_loss(value, returns) - 0.01 * policy.entropy().mean()

    model = ActorCritic()
    x = _states()
    action = torch.randint(2, (64,))
    with torch.no_grad():
        old = Categorical(logits=model(x)[0]).log_prob(action)
    batch = x, (action, old, torch.randn(64), torch.randn(64))
    return Program(model, loss, batch, torch.optim.Adam(model.parameters(), lr=3e-4, eps=1e-5))


def advantage_in_the_model() -> Program:
    """The model normalizes over the batch by itself and returns its loss."""

    class A2C(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ActorCritic()

        def forward(self, states, actions, returns):
            logits, value = self.net(states)
            advantage = returns - value.detach()
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            return (F.cross_entropy(logits, actions, reduction="none") * advantage).mean() + F.mse_loss(value, returns)

    model = A2C()
    batch = {"states": _states(), "actions": torch.randint(2, (64,)), "returns": torch.randn(64)}
    return Program(model, None, batch, torch.optim.RMSprop(model.parameters(), lr=7e-4, eps=1e-5))


def squashed_gaussian() -> Program:
    """Soft actor: a tanh of a sample, its log-probability corrected, a critic outside of the model."""
    critic = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 1)).requires_grad_(False)

    class Actor(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mean, self.log_std = nn.Linear(4, 32), nn.Linear(32, 1), nn.Linear(32, 1)

        def forward(self, x):
            h = F.relu(self.body(x))
            normal = Normal(self.mean(h), self.log_std(h).clamp(-20, 2).exp())
            u = normal.rsample()
            action = torch.tanh(u)
            log_p = normal.log_prob(u) - torch.log(1 - action**2 + 1e-6)
            return action, log_p, x

    def loss(output):
        action, log_p, states = output
        return (0.2 * log_p - critic(torch.cat([states, action], 1))).mean()

    model = Actor()
    return Program(model, loss, {"x": _states()}, torch.optim.Adam(model.parameters(), lr=3e-4))


def imitation() -> Program:
    """A tanh policy for actions inside of [-1, 1]."""
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2), nn.Tanh())
    batch = _states(), torch.tanh(torch.randn(64, 2))
    return Program(model, nn.MSELoss(), batch, torch.optim.Adam(model.parameters(), lr=1e-3))
