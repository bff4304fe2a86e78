"""Fine-tuning options: heads, loss, and the trained part of the encoder. Each option can be ablated
separately."""

from dataclasses import dataclass

HEADS = ("joint", "grouped", "attention")
POOLINGS = ("mean", "mean_std")
SCALES = ("none", "dimension", "group")
WEIGHTINGS = ("equal", "uncertainty", "dwa")
STRATEGIES = ("frozen", "last", "gradual", "full", "lora")


@dataclass(frozen=True)
class FinetuneConfig:
    """Configuration of rating heads and encoder, for PercePiano or custom ratings.

    Attributes:
        strategy: trained part of the encoder. ``frozen``: none, the heads receive pooled embeddings
            of whole clips; ``last``: its last ``last_blocks`` blocks; ``gradual``: one more block,
            from the top, every ``unfreeze_epochs`` epochs (ULMFiT, Howard and Ruder 2018, section
            3.3); ``full``: all of it; ``lora``: adapters of rank ``lora_rank`` on the attention's
            q, k, v and o, scaled by ``lora_alpha / lora_rank`` (Hu et al. 2022, equation 3).
        encoder_rate: learning rate of the encoder's top block relative to the heads'; adapters use
            the heads' rate.
        layer_decay: learning rate of each block relative to the one above it (BEiT, Bao et al.
            2022, appendix; MAE, He et al. 2022, table 9), as ULMFiT's discriminative rates (section
            3.2).
        max_windows: maximum number of windows per clip in a training batch, spread over the clip;
            inference uses the whole clip.
        head: ``joint``: one hidden layer for all dimensions; ``grouped``: one for each of
            ``dimensions.HEAD_GROUPS``; ``attention``: grouped, with attention to bands and between
            groups, see `heads.CrossTaskAttention`.
        pooling: statistics over time that the heads receive.
        `heard`: in addition to the embedding, the heads receive descriptors (tempo, touch, loudness
            ..., see `descriptors`) of the notes and pedals that the encoder transcribes over the
            whole clip; needs a frozen encoder pre-trained to transcribe.
        rating_scale: the heads are trained on the original ratings (``none``), or on ratings
            standardised over the fold's training clips, per dimension or per group.
        weighting: of the groups' losses, see `training.losses`: the same for all dimensions
            (``equal``), homoscedastic uncertainty, or dynamic weight averaging with
            ``dwa_temperature``.
        weigh_by_raters: weight clips by their number of raters: the variance of a mean of n ratings
            decreases as 1 / n.
        predict_uncertainty: the heads also predict a standard deviation for every rating (Nix and
            Weigend 1994).
        mask_bands, mask_frames, mixup, gain_db: augmentation of the encoder's training windows, see
            ``data/augment.py``; with a frozen encoder, clips are not augmented.
        unseen: a held-out soundfont: its renderings are excluded from training, and their
            predictions are written to a separate table, to measure the loss on an unknown piano.
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
        """Whether any part of the encoder is trained, which requires windows of clips in
        training."""
        return self.strategy != "frozen"
