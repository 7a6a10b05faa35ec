"""The multi-scale vision transformer (Zhang et al., ICCV 2021, section 3.1), with timm's model interface.

Legend: B batch, G global tokens, N local tokens of an H × W map, C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast

import torch
from timm.models import register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vil.config import ModelConfig, Size, StageConfig, Tree
from vil.errors import UserError
from vil.models.attention_maps import AttentionMap, Queries, attention_maps, attention_rollout
from vil.models.stage import LayerNorm, Stage, map_sizes
from vil.validation import validate

MAX_BLOCKS = 2000
"""Blocks of a model; the largest of the zoo has 37."""
_STAGE_OPTIONS = {field.name for field in dataclasses.fields(StageConfig)}


class MultiScaleViT(nn.Module):
    """Multi-scale vision transformer: stages of shrinking maps, each with its own attention.

    Between stages the local tokens are folded back to a map, and the global ones are dropped, or projected to
    the next width (`stage_globals`). After the last stage: LayerNorm, then the mean over all tokens, global
    ones included (`avg`), or the first global token (`cls`), then one linear layer.

    With `distillation_token` the last stage has one more global token, after its others, which `avg` leaves
    out. It has a head of its own, `head_dist` (DeiT, Touvron et al., 2021, section 4). The logits are the
    mean of both heads, or, in training after `set_distilled_training`, a pair: of `head` and of `head_dist`.

    Args:
        config: the options; `stages` and `num_classes` must be set, and options that `stages` replaces
            (`attention`, `blocks`, `position`, `window`, ...) are ignored: see `vil.models.zoo`.
        image_size: (height, width) of the images in pixels; None is `config.image_size`. Other sizes work at
            run time, except with linformer attention.

    Raises:
        UserError: options that do not go together; the location is the name in `ModelConfig`.
    """

    def __init__(self, config: ModelConfig, image_size: int | Size | None = None) -> None:
        super().__init__()
        config = validate(ModelConfig, dataclasses.asdict(config))
        if not config.stages:
            raise UserError("stages", "a model needs at least one stage")
        if config.num_classes is None:
            raise UserError("num_classes", "is needed to build a model")
        stages = config.stages
        num_blocks = sum(stage.blocks for stage in stages)
        if num_blocks > MAX_BLOCKS:
            raise UserError("blocks", f"a model has at most {MAX_BLOCKS:,} blocks, got {num_blocks:,}")
        carries_globals = config.stage_globals == "carry"
        if carries_globals and len({stage.global_tokens for stage in stages}) > 1:
            raise UserError("stage_globals", "carry needs the same number of global tokens in all stages")
        self.config = config
        # Arguments of timm.create_model that build this model again; timm stores them with the weights.
        self._model_args: Tree = {}
        # Width of external global tokens; None if they would be dropped after the first stage.
        self.external_width = stages[0].dim if carries_globals or len(stages) == 1 else None
        self.img_size = config.size if image_size is None else _checked_size(image_size)
        self.in_chans = config.in_chans
        self.num_classes = config.num_classes
        self.num_features = self.head_hidden_size = stages[-1].dim
        rates = [config.drop_path * block / max(1, num_blocks - 1) for block in range(num_blocks)]
        self.feature_info: list[Tree] = []
        modules: list[Stage] = []
        channels, reduction = config.in_chans, 1
        for index, (stage, size) in enumerate(zip(stages, map_sizes(stages, self.img_size))):
            drop_path, rates = rates[: stage.blocks], rates[stage.blocks :]
            has_dist_token = config.distillation_token and index == len(stages) - 1
            if has_dist_token:
                stage = dataclasses.replace(stage, global_tokens=stage.global_tokens + 1)
            carries = carries_globals and index > 0
            try:
                modules.append(Stage(stage, config, channels, size, drop_path, carries, has_dist_token))
            except UserError as error:
                if error.location not in _STAGE_OPTIONS:  # an option of the model
                    raise
                raise UserError(f"stages[{index}].{error.location}", error.reason) from None
            channels = stage.dim
            reduction *= stage.patch
            names = [f"stages.{index}"]
            if len(stages) == 1 and stage.blocks:  # flat, with one level per block
                names = [f"stages.0.blocks.{block}" for block in range(stage.blocks)]
            self.feature_info += [
                {"num_chs": stage.dim, "reduction": reduction, "module": name} for name in names
            ]
        self.stages = cast(list[Stage], nn.ModuleList(modules))  # typed as a list, for its elements
        self.norm: nn.Module = LayerNorm(channels)
        self.head_drop = nn.Dropout(config.head_dropout)
        self.set_pool(config.pool or "avg")
        self.head = self._new_head()
        self.head_dist = self._new_head() if config.distillation_token else None
        self.distilled_training = False
        self.apply(_initialize)

    def forward(self, x: Tensor, global_tokens: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits (B, num_classes) of images (B, in_chans, H, W); see `forward_features`.

        In distilled training, return those of the head and of `head_dist`; see `set_distilled_training`.
        """
        return self.forward_head(self.forward_features(x, global_tokens))

    def forward_features(self, x: Tensor, global_tokens: Tensor | None = None) -> Tensor:
        """Return the last stage's tokens (B, G+G'+N, C) after the final norm, global ones first.

        Args:
            x: images (B, in_chans, height, width).
            global_tokens: external global tokens (B, G', width of the first stage), for instance of a text
                encoder, placed after the G learned ones.

        Raises:
            ValueError: tokens of another shape, or external tokens in a model that discards them.
        """
        check_external_tokens(x, global_tokens, self.external_width)
        for index, stage in enumerate(self.stages):
            x, size = stage(x, global_tokens)
            if index < len(self.stages) - 1:
                x, global_tokens = self._between_stages(stage, x, size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits (B, num_classes) of tokens (B, G+N, C), or with `pre_logits` pooled features.

        With a distillation token, the features are the mean of the pooled ones and the token, as in timm.
        """
        if self.head_dist is None or not self.global_pool:
            x = self.head_drop(self._pool(x))
            return x if pre_logits else self.head(x)
        index = self.stages[-1].num_class_tokens
        x_dist = self.head_drop(x[:, index])  # (B, C)
        x = self.head_drop(self._pool(torch.cat([x[:, :index], x[:, index + 1 :]], dim=1)))
        if pre_logits:
            return (x + x_dist) / 2
        x, x_dist = self.head(x), self.head_dist(x_dist)
        if self.distilled_training and self.training:
            return x, x_dist
        return (x + x_dist) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let the model return the logits of both heads in train mode; timm's name.

        Raises:
            UserError: the model has no distillation token.
        """
        if self.head_dist is None:
            raise UserError("distillation_token", "must be true: the model has only one head")
        self.distilled_training = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
        global_tokens: Tensor | None = None,
    ) -> Any:
        """Return feature maps, as in timm: one level per stage, or per block of a model with one stage.

        Args:
            x: images (B, in_chans, height, width).
            indices: levels to return: the last n for a number, all for None.
            norm: apply the final norm to the last stage's maps.
            stop_early: skip the stages after the last requested one.
            output_fmt: `NCHW`, maps (B, C, H, W), or `NLC`, tokens (B, N, C).
            intermediates_only: return only the list.
            return_prefix_tokens: return pairs (map, global tokens (B, G, C)).
            global_tokens: external tokens, as in `forward_features`.

        Returns:
            The list of feature maps, or a pair of the final tokens (as `forward_features`) and that list.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        check_external_tokens(x, global_tokens, self.external_width)
        requested, last = feature_take_indices(self.num_levels, indices)
        intermediates: list[Tensor | tuple[Tensor, Tensor]] = []
        stages = self.stages[: last + 1] if stop_early else self.stages
        level = 0
        for index, stage in enumerate(stages):
            blocks: list[Tensor] = []
            x, size = stage(x, global_tokens, blocks if self.is_flat else None)
            for tokens in blocks or [x]:
                level += 1
                if level - 1 not in requested:
                    continue
                tokens = self.norm(tokens) if norm and index == len(self.stages) - 1 else tokens
                local = stage.to_map(tokens, size).contiguous()
                if output_fmt == "NLC":
                    local = local.flatten(2).transpose(1, 2)
                prefix = stage.to_globals(tokens, size)
                intermediates.append((local, prefix) if return_prefix_tokens else local)
            if index < len(stages) - 1:
                x, global_tokens = self._between_stages(stage, x, size)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(stages) == len(self.stages) else x), intermediates

    def attention_maps(
        self, x: Tensor, queries: Queries = None, global_tokens: Tensor | None = None
    ) -> list[list[AttentionMap]]:
        """Return the attention weights of queries and global tokens: per stage, one `AttentionMap` per block.

        The weights are those of evaluation mode; the mode of the model is restored.

        Args:
            x: images (B, in_chans, height, width).
            queries: (row, column) of pixels; in each stage, the position that contains a pixel is the query.
                `all`: all positions of every map, (B, h, N, G+N) weights per block. None: the image center.
            global_tokens: external tokens, as in `forward_features`; they count as global tokens.

        Raises:
            ValueError: a query outside the images, or as `forward_features`.
        """
        return attention_maps(self, self.stages, x, queries, global_tokens)

    def attention_rollout(
        self, x: Tensor, queries: Queries = None, global_tokens: Tensor | None = None
    ) -> list[AttentionMap | None]:
        """Return the attention rollout over the blocks of each stage (Abnar & Zuidema, 2020, section 3).

        A block mixes its tokens by (A + I) / 2, with A the mean over heads and I the residual; a stage by the
        product over its blocks. Stages are separate, as tokens are merged between them. Padding that the
        cyclic mask includes is ignored.

        Args:
            x, queries, global_tokens: as in `attention_maps`; `all` takes long, but no memory beyond the
                result.

        Returns:
            One `AttentionMap` with h = 1 per stage; None for a stage without blocks, or whose keys are not
            tokens (linformer, spatial_reduction).

        Raises:
            ValueError: as `attention_maps`.
        """
        return attention_rollout(self, self.stages, x, queries, global_tokens)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what follows the last requested level, see `forward_intermediates`. Return the indices."""
        requested, last = feature_take_indices(self.num_levels, indices)
        if self.is_flat:
            self.stages[0].blocks = self.stages[0].blocks[: last + 1]
        elif last < len(self.stages) - 1:
            self.stages = self.stages[: last + 1]
            prune_norm = True  # the final norm has the width of the last stage
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return requested

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Return the linear layer of the head; with a distillation token, that of `head_dist` too."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace each head by a new one for `num_classes` classes (0: none); change the pooling if given.

        Raises:
            UserError: a pooling that the model does not have; the model is unchanged.
        """
        previous, self.num_classes = self.num_classes, num_classes
        if global_pool is not None:
            try:
                self.set_pool(global_pool)
            except UserError:
                self.num_classes = previous
                raise
        parameter = next(self.parameters())
        self.head = self._new_head()
        if self.head_dist is not None:
            self.head_dist = self._new_head()
        for head in filter(None, (self.head, self.head_dist)):
            head.apply(_initialize).to(device=parameter.device, dtype=parameter.dtype)

    @property
    def is_flat(self) -> bool:
        """Return True for a model with one stage, whose levels of features are its blocks."""
        return len(self.config.stages or ()) == 1 and len(self.stages[0].blocks) > 0

    @property
    def num_levels(self) -> int:
        """Return the number of levels of `forward_intermediates`."""
        return len(self.stages[0].blocks) if self.is_flat else len(self.stages)

    def set_input_size(self, img_size: int | Size | None = None, window_size: int | None = None) -> None:
        """Resize embeddings and bias tables for images of another size, or for another window.

        Both are resized bilinearly, without aligned corners, as if weights were loaded into a model of that
        size.

        Args:
            img_size: (height, width) of the images in pixels, or one number for both; None keeps the size.
            window_size: side of a chunk of the local attention in every stage, in tokens; None keeps it.

        Raises:
            UserError: the images are too small, an attention has a fixed number of tokens, or no stage has
                a window; the model is unchanged.
        """
        image_size = self.img_size if img_size is None else _checked_size(img_size)
        sizes = map_sizes([stage.config for stage in self.stages], image_size)
        for stage, size in zip(self.stages, sizes):
            for block in stage.blocks:
                block.attn.check_resize(size)
        if window_size is not None:
            validate(ModelConfig, {"window": window_size})
            if all(stage.config.attention != "vision_longformer" for stage in self.stages):
                raise UserError("window_size", "no stage of the model has vision_longformer attention")
        for stage, size in zip(self.stages, sizes):
            stage.resize(size)
            if window_size is not None:
                stage.set_window(window_size)
        if window_size is not None:
            stages = [dataclasses.replace(stage, window=window_size) for stage in self.config.stages or ()]
            self.config = dataclasses.replace(self.config, stages=stages, window=window_size)
            self._model_args = {**self._model_args, "window": window_size}
        self.img_size = image_size
        self._model_args = {**self._model_args, "img_size": self.img_size}
        self._traits = {**getattr(self, "_traits", {}), "img_size": self.img_size}  # read by timm's exports

    def set_neighbors(self, neighbors: Literal["all", "self", "random"] | int) -> None:
        """Set the chunks that local attentions see in training; see `vil.attention.vision_longformer`."""
        for stage in self.stages:
            for block in stage.blocks:
                block.attn.set_neighbors(neighbors)

    def set_training_progress(self, step: int, epoch: int) -> None:
        """Prepare the attentions for a training step (performer redraws its projections)."""
        for stage in self.stages:
            for block in stage.blocks:
                block.attn.set_training_progress(step, epoch)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable recomputing each block in the backward pass, to save memory."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: global tokens, embeddings and bias tables."""
        kinds = (".global_tokens", ".dist_token", ".bias_table", ".position.", ".global_bias.")
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}

    def group_matcher(self, coarse: bool = False) -> Tree:
        """Return the layer groups for layer decay: by stage (coarse) or by block."""
        if coarse:
            return {
                "stem": r"^stages\.0\.patch_embed",
                "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))],
            }
        return {
            "stem": r"^stages\.0\.(?:patch_embed|global_tokens|dist_token|position)",
            "blocks": [
                (r"^stages\.(\d+)\.(?:patch_embed|global_tokens|dist_token|position)", (-1,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def multiply_adds(self, size: Size | None = None) -> int:
        """Count the multiply-adds for one image of (height, width) = `size`, as the paper does.

        Convolutions, linear layers, scores and weighted sums count; norms, softmax and additions do not.
        """
        total, channels = 0, self.in_chans
        configs = [stage.config for stage in self.stages]
        for stage, map_size in zip(self.stages, map_sizes(configs, size or self.img_size)):
            total += stage.multiply_adds(channels, map_size)
            channels = stage.config.dim
        num_heads = 1 if self.head_dist is None else 2
        return total + num_heads * channels * self.num_classes

    def set_pool(self, pool: str) -> None:
        """Set the pooling: `avg`, `cls` (timm's `token` is the same), or empty for none."""
        pool = "cls" if pool == "token" else pool
        if pool not in ("avg", "cls", ""):
            raise UserError("pool", f"must be avg or cls, got {pool!r}")
        if pool == "cls" and not self.stages[-1].num_class_tokens:
            raise UserError("pool", "cls needs a global token in the last stage, which has none")
        if not pool and self.config.distillation_token and self.num_classes:
            raise UserError("pool", "must be avg or cls for a model with a distillation token")
        self.global_pool = pool

    def _pool(self, x: Tensor) -> Tensor:
        """Return the features (B, C) of tokens (B, T, C); without pooling, the tokens."""
        if self.global_pool == "avg":
            return x.mean(dim=1)
        return x[:, 0] if self.global_pool == "cls" else x

    def _new_head(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def _between_stages(self, stage: Stage, x: Tensor, size: Size) -> tuple[Tensor, Tensor | None]:
        """Return the input map of the next stage and, if they are carried, its global tokens."""
        carried = stage.to_globals(x, size) if self.config.stage_globals == "carry" else None
        return stage.to_map(x, size), carried


@register_notrace_function  # checks only, not part of a traced graph
def check_external_tokens(x: Tensor, global_tokens: Tensor | None, width: int | None) -> None:
    """Raise ValueError if a model with images `x` cannot use these external global tokens."""
    if global_tokens is None:
        return
    if width is None:
        raise ValueError("external global tokens need a model with stage_globals='carry'")
    if global_tokens.dim() != 3 or global_tokens.shape[::2] != (x.shape[0], width):
        shape = tuple(global_tokens.shape)
        raise ValueError(f"global_tokens must be ({x.shape[0]}, any number, {width}), got {shape}")


def _checked_size(image_size: int | Size) -> Size:
    return validate(ModelConfig, {"image_size": image_size}).size


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
