"""The continual experiment: what the training loop needs to know of tasks that overlap in time.

One state, one compiled step of fixed width: the gradients of the active tasks and of the memory, their Gram matrix, the
weights that an aggregator or a rehearsal rule makes of it, one update. Test accuracies of all tasks are measured inside
the step at each task's start and end, and live in the state: a resumed run has them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh

from stabletrain.continual.aggregation import Aggregation
from stabletrain.continual.buffer import RehearsalBuffer
from stabletrain.continual.config import ContinualConfig, filled
from stabletrain.continual.evaluation import evaluate_run
from stabletrain.continual.forward import LayerRegularizer
from stabletrain.continual.losses import (
    cross_entropy,
    icarl_loss,
    logit_distance,
    margin_cross_entropy,
    predictions,
    weighted_mean,
)
from stabletrain.continual.networks import build_network
from stabletrain.continual.presets import FROM_STREAM
from stabletrain.continual.schedule import Schedule
from stabletrain.continual.streams import Streams
from stabletrain.continual.timeline import make_timeline
from stabletrain.data.load import load_dataset
from stabletrain.errors import ConfigError, DataError
from stabletrain.random_keys import key_from_data, random_key
from stabletrain.training.config import replace
from stabletrain.training.devices import compute_dtype, replicated
from stabletrain.training.experiment import Batch, Evaluation, EvaluationContext, Metrics
from stabletrain.training.stability import MonitorState, Policy, guarded_update, init_monitor

Array = jax.Array
Params = Any

TEST_CHUNK = 500
NOT_MEASURED = -1.0
RESIDENT_BYTES = 1 << 31
"""Training and test images up to this size lie on every device; Tiny-ImageNet takes 1.35 GB."""
OFF, MEMORY, SECOND_DRAW, TASK = range(4)


@struct.dataclass
class ContinualState:
    """Everything that evolves.

    `statistics`: of batch normalisation, {} without. `aggregator`: what an aggregator remembers. `losses` [T + 2]: the
    last loss of each gradient's identity. `accuracy` [E, T] at each measured step, -1 where not measured, with rows to
    spare (`Schedule.rows`). `stored`:
    what lies with each slot of the buffer (`logits` [capacity, C], `images` [capacity, H, W, C]). `old`: parameters and
    statistics when the last task ended (iCaRL), {} otherwise.
    """

    params: Params
    statistics: Any
    optimizer: Any
    monitor: MonitorState
    aggregator: Any
    losses: Array
    accuracy: Array
    stored: dict[str, Array]
    old: dict[str, Any]


def optimizer_for(config: ContinualConfig) -> optax.GradientTransformation:
    """Adam with Keras's epsilon of 1e-7, as released, or SGD."""
    if config.optimizer == "sgd":
        return optax.sgd(config.learning_rate, momentum=config.momentum or None)
    return optax.adam(
        config.learning_rate, b1=filled(config.beta1), b2=filled(config.beta2), eps=config.adam_epsilon
    )  # fmt: skip


