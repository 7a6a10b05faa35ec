"""The multi-scale vision transformer (Zhang et al., ICCV 2021, section 3.1), under timm's model contract.

Legend: B batch, G global tokens, N local tokens of an H × W map, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

from timm.models import register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vil.attention import ATTENTIONS, AttentionOptions
from vil.config import ConfigError, StageConfig
from vil.models.attention_maps import AttentionMap, Queries, attention_maps, attention_rollout
from vil.models.stage import LayerNorm, Size, Stage, map_sizes


class MultiScaleViT(nn.Module):
    """Multi-scale vision transformer: stages of shrinking maps, each with its own attention.

    Between stages the local tokens are folded back to a map, and the global ones are dropped, or carried on
    by a linear map to the next width (`stage_globals`). After the last stage: LayerNorm, then the mean over
    all tokens, global ones included (`avg`), or the first global token (`cls`), then one linear layer.

    Args:
        stages: one `StageConfig` per stage, at least one.
        img_size: (height, width) of the images that the model is built for, or one number for both; other
            sizes work at run time, except with linformer attention.
        in_chans: channels of the images.
        num_classes: classes of the head; 0 for none.
        global_pool: `avg`, `cls` (timm's `token` is the same), or empty for no pooling.
        mask: keys of the local attention: `chunk`, `exact` or `cyclic`.
        neighbors: chunks that the local attention sees in training: `all`, `self` or `random`.
        share_global_projection: global tokens use the projections of the local ones.
        share_key_value_projection: linformer: one projection for keys and values.
        attention_backend: implementation of the local attention.
        mlp_ratio: hidden width of the MLPs over C.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the embeddings.
        proj_drop_rate: dropout after the attention's projection and in the MLP.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth at the last block, rising linearly from 0 over all blocks.
        norm_embed: LayerNorm after each patch embedding.
        stage_globals: what becomes of global tokens between stages: `discard`, as in the paper, or `carry`;
            then only the first stage has learned ones, and all stages have as many.

    Raises:
        ConfigError: an impossible combination; the key is named as in `ModelConfig`.
    """

    def __init__(
        self,
        stages: Sequence[StageConfig],
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mask: Literal["chunk", "exact", "cyclic"] = "chunk",
        neighbors: Literal["all", "self", "random"] = "all",
        share_global_projection: bool = True,
        share_key_value_projection: bool = True,
        attention_backend: str = "auto",
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_embed: bool = True,
        stage_globals: Literal["discard", "carry"] = "discard",
    ) -> None:
        super().__init__()
        if not stages:
            raise ConfigError("stages", "a model needs at least one stage")
        if in_chans < 1:
            raise ConfigError("in_chans", f"must be at least 1, got {in_chans}")
        for key, rate in (("drop_path", drop_path_rate), ("dropout", proj_drop_rate),
                          ("attention_dropout", attn_drop_rate)):  # fmt: skip
            if not 0 <= rate < 1:
                raise ConfigError(key, f"must be from 0 to below 1, got {rate}")
        if stage_globals not in ("discard", "carry"):
            raise ConfigError("stage_globals", f"must be discard or carry, got {stage_globals!r}")
        if stage_globals == "carry" and len({stage.global_tokens for stage in stages}) > 1:
            raise ConfigError("stage_globals", "to carry global tokens, all stages need as many of them")
        self._model_args: dict[str, Any] = {}  # what timm writes beside the weights; the zoo fills it in
        self.stage_globals = stage_globals
        # Width of tokens from outside, None where they would be dropped after the first stage.
        self.outside_width = stages[0].dim if stage_globals == "carry" or len(stages) == 1 else None
        self.img_size = _pair(img_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = stages[-1].dim
        last = max(1, sum(stage.blocks for stage in stages) - 1)
        rates = [drop_path_rate * block / last for block in range(last + 1)]
        self.feature_info: list[dict[str, Any]] = []
        modules = []
        channels, reduction = in_chans, 1
        for number, (stage, size) in enumerate(zip(stages, map_sizes(stages, self.img_size))):
            with _named_as_of_stage(number, stage):
                _check_stage(stage)
            options = AttentionOptions(
                relative_position=stage.position == "relative"
                and ATTENTIONS[stage.attention].has_relative_position,
                attention_dropout=attn_drop_rate,
                dropout=proj_drop_rate,
                window=stage.window,
                mask=mask,
                neighbors=neighbors,
                share_global_projection=share_global_projection,
                backend=attention_backend,
                projected_tokens=stage.projected_tokens,
                share_key_value_projection=share_key_value_projection,
                random_features=stage.random_features,
                reduction=stage.reduction,
            )
            done = sum(s.blocks for s in stages[:number])
            drop_path = rates[done : done + stage.blocks]
            carries = number > 0 and stage_globals == "carry"
            with _named_as_of_stage(number, stage):
                built = Stage(
                    stage, channels, size, options, mlp_ratio, pos_drop_rate, drop_path, norm_embed, carries
                )
            modules.append(built)
            channels = stage.dim
            reduction *= stage.patch
            self.feature_info.append(
                {"num_chs": stage.dim, "reduction": reduction, "module": f"stages.{number}"}
            )
        self.stages = cast(list[Stage], nn.ModuleList(modules))
        self.norm: nn.Module = LayerNorm(channels)
        self.head_drop = nn.Dropout(drop_rate)
        self._set_pool(global_pool)
        self.head = nn.Linear(channels, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_initialize)

    def forward(self, x: Tensor, global_tokens: Tensor | None = None) -> Tensor:
        """Images (B, in_chans, height, width) → logits (B, num_classes); see `forward_features`."""
        return self.forward_head(self.forward_features(x, global_tokens))

    def forward_features(self, x: Tensor, global_tokens: Tensor | None = None) -> Tensor:
        """Images → the last stage's tokens (B, G+G'+N, C) after the final norm, global ones first.

        Args:
            x: images (B, in_chans, height, width).
            global_tokens: (B, G', width of the first stage), tokens from outside, a text encoder's for
                instance, that attend and are attended to as the model's own G global tokens, behind which
                they stand.

        Raises:
            ValueError: tokens of another shape, or tokens from outside in a model that discards them.
        """
        check_outside_tokens(x, global_tokens, self.outside_width)
        for number, stage in enumerate(self.stages):
            x, size = stage(x, global_tokens)
            if number < len(self.stages) - 1:
                global_tokens = stage.carried(x, size) if self.stage_globals == "carry" else None
                x = stage.to_map(x, size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, G+N, C) → logits (B, num_classes), or the pooled features (B, C) with `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean(dim=1)
        elif self.global_pool == "cls":
            x = x[:, 0]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

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
        """Feature maps of the stages, as timm defines it.

        Args:
            x: images (B, in_chans, height, width).
            indices: stages to return: the last n for a number, all for None.
            norm: apply the final norm to the last stage's map.
            stop_early: leave out the stages after the last one that is asked for.
            output_fmt: `NCHW`, maps (B, C, H, W), or `NLC`, tokens (B, N, C).
            intermediates_only: return only the list.
            return_prefix_tokens: return pairs (map, global tokens (B, G, C)).
            global_tokens: tokens from outside, as in `forward_features`.

        Returns:
            The list of feature maps, or a pair of the final tokens (as `forward_features`) and that list.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        check_outside_tokens(x, global_tokens, self.outside_width)
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates: list[Any] = []
        stages = self.stages[: last + 1] if stop_early else self.stages
        for number, stage in enumerate(stages):
            x, size = stage(x, global_tokens)
            final = number == len(self.stages) - 1
            if number in take:
                tokens = self.norm(x) if norm and final else x
                local = stage.to_map(tokens, size).contiguous()
                if output_fmt == "NLC":
                    local = local.flatten(2).transpose(1, 2)
                prefix = stage.carried(tokens, size)
                intermediates.append((local, prefix) if return_prefix_tokens else local)
            if number < len(stages) - 1:
                global_tokens = stage.carried(x, size) if self.stage_globals == "carry" else None
                x = stage.to_map(x, size)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(stages) == len(self.stages) else x), intermediates

    def attention_maps(
        self, x: Tensor, queries: Queries = None, global_tokens: Tensor | None = None
    ) -> list[list[AttentionMap]]:
        """What queries and global tokens attend to: for each stage, one `AttentionMap` per block.

        The weights are those by which each head sums up values in evaluation, whatever mode the model is in.

        Args:
            x: images (B, in_chans, height, width).
            queries: (row, column) of pixels; in each stage the position that holds the pixel queries. `all`:
                all positions of every map, (B, h, N, G+N) weights per block. None: the images' middle.
            global_tokens: tokens from outside, as in `forward_features`; they count among the global ones.

        Raises:
            ValueError: a query outside the images, or what `forward_features` raises.
        """
        return attention_maps(self, x, queries, global_tokens)

    def attention_rollout(
        self, x: Tensor, queries: Queries = None, global_tokens: Tensor | None = None
    ) -> list[AttentionMap | None]:
        """Attention rollout over the blocks of each stage (Abnar & Zuidema, 2020, section 3).

        A block mixes its tokens by (A + I) / 2, A the mean of its heads' weights and I the residual; a stage
        by the product over its blocks. Between stages tokens are folded anew, so rollout ends there. Padding
        that the cyclic mask shows is left out.

        Args:
            x, queries, global_tokens: as in `attention_maps`; here `all` is costly in time, not in memory
                beyond the result.

        Returns:
            One `AttentionMap` with h = 1 per stage; None where a stage has no blocks, or keys that are no
            tokens (linformer, spatial_reduction).

        Raises:
            ValueError: as `attention_maps`.
        """
        return attention_rollout(self, x, queries, global_tokens)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages that the given intermediates do not need; returns those intermediates."""
        take, last = feature_take_indices(len(self.stages), indices)
        if last < len(self.stages) - 1:
            self.stages = self.stages[: last + 1]
            prune_norm = True  # the final norm belongs to the width of the last stage
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The linear layer of the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` classes (0: none), and another pooling where given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_pool(global_pool)
        parameter = next(self.parameters())
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.apply(_initialize).to(device=parameter.device, dtype=parameter.dtype)

    def set_input_size(self, img_size: int | Size) -> None:
        """Builds the model for another image size: embeddings and bias tables are resized in place.

        Raises:
            ConfigError: the images are too small, or an attention is bound to its number of tokens.
        """
        sizes = map_sizes([stage.config for stage in self.stages], _pair(img_size))
        for stage, size in zip(self.stages, sizes):  # all or nothing
            for block in stage.blocks:
                block.attn.check_resize(size)
        for stage, size in zip(self.stages, sizes):
            stage.resize(size)
        self.img_size = _pair(img_size)
        if self._model_args:
            self._model_args = {**self._model_args, "img_size": self.img_size}

    def set_neighbors(self, neighbors: Literal["all", "self", "random"] | int) -> None:
        """What every local attention sees in training: see `vil.attention.vision_longformer`."""
        for stage in self.stages:
            for block in stage.blocks:
                block.attn.set_neighbors(neighbors)

    def set_training_progress(self, step: int, epoch: int) -> None:
        """Tells attentions that change while training (performer) which step comes next."""
        for stage in self.stages:
            for block in stage.blocks:
                block.attn.set_training_progress(step, epoch)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, to save memory."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are never decayed: global tokens, embeddings and bias tables."""
        kinds = (".global_tokens", ".bias_table", ".position.", ".global_bias.")
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of layers, for layer decay: by stage (coarse) or by block."""
        if coarse:
            return {
                "stem": r"^stages\.0\.patch_embed",
                "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))],
            }
        return {
            "stem": r"^stages\.0\.(?:patch_embed|global_tokens|position)",
            "blocks": [
                (r"^stages\.(\d+)\.(?:patch_embed|global_tokens|position)", (-1,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def multiply_adds(self, size: Size | None = None) -> int:
        """Multiply-adds for one image of (height, width) = `size`, counted as the paper does.

        Convolutions, linear layers, scores and weighted sums count; norms, softmax and additions do not.
        """
        total, channels = 0, self.in_chans
        configs = [stage.config for stage in self.stages]
        for stage, map_size in zip(self.stages, map_sizes(configs, size or self.img_size)):
            total += stage.multiply_adds(channels, map_size)
            channels = stage.config.dim
        return total + channels * self.num_classes

    def _set_pool(self, global_pool: str) -> None:
        pool = {"token": "cls"}.get(global_pool, global_pool)
        if pool not in ("avg", "cls", ""):
            raise ConfigError("pool", f"must be avg or cls, got {global_pool!r}")
        if pool == "cls" and not self.stages[-1].num_global_tokens:
            raise ConfigError("pool", "cls needs a global token in the last stage, which has none")
        self.global_pool = pool


@register_notrace_function  # a check, and no part of a traced graph
def check_outside_tokens(x: Tensor, global_tokens: Tensor | None, width: int | None) -> None:
    """Raises ValueError for tokens from outside that a model with images `x` cannot take."""
    if global_tokens is None:
        return
    if width is None:
        raise ValueError("global tokens from outside need a model with stage_globals='carry'")
    if global_tokens.dim() != 3 or global_tokens.shape[::2] != (x.shape[0], width):
        shape = tuple(global_tokens.shape)
        raise ValueError(f"global_tokens must be ({x.shape[0]}, any number, {width}), got {shape}")


@contextmanager
def _named_as_of_stage(number: int, stage: StageConfig) -> Iterator[None]:
    """Puts the stage in front of the key of a ConfigError that concerns the stage alone."""
    try:
        yield
    except ConfigError as error:
        if not hasattr(stage, error.key):
            raise
        raise ConfigError(f"stages[{number}].{error.key}", error.reason) from error


def _check_stage(stage: StageConfig) -> None:
    if stage.attention not in ATTENTIONS:
        raise ConfigError("attention", f"must be one of {', '.join(ATTENTIONS)}, got {stage.attention!r}")
    if stage.dim < 1:
        raise ConfigError("dim", f"must be at least 1, got {stage.dim}")
    if stage.blocks < 0:
        raise ConfigError("blocks", f"must be 0 or more, got {stage.blocks}")
    if stage.global_tokens < 0:
        raise ConfigError("global_tokens", f"must be 0 or more, got {stage.global_tokens}")


def _pair(size: int | Sequence[int]) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    if not 1 <= min(height, width) <= max(height, width) <= 65536:
        raise ConfigError("image_size", f"must be from 1 to 65,536 pixels, got {height}×{width}")
    return int(height), int(width)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
