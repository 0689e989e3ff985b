"""The methods by name: which parts each is made of. Imports no JAX.

A preset says nothing that an option cannot say: `--method er --aggregator spcl` is rehearsal with the decomposition.
Where a value is not a preset's, the data's or the network's default is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARRANGEMENTS = ("random", "serial", "parallel", "staggered")
"""Ways of placing tasks' windows whose lengths are known."""

AT_TASK_END = ("released", "herding")
FROM_STREAM = ("reservoir", "class-balanced")
BUFFER_NAMES = (*AT_TASK_END, *FROM_STREAM)
"""Rules that fill the rehearsal buffer: when a task ends, or from the stream as it arrives."""

AGGREGATOR_NAMES = (
    "sum", "mean", "norm", "mgda", "nmgda", "pcgrad", "gradvac", "cagrad", "imtl-g", "aligned-mtl", "upgrad",
    "dualproj", "config", "rlw", "dwa", "nash-mtl", "graddrop", "uw", "gradnorm", "maxdo", "emgd", "spcl",
    "spcl-released", "pcgrad-released", "graddrop-released", "imtl-g-released", "rlw-released", "dwa-released",
    "maxdo-released",
)  # fmt: skip
"""`stabletrain.continual.aggregators.gram_weights.AGGREGATORS` by name: the memory is one task more."""

REHEARSAL_RULE_NAMES = ("current", "er", "replay-sum", "agem", "gem", "mega", "mega-released")
"""`stabletrain.continual.baselines.RULES` by name: the mean gradient of the active tasks against the memory's."""


@dataclass(frozen=True)
class Preset:
    """A method: the values of options that make it."""

    help: str
    values: Mapping[str, Any] = field(default_factory=dict)


_MTL = {
    "sum": "Sum of the gradients.",
    "mean": "Mean of the gradients.",
    "norm": "Sum of unit gradients.",
    "mgda": "MGDA: shortest convex combination (Desideri 2012; Sener and Koltun 2018).",
    "nmgda": "MGDA with weights from unit gradients.",
    "pcgrad": "PCGrad: projects conflicting gradients on each other's normal planes (Yu et al. 2020).",
    "gradvac": "GradVac: aligns cosines with their running means (Wang et al. 2021).",
    "cagrad": "CAGrad: best worst-task progress near the mean gradient (Liu et al. 2021).",
    "imtl-g": "IMTL-G: equal projections on all gradients (Liu et al. 2021).",
    "aligned-mtl": "Aligned-MTL: condition number 1 (Senushkin et al. 2023).",
    "upgrad": "UPGrad: mean of gradients projected on the dual cone (Quinton and Rey 2024).",
    "dualproj": "DualProj: the mean gradient projected on the dual cone.",
    "config": "ConFIG: equal cosines with all gradients (Liu et al. 2024).",
    "rlw": "Random loss weights (Lin et al. 2022).",
    "dwa": "DWA: weights from the rates of the losses (Liu et al. 2019).",
    "nash-mtl": "Nash-MTL: the tasks' bargaining solution (Navon et al. 2022).",
    "graddrop": "GradDrop: each element keeps one sign, drawn by its purity (Chen et al. 2020).",
    "uw": "UW: weights from learned uncertainties of the losses (Kendall et al. 2018).",
    "gradnorm": "GradNorm: learned weights that balance the lengths of the gradients (Chen et al. 2018).",
    "maxdo": "MaxDO: the least largest asymmetric distance to a task's gradient (Lyu et al. 2023).",
    "emgd": "EMGD: shortest combination with elastic factors (Lyu et al. 2024), without its memory editing.",
    "pcgrad-released": "PCGrad as in the code released with SPCL: one other gradient, drawn, and the mean.",
    "graddrop-released": "GradDrop as in the code released with SPCL: elements of the sum's sign, nothing drawn.",
    "imtl-g-released": "IMTL-G as in the code released with SPCL: from the second gradient, with a softmax.",
    "rlw-released": "Random weights as in the code released with SPCL: of uniform numbers, their sum 1.",
    "dwa-released": "DWA as in the code released with SPCL: weights from the mean of past losses.",
    "maxdo-released": "MaxDO's predecessor in the code released with SPCL: five steps on a mean distance, and MGDA.",
}  # fmt: skip

_FORWARD = {"orthogonality": "dbt", "orthogonality_weight": 1e-3}
_STORED = {"buffer": "reservoir"}

PRESETS: dict[str, Preset] = {
    "spcl": Preset(
        "SPCL: orthogonal convolutions and the exact orthogonal decomposition of the gradients (2024).",
        {"aggregator": "spcl", "decomposition_alpha": 10.0, **_FORWARD},
    ),
    "spcl-released": Preset(
        "SPCL as the released code has it: penalty iterations, filter cosines with weight 1e-6 in each loss.",
        {"aggregator": "spcl-released", "orthogonality": "kernel_cos", "orthogonality_weight": 1e-6,
         "orthogonality_when": "before"},
    ),
    **{name: Preset(text, {"aggregator": name}) for name, text in _MTL.items()},
    "finetune": Preset("Mean gradient of the active tasks, no memory: the lower bound.",
                       {"aggregator": "current", "memory_per_class": 0}),
    "er": Preset("Experience replay: mean of the current and the memory's gradient.", {"aggregator": "er"}),
    "agem": Preset("A-GEM: no step against the memory's gradient (Chaudhry et al. 2019).", {"aggregator": "agem"}),
    "gem": Preset("GEM: no step against any finished task's gradient (Lopez-Paz and Ranzato 2017).",
                  {"aggregator": "gem"}),
    "mega": Preset("MEGA-I: the memory weighted by the ratio of losses (Guo et al. 2020).", {"aggregator": "mega"}),
    "mega-released": Preset("MEGA as in the code released with SPCL, which swaps the two weights.",
                            {"aggregator": "mega-released"}),
    "der": Preset("DER: distance to stored logits (Buzzega et al. 2020).",
                  {"aggregator": "replay-sum", "distill_weight": 0.3, "replay_weight": 0.0, **_STORED}),
    "derpp": Preset("DER++: stored logits and labels, two draws (Buzzega et al. 2020).",
                    {"aggregator": "replay-sum", "distill_weight": 0.1, "replay_weight": 0.5, **_STORED}),
    "icarl": Preset("iCaRL: binary losses with distillation, herding, nearest class mean (Rebuffi et al. 2017).",
                    {"aggregator": "replay-sum", "loss": "icarl", "buffer": "herding"}),
    "gmed": Preset("GMED: replay of edited examples (Jin et al. 2021).",
                   {"aggregator": "er", "edit_rate": 0.003, **_STORED}),
    "mdmt-r": Preset("MDMT-R: cosine head with angular margins, replay (Lyu et al. 2021).",
                     {"aggregator": "er", "loss": "margin", "head": "cosine"}),
    "single": Preset("Each task alone, with a fresh network: a bound for the accuracy at a task's own end.",
                     {"aggregator": "current", "memory_per_class": 0, "restart": True, "timeline": "serial"}),
    "joint": Preset("All tasks at once from the first step: the bound that continual learning lacks.",
                    {"aggregator": "current", "memory_per_class": 0, "timeline": "parallel"}),
}  # fmt: skip
