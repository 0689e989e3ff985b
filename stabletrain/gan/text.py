"""Lines of characters as data of a GAN: where text comes from, its vocabulary, and how generated text is judged.

A line has a fixed number of characters, shorter ones are padded with a back-tick, and goes to the critic one-hot. With
no file given the text is the language reference that ships with Python (`pydoc_data.topics`), which needs no network.
Source: Gulrajani et al. 2017, Section 5.4 and Appendix G, with the released gan_language.py.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from stabletrain.data.order import batch_indices
from stabletrain.data.spec import DataSpec
from stabletrain.errors import ConfigError, DataError
from stabletrain.metrics.text import TextReference, divergence_scalars
from stabletrain.training.experiment import Evaluation, EvaluationContext

if TYPE_CHECKING:
    from stabletrain.gan.config import GanConfig
    from stabletrain.gan.domains import Model

LENGTH = 32
PAD = "`"
UNKNOWN = "unk"
"""Symbol 0: every character outside the vocabulary. One symbol, though its name has three letters."""
SHOWN_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
VOCABULARY_LIMIT = 2048
LINE_LIMIT = 10_000_000
JUDGED_LINES = 640
HELD_OUT_SHARE = 0.1
LEAST_LINES = 2 * JUDGED_LINES
RESIDENT_BYTES = 1 << 30
SHOWN_LINES = 4
BILLION_WORD = "training-monolingual.tokenized.shuffled"
BILLION_WORD_HELD_OUT = "heldout-monolingual.tokenized.shuffled"

Tokens = NDArray[np.integer]


@dataclass(frozen=True)
class TextData:
    """Lines as symbols [N, L], and which character each symbol is; number 0 stands for all others."""

    name: str
    train: Tokens
    held_out: Tokens
    vocabulary: tuple[str, ...]
    fingerprint: str

    @property
    def spec(self) -> DataSpec:
        """As a run keeps it: the image size is the line's length, the channels are the vocabulary, spelled out."""
        return DataSpec(
            name=self.name,
            image_size=self.train.shape[1],
            channels=len(self.vocabulary),
            num_classes=0,
            class_names=self.vocabulary,
            fingerprint=self.fingerprint,
            train_count=len(self.train),
            test_count=len(self.held_out),
        )


def read_text(path: Path | None, *, length: int = LENGTH) -> TextData:
    """The text of a file, of a folder in the layout of the Billion Word benchmark, or (None) that ships with Python.

    A file: every line is broken at spaces into pieces of at most `length` characters, so that no text is lost; a
    longer word is cut. A tenth of the pieces, at random and the same each time, is held out.
    The Billion Word folder, as the paper reads it: the first `length` characters of each line of the shards
    `news.en-*`, at most ten million; held out are the lines of the held-out folder beside it, or without that those of
    the shard 0, which the release does not train on.

    Raises: `DataError` when nothing is there, it is no UTF-8 text, or it has fewer than 1,280 lines.
    """
    if path is None:
        name, pieces = "text", _pieces(_bundled_lines(), length)
        train, held_out = _split(list(pieces))
    elif path.is_dir():
        name = "billion-word"
        train, held_out = _billion_word(path, length)
    elif path.is_file():
        name = path.stem
        train, held_out = _split(list(_pieces(_lines_of([path]), length)))
    else:
        raise DataError(f"no text at {path}: --data takes a text file or the folder of the Billion Word benchmark")
    if len(train) < LEAST_LINES or len(held_out) < 1:
        raise DataError(
            f"{path or name} has {len(train):,} lines to train on and {len(held_out):,} held out; "
            f"at least {LEAST_LINES:,} and 1 are needed"
        )
    vocabulary = vocabulary_of(train, length)
    tokens, judged = (encode(lines, vocabulary, length) for lines in (train, held_out))
    digest = hashlib.sha256("\x00".join(vocabulary).encode() + tokens.tobytes() + judged.tobytes()).hexdigest()
    return TextData(name, tokens, judged, vocabulary, digest)


def _bundled_lines() -> Iterator[str]:
    from pydoc_data.topics import topics

    for _, topic in sorted(topics.items()):
        for paragraph in str(topic).split("\n\n"):
            yield " ".join(paragraph.split())


