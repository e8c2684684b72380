"""Both stages as AA-CLIP's published code computes them; the benchmark compares with this.

Every weight of CLIP requires a gradient, attention weights are stored, prompts have all 77 tokens, Stage 1 runs the
image encoder twice, and the one-hot targets of the focal loss are created on the CPU. V-V attention is over the tokens
of each image (`--surgery sequential`): the published form is a defect (docs/method.md, "Image, frozen") of the same
cost. With the same weights, the losses equal those of this project.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.adapter import AdaptedCLIP
from model.adapter_modules import blend
from model.losses import dice_loss

SMOOTHING = 1e-5


class PlainModel:
    """The published forward pass with the weights, levels, depths and blend weights of a model."""

    def __init__(self, model: AdaptedCLIP) -> None:
        self.model = model
        self.clip = model.clip.clip
        self.config = model.config

    def attention(self, attn: nn.MultiheadAttention, x: Tensor, values_only: bool, mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        packed = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = (part.view(batch, tokens, attn.num_heads, -1).transpose(1, 2) for part in packed.chunk(3, dim=-1))
        if values_only:
            q = k = v
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        return attn.out_proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))

    def block(self, block: nn.Module, x: Tensor, values_only: bool = False, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(block.attn, block.ln_1(x), values_only, mask)
        return x + block.mlp(block.ln_2(x))

    def anchors(self, tokens: Tensor, normal: int) -> Tensor:
        """Prompts of classes as token ids (C, P, 77) -> anchors (C, D, 2)."""
        *adapters, projector = self.model.text_adapter
        mask = torch.full((tokens.shape[-1],) * 2, float("-inf"), device=tokens.device).triu(1)
        anchors = []
        for prompts in tokens:
            x = self.clip.token_embedding(prompts) + self.clip.positional_embedding
            for index, block in enumerate(self.clip.transformer.resblocks):
                x = self.block(block, x, mask=mask)
                if index < len(adapters):
                    x = blend(x, adapters[index](x), self.config.text_adapt_weight)
            x = self.clip.ln_final(x)
            features = F.normalize(projector(x[torch.arange(len(x)), prompts.argmax(dim=-1)]), dim=-1)
            pair = [F.normalize(part.mean(dim=0), dim=-1) for part in (features[:normal], features[normal:])]
            anchors.append(torch.stack(pair, dim=-1))
        return torch.stack(anchors)

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> list[Tensor]:
        """Two passes: with V-V attention for the patches, and the unchanged encoder for the class token."""
        visual, blocks = self.clip.visual, self.clip.visual.transformer.resblocks
        first = len(blocks) - (self.config.surgery_until_layer - 1)
        x, streams = self.model.clip.embed_image(images), []
        for index, block in enumerate(blocks):
            x = self.block(block, x, values_only=index >= first)
            if index + 1 in self.config.levels:
                streams.append(x[:, 1:])
        x = self.model.clip.embed_image(images)
        for block in blocks:
            x = self.block(block, x)
        cls = F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)
        return [F.normalize(visual.ln_post(stream) @ visual.proj, dim=-1) + cls[:, None] for stream in streams]

    def image_features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        visual, parts = self.clip.visual, self.model.image_adapter
        x, streams = self.model.clip.embed_image(images), []
        for index, block in enumerate(visual.transformer.resblocks):
            x = self.block(block, x)
            if index < len(parts["layer_adapters"]):
                x = blend(x, parts["layer_adapters"][index](x), self.config.image_adapt_weight)
            if index + 1 in self.config.levels:
                streams.append(visual.ln_post(x[:, 1:]))
        features = [F.normalize(p(x), dim=-1) for p, x in zip(parts["seg_proj"], streams, strict=True)]
        return features, F.normalize(parts["det_proj"](streams[-1]), dim=-1).mean(dim=1)

    def stage1_loss(self, images: Tensor, masks: Tensor, tokens: Tensor, rows: Tensor, normal: int) -> Tensor:
        """tokens (C, P, 77) of the classes in the batch; rows (B,): the class of each image."""
        levels = self.frozen_features(images)
        anchors = self.anchors(tokens, normal)[rows]
        losses = [level_loss(level, anchors, masks) for level in levels]
        overlap = (anchors[..., 0] * anchors[..., 1]).sum(dim=-1).mean() ** 2
        return torch.stack(losses).mean() + 0.1 * overlap

    def stage2_loss(self, images: Tensor, masks: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        """anchors (B, D, 2) of each image."""
        levels, det = self.image_features(images)
        classification = F.cross_entropy((det[:, None] @ anchors)[:, 0], labels)
        return classification + torch.stack([level_loss(level, anchors, masks) for level in levels]).sum()


def level_loss(level: Tensor, anchors: Tensor, masks: Tensor) -> Tensor:
    side, size = round(level.shape[1] ** 0.5), masks.shape[-1]
    grid = (100 * level @ anchors).transpose(1, 2).reshape(len(level), 2, side, side)
    p = F.interpolate(grid, size, mode="bilinear", align_corners=True).softmax(dim=1)
    return focal(p, masks) + dice_loss(p[:, 0], 1 - masks) + dice_loss(p[:, 1], masks)


def focal(p: Tensor, masks: Tensor) -> Tensor:
    flat, targets = p.permute(0, 2, 3, 1).reshape(-1, 2), masks.reshape(-1, 1).long().cpu()
    one_hot = torch.zeros(len(targets), 2).scatter_(1, targets, 1)
    one_hot = one_hot.clamp(SMOOTHING, 1 - SMOOTHING).to(p.device)
    p_t = (one_hot * flat).sum(dim=1) + SMOOTHING
    return (-((1 - p_t) ** 2) * p_t.log()).mean()


def parameters_of(model: AdaptedCLIP, names: Sequence[str]) -> list[nn.Parameter]:
    """All parameters of the components."""
    return [parameter for name in names for parameter in model.components[name].parameters()]
