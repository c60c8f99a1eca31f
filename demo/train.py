"""Train the denoiser and its caption encoder: `python -m demo.train --vae FOLDER --out FOLDER --seconds 900`.

Rectified flow on latents of rendered scenes, without guidance, with extra weight on the eight noise levels that are
sampled and, towards the end, on low noise. `--init` starts from a trained folder, whatever its widths and vocabulary.
On several GPUs: `torchrun --nproc-per-node 4 -m demo.train …`, every GPU with scenes of its own.
"""

import argparse
import pathlib
import random
import time

import torch
import torch.nn as nn
from tokenizers import Tokenizer

from . import configs
from .caption_encoder import CaptionEncoder
from .checkpoint import load_part, load_state, load_tokenizer, save_part, save_shell
from .configs import PAD_MULTIPLE
from .dataset import OTHER_SIZES, SQUARE, make_dataset
from .denoiser import Denoiser
from .inherit import narrow_feed_forward, translate_embeddings
from .model import Model
from .muon import make_optimizers, set_rate
from .picture import detail_weight, load_atlas
from .ranks import Ranks
from .shelves import Shelves
from .tokenization import train_tokenizer

VOCABULARY = 1024
TOKENS_PER_BATCH = 768 * 288  # 768 pictures of 256x256 with a short prompt
LOW_NOISE_FROM = 0.8  # share of the time after which half of the draws are of low noise


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--vae", type=pathlib.Path, required=True, help="folder whose autoencoder defines the latents")
    parser.add_argument("--init", type=pathlib.Path, help="folder of trained weights to start from")
    parser.add_argument("--keep-tokenizer", action="store_true", help="use the one of --init instead of a new one")
    parser.add_argument("--seconds", type=float, default=900, help="length of the training proper")
    parser.add_argument("--others", type=int, default=len(OTHER_SIZES), help="how many other sizes to train on")
    parser.add_argument("--average", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--square-scenes", type=int, default=128_000)
    parser.add_argument("--other-scenes", type=int, default=3_200, help="scenes of each other size")
    parser.add_argument("--first-fill", type=int, default=8_192, help="pictures of 256x256 encoded before the start")
    parser.add_argument("--square-share", type=float, default=0.5, help="share of batches at 256x256")
    parser.add_argument("--tokens", type=int, default=TOKENS_PER_BATCH, help="tokens in a batch")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW; Muon runs at ten times this")
    parser.add_argument("--warm-up", type=int, default=200, help="steps until the full rate")
    parser.add_argument("--decay-from", type=float, default=0.5, help="share of the time at constant rate")
    parser.add_argument("--text-weight", type=float, default=4.0, help="extra loss where characters stand")
    parser.add_argument("--shape-weight", type=float, default=2.0, help="extra loss where shapes stand")
    parser.add_argument("--seed", type=int, default=11, help="of the scenes")
    parser.add_argument("--save-every", type=float, default=100, help="seconds between checkpoints")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


def build_model(tokenizer: Tokenizer, init: pathlib.Path | None) -> Model:
    text_config = {**configs.TEXT_ENCODER, "vocab_size": tokenizer.get_vocab_size()}
    model = Model(CaptionEncoder(text_config), Denoiser(configs.TRANSFORMER))
    if init:
        _, state = load_state(init, "transformer")
        model.transformer.load_state_dict(narrow_feed_forward(state, configs.TRANSFORMER["ffn_hidden_dim"]))
        _, state = load_state(init, "text_encoder")
        name = "model.embed_tokens.weight"
        state[name] = translate_embeddings(state[name], load_tokenizer(init), tokenizer)
        model.text_encoder.load_state_dict(state)
    return model


def compile_blocks(model: Model) -> None:
    """Lengths and batch sizes vary, so the blocks are compiled for any."""
    for block in [*model.text_encoder.model.layers[:-1], *model.transformer.blocks()]:
        block.compile(dynamic=True)


def sample_sigma(count: int, device: torch.device, low_noise: bool) -> torch.Tensor:
    """Noise levels in 0..1: uniform and logit-normal draws with shift 3, and the sampler's own eight levels."""
    kind = torch.rand(count, device=device)
    draw = torch.rand(count, device=device)
    middle = torch.sigmoid(torch.randn(count, device=device))
    u = torch.where(kind < 0.3, middle, draw)
    sigma = 3 * u / (1 + 2 * u)
    levels = torch.tensor(configs.SIGMAS[:-1], device=device)
    sigma = torch.where(kind > 0.6, levels[torch.randint(len(levels), (count,), device=device)], sigma)
    if low_noise:
        sigma = torch.where(torch.rand(count, device=device) < 0.5, 0.5 * draw, sigma)
    return sigma


def batch_size(tokens: int, size: tuple[int, int]) -> int:
    """A multiple of eight pictures that hold about `tokens` tokens with their prompts."""
    length = size[0] * size[1] // 256 + PAD_MULTIPLE
    return max(8, tokens // length // 8 * 8)


class Trainer:
    def __init__(self, args: argparse.Namespace, model: Model, average: Model, shelves: Shelves, ranks: Ranks):
        self.args, self.model, self.average, self.shelves, self.ranks = args, model, average, shelves, ranks
        self.device = shelves.atlas.device
        self.optimizers = make_optimizers(model, args.lr, 10 * args.lr)
        self.rng, self.step = random.Random(5), 0  # the same everywhere: steps of one size take the same time

    def loss(self, low_noise: bool) -> torch.Tensor:
        shelf = self.shelves.pick(self.rng)
        latents, rows, words = shelf.batch(batch_size(self.args.tokens, shelf.size), self.rng)
        sigma = sample_sigma(len(latents), self.device, low_noise)
        noise, s = torch.randn_like(latents), sigma.view(-1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            velocity = self.model(s * noise + (1 - s) * latents, sigma, rows["tokens"][:, :words], rows["length"])
        weight = detail_weight(rows, *shelf.size, self.args.text_weight, self.args.shape_weight)
        return ((velocity.float() - (noise - latents)).square() * weight).mean() / weight.mean()

    def advance(self, done: float) -> torch.Tensor:
        """One step; `done` is the share of the time that has passed."""
        loss = self.loss(done > LOW_NOISE_FROM)
        loss.backward()
        self.ranks.average_gradients(list(self.model.parameters()))
        decay = max(0.01, (1 - done) / (1 - self.args.decay_from))
        set_rate(self.optimizers, min(1.0, (self.step + 1) / self.args.warm_up, decay))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            keep = min(self.args.average, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        if self.ranks.index:
            return
        for name in ("transformer", "text_encoder"):
            part = getattr(self.average, name)
            save_part(self.args.out, name, part, part.config)

    def run(self, log) -> None:
        start, saved, losses = time.time(), time.time(), []
        while (elapsed := self.ranks.agree(time.time() - start)) < self.args.seconds:
            losses.append(self.advance(elapsed / self.args.seconds))
            if self.step % 24 == 0:
                self.shelves.refill(square_count=384, other_count=64, others=6)
            if self.step % 200 == 0:
                log(
                    f"step {self.step}, {self.step / (time.time() - start):.2f} a second, "
                    f"loss {torch.stack(losses).mean():.4f}, {self.shelves.pictures} pictures"
                )
                losses = []
            if time.time() - saved > self.args.save_every:
                self.save()
                saved = time.time()
        self.save()
        log(f"{self.step} steps in {time.time() - start:.0f} s")


def main() -> None:
    args, start, ranks = parse_arguments(), time.time(), Ranks()

    def log(line: str) -> None:
        if not ranks.index:
            print(f"[{time.time() - start:6.1f}] {line}", flush=True)

    tokenizer = load_tokenizer(args.init) if args.keep_tokenizer else train_tokenizer(VOCABULARY)
    if not ranks.index:
        save_shell(args.out, tokenizer)
    counts = {SQUARE: args.square_scenes, **dict.fromkeys(OTHER_SIZES[: args.others], args.other_scenes)}
    shares = {size: count // ranks.count for size, count in counts.items() if count}
    dataset = make_dataset(shares, tokenizer, seed=args.seed + ranks.index)
    log(f"{sum(len(data['length']) for data in dataset.values())} scenes, vocabulary {tokenizer.get_vocab_size()}")
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", ranks.index % torch.cuda.device_count())
        torch.cuda.set_device(device)
    ranks.join(device)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, for half a second, at every new shape
    torch._dynamo.config.recompile_limit = 64
    vae = load_part(args.vae, "vae").to(device, memory_format=torch.channels_last)
    vae = vae.to(torch.bfloat16) if device.type == "cuda" else vae
    shelves = Shelves(dataset, vae, load_atlas().to(device), args.square_share)
    shelves.refill(args.first_fill, args.first_fill // 64, others=len(shelves.others))
    log(f"{shelves.pictures} pictures encoded")
    model = build_model(tokenizer, args.init).to(device)
    average = build_model(tokenizer, None).to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    torch.manual_seed(1 + ranks.index)
    if args.compile:
        compile_blocks(model)
    trainer = Trainer(args, model, average, shelves, ranks)
    for _ in range(3):  # compilation is no part of the training time
        trainer.loss(low_noise=False).backward()
        model.zero_grad(set_to_none=True)
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, ready")
    trainer.run(log)
    ranks.leave()


if __name__ == "__main__":
    main()
