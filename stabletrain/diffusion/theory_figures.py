"""The theory laboratory's figures and its table, from what `theory` measured."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stabletrain.diffusion.theory import Cancellation, ForwardNorms, GradientRatios, MergeNorms, Robustness

COLOURS = {"unscaled": "#D55E00", "1/sqrt(2)": "#E69F00", "CS 0.8": "#56B4E9", "CS 0.5": "#0072B2"}


@dataclass(frozen=True)
class Laboratory:
    """Everything that one run of the laboratory found."""

    forward: Sequence[ForwardNorms]
    merges: Sequence[MergeNorms]
    robustness: Sequence[Robustness]
    gradients: Sequence[GradientRatios]
    cancellation: Cancellation

    def numbers(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "theorem_3.1": [each.numbers() for each in self.forward],
            "merges": [each.numbers() for each in self.merges],
            "theorem_3.4": [each.numbers() for each in self.robustness],
            "theorem_3.3": [each.numbers() for each in self.gradients],
            "group_norm": self.cancellation.numbers(),
        }


def files_of(found: Laboratory) -> dict[str, bytes]:
    """`<figure>.png` and `<figure>.svg` for each figure."""
    figures = {
        "forward-norms": forward_figure(found.forward),
        "real-networks": real_figure(found.merges, found.cancellation),
        "robustness": robustness_figure(found.robustness),
        "gradients": gradient_figure(found.gradients),
    }
    files = {}
    for name, figure in figures.items():
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            stream = io.BytesIO()
            figure.savefig(stream, format=kind, dpi=150, metadata=metadata)
            files[f"{name}.{kind}"] = stream.getvalue()
    return files


def _figure(columns: int, width: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 3.4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def forward_figure(found: Sequence[ForwardNorms]) -> Any:
    """Theorem 3.1 on the paper's network: a panel for each gain and depth; points measured, lines exact."""
    panels = sorted({(each.gain, each.num_skips) for each in found})
    figure, axes = _figure(len(panels))
    for axis, (gain, depth) in zip(axes, panels, strict=True):
        for each in found:
            if (each.gain, each.num_skips) != (gain, depth):
                continue
            colour, place = COLOURS[each.scaling.label], np.arange(depth + 1)
            axis.plot(place, each.predicted, "-", color=colour, linewidth=1.2, label=each.scaling.label)
            mean = each.measured.mean(axis=0)
            axis.errorbar(place, mean, 2 * each.standard_error, fmt="o", markersize=3, color=colour, capsize=2)
        if gain != 1:
            axis.set_yscale("log")
        axis.set_title(f"gain {gain:g}, {depth} skips", fontsize=9)
        axis.set_xlabel("feature $h_i$ (0: outermost)")
    axes[0].set_ylabel(r"$\|h_i\|^2 / \|x\|^2$")
    axes[0].legend(fontsize=7, title="line: exact expectation", title_fontsize=7)
    return figure


def effect(found: Sequence[MergeNorms]) -> dict[str, dict[str, tuple[float, float]]]:
    """Network -> scaling -> ||h_0||^2 relative to the unscaled network: measured, and as gain 1 would have it."""
    result: dict[str, dict[str, tuple[float, float]]] = {}
    plain = {each.network: each for each in found if each.scaling.name == "none"}
    for each in found:
        base = plain[each.network].norms[:, 0].mean()
        count = each.norms.shape[1] - 1
        promised = (1 + sum(kappa**2 for kappa in each.scaling.coefficients(count))) / (1 + count)
        result.setdefault(each.network, {})[each.scaling.label] = (float(each.norms[:, 0].mean() / base), promised)
    return result


