"""Train the narrow autoencoder: `python -m demo.distil --teacher FOLDER --out FOLDER --seconds 300`.

It keeps the latents of a wider one, the teacher: the encoder learns to give them, the decoder to turn them, and
slightly wrong ones, back into pictures.
"""

import argparse
import pathlib
import random
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from . import configs
from .autoencoder import Autoencoder, Decoder
from .checkpoint import load_part, load_state, load_tokenizer, save_part
from .dataset import Arrays, make_dataset, take
from .inherit import narrow_autoencoder
from .picture import detail_weight, load_atlas, render

SIZES = {(256, 256): 40_000, (192, 192): 20_000, (224, 208): 8_000, (208, 304): 8_000, (320, 240): 8_000}
WOBBLE = 0.14  # standard deviation of wrong latents in units of a channel's own
COARSE_SHARE = 0.3  # of the time: the decoder's coarse half alone


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write the autoencoder to")
    parser.add_argument("--teacher", type=pathlib.Path, required=True, help="folder of the wide autoencoder")
    parser.add_argument("--init", type=pathlib.Path, help="folder of a narrow autoencoder to go on from")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--pixels", type=int, default=32 * 256 * 256, help="pixels in a batch")
    parser.add_argument("--scenes", type=float, default=1.0, help="factor on the number of scenes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--parts", nargs="+", default=["encoder", "decoder"], choices=["encoder", "decoder"])
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def picture_loss(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, weighted by [B, 1, H, W], and absolute error of the gradients at three scales."""
    loss = (((x - y).abs() + 0.5 * (x - y).square()) * weight).mean() / weight.mean()
    for scale in (1, 2, 4):
        a, b = (F.avg_pool2d(t, scale) for t in (x, y))
        across = (a[..., 1:] - a[..., :-1]) - (b[..., 1:] - b[..., :-1])
        down = (a[..., 1:, :] - a[..., :-1, :]) - (b[..., 1:, :] - b[..., :-1, :])
        loss = loss + 0.5 * (across.abs().mean() + down.abs().mean())
    return loss


def coarse_features(decoder: Decoder, z: torch.Tensor) -> torch.Tensor:
    """The decoder's state at a quarter of the picture's area, [B, 64, H / 2, W / 2], for either width of decoder.

    The wide decoder's third level begins with the block that narrows to 64 channels.
    """
    h = decoder.mid_block(decoder.conv_in(z))
    h = decoder.up_blocks[1](decoder.up_blocks[0](h))
    return decoder.up_blocks[2].resnets[0](h) if h.shape[1] > decoder.conv_out.in_channels else h


def fine_picture(decoder: Decoder, h: torch.Tensor) -> torch.Tensor:
    """The rest of a narrow decoder, from `coarse_features` to the picture."""
    h = decoder.up_blocks[3](decoder.up_blocks[2](h))
    return decoder.conv_out(F.silu(decoder.conv_norm_out(h)))


class Distiller:
    """Stages of the decoder: first its coarse half learns the teacher's features alone, which is quick, then all."""

    def __init__(self, args: argparse.Namespace, vae: Autoencoder, teacher: Autoencoder, data: dict, atlas):
        self.args, self.vae, self.teacher, self.data, self.atlas = args, vae, teacher, data, atlas
        self.device, self.rng = atlas.device, random.Random(1)
        # weights are kept in float32 and used in the teacher's type
        self.dtype = next(teacher.parameters()).dtype
        parameters = [p for part in args.parts for p in getattr(vae, part).parameters()]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)

    def pictures(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rendered scenes [B, 3, H, W] and how much each pixel counts [B, 1, H, W]: small things have few."""
        size = self.rng.choice(list(self.data))
        data: Arrays = self.data[size]
        rows = torch.randint(len(data["length"]), (max(2, self.args.pixels // (size[0] * size[1])),))
        batch = take(data, rows, self.device)
        x = render(batch, *size, self.atlas).contiguous(memory_format=torch.channels_last)
        return x, F.interpolate(detail_weight(batch, *size, text=2.0, shapes=2.0), scale_factor=8)

    def wobbled(self, mean: torch.Tensor) -> torch.Tensor:
        """Latents as a denoiser gives them: a little wrong, some more than others."""
        strength = WOBBLE * torch.rand(len(mean), 1, 1, 1, device=self.device)
        return mean + mean.std((0, 2, 3), keepdim=True) * strength * torch.randn_like(mean)

    def cast(self, part: str) -> dict[str, torch.Tensor]:
        return {name: p.to(self.dtype) for name, p in getattr(self.vae, part).named_parameters()}

    def encoder_loss(self, x: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        moments = functional_call(self.vae.encoder, self.cast("encoder"), (x.to(self.dtype),)).float()
        goal_mean, mean = goal.chunk(2, 1)[0], moments.chunk(2, 1)[0]
        spread = goal_mean.std((0, 2, 3), keepdim=True)
        return ((mean - goal_mean) / spread).square().mean() + 1e-3 * (moments - goal).square().mean()

    def decoder_loss(
        self, x: torch.Tensor, weight: torch.Tensor, goal: torch.Tensor, coarse_only: bool
    ) -> torch.Tensor:
        mean = goal.chunk(2, 1)[0]
        stages = DecoderStages(self.vae.decoder)
        weights = {f"decoder.{name}": p for name, p in self.cast("decoder").items()}
        features, y = functional_call(stages, weights, (self.wobbled(mean).to(self.dtype), coarse_only))
        if coarse_only:
            return self.hint(features, mean)
        self.error = (x - y.detach().float()).square().mean() / 4
        loss = picture_loss(x, y.float(), weight)
        return loss if self.args.init else loss + 0.1 * self.hint(features, mean)

    def hint(self, features: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """How far the coarse features are from the teacher's: a good start, but it knows one size only."""
        with torch.no_grad():
            wanted = coarse_features(self.teacher.decoder, mean.to(self.dtype)).float()
        return (features.float() - wanted).square().mean() / wanted.square().mean()

    def advance(self, done: float) -> torch.Tensor:
        """One step; `done` is the share of the time that has passed. Returns the loss."""
        x, weight = self.pictures()
        with torch.no_grad():
            goal = self.teacher.encoder(x.to(self.dtype)).float()
        loss = torch.zeros((), device=self.device)
        if "encoder" in self.args.parts:
            loss = loss + self.encoder_loss(x, goal)
        if "decoder" in self.args.parts:
            coarse_only = done < COARSE_SHARE and not self.args.init
            loss = loss + self.decoder_loss(x, weight, goal, coarse_only)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1.0, 0.01 + 1.6 * (1 - done))
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def run(self, log) -> None:
        start, losses, step, self.error = time.time(), [], 0, torch.ones(())
        while (elapsed := time.time() - start) < self.args.seconds:
            losses.append(self.advance(elapsed / self.args.seconds))
            step += 1
            if step % 100 == 0:
                log(
                    f"step {step}, {step / (time.time() - start):.2f} a second, loss {torch.stack(losses).mean():.4f}, "
                    f"{-10 * self.error.log10():.2f} dB"
                )
                losses = []
        save_part(self.args.out, "vae", self.vae, self.vae.config)
        log(f"{step} steps in {time.time() - start:.0f} s")


