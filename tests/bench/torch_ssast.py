"""The peer of ``bench model``: SSAST pre-training as published, in PyTorch, vectorised over the
clips of a batch.

Source: Gong et al. 2022 (arXiv 2110.09784), section 2, with the published code's step: one masked
forward and backward pass for the discriminative objective and another, with another mask, for the
generative one; then Adam with coupled L2. Masks and losses, which the published code computes clip
by clip in Python, are computed for the batch. Attention is PyTorch's fused kernel, and the heads
process only masked tokens, so that the peer is as fast as its algorithm allows in eager PyTorch.

Parameters have the published names, so that `weights.to_torch` of this package's SSAST works with
``load_state_dict``.

Raises:
    InputError: on import, if PyTorch is missing.
"""

from percepiano_ast.config import ModelConfig, PretrainConfig
from percepiano_ast.errors import InputError

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise InputError(
        "this benchmark compares with PyTorch, which is not installed; run "
        "`pip install torch --index-url https://download.pytorch.org/whl/cpu`."
    ) from error

PREFIX_TOKENS = 2  # cls and distillation token


class _Attention(nn.Module):
    """Multi-head self-attention with one product for query, key and value."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, length, width))


class _Mlp(nn.Module):
    """Linear - exact GELU - Linear."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    """Pre-LN transformer block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = _Attention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = _Mlp(config.width, config.mlp_ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    """The published convolution, computed as a product with flat patches, because patches do not
    overlap."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.proj = nn.Conv2d(1, config.width, config.patch_size, config.stride)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class _Encoder(nn.Module):
    """The part from timm's distilled DeiT, including the learned position table."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch_embed = _PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width).normal_(std=0.02))
        self.dist_token = nn.Parameter(torch.empty(1, 1, config.width).normal_(std=0.02))
        length = PREFIX_TOKENS + config.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, length, config.width).normal_(std=0.02))
        self.blocks = nn.Sequential(*(_Block(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)


def _head(config: ModelConfig) -> nn.Sequential:
    """Linear - ReLU - Linear(patch values), SSAST section 2.3."""
    return nn.Sequential(
        nn.Linear(config.width, config.width), nn.ReLU(), nn.Linear(config.width, config.patch_dim)
    )


class TorchSSAST(nn.Module):
    """SSAST with both heads; each objective runs the encoder separately, as published.

    Raises:
        InputError: overlapping patches, which pre-training does not support.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.stride != config.patch_size:
            raise InputError(
                f"stride {config.stride} differs from patch_size {config.patch_size}; give a model"
                " without overlap."
            )
        self.config = config
        self.v = _Encoder(config)
        self.mask_embed = nn.Parameter(torch.empty(1, 1, config.width).normal_(std=0.02))
        self.cpredlayer = _head(config)
        self.gpredlayer = _head(config)

    def discriminative(self, log_mel: torch.Tensor, mask_index: torch.Tensor) -> torch.Tensor:
        """InfoNCE of the masked patches within each clip, softmax over the targets: float32 scalar
        (equation 1).

        Args:
            log_mel: (B, T, F), normalised.
            mask_index: int64 (B, M), distinct patch indices of every clip.
        """
        tokens, target = self._masked_tokens(log_mel, mask_index)
        logits = self.cpredlayer(tokens) @ target.transpose(1, 2)  # prediction i, target j
        right = torch.arange(logits.shape[1]).repeat(logits.shape[0])
        return F.cross_entropy(logits.flatten(0, 1), right)

    def generative(self, log_mel: torch.Tensor, mask_index: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the masked patches: float32 scalar (equation 2); arguments as in
        `discriminative`."""
        tokens, target = self._masked_tokens(log_mel, mask_index)
        return F.mse_loss(self.gpredlayer(tokens), target)

    def _masked_tokens(
        self, log_mel: torch.Tensor, mask_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoded tokens (B, M, D) and raw values (B, M, patch_dim) of the masked patches."""
        patches = self._patches(log_mel)
        batch, count, _ = patches.shape
        masked = torch.zeros(batch, count, 1, dtype=torch.bool).scatter_(
            1, mask_index[:, :, None], True
        )
        x = torch.where(masked, self.mask_embed, self.v.patch_embed(patches))
        prefix = torch.cat([self.v.cls_token, self.v.dist_token], dim=1).expand(batch, -1, -1)
        x = self.v.norm(self.v.blocks(torch.cat([prefix, x], dim=1) + self.v.pos_embed))
        rows = torch.arange(batch)[:, None]
        return x[rows, mask_index + PREFIX_TOKENS], patches[rows, mask_index]

    def _patches(self, log_mel: torch.Tensor) -> torch.Tensor:
        """(B, T, F) -> (B, N, p_f * p_t), patches and their values counted along time first."""
        (grid_f, grid_t), (size_f, size_t) = self.config.grid, self.config.patch_size
        kept = log_mel[:, : grid_t * size_t, : grid_f * size_f].transpose(1, 2)
        x = kept.reshape(-1, grid_f, size_f, grid_t, size_t).transpose(2, 3)
        return x.reshape(-1, grid_f * grid_t, size_f * size_t)


def sample_mask_index(batch: int, config: ModelConfig, pretrain: PretrainConfig) -> torch.Tensor:
    """Clustered masks of a batch: int64 (B, M). Blocks of C x C are placed in random order until M
    patches are masked.

    Each block has a random number as its rank. A patch is masked at the smallest rank of the C x C
    blocks that cover it.
    """
    smallest, largest = pretrain.cluster
    size = torch.randint(smallest, largest + 1, (batch, 1, 1, 1))
    turn = torch.rand(batch, 1, *(side + largest - 1 for side in config.grid))
    first_hit = torch.empty(batch, 1, *config.grid)
    for cluster in range(smallest, largest + 1):
        cut = turn[:, :, largest - cluster :, largest - cluster :]
        first_hit = torch.where(size == cluster, -F.max_pool2d(-cut, cluster, 1), first_hit)
    return first_hit.flatten(1).topk(pretrain.num_masked(config), largest=False).indices


def make_optimizer(model: TorchSSAST, learning_rate: float) -> torch.optim.Optimizer:
    """The published Adam with coupled L2, in PyTorch's fused form."""
    return torch.optim.Adam(
        model.parameters(), learning_rate, betas=(0.95, 0.999), weight_decay=5e-7, fused=True
    )


class Peer:
    """A model in training on random spectrograms, with this number of threads."""

    def __init__(self, config: ModelConfig, pretrain: PretrainConfig, threads: int):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.model, self.pretrain = TorchSSAST(config), pretrain
        self.optimizer = make_optimizer(self.model, 1e-4)
        self.log_mel = 0.5 * torch.randn(pretrain.batch_size, config.n_frames, config.n_mels)

    def step(self) -> tuple[float, float]:
        """One published training step: two masked forward and backward passes, one update. Returns
        nce and mse."""
        self.optimizer.zero_grad()
        model, batch = self.model, len(self.log_mel)
        nce = model.discriminative(
            self.log_mel, sample_mask_index(batch, model.config, self.pretrain)
        )
        nce.backward()  # before the second forward pass, so that activations are freed
        mse = model.generative(self.log_mel, sample_mask_index(batch, model.config, self.pretrain))
        (self.pretrain.generative_weight * mse).backward()
        self.optimizer.step()
        return nce.item(), mse.item()
