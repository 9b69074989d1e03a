"""The claims, one by one: which runs they need, what is compared, and in which direction.

An arm is a recipe of recipes/claims and settings over it. A check compares a number (values.py, probes.py) of an arm with that of
another arm, seed by seed, or with a constant. A claim holds when all of its checks do. "No worse" means within NO_WORSE nats.

All arms share one test bed: the sizes, the schedule and the text of top2.toml, except for what an arm is about. It was chosen once, by
whether top2.toml beats dense.toml with one seed, before anything else was trained on it; nothing is tuned for a claim (docs/log.md).
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT  # noqa: E402

RECIPES = ROOT / "recipes" / "claims"
LESS, MORE = -1, 1
# Nats per token that count as equal: a sixth of what top-2 gains over the dense model on this bed, set from those two before anything else
# was trained on it.
NO_WORSE = 0.02


@dataclass(frozen=True)
class Arm:
    """What is trained."""

    name: str
    recipe: str
    set: tuple = ()
    # `--set` key -> arm whose exported model of the same seed it is given.
    needs: tuple = ()
    probes: tuple = ()
    # What is set beside `set` to measure its speed, so that the few steps of that are of its slowest phase.
    calibrate: tuple = ()


@dataclass(frozen=True)
class Check:
    """`measure` of `arm` against `factor` times that of another arm, or against a number."""

    what: str
    measure: str
    arm: str
    sign: int
    against: object
    margin: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what would show it here."""

    name: str
    says: str
    paper: str
    checks: tuple = ()
    # The four arms that every comparison of quality stands beside, at this claim's sizes.
    baselines: tuple = ("dense", "switch", "top2", "random")
    # Why it cannot be tested at this size; then there are no checks.
    untestable: str = ""


def nll(arm, against, what, sign=LESS, margin=0.0):
    """A check of held-out loss."""
    return Check(what, "nll", arm, sign, against, margin)


def of_sizes(suffix, *set, switch=(), two=()):
    """The four baselines with other sizes; `switch` and `two` are set for switch.toml and for the recipes of two picks."""
    own = {"dense": (), "switch": switch, "top2": two, "random": two}
    return tuple(Arm(f"{name}-{suffix}", name, set + more) for name, more in own.items())


THREE_LAYERS = of_sizes("3-layers", "model.n_layers=3")
SIX_LAYERS = of_sizes("6-layers", "model.n_layers=6")
# As in global-balance.toml: sixteen experts, and one sequence of one domain a micro-batch.
ONE_DOMAIN = ("train.batch_size=1", "train.accumulate=8", "train.seq_len=256", "model.max_position_embeddings=256")
LONG = of_sizes("long", *ONE_DOMAIN, switch=("model.n_experts=8",), two=("model.n_experts=16",))

_ARMS = (
    Arm("dense", "dense"),
    Arm("switch", "switch"),
    Arm("top2", "top2"),
    Arm("random", "random"),
    *THREE_LAYERS,
    *SIX_LAYERS,
    *(arm for arm in LONG if arm.name != "top2-long"),
    Arm("gshard", "gshard"),
    Arm("capacity-2", "capacity"),
    Arm("capacity-1", "capacity", ("router.capacity.factor=1.0",)),
    Arm("capacity-half", "capacity", ("router.capacity.factor=0.5",)),
    Arm("capacity-half-priority", "capacity", ("router.capacity.factor=0.5", "router.drop_order='priority'", "router.allow_non_causal=true")),
    Arm("z-loss", "z-loss"),
    Arm("deepseek", "deepseek", probes=("ablation",)),
    Arm("deepseek-no-shared", "deepseek-no-shared"),
    Arm("bias", "bias-balance"),
    Arm("aux", "bias-balance", ("balance_bias.until_step=0", "losses.balance=0.001")),
    Arm("adamoe", "adamoe", probes=("difficulty",)),
    Arm("top-p", "top-p", probes=("difficulty",)),
    Arm("top-p-0.2", "top-p", ("router.top_p=0.2",)),
    Arm("top-p-0.6", "top-p", ("router.top_p=0.6",)),
    Arm("top-p-no-entropy", "top-p", ("losses.entropy=0",)),
    Arm("rmoe", "rmoe"),
    Arm("rmoe-no-passing", "rmoe-no-passing"),
    Arm("uoe", "uoe"),
    Arm("uoe-random", "uoe", ("router.name='uniform'",)),
    Arm("uoe-attention", "uoe-attention"),
    Arm("uoe-attention-unlearned", "uoe-attention", ("model.attention_experts={n_experts=4,top_k=2,eps=0.0}",)),
    # Not 0, which would run one pass: a weight that moves nothing leaves two of them, and their disagreement is measured.
    Arm("thor-0", "thor", ("losses.consistency=1e-9",)),
    Arm("thor-1", "thor", ("losses.consistency=1.0",)),
    Arm("thor-5", "thor"),
    Arm("evomoe", "evomoe", calibrate=("evolve.dense_steps=1",)),
    Arm("evomoe-identical", "evomoe", ("evolve.spawn={mask=0.0}",), calibrate=("evolve.dense_steps=1",)),
    Arm("micro", "global-balance", ("losses.scope='micro'",), probes=("specialisation",)),
    Arm("global", "global-balance", probes=("specialisation",)),
    Arm("buffer", "global-balance", ("losses.scope='buffer'",), probes=("specialisation",)),
    Arm("micro-mixed", "global-balance-mixed", probes=("specialisation",)),
    Arm("pyramid", "pyramid"),
    Arm("residual", "residual"),
    Arm("mos-teacher", "mos-teacher"),
    Arm("mos-none", "mos", ("distill.until_step=0",), needs=(("distill.teacher", "mos-teacher"),)),
    Arm("mos-always", "mos", ("distill.until_step=1000000",), needs=(("distill.teacher", "mos-teacher"),)),
    Arm("mos-staged", "mos", needs=(("distill.teacher", "mos-teacher"),)),
    Arm("expert-choice", "expert-choice"),
    Arm("expert-choice-pool", "expert-choice", ("train.batch_size=2", "train.accumulate=16")),
    Arm("top2-pool", "top2", ("train.batch_size=2", "train.accumulate=16")),
)

