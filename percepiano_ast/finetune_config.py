"""What fine-tuning may choose: the heads, the loss, and what of the encoder is trained. Every row is a switch of its own."""

from dataclasses import dataclass

HEADS = ("joint", "grouped", "attention")
POOLINGS = ("mean", "mean_std")
SCALES = ("none", "dimension", "group")
WEIGHTINGS = ("equal", "uncertainty", "dwa")
STRATEGIES = ("frozen", "last", "gradual", "full", "lora")


@dataclass(frozen=True)
class FinetuneConfig:
    """Rating heads and encoder, on PercePiano or on ratings of one's own.

    Attributes:
        strategy: what of the encoder is trained. ``frozen``: nothing, the heads see pooled embeddings of whole clips;
            ``last``: its last ``last_blocks`` blocks; ``gradual``: one block more, from the top, every ``unfreeze_epochs``
            epochs (ULMFiT, Howard and Ruder 2018, section 3.3); ``full``: all of it; ``lora``: adapters of rank
            ``lora_rank`` beside the attention's q, k, v and o, whose output counts ``lora_alpha / lora_rank`` (Hu et al.
            2022, equation 3).
        encoder_rate: learning rate of the encoder's top relative to the heads'; adapters learn at the heads' rate.
        layer_decay: the rate of each block relative to the one above it (BEiT, Bao et al. 2022, appendix; MAE, He et al.
            2022, table 9), ULMFiT's discriminative rates (section 3.2).
        max_windows: of a clip in a training batch, spread over it; a rating hears all of it.
        head: ``joint``: one hidden layer for all dimensions; ``grouped``: one for each of ``dimensions.HEAD_GROUPS``;
            ``attention``: that, and groups that attend to the bands and to one another, see `heads.CrossTaskAttention`.
        pooling: what of the moments over time the heads see.
        heard: the heads see, beside the embedding, what the notes and pedals that the encoder hears over the whole clip say of
            tempo, touch, loudness ... (`descriptors`): of a frozen encoder that was pre-trained to hear them.
        rating_scale: the heads learn ratings as they are (``none``), or standardised by the training clips of the fold,
            each dimension by its own mean and deviation or all of a group by theirs.
        weighting: of the groups' losses, see `training.losses`: every dimension alike (``equal``), homoscedastic
            uncertainty, or dynamic weight averaging with ``dwa_temperature``.
        weigh_by_raters: a clip counts by the number of its raters: the variance of a mean of n ratings falls as 1 / n.
        predict_uncertainty: heads with a standard deviation for every rating (Nix and Weigend 1994).
        mask_bands, mask_frames, mixup, gain_db: augmentation of the windows that an encoder is trained on, see
            ``data/augment.py``; a frozen one hears clips as they are.
        unseen: a synthesizer whose renderings no model learns from; what is said of them becomes a table of its own, which
            shows what another piano costs.
    """

    batch_size: int
    epochs: int
    learning_rate: float
    strategy: str = "frozen"
    last_blocks: int = 2
    unfreeze_epochs: int = 2
    lora_rank: int = 8
    lora_alpha: float = 16.0
    encoder_rate: float = 0.1
    layer_decay: float = 0.75
    max_windows: int = 2
    head: str = "grouped"
    pooling: str = "mean_std"
    heard: bool = False
    rating_scale: str = "none"
    weighting: str = "equal"
    dwa_temperature: float = 2.0
    weigh_by_raters: bool = False
    predict_uncertainty: bool = False
    mask_bands: int = 0
    mask_frames: int = 0
    mixup: float = 0.0
    gain_db: float = 0.0
    weight_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    warmup_steps: int = 20
    hidden: int = 128
    dropout: float = 0.5
    unseen: str = ""
    protocol: str = "content"
    seed: int = 0

    @property
    def trains_encoder(self) -> bool:
        """Whether anything of the encoder is trained, so that training hears windows."""
        return self.strategy != "frozen"
