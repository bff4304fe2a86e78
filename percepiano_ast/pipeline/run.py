"""A run: its preset, its output paths, and the initial weights of its encoder."""

import dataclasses
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from percepiano_ast.config import (
    MODELS,
    PRETRAININGS,
    FrontEnd,
    LevelStats,
    ModelConfig,
    Preset,
    from_json,
    lookup,
)
from percepiano_ast.data import percepiano, shards
from percepiano_ast.errors import InputError
from percepiano_ast.files import sha256_of
from percepiano_ast.inference.transcribe import Transcriber
from percepiano_ast.models import weights
from percepiano_ast.models.cnn import ENCODERS, Geometry
from percepiano_ast.training import checkpoints

logger = logging.getLogger(__name__)

MADE_BY_PRETRAIN = "notebook 02_ssast_pretrain_tpu or `percepiano pretrain`"
MADE_BY_FINETUNE = "notebook 03_finetune_percepiano_gpu or `percepiano finetune`"

INITS = dict.fromkeys(PRETRAININGS, "from my pre-training")
INITS |= {"scratch": "from scratch", "audioset": "from AudioSet AST"}
INITS |= {name: other.label for name, other in ENCODERS.items()}


OLD_SETTINGS = {"heard": "transcription_features", "unseen": "held_out_synthesizer"}


@dataclass(frozen=True)
class Run:
    """A preset, an output directory, and a pre-training (see ``config.PRETRAININGS``).

    Attributes:
        shards: a copy of the pre-training shards on a faster disk.
        clips: shards of rated clips shared by several runs.
        store: another storage location of checkpoints and models, a folder or
            ``gs://BUCKET/PREFIX``, which is more reliable than a mounted Drive.
    """

    preset: Preset
    root: Path
    pretraining: str = "ssast"
    shards: Path | None = None
    clips: Path | None = None
    store: str = ""

    @property
    def maestro(self) -> Path:
        """Shards for pre-training."""
        return self.shards or self.root / "maestro"

    @property
    def pretrain(self) -> Path:
        """Pre-training: settings, history, checkpoints."""
        return self.root / "pretrain" / self.pretraining

    @property
    def percepiano(self) -> Path:
        """Shards of rated clips, classic features, index."""
        return self.percepiano_in(self.preset.front_end)

    def percepiano_in(self, front_end: FrontEnd) -> Path:
        """Shards of rated clips, classic features and index with this front end."""
        if front_end != self.preset.front_end:
            return self.root / f"percepiano_{front_end.kind}"
        return self.clips or self.root / "percepiano"

    @property
    def evaluation(self) -> Path:
        """Metrics, report and figures."""
        return self.root / "evaluation"

    def finetune(self, model: str) -> Path:
        """Folds of one fine-tuned model."""
        return self.root / "finetune" / model

    def predictions(self, model: str) -> Path:
        """Out-of-fold predictions of one model."""
        return self.root / f"predictions_{model}.csv"

    def kept(self, directory: Path) -> str:
        """Storage location of the checkpoints and models of a step in ``directory``."""
        if not self.store:
            return str(directory)
        return f"{self.store.rstrip('/')}/{directory.relative_to(self.root)}"

    @property
    def in_bucket(self) -> bool:
        """Whether permanent outputs are stored at ``gs://``."""
        return self.store.startswith("gs://")

    def for_pretraining(self, name: str) -> "Run":
        """The same run with another kind of pre-training."""
        training, geometry = lookup(PRETRAININGS, name, "pre-training")
        preset = dataclasses.replace(
            self.preset,
            pretrain=dataclasses.replace(self.preset.pretrain, **training),
            model=self.preset.model.cut(**geometry),
        )
        return dataclasses.replace(self, preset=preset, pretraining=name)

    def changed(self, part: str, **values) -> "Run":
        """The same run with other values in the preset's ``pretrain``, ``finetune`` or ``compute``;
        None, 0 and empty text keep the preset's value, like an empty field of a form."""
        meant = {name: value for name, value in values.items() if value or value is False}
        changed = dataclasses.replace(getattr(self.preset, part), **meant)
        return dataclasses.replace(self, preset=dataclasses.replace(self.preset, **{part: changed}))

    def switched(self, pairs: Iterable[str]) -> "Run":
        """The same run with options of `config.FinetuneConfig` set, each ``NAME=VALUE``.

        Raises:
            InputError: an unknown option, or an invalid value.
        """
        config = self.preset.finetune
        for pair in pairs:
            name, equals, text = pair.partition("=")
            name = OLD_SETTINGS.get(name, name)
            kind = type(lookup(vars(config), name, "switch"))
            if not equals or kind is tuple:
                raise InputError(f"{pair!r} does not have the form NAME=VALUE with a single value")
            try:
                value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            except (KeyError, ValueError):
                wanted = "true or false" if kind is bool else f"of type {kind.__name__}"
                raise InputError(f"{name}={text}: the value must be {wanted}") from None
            changed: dict[str, Any] = {name: value}
            config = dataclasses.replace(config, **changed)
        return dataclasses.replace(self, preset=dataclasses.replace(self.preset, finetune=config))


@dataclass(frozen=True)
class EncoderInit:
    """The initial encoder of fine-tuning.

    Attributes:
        name: of the model in tables, such as ``ast-base-ssast`` or ``cnn``.
        encoder: parameters; None for random ones.
        weights: checksum of the parameters, or None.
        transcription: parameters of the transcription head, if there is one.
    """

    name: str
    model: Geometry
    front_end: FrontEnd
    statistics: LevelStats
    encoder: dict | None = None
    weights: str | None = None
    transcription: dict | None = None