ARMS = {arm.name: arm for arm in _ARMS}

CLAIMS = (
    Claim(
        "sparse",
        "At equal active size, routed experts beat a dense feed-forward, and a learned router beats a random one.",
        "Shazeer et al., 2017, arXiv 1701.06538; Fedus et al., 2021, arXiv 2101.03961",
        (
            nll("top2", "dense", "held-out loss of top-2 below the dense model's"),
            nll("switch", "dense", "held-out loss of Switch below the dense model's"),
            nll("top2", "random", "held-out loss of top-2 below random routing's"),
        ),
    ),
    Claim(
        "capacity",
        "A larger capacity is better: at factor 2 fewer tokens are dropped than at 1.",
        "Fedus et al., 2021, arXiv 2101.03961, Table 1",
        (nll("capacity-2", "capacity-1", "held-out loss at capacity 2 below that at 1"),),
    ),
    Claim(
        "priority",
        "When experts are too small for all, it pays to drop the tokens whose router is least sure (batch prioritised routing).",
        "Riquelme et al., 2021, arXiv 2106.05974",
        (nll("capacity-half-priority", "capacity-half", "held-out loss at capacity 0.5, by priority below by position"),),
    ),
    Claim(
        "gshard",
        "Sampling the second expert costs nothing against taking the second best.",
        "Lepikhin et al., 2020, arXiv 2006.16668",
        (nll("gshard", "top2", "held-out loss with a sampled second expert no worse than of top-2, which takes the second best", margin=NO_WORSE),),
    ),
    Claim(
        "z-loss",
        "The balance loss cannot see how large the logits grow; the z-loss bounds them and costs no quality.",
        "Zoph et al., 2022, arXiv 2202.08906",
        (
            Check("mean squared log-sum-exp at the end, with z-loss below half of that without", "z", "z-loss", LESS, "top2", factor=0.5),
            nll("z-loss", "top2", "held-out loss with z-loss no worse than without", margin=NO_WORSE),
        ),
    ),
    Claim(
        "expert-choice",
        "Experts that choose tokens see the future: the smaller the pool they choose from, the more of it leaks, and the loss falls without the model being better.",
        "Zhou et al., 2022, arXiv 2202.09368; the leak: Wang et al., 2024, arXiv 2408.15664",
        (
            nll("expert-choice-pool", "expert-choice", "loss with pools of 128 tokens below that with pools of 2048"),
            nll("top2-pool", "top2", "control: top-2 is no better for the smaller micro-batch", sign=MORE, margin=NO_WORSE),
        ),
    ),
    Claim(
        "deepseek",
        "Thin experts and one shared expert beat thick ones at equal size; the shared expert holds what the routed ones cannot replace.",
        "Dai et al., 2024, arXiv 2401.06066",
        (
            nll("deepseek", "top2", "held-out loss of 1 shared and 31 thin experts no worse than of 8 thick ones", margin=NO_WORSE),
            nll("deepseek", "deepseek-no-shared", "held-out loss with a shared expert below that with one more routed one"),
            Check("loss that silencing the shared expert costs, as a multiple of the worst routed one's, above 3", "ablate.ratio", "deepseek", MORE, 3.0),
        ),
    ),
    Claim(
        "bias-balance",
        "A bias that follows the load balances experts without a loss that disturbs the model.",
        "Wang et al., 2024, arXiv 2408.15664",
        (
            Check("MaxVio at the end, below 0.2", "max_vio", "bias", LESS, 0.2),
            Check("MaxVio at the end, below that of a balance loss of 0.001", "max_vio", "bias", LESS, "aux"),
            nll("bias", "aux", "held-out loss no worse than with the balance loss", margin=NO_WORSE),
        ),
    ),
    Claim(
        "adamoe",
        "With null experts each token takes as many real ones as it needs, at the quality of a fixed number.",
        "Zeng et al., 2024, arXiv 2406.13233",
        (
            nll("adamoe", "top2", "held-out loss with a target of two real experts no worse than of top-2", margin=NO_WORSE),
            Check("real experts per token above 1.7 (target 2.0)", "experts", "adamoe", MORE, 1.7),
            Check("real experts per token below 2.3 (target 2.0)", "experts", "adamoe", LESS, 2.3),
            Check("standard deviation of real experts over tokens, above 0.3", "experts.sd", "adamoe", MORE, 0.3),
            Check("experts of tokens before a decided character, below those before a free one", "experts.easy", "adamoe", LESS, "adamoe/experts.hard"),
        ),
    ),
    Claim(
        "top-p",
        "Harder tokens take more experts, and training brings their number below that of top-2.",
        "Huang et al., 2024, arXiv 2403.07652",
        (
            Check("experts per token at the end, below those of the first steps", "picks", "top-p", LESS, "top-p/picks.start"),
            Check("experts per token at the end, below 2.5", "picks", "top-p", LESS, 2.5),
            Check("experts per token without the entropy loss, above those with it", "picks", "top-p-no-entropy", MORE, "top-p"),
            Check("experts per token at p = 0.2, below those at 0.4", "picks", "top-p-0.2", LESS, "top-p"),
            Check("experts per token at p = 0.6, above those at 0.4", "picks", "top-p-0.6", MORE, "top-p"),
            Check("experts of the first layer, above those of the last", "picks.first", "top-p", MORE, "top-p/picks.last"),
            Check("experts of tokens before a free character, above those before a decided one", "experts.hard", "top-p", MORE, "top-p/experts.easy"),
            nll("top-p", "top2", "held-out loss no worse than of top-2", margin=NO_WORSE),
        ),
    ),
    Claim(
        "rmoe",
        "A router that remembers the routing of the layers below is better than one that does not.",
        "Qiu et al., 2024, arXiv 2408.06793",
        (nll("rmoe", "top2-6-layers", "held-out loss below that of linear routers"),),
        tuple(arm.name for arm in SIX_LAYERS),
    ),
    Claim(
        "rmoe-passing",
        "It is the memory that helps, not the larger router.",
        "Qiu et al., 2024, arXiv 2408.06793, Table 4",
        (nll("rmoe", "rmoe-no-passing", "held-out loss below that of the same router without the memory"),),
        tuple(arm.name for arm in SIX_LAYERS),
    ),
    Claim(
        "uoe",
        "Slices of one dense layer, chosen and summed, do as well as the dense layer of the slices that run.",
        "Yang, Lian, Li, 2025, arXiv 2503.02495",
        (
            nll("uoe", "dense", "held-out loss no worse than of a dense model of equal active size", margin=NO_WORSE),
            nll("uoe", "uoe-random", "held-out loss below that of slices chosen at random"),
        ),
    ),
    Claim(
        "uoe-attention",
        "Slices of attention, chosen and summed, do as well as attention of the size of the slices that run.",
        "Yang, Lian, Li, 2025, arXiv 2503.02495",
        (
            nll("uoe-attention", "uoe", "held-out loss no worse than with whole attention of that size", margin=NO_WORSE),
            nll("uoe-attention", "uoe-attention-unlearned", "held-out loss below that with a router that does not learn"),
        ),
    ),
    Claim(
        "uoe-patches",
        "Slices that choose patches of a sequence beat other mixtures on long-range classification.",
        "Yang, Lian, Li, 2025, arXiv 2503.02495",
        untestable="a choice over the sequence is not causal, so it cannot train a language model, and there is no classifier here",
    ),
    Claim(
        "thor",
        "Experts drawn at random, tied by a consistency loss, do without a router.",
        "Zuo et al., 2021, arXiv 2110.04260",
        (
            Check("disagreement of two passes at weight 5, below a fifth of that at 0", "part.consistency", "thor-5", LESS, "thor-0", factor=0.2),
            nll("thor-5", "thor-0", "held-out loss under random experts at weight 5 below that at 0"),
            nll("thor-1", "thor-0", "held-out loss under random experts at weight 1 below that at 0"),
            nll("thor-5", "switch", "held-out loss at weight 5 no worse than of Switch with as many parameters", margin=NO_WORSE),
        ),
    ),
    Claim(
        "evomoe",
        "Experts that grow out of one, under a gate that cools from all experts to one, beat Switch from scratch.",
        "Nie et al., 2021, arXiv 2112.14397",
        (
            Check("experts per token at the end, below 2", "picks", "evomoe", LESS, 2.0),
            nll("evomoe", "switch", "held-out loss after as many steps below that of Switch"),
            nll("evomoe", "evomoe-identical", "held-out loss below that of experts that start as equals"),
        ),
    ),
    Claim(
        "global-balance",
        "Balance over the whole batch instead of each micro-batch lets experts specialise by domain, at no cost in quality.",
        "Qiu et al., 2025, arXiv 2501.11873",
        (
            Check("divergence of the domains' experts, above that of balance per micro-batch", "js", "global", MORE, "micro"),
            nll("global", "micro", "held-out loss no worse than with balance per micro-batch", margin=NO_WORSE),
            Check("divergence with buffered loads, above that of balance per micro-batch", "js", "buffer", MORE, "micro"),
            Check("control: divergence when every micro-batch has all domains, above that of one domain each", "js", "micro-mixed", MORE, "micro"),
        ),
        ("dense-long", "switch-long", "micro", "random-long"),
    ),
    Claim(
        "pyramid",
        "More experts in the last layers and fewer in the first are no worse than the same number everywhere (PR-MoE).",
        "Rajbhandari et al., 2022, arXiv 2201.05596",
        (nll("pyramid", "switch", "held-out loss of 2, 2, 6, 6 experts no worse than of 4 in each layer", margin=NO_WORSE),),
    ),
    Claim(
        "residual",
        "One routed expert beside a dense layer is as good as two routed experts (PR-MoE).",
        "Rajbhandari et al., 2022, arXiv 2201.05596",
        (nll("residual", "top2", "held-out loss no worse than of top-2", margin=NO_WORSE),),
    ),
    Claim(
        "mos",
        "A student that follows its teacher only in the first part of training ends better than one that follows always, or never (Mixture-of-Students).",
        "Rajbhandari et al., 2022, arXiv 2201.05596",
        (
            nll("mos-staged", "mos-none", "held-out loss of staged below that of no distillation"),
            nll("mos-staged", "mos-always", "held-out loss of staged below that of distillation to the end"),
            Check("held-out loss after 40 % of the steps, distillation to the end below none", "nll@0.4", "mos-always", LESS, "mos-none"),
        ),
        tuple(arm.name for arm in THREE_LAYERS),
    ),
)


