"""`stabletrain diffusion theory`: ScaleLong's theorems against measurement. Imports no JAX until it runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from stabletrain.errors import EXIT_OK, ConfigError
from stabletrain.training.config import LARGEST_SEED, option
from stabletrain.training.presets import settings_from


@dataclass(frozen=True, kw_only=True)
class TheoryOptions:
    """Settings of the laboratory; the defaults are those of the small scale, for one CPU core."""

    depths: tuple[int, ...] = option((6, 12), "Skips of the paper's network.", minimum=1)
    width: int = option(128, "Width m of the paper's network.", minimum=2)
    gains: tuple[float, ...] = option((1.0, 2.0), "Gains of its blocks; 2 is the text read literally.", minimum=0.01)
    seeds: int = option(96, "Initialisations for the forward norms.", minimum=2)
    robustness_width: int = option(64, "Width of the paper's network where Jacobians are built.", minimum=2)
    robustness_seeds: int = option(4, "Initialisations for the bounds.", minimum=1)
    gradient_seeds: int = option(16, "Initialisations for the gradients.", minimum=1)
    uvit_width: int = option(32, "Width of the U-ViT (8x8 images, patch 2).", minimum=4)
    uvit_depth: int = option(6, "Depth of the U-ViT; half of it are skips.", minimum=2)
    unet_channels: int = option(8, "Channels of the UNet (8x8 images, two levels).", minimum=4)
    unet_blocks: int = option(1, "Residual blocks in each level of the UNet.", minimum=1)
    network_seeds: int = option(32, "Initialisations for the norms in U-ViT and UNet.", minimum=2)
    kappa: float = option(0.5, "Coefficient that GroupNorm is shown with.", minimum=0.0, maximum=1.0)


def theory(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for figures (PNG, SVG), table and numbers.")
    ] = Path("results/theory"),
    preset: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE.toml", help="Settings, with [small] and [paper]."),
    ] = None,
    scale: Annotated[
        str, typer.Option("--scale", metavar="small|paper", help="Which settings of the --config file to take.")
    ] = "small",
    depths: Annotated[list[int] | None, typer.Option(help="Skips of the paper's network. [default: 6 12]")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the paper's network.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Initialisations for the forward norms.")] = None,
    network_seeds: Annotated[int | None, typer.Option(help="Initialisations of U-ViT and UNet.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of weights, inputs and noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Measure ScaleLong's theorems on the paper's network, U-ViT and the UNet, against what they predict."""
    given = {"depths": depths or None, "width": width, "seeds": seeds, "network_seeds": network_seeds}
    options = settings_from(TheoryOptions, preset, scale, given)
    if options.uvit_depth % 2 or options.uvit_width % 4:
        raise ConfigError("the U-ViT needs an even depth, and a width that its 4 attention heads divide")
    from stabletrain.training.devices import configure_backend
    from stabletrain.training.run_directory import readable_errors

    with readable_errors(out):  # before minutes of measuring
        out.mkdir(parents=True, exist_ok=True)
    configure_backend(1, 1)
    from stabletrain.diffusion import theory as laboratory
    from stabletrain.diffusion.theory_figures import Laboratory, files_of, metrics_of, table_of
    from stabletrain.diffusion.unet import UNet
    from stabletrain.diffusion.uvit import UViT

    def tell(what: str) -> None:
        if not quiet:
            print(what, file=sys.stderr, flush=True)

    scalings = laboratory.SCALINGS
    uvit = UViT(8, 1, 2, options.uvit_width, options.uvit_depth, 4)
    unet = UNet(1, options.unet_channels, (1, 2), options.unet_blocks, (4,))
    deepest = max(options.depths)

    tell("Theorem 3.1: forward norms of the paper's network")
    forward = []
    for gain in options.gains:
        for depth in options.depths if gain == 1 else (deepest,):
            forward += laboratory.forward_norms(
                depth, options.width, scalings, gain=gain, seeds=options.seeds, seed=seed
            )
    merges = []
    for name, network in (("U-ViT", uvit), ("UNet", unet)):
        tell(f"norms in {name}")
        merges += laboratory.merge_norms(name, network, scalings, seeds=options.network_seeds, seed=seed)
    tell("Theorem 3.4: robustness")
    robustness = laboratory.theorem_network_robustness(
        min(options.depths), options.robustness_width, scalings, seeds=options.robustness_seeds, seed=seed
    )
    for name, network in (("U-ViT", uvit), ("UNet", unet)):
        tell(f"local robustness of {name}")
        robustness += laboratory.local_robustness(name, network, scalings, seeds=options.robustness_seeds, seed=seed)
    tell("Theorem 3.3: gradients")
    gradients = []
    plain = laboratory.theorem_network(min(options.depths), options.width)
    everything: dict[str, laboratory.Network] = {"theorem MLP": plain, "U-ViT": uvit, "UNet": unet}
    for name, any_network in everything.items():
        gradients += laboratory.gradient_ratios(name, any_network, scalings, seeds=options.gradient_seeds, seed=seed)
    found = Laboratory(
        forward, merges, robustness, gradients,
        laboratory.cancellation(unet, options.kappa, seeds=options.robustness_seeds, seed=seed),
    )  # fmt: skip

    metrics = metrics_of(found)
    document = {
        "scale": scale,
        "settings": dataclasses.asdict(options) | {"seed": seed},
        "metrics": metrics,
        **found.numbers(),
    }
    files = {
        **files_of(found),
        "theory.json": (json.dumps(document, indent=2) + "\n").encode(),
        "theory.md": table_of(found).encode(),
    }
    with readable_errors(out):
        for file, content in files.items():
            (out / file).write_bytes(content)
    if as_json:
        head = {"run_dir": str(out), "status": "done", "step": 0, "metrics": metrics}
        print(json.dumps({**head, "files": sorted(files)}, indent=2))
    else:
        print(table_of(found))
        print("\n".join(str(out / file) for file in sorted(files)))
    return EXIT_OK
