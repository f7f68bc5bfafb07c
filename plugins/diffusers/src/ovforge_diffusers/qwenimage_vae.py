"""Qwen-Image's autoencoder (Wu et al. 2025), AutoencoderKLQwenImage: one for videos, here of one frame.

Its convolutions see a frame and the two before it. Of a picture these are zeros, so that of each kernel only the last
slice acts: what is converted are the convolutions of two dimensions that remain, a third of the work and weights.
"""

from __future__ import annotations

from typing import Any

from ovforge_convert import Port
from ovforge_diffusers.convert import without_initial_weights
from ovforge_diffusers.ports import RuntimeOptions, Sizes, Submodel

__all__ = ["CLASS", "qwenimage_decoder", "qwenimage_encoder"]

CLASS = "AutoencoderKLQwenImage"


def qwenimage_decoder(module: Any, latent: Sizes, scale: RuntimeOptions) -> Submodel:
    """Describe the decoder: latents [batch, channels, 1, height, width] -> pictures [batch, 3, 1, height, width]."""
    _keep_one_frame(module)
    channels = module.config.z_dim

    def forward(latent_sample: Any) -> tuple[Any, ...]:
        decoder = module.decoder
        x = _middle(decoder.mid_block, decoder.conv_in(module.post_quant_conv(latent_sample.squeeze(2))))
        for block in decoder.up_blocks:
            for layer in block.resnets:
                x = _residual(layer, x)
            for layer in block.upsamplers or ():
                x = _doubled(layer, x)
        x = decoder.conv_out(decoder.nonlinearity(_normalized(decoder.norm_out, x)))
        return (x.clamp(-1.0, 1.0).unsqueeze(2),)

    shape = (latent.batch, channels, 1, latent.height, latent.width)
    example = (2, channels, 1, latent.height or 8, latent.width or 8)
    return Submodel(forward, (Port("latent_sample", shape, example),), ("sample",), scale)


def qwenimage_encoder(module: Any, picture: Sizes, factor: int, scale: RuntimeOptions) -> Submodel:
    """Describe the encoder: pictures [batch, 3, 1, height, width] -> mean and log variance, stacked, of latents."""
    _keep_one_frame(module)
    channels = module.config.input_channels

    def forward(sample: Any) -> tuple[Any, ...]:
        encoder = module.encoder
        x = encoder.conv_in(sample.squeeze(2))
        for layer in encoder.down_blocks:
            x = _of_encoder(layer, x)
        x = _middle(encoder.mid_block, x)
        x = encoder.conv_out(encoder.nonlinearity(_normalized(encoder.norm_out, x)))
        return (module.quant_conv(x).unsqueeze(2),)

    shape = (picture.batch, channels, 1, picture.height, picture.width)
    example = (2, channels, 1, picture.height or 8 * factor, picture.width or 8 * factor)
    return Submodel(forward, (Port("sample", shape, example),), ("latent_parameters",), scale)


def _keep_one_frame(module: Any) -> None:
    """Put convolutions of two dimensions in place of the causal ones, but for those between frames, which do not run.

    `weights` gives them the last slice of what is stored.
    """
    import torch

    for parent in module.modules():
        for name, layer in list(parent.named_children()):
            if type(layer).__name__ != "QwenImageCausalConv3d" or name == "time_conv":
                continue
            left, _, top, *_ = layer._padding
            with without_initial_weights():
                flat = torch.nn.Conv2d(
                    layer.in_channels, layer.out_channels, layer.kernel_size[1:], layer.stride[1:], (top, left)
                )
            setattr(parent, name, flat)


def _of_encoder(layer: Any, x: Any) -> Any:
    kind = type(layer).__name__
    if kind == "QwenImageResample":
        return layer.resample(x)
    return _attention(layer, x) if kind == "QwenImageAttentionBlock" else _residual(layer, x)


def _middle(block: Any, x: Any) -> Any:
    x = _residual(block.resnets[0], x)
    for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(layer, _attention(attention, x))
    return x


def _residual(block: Any, x: Any) -> Any:
    inner = block.conv1(block.nonlinearity(_normalized(block.norm1, x)))
    inner = block.conv2(block.nonlinearity(_normalized(block.norm2, inner)))
    return inner + block.conv_shortcut(x)


def _attention(block: Any, x: Any) -> Any:
    import torch

    channels, height, width = x.shape[1:]
    tokens = block.to_qkv(_normalized(block.norm, x)).flatten(2).transpose(1, 2).unsqueeze(1)
    made = torch.nn.functional.scaled_dot_product_attention(*tokens.chunk(3, dim=-1))
    return x + block.proj(made.squeeze(1).transpose(1, 2).reshape(-1, channels, height, width))


def _doubled(layer: Any, x: Any) -> Any:
    """Return twice the sides: nearest-exact is nearest there."""
    import torch

    return layer.resample[1](torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def _normalized(norm: Any, x: Any) -> Any:
    import torch

    return torch.nn.functional.normalize(x, dim=1) * norm.scale * norm.gamma.reshape(-1, 1, 1) + norm.bias
