"""What a pinned program is: all that `check` is given, as someone would have written it for training."""

import inspect
from dataclasses import dataclass, field

import torch

from renorm.diagnose import check


@dataclass(frozen=True)
class Program:
    """One training program up to its first step."""

    model: torch.nn.Module
    loss: object = None  # of (output, target), or of the output; None where the model returns its loss
    batch: object = None  # None where there is a loader
    optimizer: torch.optim.Optimizer | None = None
    loader: object = None
    options: dict = field(default_factory=dict)  # further arguments of `check`


@dataclass(frozen=True)
class Fault:
    """What is wrong with a faulty program, for those who compare."""

    expects: frozenset  # ids of rules; any of them is the diagnosis
    also: frozenset  # ids of rules that are true of it, too


def fault(*expects, also=()):
    """Mark a program as faulty: the ids of the rules that name the fault, and of those that are true besides."""

    def mark(build):
        build.fault = Fault(frozenset(expects), frozenset(also))
        return build

    return mark


def programs(*modules):
    """The functions of these modules that return a Program, by name."""
    found = {}
    for module in modules:
        for name, build in vars(module).items():
            if (
                inspect.isfunction(build)
                and build.__module__ == module.__name__
                and build.__annotations__.get("return") is Program
            ):
                assert name not in found, f"two programs have the name {name}"
                found[name] = build
    return found


def diagnosed(build, seed=0):
    """What `check` says of this program, built from this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        program = build()
        return check(program.model, program.loss, program.optimizer, program.batch, program.loader, **program.options)