def real_figure(found: Sequence[MergeNorms], group_norm: Cancellation) -> Any:
    """What is left of Theorem 3.1 in U-ViT and the UNet at initialisation, and of a coefficient behind GroupNorm."""
    effects = effect(found)
    figure, axes = _figure(len(effects) + 1)
    for axis, (network, by_scaling) in zip(axes, effects.items(), strict=False):
        place = np.arange(len(by_scaling))
        measured, promised = zip(*by_scaling.values(), strict=True)
        axis.bar(place - 0.2, measured, 0.4, color=[COLOURS[label] for label in by_scaling], label="measured")
        axis.bar(place + 0.2, promised, 0.4, fill=False, edgecolor="black", hatch="//", label="gain-1 prediction")
        axis.set_xticks(place, by_scaling, fontsize=7)
        axis.set_title(f"{network}, at initialisation", fontsize=9)
        axis.set_ylim(0, 1.35)  # room for the legend
    axes[0].set_ylabel(r"outermost $\|h_0\|^2$, relative to unscaled")
    axes[0].legend(fontsize=7)
    axis = axes[-1]
    place = np.arange(len(group_norm.merged))
    axis.bar(place - 0.2, group_norm.merged, 0.4, color="#999999", label="into the block (and its shortcut)")
    axis.bar(place + 0.2, group_norm.normalized, 0.4, color="#009E73", label="behind its GroupNorm")
    axis.set_xticks(place, [f"{i}{'' if ok else '*'}" for i, ok in enumerate(group_norm.aligned)])
    axis.set(xlabel="skip (*: a group has channels of both)", ylabel="relative change")
    axis.set_title(f"UNet: skip times {group_norm.kappa:g}", fontsize=9)
    axis.set_yscale("log")  # what is left behind the norm comes from its epsilon
    axis.set_ylim(top=30 * group_norm.merged.max())
    axis.legend(fontsize=7)
    return figure


def robustness_figure(found: Sequence[Robustness]) -> Any:
    """Theorem 3.4: measured gains below both bounds, on a log axis; a panel for each network."""
    networks = list(dict.fromkeys(each.network for each in found))
    figure, axes = _figure(len(networks))
    for axis, network in zip(axes, networks, strict=True):
        of_network = [each for each in found if each.network == network]
        for place, each in enumerate(of_network):
            spread = place + np.linspace(-0.15, 0.15, len(each.gain))
            axis.plot(spread, each.gain, "o", markersize=3, color=COLOURS[each.scaling.label])
            axis.plot(spread, each.unrolled, "_", color="#555555")
            axis.plot(spread, each.bound, "_", color="#000000", markeredgewidth=2)
        axis.set_yscale("log")
        axis.set_xticks(range(len(of_network)), [each.scaling.label for each in of_network], fontsize=7)
        axis.set_title(network, fontsize=9)
    axes[0].set_ylabel("output change per input change")
    axes[0].plot([], [], "o", color="#0072B2", markersize=3, label="measured")
    axes[0].plot([], [], "_", color="#555555", label="bound, each block's own constant")
    axes[0].plot([], [], "_", color="#000000", markeredgewidth=2, label="bound of Theorem 3.4")
    axes[0].legend(fontsize=7)
    return figure