def compared(claim):
    """The arms of a claim's checks."""
    names = [check.arm for check in claim.checks]
    return names + [other_side(check)[0] for check in claim.checks if isinstance(check.against, str)]


def recipe_of(arm):
    """The file that an arm trains."""
    return RECIPES / f"{arm.recipe}.toml"


def sha256(data):
    """Enough of a hash to tell two of a few hundred things apart."""
    return hashlib.sha256(data).hexdigest()[:16]


def meaning(arm):
    """Hash of an arm's recipe without its comments, and of what is set over it: two arms with equal ones train alike."""
    lines = [line.strip() for line in recipe_of(arm).read_text(encoding="utf-8").splitlines()]
    return sha256(("\n".join(line for line in lines if line and not line.startswith("#")) + json.dumps(arm.set)).encode())


def steps_of(arm):
    """`train.steps` of an arm."""
    given = dict(change.split("=", 1) for change in arm.set)
    if "train.steps" in given:
        return int(given["train.steps"])
    lines = (line.partition("=") for line in recipe_of(arm).read_text(encoding="utf-8").splitlines())
    return next(int(value) for key, _, value in lines if key.strip() == "steps")


def waits_for(claim):
    """Recipes of a claim's checks that do not exist, because the trainer cannot do yet what they need."""
    names = compared(claim) + [teacher for name in compared(claim) for _, teacher in ARMS[name].needs]
    return sorted({ARMS[name].recipe for name in names if not recipe_of(ARMS[name]).is_file()})


def arms_of(claim):
    """What a claim trains: its baselines and the arms of its checks, each once; teachers before students. Baselines without a recipe are
    left out, and a claim that waits for one trains nothing."""
    if not claim.checks or waits_for(claim):
        return []
    names = [name for name in claim.baselines if recipe_of(ARMS[name]).is_file()] + compared(claim)
    found = {}
    for name in names:
        for _, teacher in ARMS[name].needs:
            found.setdefault(teacher, ARMS[teacher])
        found.setdefault(name, ARMS[name])
    return list(found.values())


def other_side(check):
    """Arm and measure that a check is against: `ARM`, or `ARM/MEASURE` for another measure."""
    arm, _, measure = check.against.partition("/")
    return arm, measure or check.measure


def claim_named(name):
    """The claim; KeyError when there is none."""
    for claim in CLAIMS:
        if claim.name == name:
            return claim
    raise KeyError(name)
