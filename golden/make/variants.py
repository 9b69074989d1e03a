"""Owns the words in which the tables of golden/make/models/ describe a tiny checkpoint: Variant, Architecture, Without.

A `Without` is one way to compute the checkpoint wrongly: with other config values, with tensors blanked, or with a piece
of the running model replaced. checkpoints.py insists that each of them is visible in the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Without:
    """A wrong reading of a checkpoint, which must show in the logits."""

    config: dict = field(default_factory=dict)
    fill: dict[str, float] = field(default_factory=dict)  # regex of tensor names -> value they are filled with
    patch: Callable | None = None  # applied to the loaded model


@dataclass(frozen=True)
class Variant:
    """One checkpoint folder."""

    purpose: str
    config: dict = field(default_factory=dict)  # changes to the architecture's BASE
    without: dict[str, Without] = field(default_factory=dict)
    spelling: str = "v5"
    extra: dict = field(default_factory=dict)  # keys set in config.json after everything else; ... drops a key
    dtype: str = "float32"
    shards: int = 1
    layout: str = "original"  # original | runtime | fp8 | mxfp4
    lengths: tuple[int, ...] = (13, 1)
    mtp: bool = False  # adds a multi-token-prediction block that must be ignored
    patch: Callable | None = None  # a correction of transformers, applied to every model before it computes
    prefill_only: bool = False  # step by step gives something else, on purpose


@dataclass(frozen=True)
class Architecture:
    """What the variants of one model_type share."""

    base: dict
    variants: dict[str, Variant]
    v4_renames: dict[str, str] = field(default_factory=dict)
    v4_extra: Callable = lambda config: {}
    v4: Callable | None = None  # writes the whole v4 config.json, instead of the two above
    init: dict[str, tuple] = field(default_factory=dict)  # regex -> (mean, standard deviation | "fan1": 1/sqrt(shape[1]))
    keep_f32: str = r"e_score_correction_bias$"


def rope(theta=10000.0, **scaling):
    """What `rope_parameters` says of plain rotary positions, or of scaled ones."""
    return {"rope_type": "default", "rope_theta": theta} | scaling


def reroute(weights):
    """A patch: weights(router logits, weights, experts) replaces what the routers return as weights."""

    def apply(model):
        from common import routers

        for _, module in routers(model):
            module.register_forward_hook(
                lambda _module, _inputs, output: (output[0], weights(*output), output[2])
            )

    return apply


def raw_softmax(logits, _weights, experts):
    """Softmax over all experts at the picked ones."""
    return logits.softmax(-1).gather(1, experts)


def renormalised(logits, _weights, experts):
    """Softmax over the picked experts."""
    return logits.gather(1, experts).softmax(-1)