def _lines_of(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                yield from (line.rstrip("\r\n") for line in file)
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _pieces(lines: Iterable[str], length: int) -> Iterator[str]:
    wrapper = textwrap.TextWrapper(width=length, break_on_hyphens=False)
    return chain.from_iterable(wrapper.wrap(line) for line in lines)


def _split(pieces: Sequence[str]) -> tuple[list[str], list[str]]:
    order = np.random.Generator(np.random.PCG64(5)).permutation(len(pieces))
    held = int(HELD_OUT_SHARE * len(pieces))
    return [pieces[i] for i in np.sort(order[held:])], [pieces[i] for i in np.sort(order[:held])]


def _billion_word(folder: Path, length: int) -> tuple[list[str], list[str]]:
    root = folder / BILLION_WORD if (folder / BILLION_WORD).is_dir() else folder
    shards = sorted(root.glob("news.en-*-of-*"))
    if not shards:
        raise DataError(f"{folder} has no shards {BILLION_WORD}/news.en-00001-of-00100 ...")
    others = sorted((root.parent / BILLION_WORD_HELD_OUT).glob("news.en.heldout-*"))
    if not others:
        others, shards = shards[:1], shards[1:]
    cut = (line[:length] for line in _lines_of(shards) if line.strip())
    held_out = (line[:length] for line in _lines_of(others) if line.strip())
    return list(islice(cut, LINE_LIMIT)), list(islice(held_out, LINE_LIMIT // 10))


def vocabulary_of(lines: Iterable[str], length: int, limit: int = VOCABULARY_LIMIT) -> tuple[str, ...]:
    """The unknown symbol, then the most frequent characters of the padded lines, most frequent first, `limit` in all.

    Characters of equal frequency are in the order of their code points.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
        counts[PAD] += length - len(line)
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    return (UNKNOWN, *(character for character, count in ordered[: limit - 1] if count))


def encode(lines: Sequence[str], vocabulary: Sequence[str], length: int) -> Tokens:
    """Symbols [N, length] of lines, padded. Raises: `ValueError` for a line longer than `length`."""
    numbers = {character: number for number, character in enumerate(vocabulary) if number}
    tokens = np.full((len(lines), length), numbers.get(PAD, 0), np.uint8 if len(vocabulary) <= 256 else np.uint16)
    for row, line in enumerate(lines):
        if len(line) > length:
            raise ValueError(f"a line of {len(line)} characters is longer than {length}")
        tokens[row, : len(line)] = [numbers.get(character, 0) for character in line]
    return tokens


def decode(tokens: Tokens, vocabulary: Sequence[str]) -> list[str]:
    """Lines as text, with the padding at their end removed; the unknown symbol is shown as U+FFFD."""
    shown = [SHOWN_UNKNOWN, *vocabulary[1:]]
    return ["".join(shown[symbol] for symbol in line).rstrip(PAD) for line in tokens]


class TextDomain:
    """Lines of text [L, V] for the GAN family: real lines one-hot, generated ones a softmax at each position."""

    num_classes = 0
    class_names: tuple[str, ...] = ()

    def __init__(self, config: GanConfig, data_spec: DataSpec | None) -> None:
        self._config = config
        self.data: TextData | None = None
        if data_spec is None:
            self.data = read_text(Path(config.data).expanduser() if config.data else None)
            data_spec = self.data.spec
        self.data_spec = data_spec
        self.vocabulary = data_spec.class_names
        self.sample_shape = (data_spec.image_size, data_spec.channels)
        self.resident: dict[str, Any] = {}
        if self.data is not None:
            self._reference = TextReference(self.data.train, self.data.held_out, len(self.vocabulary))
            if self.data.train.nbytes <= RESIDENT_BYTES:
                self.resident["tokens"] = self.data.train

    @property
    def judged_lines(self) -> int:
        """Lines that are generated to be judged: 640, or as many as were held out."""
        assert self.data is not None, "an experiment built for sampling cannot be evaluated"
        return min(JUDGED_LINES, len(self.data.held_out))

    def batch(self, position: int, count: int) -> dict[str, np.ndarray]:
        """Numbers of training lines, or the lines themselves where they are too many to lie on the device."""
        assert self.data is not None, "an experiment built for sampling has no training data"
        index = batch_indices(self._config.seed, position, len(self.data.train), count)
        return {"index": index} if self.resident else {"line": self.data.train[index]}

    def real(self, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, None]:
        """One-hot lines [B, L, V]; the key is not needed."""
        del key
        lines = batch["line"] if "line" in batch else batch["tokens"][batch["index"]]
        return self.one_hot(lines), None

    def one_hot(self, lines: Any) -> jax.Array:
        """Symbols [B, L] -> [B, L, V]."""
        return jax.nn.one_hot(jnp.asarray(lines, jnp.int32), len(self.vocabulary), dtype=jnp.float32)

    def fixed(self, split: str, count: int) -> tuple[np.ndarray, None]:
        """Up to `count` lines of a split, evenly spread, one-hot."""
        assert self.data is not None, "an experiment built for sampling has no data"
        lines = self.data.train if split == "train" else self.data.held_out
        chosen = np.linspace(0, len(lines) - 1, min(count, len(lines))).astype(int)
        return np.asarray(self.one_hot(lines[chosen])), None

    def evaluate(self, model: Model, step: int, context: EvaluationContext) -> Evaluation:
        """How far the n-grams of generated lines are from real ones.

        `eval/jsd<n>_<lines>`, with the same of held-out lines as `..._floor`: see `stabletrain.metrics.text`.
        """
        assert self.data is not None, "an experiment built for sampling cannot be evaluated"
        count = self.judged_lines
        soft = model.samples(None, count, seed=self._config.seed, context=context, what="lines of text")
        lines = soft.argmax(-1)
        scalars = {f"eval/{name}": value for name, value in divergence_scalars(self._reference.compare(lines)).items()}
        text = decode(lines, self.vocabulary)
        return Evaluation(
            scalars=scalars,
            files={f"samples/{step:08d}.txt": _as_file(text)},
            shown=" | ".join(text[:SHOWN_LINES]),
        )

    def sample_files(
        self, samples: np.ndarray, labels: np.ndarray | None, context: EvaluationContext
    ) -> dict[str, bytes]:
        """The lines as `samples.txt`."""
        del labels, context
        return {"samples.txt": _as_file(decode(samples.argmax(-1), self.vocabulary))}


def _as_file(lines: Sequence[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def build_text(config: GanConfig, data_spec: DataSpec | None) -> TextDomain:
    """The domain of `--dataset text`. Raises: `ConfigError` for options that text has no use for."""
    if config.network != "text-resnet":
        raise ConfigError(f"text needs --network text-resnet, not {config.network!r}")
    return TextDomain(config, data_spec)