class DecoderStages(nn.Module):
    """A decoder that also returns its coarse features, in a form whose weights can be replaced for one call."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, z: torch.Tensor, coarse_only: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = coarse_features(self.decoder, z)
        return features, None if coarse_only else fine_picture(self.decoder, features)


def main() -> None:
    args, start = parse_arguments(), time.time()

    def log(line: str) -> None:
        print(f"[{time.time() - start:6.1f}] {line}", flush=True)

    counts = {size: int(count * args.scenes) for size, count in SIZES.items()}
    data = make_dataset(counts, load_tokenizer(args.teacher), seed=23)
    log(f"{sum(len(part['length']) for part in data.values())} scenes")
    torch.manual_seed(0)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # batches have few shapes
    teacher = load_part(args.teacher, "vae").to(device, memory_format=torch.channels_last)
    teacher = teacher.to(torch.bfloat16) if device.type == "cuda" else teacher
    vae = load_part(args.init, "vae") if args.init else Autoencoder(configs.AUTOENCODER)
    if not args.init:
        vae.load_state_dict(narrow_autoencoder(load_state(args.teacher, "vae")[1], vae.state_dict()))
    vae = vae.requires_grad_(True).to(device, memory_format=torch.channels_last)
    Distiller(args, vae, teacher, data, load_atlas().to(device)).run(log)


if __name__ == "__main__":
    main()
