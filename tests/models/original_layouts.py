"""Files in the layouts of the models' authors, made from diffusers modules.

Each map lists modules in the order in which the original code builds them, as (original name, diffusers' name). It was
written from that code and shares nothing with the code that loads the files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from halovae.models import tiny_configs, zoo

Pairs = Iterator[tuple[str, str]]
State = dict[str, Tensor]


def written(module: nn.Module, pairs: Callable[[nn.Module], Pairs]) -> State:
    """Return the whole state of `module` by original names, contiguous."""
    state, out = dict(module.state_dict()), {}
    for original, name in pairs(module):
        for leaf in (".weight", ".bias", ".gamma", ".running_mean", ".running_var", ".num_batches_tracked", ""):
            if name + leaf in state:
                out[original + leaf] = state.pop(name + leaf).contiguous()
    assert not state, list(state)
    return out


def same_names(module: nn.Module) -> Pairs:
    """diffusers' own names. Tencent's hyvideo/vae/unet_causal_3d_blocks.py (HunyuanVideo) uses the same."""
    yield from ((key, key) for key in module.state_dict())


def _config(module: nn.Module) -> Mapping[str, object]:
    return module.config  # type: ignore[return-value]


# Wan-AI: wan/modules/vae.py (Wan2.1) and wan/modules/vae2_2.py (Wan2.2-5B).


def _wan_residual(original: str, name: str) -> Pairs:
    for ours, theirs in (("residual.0", "norm1"), ("residual.2", "conv1"), ("residual.3", "norm2")):
        yield f"{original}.{ours}", f"{name}.{theirs}"
    yield f"{original}.residual.6", f"{name}.conv2"
    yield f"{original}.shortcut", f"{name}.conv_shortcut"


def _wan_outside() -> Pairs:
    yield "conv1", "quant_conv"
    yield "conv2", "post_quant_conv"
    for half in ("encoder", "decoder"):
        yield f"{half}.conv1", f"{half}.conv_in"
        yield from _wan_residual(f"{half}.middle.0", f"{half}.mid_block.resnets.0")
        for layer in ("norm", "to_qkv", "proj"):
            yield f"{half}.middle.1.{layer}", f"{half}.mid_block.attentions.0.{layer}"
        yield from _wan_residual(f"{half}.middle.2", f"{half}.mid_block.resnets.1")
        yield f"{half}.head.0", f"{half}.norm_out"
        yield f"{half}.head.2", f"{half}.conv_out"


def wan21(module: nn.Module) -> Pairs:
    yield from _wan_outside()
    levels, blocks = len(_config(module)["dim_mult"]), _config(module)["num_res_blocks"]  # type: ignore[arg-type]
    assert isinstance(blocks, int)
    index = 0
    for level in range(levels):  # the encoder's list is flat in diffusers too
        for _ in range(blocks):
            yield from _wan_residual(f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}")
            index += 1
        if level != levels - 1:
            for layer in ("resample.1", "time_conv"):
                yield f"encoder.downsamples.{index}.{layer}", f"encoder.down_blocks.{index}.{layer}"
            index += 1
    index = 0
    for level in range(levels):
        for block in range(blocks + 1):
            yield from _wan_residual(f"decoder.upsamples.{index}", f"decoder.up_blocks.{level}.resnets.{block}")
            index += 1
        if level != levels - 1:
            for layer in ("resample.1", "time_conv"):
                yield f"decoder.upsamples.{index}.{layer}", f"decoder.up_blocks.{level}.upsamplers.0.{layer}"
            index += 1


def wan22(module: nn.Module) -> Pairs:
    yield from _wan_outside()
    levels, blocks = len(_config(module)["dim_mult"]), _config(module)["num_res_blocks"]  # type: ignore[arg-type]
    assert isinstance(blocks, int)
    for half, down, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        for level in range(levels):
            start = f"{half}.{down}samples.{level}.{down}samples"
            for block in range(count):
                yield from _wan_residual(f"{start}.{block}", f"{half}.{down}_blocks.{level}.resnets.{block}")
            for layer in ("resample.1", "time_conv"):
                yield f"{start}.{count}.{layer}", f"{half}.{down}_blocks.{level}.{down}sampler.{layer}"


# CompVis' ldm/modules/diffusionmodules/model.py, and Black Forest Labs' flux/modules/autoencoder.py.


def _ldm_resnet(original: str, name: str) -> Pairs:
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{original}.{layer}", f"{name}.{layer}"
    yield f"{original}.nin_shortcut", f"{name}.conv_shortcut"


def latent_diffusion(module: nn.Module) -> Pairs:
    levels = len(_config(module)["block_out_channels"])  # type: ignore[arg-type]
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in", f"{half}.conv_in"
        yield from _ldm_resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        for ours, theirs in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v")):
            yield f"{half}.mid.attn_1.{ours}", f"{half}.mid_block.attentions.0.{theirs}"
        yield f"{half}.mid.attn_1.proj_out", f"{half}.mid_block.attentions.0.to_out.0"
        yield from _ldm_resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        yield f"{half}.norm_out", f"{half}.conv_norm_out"
        yield f"{half}.conv_out", f"{half}.conv_out"
    for level in range(levels):
        for block in range(9):
            down = f"encoder.down_blocks.{level}.resnets.{block}"
            yield from _ldm_resnet(f"encoder.down.{level}.block.{block}", down)
            up = f"decoder.up_blocks.{levels - 1 - level}.resnets.{block}"  # the decoder counts from the pictures
            yield from _ldm_resnet(f"decoder.up.{level}.block.{block}", up)
        yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
        yield f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{levels - 1 - level}.upsamplers.0.conv"


def flux2(module: nn.Module) -> Pairs:
    """latent diffusion's names, with the outer convolutions inside, and the statistics of packed latents."""
    moved = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    yield from ((moved.get(original, original), name) for original, name in latent_diffusion(module))
    yield "bn", "bn"