def init_named(run: Run, label: str) -> str:
    """The one of `INITS` for a label of a notebook's form, such as ``from scratch``."""
    inits = {label: init for init, label in INITS.items()}
    return lookup(inits | {INITS[run.pretraining]: run.pretraining}, label, "start")


def transcribes(init: str) -> bool:
    """Whether the encoder ``init`` is pre-trained to transcribe, as `fit_regressors` needs."""
    return init in PRETRAININGS and PRETRAININGS[init][0].get("objective", "ssast") != "ssast"


def load_encoder(run: Run, init: str, source: str = "") -> EncoderInit:
    """Load the weights of ``init``, one of `INITS`.

    Args:
        source: published weights for ``audioset``, by default downloaded; for a pre-training, a
            file of `Transcriber.write` instead of the run's.

    Raises:
        InputError: unknown ``init``; no pre-training yet, or one of another geometry.
    """
    lookup(INITS, init, "start of the encoder")
    if init == "audioset":
        folder = source or weights.fetch_audioset(run.root / "weights" / "audioset")
        found = weights.read_weights(folder)
        sizes = {(size.width, size.depth): name for name, size in MODELS.items()}
        encoder = found.params["encoder"]
        name = f"ast-{sizes.get((found.config.width, found.config.depth), 'custom')}-audioset"
        checksum = sha256_of(*map(np.asarray, jax.tree.leaves(encoder)))
        return EncoderInit(name, found.config, found.front_end, found.statistics, encoder, checksum)
    if source and init in PRETRAININGS:
        given = Transcriber.read(source)
        params, checksum = given.params, sha256_of(Path(source))
        facts = f"ast-{given.model.name}-{init}", given.model, given.front_end, given.statistics
        return EncoderInit(*facts, params["encoder"], checksum, params["transcription"])
    run = run.for_pretraining(init) if init in PRETRAININGS else run
    other = init in ENCODERS
    model = ENCODERS[init].config.beside(run.preset.model) if other else run.preset.model
    name = init if other else f"ast-{model.name}-{init}"
    untrained = other or init == "scratch"
    made_before = f"{run.kept(run.pretrain)}/checkpoints"
    if untrained and not (run.pretrain.exists() or checkpoints.listing(made_before)):
        logger.info(
            f"no pre-training in {run.kept(run.pretrain)}: levels are normalised with the"
            " statistics of the rated clips"
        )
        rated = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
        return EncoderInit(name, model, rated.front_end, rated.statistics)
    # All other starts share one normalisation: the statistics of the pre-training split.
    fields = "front_end", "statistics"
    tree, made = checkpoints.open_latest(made_before, made_by=MADE_BY_PRETRAIN, fields=fields)
    plain = name, model, FrontEnd(**made["front_end"]), LevelStats(**made["statistics"])
    if untrained:
        return EncoderInit(*plain)
    params = tree["state"]["ema"] or tree["state"]["params"]
    return EncoderInit(*plain, params["encoder"], made["sha256"], params.get("transcription"))


def convert(
    source: str | Path,
    to: str | Path,
    kind: str = "",
    *,
    frames: int = 0,
    stride: tuple[int, ...] = (),
) -> Path:
    """Read weights from ``source`` and write them to ``to`` in a published form.

    Args:
        source: directory of an SSAST pre-training (``runs/base/pretrain/ssast``), or a path for
            `weights.read_weights`.
        to: a ``.safetensors`` file, or for the kind ``hf_ast`` a folder.
        kind: ``ast`` or ``hf_ast`` for an AST; by default unchanged.
        frames, stride: geometry of weights that do not describe it; both or none. One stride, or
            those of frequency and time.

    Raises:
        InputError: no weights at ``source``, a model with a decoder, unlike SSAST's published form,
            a kind that they cannot be converted to, or another geometry than theirs.
    """
    geometry = None
    if frames or stride:
        if frames < 1 or len(stride) not in (1, 2) or min(stride) < 1:
            raise InputError(
                f"--frames {frames} --stride {','.join(map(str, stride)) or 0}: a geometry needs"
                " both. Give the frames of a window and the stride, or those of frequency and time"
            )
        geometry = (stride[0], stride[-1]), frames
    home = Path(source) / "checkpoints"
    if home.is_dir():
        fields = "pretrain", "model", "front_end", "statistics", "data", "epoch"
        made_by = "`percepiano pretrain`"
        tree, made = checkpoints.open_latest(home, made_by=made_by, fields=fields)
        if made["pretrain"]["decoder_depth"]:
            raise InputError(
                f"{home} holds a model with a decoder, which SSAST's published form does not have."
                " Use it with `finetune --init visible`"
            )
        found = weights.Weights(
            tree["state"]["ema"] or tree["state"]["params"],
            from_json(ModelConfig, made["model"]),
            "ssast_pretrain",
            FrontEnd(**made["front_end"]),
            LevelStats(**made["statistics"]),
            {"data": made["data"], "epoch": made["epoch"], "checkpoint": made["sha256"]},
        )
    else:
        found = weights.read_weights(source, geometry)
    stated = found.config.stride, found.config.n_frames
    if geometry not in (None, stated):
        raise InputError(
            f"{source} states stride {stated[0]} and {stated[1]:,} frames, not {geometry[0]} and"
            f" {geometry[1]:,}. Omit --frames and --stride"
        )
    # A pre-trained model has no classifier, so there is only one format for it.
    forms = {"ast": ("ast", "hf_ast"), "hf_ast": ("hf_ast", "ast")}.get(found.kind, (found.kind,))
    if kind and kind not in forms:
        raise InputError(
            f"{source} holds weights of the kind {found.kind!r}, which cannot be converted to"
            f" {kind!r}. Possible kinds: {', '.join(forms)}"
        )
    return weights.write_weights(to, dataclasses.replace(found, kind=kind or found.kind))


def workers() -> int:
    """Number of worker processes: one per core available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