class ContinualExperiment:
    """Parallel continual learning on a labelled image data set; see `stabletrain.training.experiment.Experiment`."""

    traceable = True
    batch_axis = 1  # slots come first

    def __init__(self, config: ContinualConfig, *, mesh: Mesh) -> None:
        self.mesh = mesh
        self.dataset = load_dataset(config.dataset, data=config.data, image_size=config.image_size or None)
        self.data_spec = data_spec = self.dataset.spec
        if not data_spec.num_classes:
            raise ConfigError(f"data set {data_spec.name!r} has no labels, and tasks are sets of classes")
        self.classes = data_spec.num_classes
        self.image_shape = (data_spec.image_size, data_spec.image_size, data_spec.channels)
        self.config = config
        self.network = build_network(config, self.classes, compute_dtype(config.precision))
        self.policy = Policy.from_config(config, watch_blowup=False)  # the loss rises whenever a task starts
        self.optimizer = optimizer_for(config)
        shapes = jax.eval_shape(self._initial, random_key(0))
        self.parameter_count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"]))
        self.regularizer = LayerRegularizer(config, self.network)
        self.inner_steps = 10 if config.network == "mlp" or mesh.devices.flat[0].platform != "cpu" else 1
        self._set_up()

    def _set_up(self) -> None:
        """The timeline, the schedule and the resident data. Raises: `DataError` for data that cannot be used."""
        config, train, test = self.config, self.dataset.train, self.dataset.test
        if train.labels is None or test.labels is None or not len(train) or not len(test):
            raise DataError(f"data set {self.data_spec.name!r} needs labelled training and test images")
        counts = np.bincount(train.labels, minlength=self.classes)
        self.timeline = make_timeline(
            filled(config.timeline),
            counts,
            batch_size=config.batch_size,
            epochs=config.epochs,
            tasks=config.tasks,
            label_seed=config.seed if config.label_seed is None else config.label_seed,
            timeline_seed=config.seed if config.timeline_seed is None else config.timeline_seed,
            overlap=0.0 if config.overlap is None else config.overlap,
            class_range=(config.class_range[0], config.class_range[1]) if config.class_range else None,
        )
        if config.steps > self.timeline.steps:
            raise ConfigError(f"--steps {config.steps} is more than the {self.timeline.steps} steps of the timeline")
        self.config = config = replace(config, steps=config.steps or self.timeline.steps)
        images, test_images = train.images.array(), test.images.array()
        if images is None or test_images is None or images.nbytes + test_images.nbytes > RESIDENT_BYTES:
            raise DataError(
                f"data set {self.data_spec.name!r} is larger than {RESIDENT_BYTES >> 30} GiB, which must lie on every "
                "device: use a smaller --image-size"
            )
        self.owner = self.timeline.task_of_class(self.classes)
        test_owner = self.owner[test.labels]
        test_counts = np.bincount(test_owner[test_owner >= 0], minlength=self.timeline.tasks)
        if not test_counts.all():
            raise DataError(f"task {int(np.argmin(test_counts))} has no test image")

        streams = Streams(
            train.labels, self.timeline, batch_size=config.batch_size, epochs=config.epochs, seed=config.seed
        )
        self.capacity = filled(config.memory_per_class) * self.classes
        buffer = None
        if self.capacity:
            features = (
                images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
                if config.buffer == "herding"
                else None
            )
            buffer = RehearsalBuffer(
                filled(config.buffer), self.capacity, streams, train.labels, seed=config.seed, features=features
            )
        self.schedule = Schedule(
            streams,
            buffer,
            num_classes=self.classes,
            second_draw=bool(config.replay_weight),
            by_task=config.aggregator == "gem",
            measure_every=config.measure_every,
        )
        self.aggregation = Aggregation(config, self.schedule.identities)
        self.examples_per_step = round(config.batch_size * self.timeline.mean_active)
        self.test_labels = test.labels
        self._place(images, train.labels, test_images, test.labels, test_counts)
        self._accuracies = jax.jit(self.accuracies)
        self._features = jax.jit(lambda state, x: self.apply(state.params, state.statistics, self.to_input(x))[0])

    def _place(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        test_images: np.ndarray,
        test_labels: np.ndarray,
        test_counts: np.ndarray,
    ) -> None:
        """What the programs are given beside the batch. All that depends on the seed is here, so that runs which differ
        in nothing else share their compiled programs.
        """
        pad = -len(test_images) % min(TEST_CHUNK, len(test_images))
        self.resident: dict[str, Array] = jax.device_put(
            {
                "images": images,
                "labels": labels,
                "owner": self.owner,
                "key": np.asarray(jax.random.key_data(random_key(self.config.seed))),
                "test_counts": test_counts.astype(np.float32),
                "test_images": np.concatenate([test_images, test_images[:pad]]),
                "test_labels": np.concatenate([test_labels, np.full(pad, -1, np.int32)]),
            },
            replicated(self.mesh),
        )

    # --- state --------------------------------------------------------------------------------------------------------

    def _initial(self, key: Array) -> dict[str, Any]:
        variables = self.network.init({"params": key}, jnp.zeros((1, *self.image_shape)), running=True)
        return {"params": variables["params"], "statistics": variables.get("batch_stats", {})}

    def init(self, key: Array) -> ContinualState:
        """The state before the first step."""
        initial = self._initial(key)
        params = initial["params"]
        stored: dict[str, Array] = {}
        if self.config.distill_weight:
            stored["logits"] = jnp.zeros((self.capacity, self.classes))
        if self.config.edit_rate:
            stored["images"] = jnp.zeros((self.capacity, *self.image_shape))
        return ContinualState(
            params=params,
            statistics=initial["statistics"],
            optimizer=self.optimizer.init(params),
            monitor=init_monitor(params, self.policy),
            aggregator=self.aggregation.init(),
            losses=jnp.zeros(self.schedule.identities),
            accuracy=jnp.full((self.schedule.rows, self.timeline.tasks), NOT_MEASURED),
            stored=stored,
            old=jax.tree.map(jnp.copy, initial) if self.config.loss == "icarl" else {},
        )

    def batch(self, position: int) -> Batch:
        """The slots of a step: indices into the resident images, weights, masks, events."""
        batch = self.schedule.batch(position)
        if self.config.loss == "icarl":
            assert self.schedule.buffer is not None
            batch["exemplars"] = self.schedule.buffer.content(position + 1)
        return batch

    # --- the network on examples --------------------------------------------------------------------------------------

    def to_input(self, images: Array) -> Array:
        """uint8 -> the range that the network is given."""
        values = images.astype(jnp.float32) / 255.0
        return values if self.config.pixels == "unit" else 2.0 * values - 1.0

    def apply(self, params: Params, statistics: Any, images: Array) -> tuple[Array, Array]:
        """Features and logits in tests, with running or (`--statistics batch`) the batch's own statistics."""
        variables = {"params": params, **({"batch_stats": statistics} if statistics else {})}
        if statistics and self.config.statistics == "batch":
            return self.network.apply(variables, images, running=False, mutable=["batch_stats"])[0]
        return self.network.apply(variables, images, running=True)

    def _forward(self, params: Params, statistics: Any, images: Array) -> tuple[Array, Any]:
        """Logits in training, and the new running statistics."""
        if not statistics:
            return self.network.apply({"params": params}, images, running=False)[1], statistics
        (_, logits), new = self.network.apply(
            {"params": params, "batch_stats": statistics}, images, running=False, mutable=["batch_stats"]
        )
        return logits, new["batch_stats"]

    def _mask(self, labels: Array, begun: Array, owner: Array) -> tuple[Array, Array]:
        """[..., C]: the classes that compete with each label, and those of the label's own task."""
        same = (owner == owner[labels][..., None]).astype(jnp.float32)
        return (same if self.config.scenario == "task" else jnp.broadcast_to(begun, same.shape)), same

    def _slots(self, state: ContinualState, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Everything that the loss of a slot needs, each with the slots as its first axis."""
        labels = batch["labels"][batch["index"]]
        images = self.to_input(batch["images"][batch["index"]])
        mask, same = self._mask(labels, batch["begun"], batch["owner"])
        slots = {
            "image": images, "label": labels, "weight": batch["weight"], "mask": mask, "same": same,
            "kind": batch["kind"],
        }  # fmt: skip
        remembered = ((batch["kind"] == MEMORY) | (batch["kind"] == SECOND_DRAW))[:, None]
        if "logits" in state.stored:
            slots["stored_logits"] = state.stored["logits"][batch["place"]]
        if "images" in state.stored:
            edited = state.stored["images"][batch["place"]]
            slots["image"] = jnp.where(remembered[..., None, None, None], edited, images)
        if self.config.loss == "icarl":
            flat = slots["image"].reshape(-1, *self.image_shape)
            _, old_logits = self.apply(state.old["params"], state.old["statistics"], flat)
            slots["old_logits"] = old_logits.reshape(*labels.shape, -1)
            slots["old"] = jnp.broadcast_to(batch["old"], (len(labels), self.classes))
        return slots

    def _slot_loss(self, params: Params, statistics: Any, slot: Mapping[str, Array]) -> tuple[Array, dict[str, Any]]:
        """The loss of one slot; new running statistics and logits [B, C] beside it."""
        config = self.config
        logits, new_statistics = self._forward(params, statistics, slot["image"])
        if config.loss == "icarl":
            loss = icarl_loss(logits, slot["label"], slot["mask"], slot["weight"], slot["old"], slot["old_logits"])
        elif config.loss == "margin":
            loss = margin_cross_entropy(logits, slot["label"], slot["mask"], slot["weight"], slot["same"])
        else:
            loss = cross_entropy(logits, slot["label"], slot["mask"], slot["weight"])
        if config.distill_weight:
            distance = config.distill_weight * logit_distance(logits, slot["stored_logits"], slot["weight"])
            kind = slot["kind"]
            loss = jnp.where(
                kind == MEMORY, distance, jnp.where(kind == SECOND_DRAW, filled(config.replay_weight) * loss, loss)
            )
        loss = loss + self.regularizer.in_each_loss(params)
        return loss, {"statistics": new_statistics, "logits": logits}

    def _step_key(self, batch: Mapping[str, Array]) -> Array:
        return jax.random.fold_in(key_from_data(batch["key"]), batch["position"])

    # --- one update ---------------------------------------------------------------------------------------------------

    def step(self, state: ContinualState, batch: Batch) -> tuple[ContinualState, Metrics]:
        """One update from the gradients of all slots, then, at an event, the test accuracy of every task."""
        state = self._begin(state, batch)
        slots, on = self._slots(state, batch), batch["kind"] != OFF
        current, memory = batch["kind"] == TASK, on & (batch["kind"] != TASK)
        if self.config.edit_rate:
            slots, state = self._edited(state, slots, batch, current, memory)

        def loss_of(params: Params, slot: Mapping[str, Array]) -> tuple[Array, dict[str, Any]]:
            return self._slot_loss(params, state.statistics, slot)

        key = self._step_key(batch)
        found = self.aggregation.update(
            loss_of, state.params, slots, on=on, current=current, memory=memory, identity=batch["identity"],
            state=state.aggregator, key=key,
        )  # fmt: skip
        penalty, gradients = self.regularizer.added(state.params, found.update)
        active = jnp.any(on)
        loss = weighted_mean(found.losses, current.astype(jnp.float32))
        update = guarded_update(
            self.optimizer, loss=loss, gradients=gradients, params=state.params, optimizer_state=state.optimizer,
            monitor=state.monitor, policy=self.policy,
        )  # fmt: skip

        def kept(new: Any, old: Any) -> Any:
            """Where nothing is active (behind the timeline's end, after a rollback) all stays as it is."""
            return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)

        share = on / jnp.maximum(jnp.sum(on), 1)
        statistics = jax.tree.map(lambda leaf: jnp.tensordot(share, leaf, 1), found.auxiliary["statistics"])
        where = jnp.where(on, batch["identity"], self.schedule.identities)
        new = ContinualState(
            params=kept(update.params, state.params),
            statistics=kept(update.choose(statistics, state.statistics), state.statistics),
            optimizer=kept(update.optimizer_state, state.optimizer),
            monitor=update.monitor,
            aggregator=kept(update.choose(found.state, state.aggregator), state.aggregator),
            losses=state.losses.at[where].set(found.losses, mode="drop"),
            accuracy=state.accuracy,
            stored=self._stored(state, slots, batch, found.auxiliary["logits"]),
            old=state.old,
        )
        new = self._measured(new, batch)
        metrics = {
            "train/loss": loss,
            "stability/gradients": jnp.sum(on),
            "stability/tasks_active": jnp.sum(current),
            **{f"stability/{name}": value for name, value in found.indicators.items()},
            **{f"stability/loss/task_{t}": new.losses[1 + t] for t in range(self.timeline.tasks)},
            **({"stability/loss/memory": new.losses[0]} if self.capacity else {}),
            **({"train/orthogonality": penalty} if self.regularizer.on else {}),
            **update.metrics,
        }
        return new, metrics

    def _begin(self, state: ContinualState, batch: Mapping[str, Array]) -> ContinualState:
        """A fresh network where a task starts (`--restart`); the old network where one has just ended (iCaRL)."""
        if self.config.restart:
            initial = self._initial(jax.random.fold_in(self._step_key(batch), 0x5EED))
            fresh = (initial["params"], initial["statistics"], self.optimizer.init(initial["params"]))
            now = (state.params, state.statistics, state.optimizer)
            first = batch["restart"] & (batch["position"] > 0)
            params, statistics, optimizer = jax.tree.map(lambda a, b: jnp.where(first, a, b), fresh, now)
            state = dataclasses.replace(state, params=params, statistics=statistics, optimizer=optimizer)
        if self.config.loss == "icarl":
            now_whole = {"params": state.params, "statistics": state.statistics}
            old = jax.tree.map(lambda a, b: jnp.where(batch["ended"], a, b), now_whole, state.old)
            state = dataclasses.replace(state, old=old)
        return state

    def _stored(
        self, state: ContinualState, slots: Mapping[str, Array], batch: Mapping[str, Array], logits: Array
    ) -> dict[str, Array]:
        """With each example that enters the buffer: its logits of this step (DER), its pixels (GMED)."""
        if not state.stored:
            return {}
        assert self.config.buffer in FROM_STREAM
        arrive = jnp.where(batch["arrive"] < 0, self.capacity, batch["arrive"])
        stored = dict(state.stored)
        if "logits" in stored:
            stored["logits"] = stored["logits"].at[arrive].set(logits, mode="drop")
        if "images" in stored:
            stored["images"] = stored["images"].at[arrive].set(slots["image"], mode="drop")
        return stored

    def _edited(
        self, state: ContinualState, slots: dict[str, Array], batch: Mapping[str, Array], current: Array, memory: Array
    ) -> tuple[dict[str, Array], ContinualState]:
        """GMED: replayed pixels moved up the rise of their loss that a virtual step on the current tasks would bring.

        x <- x + rate d/dx [l(x; theta - lr g_c) - l(x; theta)], kept within the range of pixels, and stored.

        Source: Jin et al. 2021, Eq. 4. Differs: no decay of the pixels, the virtual step is one of SGD with the
        learning rate; the code released with SPCL subtracts where the paper adds.
        """
        rate = filled(self.config.edit_rate)

        def current_loss(params: Params) -> Array:
            losses = jax.vmap(lambda slot: self._slot_loss(params, state.statistics, slot)[0])(slots)
            return weighted_mean(losses, current.astype(jnp.float32))

        gradient = jax.grad(current_loss)(state.params)
        ahead = jax.tree.map(lambda p, g: p - self.config.learning_rate * g, state.params, gradient)

        def rise(images: Array) -> Array:
            moved = {**slots, "image": images}
            later = jax.vmap(lambda slot: self._slot_loss(ahead, state.statistics, slot)[0])(moved)
            now = jax.vmap(lambda slot: self._slot_loss(state.params, state.statistics, slot)[0])(moved)
            return jnp.sum((later - now) * memory)

        # The loss is a mean over the batch: its gradient in one example's pixels is that of the example over the count.
        count = jnp.sum(batch["weight"], 1)[:, None, None, None, None]
        moved = slots["image"] + rate * count * jax.grad(rise)(slots["image"])
        low = 0.0 if self.config.pixels == "unit" else -1.0
        images = jnp.where(memory[:, None, None, None, None], jnp.clip(moved, low, 1.0), slots["image"])
        replayed = memory[:, None] & (batch["weight"] > 0)
        where = jnp.where(replayed, batch["place"], self.capacity)
        stored = {**state.stored, "images": state.stored["images"].at[where].set(images, mode="drop")}
        return {**slots, "image": images}, dataclasses.replace(state, stored=stored)

    # --- accuracy -----------------------------------------------------------------------------------------------------

    def _measured(self, state: ContinualState, batch: Mapping[str, Array]) -> ContinualState:
        def measure() -> Array:
            row = self.accuracies(state, batch)
            return state.accuracy.at[batch["event"]].set(row)

        return dataclasses.replace(state, accuracy=lax.cond(batch["event"] >= 0, measure, lambda: state.accuracy))

    def accuracies(self, state: ContinualState, batch: Mapping[str, Array]) -> Array:
        """[T]: the share of each task's test images that are told right; -1 for tasks that have not begun.

        `batch` needs the resident arrays, `begun`, and with iCaRL `exemplars`: there the class is that of the nearest
        mean of its exemplars' unit features, and a class without exemplars is never chosen.
        """
        means = self._class_means(state, batch) if self.config.loss == "icarl" else None
        images, labels = batch["test_images"], batch["test_labels"]
        chunk = min(TEST_CHUNK, len(images))

        def told_right(part: tuple[Array, Array]) -> Array:
            part_images, part_labels = part
            features, logits = self.apply(state.params, state.statistics, self.to_input(part_images))
            if means is not None:
                logits = _unit(features) @ means[0].T
            mask, _ = self._mask(part_labels, batch["begun"], batch["owner"])
            if means is not None:
                mask = mask * means[1]
            return predictions(logits, mask) == part_labels

        parts = (images.reshape(-1, chunk, *images.shape[1:]), labels.reshape(-1, chunk))
        right = lax.map(told_right, parts).reshape(-1)
        task = jnp.where(labels >= 0, batch["owner"][labels], -1)
        each = jax.nn.one_hot(task, self.timeline.tasks, dtype=jnp.float32)  # a row of zeros for -1
        shares = (right.astype(jnp.float32) @ each) / batch["test_counts"]
        task_of = jnp.where(batch["owner"] < 0, self.timeline.tasks, batch["owner"])
        has_begun = jnp.zeros(self.timeline.tasks).at[task_of].max(batch["begun"], mode="drop") > 0
        return jnp.where(has_begun, shares, NOT_MEASURED)

    def _class_means(self, state: ContinualState, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        """Unit means [C, D] of the exemplars' unit features, and 1 for the classes [C] that have exemplars."""
        exemplars = batch["exemplars"]
        there = (exemplars >= 0).astype(jnp.float32)
        features, _ = self.apply(state.params, state.statistics, self.to_input(batch["images"][exemplars]))
        member = jax.nn.one_hot(batch["labels"][exemplars], self.classes) * there[:, None]
        return _unit(member.T @ _unit(features)), (member.sum(0) > 0).astype(jnp.float32)

    # --- watching and evaluation --------------------------------------------------------------------------------------

    def probe(self, state: ContinualState) -> Metrics:
        """Nothing besides what each step tells."""
        del state
        return {}

    def weights(self, state: ContinualState) -> dict[str, Params]:
        """The network's parameters, with the running statistics where there are any."""
        return {"raw": {"params": state.params, "batch_stats": state.statistics} if state.statistics else state.params}

    def measure_now(self, state: ContinualState, step: int) -> Array:
        """[T]: test accuracies after `step` updates; -1 for tasks that have not begun."""
        last = max(min(step, self.timeline.steps) - 1, 0)
        batch = {"begun": self.schedule.batch(last)["begun"], **self.resident}
        if self.config.loss == "icarl":
            assert self.schedule.buffer is not None
            batch["exemplars"] = self.schedule.buffer.content(last + 1)
        return self._accuracies(state, batch)

    def features(self, state: ContinualState, test_index: np.ndarray) -> Array:
        """Features [N, D] of test images by index."""
        return self._features(state, self.resident["test_images"][test_index])

    def evaluate(self, state: ContinualState, step: int, context: EvaluationContext) -> Evaluation:
        """Accuracy now, the numbers made of the accuracy matrix, layers, features, and pictures of the run."""
        return evaluate_run(self, state, step, context)


def _unit(features: Array) -> Array:
    return features / jnp.sqrt(jnp.sum(jnp.square(features), -1, keepdims=True) + 1e-12)