def with_convolutions(state: State) -> State:
    """Return the state with attention projections as 1x1 convolutions."""
    return {key: one[:, :, None, None] if ".attn_1." in key and one.ndim == 2 else one for key, one in state.items()}


# Lightricks' ltx_video/models/autoencoders/causal_video_autoencoder.py: `blocks`, one after the other.


def _ltx_block(original: str, name: str) -> Pairs:
    """ResnetBlock3D: in `res_x`, or on its own as `res_x_y`."""
    for layer in ("conv1.conv", "conv2.conv", "scale_shift_table", "per_channel_scale1", "per_channel_scale2"):
        yield f"{original}.{layer}", f"{name}.{layer}"
    yield f"{original}.conv_shortcut", f"{name}.conv_shortcut.conv"
    yield f"{original}.norm3.norm", f"{name}.norm3"


def _ltx_blocks(original: str, name: str) -> Pairs:
    """UNetMidBlock3D: `res_x`."""
    for block in range(9):
        yield from _ltx_block(f"{original}.res_blocks.{block}", f"{name}.resnets.{block}")
    yield from _ltx_embedder(f"{original}.time_embedder", f"{name}.time_embedder")


def _ltx_embedder(original: str, name: str) -> Pairs:
    for layer in ("linear_1", "linear_2"):
        yield f"{original}.timestep_embedder.{layer}", f"{name}.timestep_embedder.{layer}"