def gradient_figure(found: Sequence[GradientRatios]) -> Any:
    """Theorem 3.3: squared gradient norms over their prediction, by skip; a panel for each network."""
    networks = list(dict.fromkeys(each.network for each in found))
    figure, axes = _figure(len(networks))
    for axis, network in zip(axes, networks, strict=True):
        for each in found:
            if each.network == network:
                place, colour = np.arange(len(each.encoders)), COLOURS[each.scaling.label]
                axis.plot(place, each.encoders, "o-", color=colour, markersize=3, label=each.scaling.label)
                axis.plot(place, each.decoders, "s--", color=colour, markersize=3)
        axis.set_yscale("log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(network, fontsize=9)
        axis.set_xlabel("skip (0: outermost)")
    axes[0].set_ylabel("squared gradient norm / prediction")
    axes[0].legend(fontsize=7, title="solid: encoder, dashed: decoder", title_fontsize=7)
    return figure


def table_of(found: Laboratory) -> str:
    """The findings as one Markdown page."""
    lines = ["# ScaleLong's theorems, measured", ""]
    lines += ["## Theorem 3.1 on the paper's network: outermost feature, mean of ||h_0||^2 / ||x||^2", ""]
    rows: list[tuple[Any, ...]] = [
        (
            f"{each.gain:g}", each.num_skips, each.scaling.label, f"{each.predicted[0]:.4g}",
            f"{each.measured[:, 0].mean():.4g} ± {each.standard_error[0]:.2g}", f"{each.largest_deviation:.1f}",
        )
        for each in found.forward
    ]  # fmt: skip
    lines += _table(("gain", "skips", "scaling", "exact", "measured", "largest deviation of any h_i, in SE"), rows)
    lines += ["", "## What is left of it in real networks, at initialisation", ""]
    effects = effect(found.merges)
    rows = [
        (
            each.network, each.scaling.label, f"{np.mean(each.gains):.3g}", f"{each.ratio.mean():.3f}",
            f"{each.largest_deviation:.1f}", f"{effects[each.network][each.scaling.label][0]:.3f}",
            f"{effects[each.network][each.scaling.label][1]:.3f}",
        )
        for each in found.merges
    ]  # fmt: skip
    head: tuple[str, ...] = (
        "network", "scaling", "gain of a merge", "merge: measured / exact", "largest deviation, in SE",
        "||h_0||^2 relative to unscaled", "the same with gain 1",
    )  # fmt: skip
    lines += _table(head, rows)
    lines += ["", "## Theorem 3.4: output change per input change", ""]
    rows = [
        (
            each.network, each.scaling.label, f"{each.gain.max():.3g}", f"{each.unrolled.min():.3g}",
            f"{each.bound.min():.3g}", each.violations,
        )
        for each in found.robustness
    ]  # fmt: skip
    head = (
        "network", "scaling", "largest measured", "smallest bound, own constants", "smallest bound of the theorem",
        "violations",
    )  # fmt: skip
    lines += _table(head, rows)
    lines += ["", "## Theorem 3.3: squared gradient norm over its prediction", ""]
    rows = [
        (each.network, each.scaling.label, *(f"{value:.3g}" for value in each.extremes)) for each in found.gradients
    ]
    lines += _table(("network", "scaling", "smallest", "largest"), rows)
    lines += ["", f"## GroupNorm in the UNet's decoders: the skip multiplied by {found.cancellation.kappa:g}", ""]
    each = found.cancellation
    rows = [
        (i, "yes" if ok else "no", f"{before:.3g}", f"{behind:.3g}")
        for i, (ok, before, behind) in enumerate(zip(each.aligned, each.merged, each.normalized, strict=True))
    ]
    lines += _table(("skip", "groups aligned", "change into the block", "change behind GroupNorm"), rows)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    bars = [list(map(str, row)) for row in rows]
    return [f"| {' | '.join(row)} |".replace("||", "‖") for row in ([*head], ["---"] * len(head), *bars)]


def metrics_of(found: Laboratory) -> Mapping[str, float]:
    """What the command prints and a script reads."""
    metrics: dict[str, float] = {}
    for each in found.forward:
        name = f"theorem31/gain{each.gain:g}/n{each.num_skips}/{each.scaling.label}"
        metrics[f"{name}/measured"] = float(each.measured[:, 0].mean())
        metrics[f"{name}/predicted"] = float(each.predicted[0])
    for network, by_scaling in effect(found.merges).items():
        for label, (measured, promised) in by_scaling.items():
            metrics[f"effect/{network}/{label}/measured"] = measured
            metrics[f"effect/{network}/{label}/gain1"] = promised
    metrics["theorem34/violations"] = float(sum(each.violations for each in found.robustness))
    for ratios in found.gradients:
        low, high = ratios.extremes
        metrics[f"theorem33/{ratios.network}/{ratios.scaling.label}/smallest"] = low
        metrics[f"theorem33/{ratios.network}/{ratios.scaling.label}/largest"] = high
    return metrics
