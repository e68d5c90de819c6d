"""Rules about how many values a norm's mean and variance come from."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from renorm.diagnose.catalogue import Found, rule
from renorm.diagnose.evidence import Evidence
from renorm.diagnose.rules.norms import one_each
from renorm.diagnose.rules.statistics import NormCall, norm_calls
from renorm.diagnose.rules.words import called, listed, shown

ONE_VALUE = "Expected more than 1 value per channel"  # torch's words, and renorm's
ONE_POSITION = "Expected more than 1 spatial element"


NARROW = """
model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
loss = nn.CrossEntropyLoss()
batch = torch.randn({0}, 8), torch.randint(3, ({0},))
"""


@rule(
    "C17",
    "few-values-per-channel",
    "error",
    title="A batch norm over too few values",
    why="With one value a channel there is no variance, and torch raises; with two the output is +1 and -1 whatever "
    "the input is; with a few, mean and variance are noise that evaluation does not have.",
    fix="Larger batches, GroupNorm in its place, synchronized statistics over processes, or drop_last=True in the "
    "loader where only the last batch is small.",
    source="Wu & He 2018, arXiv:1803.08494: at a batch of 2, GN has 10.6 % less error than BN; the limits of 8 and "
    "16 values are calibrated on the clean programs of tests/diagnose",
    bad=NARROW.format(2),
    good=NARROW.format(32),
)
def few_values_per_channel(evidence: Evidence) -> Iterator[Found]:
    """Values, not samples: images bring many. Fewer than 16 are worth an info, fewer than 8 a warning."""
    raised = raised_in(evidence, ONE_VALUE)
    if raised is not None and not isinstance(raised, nn.GroupNorm):
        name = evidence.names.get(raised, "")
        yield Found(
            f"{name or 'the model'} gets one value per channel, input {came_in(evidence)}: there is no variance of "
            f"one value, and the forward pass fails",
            module=name,
            fix="# at least two samples a batch: DataLoader(..., drop_last=True)\n" + as_group(name, raised),
        )
    calls = [
        c for c in one_each(norm_calls(evidence.trace)) if c.couples_batch and c.plain and c.measures and not c.shared
    ]
    few = sorted((call for call in calls if call.values < 16), key=lambda call: call.values)
    if few:
        least = few[0]
        others = listed([called(call.node) for call in few[1:]])
        two = least.values <= 2 and bool((least.standardized().abs() > 0.99).float().mean() > 0.9)
        then = "its output is +1 and -1, whatever the input" if two else "mean and variance are mostly noise"
        yield Found(
            f"{called(least.node)} has {least.values} values per channel, input {shown(tuple(least.input.shape))}: "
            f"{then}{f' (and so, with fewer than 16: {others})' if others else ''}",
            module=least.node.name,
            fix=as_group(least.node.name, least.node.module),
            severity="error" if two else "warning" if least.values < 8 else "info",
        )
    yield from last_batch(evidence, [call for call in calls if call.values >= 16 or not few])


def last_batch(evidence: Evidence, calls: list[NormCall]) -> Iterator[Found]:
    """What the last, smaller batch of an epoch will meet; run, not only predicted."""
    loader, size = evidence.loader, getattr(evidence.loader, "batch_size", None)
    if not isinstance(size, int) or size < 2 or getattr(loader, "drop_last", False) or evidence.run.error is not None:
        return
    try:
        samples = len(loader.sampler)  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        return
    rest, now = samples % size, evidence.batch_size
    if rest == 0 or rest >= now:
        return
    worst = min((call for call in calls if call.values % now == 0), key=lambda call: call.values, default=None)
    if worst is None or worst.values // now * rest > 2:
        return

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:rest] if tensor.dim() and len(tensor) == now else tensor

    again = evidence.again(evidence.each_input(cut), evidence.each_target(cut))
    fails = again.error is not None and ONE_VALUE in str(again.error)
    if not fails and again.error is not None:
        return
    left = f"{samples} samples in batches of {size} leave {rest} for the last one"
    then = "the forward pass will fail there" if fails else "its output there is +1 and -1, whatever the input"
    if not fails and worst.values // now * rest < 2:
        return  # a norm with another answer to one value
    yield Found(
        f"{left}, {worst.values // now * rest} per channel in {called(worst.node)}: {then}",
        module=worst.node.name,
        fix="DataLoader(..., drop_last=True)",
        severity="error" if fails else "warning",
    )


def raised_in(evidence: Evidence, words: str) -> nn.Module | None:
    """The module whose forward pass raised this; None where none did."""
    if evidence.run.error is None or words not in str(evidence.run.error) or not evidence.trace.running:
        return None
    return evidence.trace.running[-1]


def came_in(evidence: Evidence) -> str:
    """The shape that went into the innermost module an error came through, or into the function that raised."""
    failed = evidence.trace.failed
    taken = failed.inputs if failed is not None else evidence.trace.entered[-1] if evidence.trace.entered else ()
    return shown(tuple(taken[0].shape)) if taken else "unknown"


def as_group(name: str, module: nn.Module | None) -> str:
    """A group norm in the place of a batch norm, as code."""
    channels = getattr(module, "num_features", None)
    if not isinstance(channels, int) or not name:
        return "# or a norm within each sample, such as torch.nn.functional.group_norm"
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and (channels // g >= 4 or g == 1))
    return f'model.set_submodule("{name}", torch.nn.GroupNorm({groups}, {channels}))'


@rule(
    "C18",
    "few-values-per-set",
    "error",
    title="An instance, group or layer norm over one or two values",
    why="One value minus its own mean is 0: the output is the bias, whatever the input is, and nothing in front of "
    "the norm learns. Of two values only the order is left.",
    fix="Fewer groups, or a norm over more axes.",
    source="follows from the formula; torch raises for instance norm only",
    bad="""