def ltx(module: nn.Module) -> Pairs:
    state = module.state_dict()
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in.conv", f"{half}.conv_in.conv"
        yield f"{half}.conv_out.conv", f"{half}.conv_out.conv"
    yield "decoder.timestep_scale_multiplier", "decoder.timestep_scale_multiplier"
    yield "decoder.last_scale_shift_table", "decoder.scale_shift_table"
    yield from _ltx_embedder("decoder.last_time_embedder", "decoder.time_embedder")
    yield "per_channel_statistics.mean-of-means", "latents_mean"
    yield "per_channel_statistics.std-of-means", "latents_std"

    def has(start: str) -> bool:
        return any(key.startswith(start) for key in state)

    index = level = 0
    while has(name := f"encoder.down_blocks.{level}."):  # res_x, then compress_all (or space, time), then res_x_y
        yield from _ltx_blocks(f"encoder.down_blocks.{index}", name[:-1])
        index += 1
        if has(f"{name}downsamplers.0."):
            for layer in ("conv", "conv.conv"):
                yield f"encoder.down_blocks.{index}.{layer}", f"{name}downsamplers.0.{layer}"
            index += 1
        if has(f"{name}conv_out."):
            yield from _ltx_block(f"encoder.down_blocks.{index}", f"{name}conv_out")
            index += 1
        level += 1
    yield from _ltx_blocks(f"encoder.down_blocks.{index}", "encoder.mid_block")
    yield from _ltx_blocks("decoder.up_blocks.0", "decoder.mid_block")
    index, level = 1, 0
    while has(name := f"decoder.up_blocks.{level}."):  # res_x_y, then compress_all, then res_x
        if has(f"{name}conv_in."):
            yield from _ltx_block(f"decoder.up_blocks.{index}", f"{name}conv_in")
            index += 1
        if has(f"{name}upsamplers.0."):
            yield f"decoder.up_blocks.{index}.conv.conv", f"{name}upsamplers.0.conv.conv"
            index += 1
        yield from _ltx_blocks(f"decoder.up_blocks.{index}", name[:-1])
        index += 1
        level += 1


# Tiny models, decoded by diffusers, for the layouts above.

ENTRIES = {entry.name: entry for entry in zoo.ENTRIES}
WIDTHS = {"block_out_channels": (32, 32, 64), "norm_num_groups": 32}  # the true groups, which files do not show
KL: dict[str, Any] = {**tiny_configs.BLOCKS_2D, **WIDTHS}


def tiny(name: str, **config: Any) -> nn.Module:
    """Build a module of the zoo, or one of its class with another config, with seeded weights."""
    entry = ENTRIES[name]
    if config:
        import diffusers

        entry = replace(entry, make=lambda: getattr(diffusers, name.split()[0])(**config).eval())
    return zoo.build(entry)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "sd": lambda: tiny("AutoencoderKL", **KL, layers_per_block=2),
    "flux": lambda: tiny("AutoencoderKL", **KL, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    "flux.2": lambda: tiny("AutoencoderKLFlux2", **KL, latent_channels=4, layers_per_block=1),
    "flux.2, small decoder": lambda: tiny(
        "AutoencoderKLFlux2", **KL, latent_channels=4, layers_per_block=1, decoder_block_out_channels=(32, 32, 32)
    ),
    "hunyuan-video": lambda: tiny(
        "AutoencoderKLHunyuanVideo", latent_channels=4, block_out_channels=(32, 32, 32, 64), layers_per_block=1
    ),
    "ltx-video 0.9.0": lambda: tiny(
        "AutoencoderKLLTXVideo (0.9.0)",
        **{  # widths that change between blocks, as in the true model
            **tiny_configs.LTX,
            "block_out_channels": (4, 8, 12, 12),
            "decoder_block_out_channels": (4, 8, 12, 12),
            "layers_per_block": (2, 1, 1, 1, 2),
            "spatio_temporal_scaling": (True, True, True, False),
            "decoder_spatio_temporal_scaling": (True, True, True, False),
        },
    ),
    "ltx-video 0.9.1": lambda: tiny("AutoencoderKLLTXVideo (0.9.1, noise)"),
    "ltx-video 0.9.5": lambda: tiny("AutoencoderKLLTXVideo (0.9.5)"),
    "ltx-2": lambda: tiny("AutoencoderKLLTX2Video"),
}
# The map for each module.
MAPS: dict[str, Callable[[nn.Module], Pairs]] = {
    "sd": latent_diffusion,
    "flux": latent_diffusion,
    "flux.2": flux2,
    "flux.2, small decoder": flux2,
    "hunyuan-video": same_names,
    "ltx-video 0.9.0": ltx,
    "ltx-video 0.9.1": ltx,
    "ltx-video 0.9.5": ltx,
    "ltx-2": ltx,
}


def original(name: str, module: nn.Module) -> State:
    return with_convolutions(written(module, MAPS[name]))
