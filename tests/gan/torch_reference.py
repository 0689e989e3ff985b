"""GANs in PyTorch, written apart from the package: the oracle of the fixtures of steps and losses.

Networks are functions of flat dictionaries of tensors in the package's own names and layouts, so that gradients compare
entry by entry. `python -m tests.gan.torch_reference` writes the fixtures anew; they hold numbers only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.diffusion.weights import summary_of
from tests.gan.parity_cases import (
    BATCH,
    CLASSES,
    COMMON,
    CRITIC_STEPS,
    LOSSES,
    STEPS,
    loss_inputs,
    loss_settings,
    loss_start,
    start_value,
    step_inputs,
    step_shapes,
)

FIXTURES = Path(__file__).parent / "fixtures"
Tensor = torch.Tensor
Tensors = dict[str, Tensor]
CLASS_WEIGHT, TEMPERATURE, MARGIN = 0.5, 0.5, 0.98  # ReACGAN's on CIFAR-10


# --- layers -----------------------------------------------------------------------------------------------------------


class Network:
    """Parameters by name, and the statistics that evolve as a network is called."""

    def __init__(self, params: Tensors, statistics: Tensors, prefix: str = "") -> None:
        self.params, self.statistics, self.prefix = params, statistics, prefix

    def within(self, name: str) -> Network:
        return Network(self.params, self.statistics, f"{self.prefix}{name}/")

    def has(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.params

    def __getitem__(self, name: str) -> Tensor:
        return self.params[f"{self.prefix}{name}"]

    def normalized(self, name: str, matrix: Tensor, order: Any = lambda v: v) -> Tensor:
        """The matrix [out, in] over its spectral norm after one iteration; `order` puts v into the matrix's order."""
        key = f"{self.prefix}{name}"
        if f"{key}_u" not in self.statistics:
            return matrix
        with torch.no_grad():
            v = F.normalize(matrix.t() @ self.statistics[f"{key}_u"], dim=0, eps=1e-6)
            u = F.normalize(matrix @ v, dim=0, eps=1e-6)
            self.statistics[f"{key}_u"], self.statistics[f"{key}_v"] = u, order(v)
        return matrix / torch.dot(u, matrix @ v)

    def linear(self, name: str, x: Tensor) -> Tensor:
        layer = self.within(name)
        weight = layer.normalized("kernel", layer["kernel"].t())
        return F.linear(x, weight, layer["bias"] if layer.has("bias") else None)

    def table(self, name: str) -> Tensor:
        layer = self.within(name)
        return layer.normalized("embedding", layer["embedding"])

    def conv(self, name: str, x: Tensor) -> Tensor:
        """Channels first, as PyTorch has them; the vectors of the power iteration are in the order h, w, in."""
        layer = self.within(name)
        weight = layer["kernel"].permute(3, 2, 0, 1)  # HWIO -> OIHW
        out, channels, size, _ = weight.shape

        def order(v: Tensor) -> Tensor:
            return v.reshape(channels, size, size).permute(1, 2, 0).reshape(-1)

        flat = layer.normalized("kernel", weight.reshape(out, -1), order)
        bias = layer["bias"] if layer.has("bias") else None
        return F.conv2d(x, flat.reshape(weight.shape), bias, padding=size // 2)

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        """Training mode: the batch's statistics, and running ones with PyTorch's momentum 0.1."""
        mean, var = (self.statistics[f"{self.prefix}{name}/{kind}"].clone() for kind in ("mean", "var"))
        out = F.batch_norm(x, mean, var, training=True, momentum=0.1, eps=1e-4)
        self.statistics[f"{self.prefix}{name}/mean"], self.statistics[f"{self.prefix}{name}/var"] = mean, var
        return out

    def norm(self, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """None where there is none; with a scale and shift; by a condition [B, D]."""
        layer = self.within(name)
        if layer.has("batch/scale"):
            plain = self.batch_norm(f"{name}/batch", x)
            return plain * layer["batch/scale"][:, None, None] + layer["batch/bias"][:, None, None]
        if layer.has("batch/gain"):
            plain = self.batch_norm(f"{name}/batch/norm", x)
            gain, bias = (
                condition @ layer.normalized(f"batch/{kind}", layer[f"batch/{kind}"].t()).t()
                for kind in ("gain", "bias")
            )
            return plain * (1 + gain)[:, :, None, None] + bias[:, :, None, None]
        return x

    def attention(self, name: str, x: Tensor) -> Tensor:
        """SAGAN's, in the formulation of matrices [channels, positions]."""
        layer = self.within(name)
        batch, _, height, width = x.shape
        theta = layer.conv("theta", x).flatten(2)
        phi = F.max_pool2d(layer.conv("phi", x), 2).flatten(2)
        g = F.max_pool2d(layer.conv("g", x), 2).flatten(2)
        weights = torch.softmax(theta.transpose(1, 2) @ phi, dim=-1)
        seen = (g @ weights.transpose(1, 2)).reshape(batch, -1, height, width)
        return x + layer["sigma"] * layer.conv("out", seen)


# --- the networks at 8 pixels -----------------------------------------------------------------------------------------


def generate(net: Network, z: Tensor, labels: Tensor, name: str) -> Tensor:
    """BigGAN's generator with attention, or SNGAN's: images [B, C, H, W]."""
    if name == "reacgan":
        first, second = z.chunk(2, dim=1)
        condition = torch.cat([net["shared/embedding"][labels], second], dim=1)
    else:
        first, condition = z, F.one_hot(labels, CLASSES).to(z.dtype)
    x = net.linear("start", first).reshape(len(z), 4, 4, -1).permute(0, 3, 1, 2)
    block = net.within("block_1")
    short = block.conv("shortcut", F.interpolate(x, scale_factor=2))
    x = F.interpolate(F.relu(block.norm("norm_1", x, condition)), scale_factor=2)
    x = F.relu(block.norm("norm_2", block.conv("conv_1", x), condition))
    x = block.conv("conv_2", x) + short
    if name == "reacgan":
        x = net.attention("attention_1", x)
    return torch.tanh(net.conv("out", F.relu(net.norm("norm_out", x))))


def features_of(net: Network, x: Tensor, name: str) -> Tensor:
    """The trunk of the discriminator: features [B, F]."""
    block = net.within("block_1")
    hidden = F.relu(block.norm("norm_1", block.conv("conv_1", x)))
    hidden = F.avg_pool2d(block.conv("conv_2", hidden), 2)
    x = hidden + block.conv("shortcut", block.norm("norm_shortcut", F.avg_pool2d(x, 2)))
    if name == "reacgan":
        x = net.attention("attention_1", x)
    for number in (2, 3):
        block = net.within(f"block_{number}")
        active = F.relu(block.norm("norm_1", x))
        hidden = F.relu(block.norm("norm_2", block.conv("conv_1", active)))
        x = block.conv("conv_2", hidden) + (active if name == "reacgan" else x)
    return F.relu(x).sum(dim=(2, 3))


def step_losses(net: Network, name: str, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B] and the class loss of one batch."""
    features = features_of(net, x, name)
    score = net.linear("head_score", features)[:, 0]
    if name == "acgan":
        return score, F.cross_entropy(net.linear("head_classifier", features), labels)
    embedding, proxies = net.linear("head_embedding", features), net.table("head_proxies")
    return score, d2d_ce(embedding, proxies[labels], labels, TEMPERATURE, MARGIN, released=True)


def stepped(name: str) -> dict[str, np.ndarray]:
    """Five updates of the discriminator and one of the generator."""
    start = {
        kind: {key: torch.tensor(start_value(kind, key, shape)) for key, shape in shapes.items()}
        for kind, shapes in step_shapes(name).items()
    }
    generator, critic = (
        Network(
            {key: value.requires_grad_() for key, value in start[f"{which}/params"].items()},
            {k: v for kind in ("batch_stats", "spectral") for k, v in start.get(f"{which}/{kind}", {}).items()},
        )
        for which in ("generator", "critic")
    )
    average = {key: value.detach().clone() for key, value in (generator.params | generator.statistics).items()}
    weight = {"reacgan": CLASS_WEIGHT, "acgan": 1.0}[name]
    settings = {"betas": (COMMON["beta1"], COMMON["beta2"]), "eps": COMMON["adam_epsilon"]}
    of_critic = torch.optim.Adam(critic.params.values(), COMMON["discriminator_lr"], **settings)
    of_generator = torch.optim.Adam(generator.params.values(), COMMON["generator_lr"], **settings)
    given = {key: torch.tensor(value) for key, value in step_inputs().items()}
    z = given["z"][..., : STEPS[name]["z_dim"]]
    critic_losses = []
    for number in range(CRITIC_STEPS):
        before = dict(generator.statistics)
        fake = generate(generator, z[number], given["labels"][number], name).detach()
        generator.statistics = before  # only the generator's own update moves them
        real = given["real"][number].permute(0, 3, 1, 2)
        real_score, class_loss = step_losses(critic, name, real, given["real_labels"][number])
        fake_score, _ = step_losses(critic, name, fake, given["labels"][number])
        loss = F.relu(1 - real_score).mean() + F.relu(1 + fake_score).mean() + weight * class_loss
        of_critic.zero_grad()
        loss.backward()
        of_critic.step()
        critic_losses.append(loss.item())
    kept = dict(critic.statistics)
    fake = generate(generator, z[-1], given["labels"][-1], name)
    score, class_loss = step_losses(critic, name, fake, given["labels"][-1])
    critic.statistics = kept
    loss = weight * class_loss - score.mean()
    of_generator.zero_grad()
    loss.backward()
    of_generator.step()
    with torch.no_grad():
        for key, value in (generator.params | generator.statistics).items():
            average[key] = COMMON["ema_decay"] * average[key] + (1 - COMMON["ema_decay"]) * value
    return {
        "losses": np.array([np.mean(critic_losses), loss.item()]),
        **{
            key: summary_of({k: v.detach().numpy() for k, v in values.items()})
            for key, values in {
                "generator": generator.params, "generator statistics": generator.statistics, "critic": critic.params,
                "critic statistics": critic.statistics, "average": average,
            }.items()
            if values
        },
    }  # fmt: skip


# --- class losses, pair by pair ---------------------------------------------------------------------------------------


def d2d_ce(f: Tensor, v: Tensor, y: Tensor, temperature: float, margin: float, *, released: bool) -> Tensor:
    """Kang et al. 2021, Eq. 6, and the released code's shift of the negatives, which it does not put back."""
    f, v = F.normalize(f, dim=1), F.normalize(v, dim=1)
    terms = []
    for i in range(len(f)):
        positive = torch.clamp((f[i] @ v[i] - margin) / temperature, max=0)
        others = [j for j in range(len(f)) if j != i]
        logits = {j: (f[i] @ f[j] - (1 - margin)) / temperature for j in others}
        shift = max(logits[j].item() for j in others) if released else 0.0
        negatives = [torch.exp(F.relu(logits[j]) - shift) for j in others if y[j] != y[i]]
        total = torch.exp(positive) + sum(negatives, torch.zeros((), dtype=f.dtype))
        terms.append(torch.log(total) - positive)
    return torch.stack(terms).mean()


def contrastive(f: Tensor, v: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Kang and Park 2020, Eq. 8."""
    f, v = F.normalize(f, dim=1), F.normalize(v, dim=1)
    terms = []
    for i in range(len(f)):
        to_proxy = torch.exp(f[i] @ v[i] / temperature)
        weights = {j: torch.exp(f[i] @ f[j] / temperature) for j in range(len(f)) if j != i}
        same = to_proxy + sum(w for j, w in weights.items() if y[j] == y[i])
        terms.append(-torch.log(same / (to_proxy + sum(weights.values()))))
    return torch.stack(terms).mean()


def crammer_singer(logits: Tensor, classes: Tensor) -> Tensor:
    """Kavalerov et al. 2021, Eq. 4."""
    terms = []
    for row, wanted in zip(logits, classes, strict=True):
        others = torch.cat([row[:wanted], row[wanted + 1 :]])
        terms.append(F.relu(1 + others.max() - row[wanted]))
    return torch.stack(terms).mean()


def class_loss(settings: dict[str, Any], output: dict[str, Tensor], y: Tensor) -> Tensor:
    """The class loss of the configured conditioning."""
    kind, temperature = settings["conditioning"], settings["temperature"]
    if kind == "ac":
        return F.cross_entropy(output["logits"], y)
    if kind == "ac-normalized":
        cosines = F.normalize(output["features"], dim=1) @ F.normalize(output["weights"], dim=1).t()
        return F.cross_entropy(cosines / temperature, y)
    if kind == "2c":
        return contrastive(output["embedding"], output["proxies"][y], y, temperature)
    released = settings["d2dce_variant"] == "released"
    return d2d_ce(
        output["embedding"], output["proxies"][y], y, temperature, settings["positive_margin"], released=released
    )


# --- the losses of both networks on linear features -------------------------------------------------------------------


def adversarial(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    if kind == "non-saturating":
        ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
        return F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)
    if kind == "least-squares":
        return 0.5 * F.mse_loss(real, torch.ones_like(real)) + 0.5 * F.mse_loss(fake, torch.zeros_like(fake))
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return fake.mean() - real.mean()


def adversarial_of_generator(kind: str, fake: Tensor) -> Tensor:
    if kind == "non-saturating":
        return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    if kind == "least-squares":
        return 0.5 * F.mse_loss(fake, torch.ones_like(fake))
    return -fake.mean()


def judged(p: Tensors, settings: dict[str, Any], samples: Tensor, y: Tensor) -> dict[str, Any]:
    """Score, features, and outputs of the classifier and its twin."""
    kind = settings["conditioning"]
    h = torch.tanh(samples @ p["linear/kernel"] + p["linear/bias"])
    out: dict[str, Any] = {"features": h}

    def linear(name: str) -> Tensor:
        return h @ p[f"head_{name}/kernel"] + (p.get(f"head_{name}/bias", torch.zeros(())))

    if kind == "multi-hinge":
        out["logits"] = linear("classifier")
        out["score"] = out["logits"][:, :-1].max(dim=1).values - out["logits"][:, -1]
        return out
    if kind == "sg2-projection":
        rows = p["head_label_map_embedding/kernel"] / CLASSES**0.5 + p["head_label_map_embedding/bias"]
        rows = rows / torch.sqrt((rows**2).mean(dim=1, keepdim=True) + 1e-8)
        width = h.shape[1]
        mapped = rows @ p["head_label_map/kernel"] * 0.01 / width**0.5 + 0.01 * p["head_label_map/bias"]
        mapped = F.leaky_relu(mapped, 0.2) * 2**0.5
        scores = h @ p["head_score/kernel"] / width**0.5 + p["head_score/bias"]
        out["score"] = (scores * mapped[y]).sum(dim=1) / width**0.5
        return out
    out["score"] = linear("score")[:, 0]
    if kind == "projection":
        out["score"] = out["score"] + (p["head_label_embedding/embedding"][y] * h).sum(dim=1)
    if kind == "ac":
        out["logits"] = linear("classifier")
    if kind == "ac-normalized":
        out["weights"] = p["head_classifier"]
    if kind in ("2c", "d2dce"):
        out["embedding"], out["proxies"] = linear("embedding"), p["head_proxies/embedding"]
    if settings["auxiliary"] == "tac":
        out["twin"] = {"logits": linear("twin_classifier")}
    return out


def losses_of(name: str) -> dict[str, np.ndarray]:
    """Both losses, and their gradients by the discriminator's and the generator's parameters."""
    settings = loss_settings(name)
    p, g = (
        {key: torch.tensor(value, requires_grad=True) for key, value in values.items()} for values in loss_start(name)
    )
    given = {key: torch.tensor(value) for key, value in loss_inputs().items()}
    kind, auxiliary = settings["conditioning"], settings["auxiliary"]
    real, fake, y, t = given["real"], given["fake"], given["real_labels"], given["labels"]
    of_real, of_fake = judged(p, settings, real, y), judged(p, settings, fake, t)
    if kind == "multi-hinge":
        loss = crammer_singer(of_real["logits"], y)
        loss = loss + crammer_singer(of_fake["logits"], torch.full_like(t, CLASSES))
    else:
        loss = adversarial(settings["adversarial"], of_real["score"], of_fake["score"])
    if settings["lecam"]:
        decay, start = 0.99, given["lecam"]
        moved_real = decay * start[0] + (1 - decay) * of_real["score"].mean().detach()
        moved_fake = decay * start[1] + (1 - decay) * of_fake["score"].mean().detach()
        above = (F.relu(of_real["score"] - moved_fake) ** 2).mean()
        loss = loss + settings["lecam"] * (above + (F.relu(moved_real - of_fake["score"]) ** 2).mean())
    if kind in ("ac", "ac-normalized", "2c", "d2dce"):
        if auxiliary == "adc":
            term = class_loss(settings, of_real, 2 * y) + class_loss(settings, of_fake, 2 * t + 1)
        else:
            term = class_loss(settings, of_real, y)
            if settings["class_loss_on"] == "real-and-fake":
                term = term + class_loss(settings, of_fake, t)
        if auxiliary == "tac":
            term = term + class_loss(settings, of_fake["twin"], t)
        loss = loss + settings["class_weight"] * term
    loss.backward()
    by_critic = {key: value.grad.numpy() for key, value in p.items()}

    frozen = {key: value.detach() for key, value in p.items()}
    made = torch.tanh(given["z"] @ g["linear/kernel"] + g["linear/bias"])
    of_made = judged(frozen, settings, made, t)
    if kind == "multi-hinge":
        matched = (judged(frozen, settings, real, y)["features"].mean(0) - of_made["features"].mean(0)).abs().mean()
        ours = 0.05 * crammer_singer(of_made["logits"], t) + matched
    else:
        ours = adversarial_of_generator(settings["adversarial"], of_made["score"])
    if kind in ("ac", "ac-normalized", "2c", "d2dce"):
        if auxiliary == "adc":
            term = class_loss(settings, of_made, 2 * t) - class_loss(settings, of_made, 2 * t + 1)
        else:
            term = class_loss(settings, of_made, t)
        if auxiliary == "tac":
            term = term - class_loss(settings, of_made["twin"], t)
        ours = ours + settings["class_weight"] * term
    ours.backward()
    by_generator = {key: value.grad.numpy() for key, value in g.items()}
    return {
        "losses": np.array([loss.item(), ours.item()]),
        "critic": summary_of(by_critic),
        "generator": summary_of(by_generator),
    }


def main() -> None:
    assert BATCH > CLASSES  # so that some class has two samples
    FIXTURES.mkdir(exist_ok=True)
    for kind, cases, numbers in (("step", STEPS, stepped), ("losses", LOSSES, losses_of)):
        everything = {f"{name}:{key}": value for name in cases for key, value in numbers(name).items()}
        np.savez_compressed(FIXTURES / f"{kind}.npz", **everything)


if __name__ == "__main__":
    main()