model = nn.Sequential(nn.Linear(8, 16), nn.GroupNorm(16, 16), nn.ReLU(), nn.Linear(16, 3))
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(3, (32,))
""",
    good="""
model = nn.Sequential(nn.Linear(8, 16), nn.GroupNorm(2, 16), nn.ReLU(), nn.Linear(16, 3))
loss = nn.CrossEntropyLoss()
batch = torch.randn(32, 8), torch.randint(3, (32,))
""",
)
def few_values_per_set(evidence: Evidence) -> Iterator[Found]:
    """One value is an error, two a warning, up to four an info; confirmed on what the norm makes of the batch."""
    raised = raised_in(evidence, ONE_POSITION)
    if raised is None and isinstance(raised_in(evidence, ONE_VALUE), nn.GroupNorm):
        raised = raised_in(evidence, ONE_VALUE)
    if raised is not None:
        name = evidence.names.get(raised, "")
        yield Found(
            f"{name or 'the model'} normalizes sets of one value, input {came_in(evidence)}: the forward pass fails",
            module=name,
            fix="# more positions in front of it (less pooling or striding), or a norm over more channels",
        )
    for call in one_each(norm_calls(evidence.trace)):
        if (
            call.couples_batch
            or not (call.plain and call.measures)
            or call.values > 4
            or call.input.numel() <= call.values
        ):
            continue
        if not call.centered and call.values > 1:
            continue  # of two values about zero the angle is left, not only the order
        if call.values <= 2:
            x_hat = call.standardized()
            away = x_hat.abs() < 1e-3 if call.values == 1 and call.centered else (x_hat.abs() - 1).abs() < 1e-2
            # Positions at which all values are the same, such as padding, say nothing.
            if float(away.float().mean()) < 0.9:
                continue
        if not call.centered:
            left = "the output is the input's sign"
        elif call.values == 1:
            left = "the output is the bias, whatever the input"
        elif call.values == 2:
            left = "the output is +1 and -1, only the order is left"
        else:
            left = "little of them is left"
        yield Found(
            f"{called(call.node)} normalizes sets of {call.values} value{'s' * (call.values > 1)}, input "
            f"{shown(tuple(call.input.shape))}: {left}",
            module=call.node.name,
            fix=fewer_groups(call),
            severity="error" if call.values == 1 else "warning" if call.values == 2 else "info",
        )


def fewer_groups(call: NormCall) -> str:
    """A norm over more values, as code."""
    if isinstance(call.node.module, nn.GroupNorm):
        per_group = call.values * call.node.module.num_groups // max(1, call.channels)  # positions
        groups = next(
            (g for g in (32, 16, 8, 4, 2) if call.channels % g == 0 and call.channels // g * per_group >= 8), 1
        )
        return f'model.set_submodule("{call.node.name}", torch.nn.GroupNorm({groups}, {call.channels}))'
    if call.kind == "layer_norm" and call.values == 1:
        return "# leave the norm out: there is nothing to compare a single feature with"
    return "# a norm over more values: GroupNorm over channels and positions"
