"""Train the embedded pair (`make tiny`): the teacher of stage 1 and the student base of stage 2, from recorded recipes.

Both start as autoregressive models, since masked prediction from scratch sits for long on the unigram plateau, and are
then converted to diffusion with continued training, the route of the paper's own models: the teacher to bidirectional
attention, the student to block diffusion over [x_t, x_0]. Matrices learn with Muon (in float32: CPUs without bf16 units
are a hundred times slower in it), embeddings and norms with Adam. Text: the standard library of the running Python
apart from its held-out modules, its tests, and Debian's `python3.11-doc`, `perl-doc` and `git-doc`, each content once.

    python bench/tiny.py tokenizers OUT
    python bench/tiny.py train teacher OUT      # resumes from its last state; about ninety minutes on one core
    python bench/tiny.py train student OUT

Shapes: B rows, L tokens, D hidden, V vocabulary, N masked positions.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from shared.stdlib_corpus import HELD_OUT, documents, library_folder

MASK, END, START, STOP = "<|mask|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an embedded model besides the text: the shape, the schedule and the seed."""

    vocab_size: int
    hidden_size: int
    layers: int
    intermediate_size: int
    heads: int
    kv_heads: int
    block_size: int | None  # None: bidirectional over the whole sequence
    length: int  # tokens in a row
    rows: int  # rows in a step
    autoregressive_steps: int
    diffusion_steps: int
    decay_share: float  # share of the diffusion steps, at their end, in which the learning rate falls to 0
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    seed: int = 20260424


RECIPES = {
    "teacher": Recipe(8192, 256, 5, 480, 8, 4, None, 256, 20, 600, 1100, 0.5),
    "student": Recipe(4096, 192, 3, 384, 6, 2, 32, 256, 16, 450, 600, 0.4),
}
# How often each kind of text is drawn, whatever its size.
MIXTURE = {"library": 0.58, "tests": 0.14, "python-doc": 0.18, "perl-doc": 0.05, "git-doc": 0.05}


def training_text() -> dict[str, list[str]]:
    """Kind of text -> its files' contents. Held-out modules, their tests and their pages are left out."""
    held_names = HELD_OUT | {f"test_{name}" for name in HELD_OUT}
    library = library_folder()
    found: dict[str, list[Path]] = {
        "tests": sorted((library / "test").rglob("*.py")),
        "python-doc": [
            Path(p) for p in sorted(glob.glob("/usr/share/doc/python3.11/html/_sources/**/*.txt", recursive=True))
        ],
        "perl-doc": [Path(p) for p in sorted(glob.glob("/usr/share/perl/**/*.pod", recursive=True))],
        "git-doc": [Path(p) for p in sorted(glob.glob("/usr/share/doc/git*/**/*.txt*", recursive=True))],
    }
    seen: set[bytes] = set()
    text: dict[str, list[str]] = {"library": [t for _, t in documents(held_out=False)]}
    for kind, paths in found.items():
        kept = []
        for path in paths:
            stems = {part.split(".")[0] for part in path.parts}
            if held_names & stems or not path.is_file():
                continue
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            digest = hashlib.sha256(raw).digest()
            if digest in seen:
                continue
            seen.add(digest)
            try:
                kept.append(raw.decode("utf-8"))
            except UnicodeDecodeError:
                continue
        text[kind] = kept
    return text


def train_tokenizers(out: Path) -> None:
    """Byte-level BPE for both: different sizes and different splitting rules, so that their chunks differ as real ones do."""
    text = training_text()
    for name, splitter in (
        (
            "teacher",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        ),
        ("student", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)),
    ):
        parts = (
            text["library"] * 2 + text["tests"][::4] + text["python-doc"] + text["perl-doc"][::3] + text["git-doc"][::3]
        )
        fast = byte_level_bpe(RECIPES[name].vocab_size, parts, splitter)
        fast.save_pretrained(out / name)
        sample = "".join(text["library"][:200])
        print(f"{name}: {len(fast)} tokens, {len(sample.encode()) / len(fast(sample).input_ids):.2f} bytes per token")


def byte_level_bpe(size: int, texts: list[str], splitter: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens, the special ones of the embedded pair among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, MASK, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, mask_token=MASK, chat_template=CHATML
    )


def token_streams(tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """Kind of text -> its ids in one array, files parted by the end token."""
    streams = {}
    for kind, texts in training_text().items():
        rows = tokenizer(texts).input_ids if texts else []
        streams[kind] = np.concatenate([np.array([*row, tokenizer.eos_token_id], np.uint16) for row in rows])
    return streams


def windows(streams: dict[str, np.ndarray], recipe: Recipe, step: int) -> torch.Tensor:
    """ids_BL of one step; a function of the seed and the step alone, so that a restart repeats nothing."""
    rng = np.random.default_rng([recipe.seed, step])
    kinds = list(streams)
    shares = np.array([MIXTURE[k] for k in kinds])
    rows = []
    for kind in rng.choice(len(kinds), size=recipe.rows, p=shares / shares.sum()):
        stream = streams[kinds[kind]]
        start = rng.integers(0, len(stream) - recipe.length)
        rows.append(stream[start : start + recipe.length])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def masks(ids_BL: torch.Tensor, end: int, recipe: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(masked_BL, timestep_B): stratified timesteps; neighbouring tokens join into chunks that are masked together."""
    rng = np.random.default_rng([recipe.seed, step, 1])
    rows, length = ids_BL.shape
    timestep_B = 0.02 + 0.98 * (rng.permutation(rows) + rng.random(rows)) / rows
    chunk_BL = np.cumsum(rng.random((rows, length)) < 0.7, axis=1)
    uniform_BL = np.take_along_axis(rng.random((rows, length + 1)), chunk_BL, axis=1)
    masked_BL = torch.from_numpy(uniform_BL < timestep_B[:, None]) & (ids_BL != end)
    return masked_BL, torch.from_numpy(timestep_B).float()


class Muon:
    """Muon for the hidden matrices (momentum, then Newton-Schulz orthogonalisation, in float32), Adam for the rest."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        named = dict(model.named_parameters())
        self.matrices = {n: p for n, p in named.items() if p.ndim == 2 and "embed" not in n}
        self.others = {n: p for n, p in named.items() if n not in self.matrices}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.adam = torch.optim.AdamW(
            self.others.values(), lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.adam_lr * factor
        self.adam.step()
        by_shape: dict[torch.Size, list[str]] = {}
        for name, parameter in self.matrices.items():
            by_shape.setdefault(parameter.shape, []).append(name)
        for shape, names in by_shape.items():
            updates = []
            for name in names:
                gradient = self.matrices[name].grad
                self.momentum[name].lerp_(gradient, 0.05)
                updates.append(gradient.lerp(self.momentum[name], 0.95))
            rate = self.recipe.muon_lr * factor * max(1.0, shape[0] / shape[1]) ** 0.5
            for name, update in zip(names, orthogonalise(torch.stack(updates)), strict=True):
                self.matrices[name].mul_(1 - 0.1 * self.recipe.muon_lr * factor).add_(update, alpha=-rate)

    def state(self) -> dict[str, torch.Tensor]:
        state = {f"momentum.{n}": m for n, m in self.momentum.items()}
        for name, parameter in self.others.items():
            for key, value in self.adam.state.get(parameter, {}).items():
                state[f"adam.{key}.{name}"] = torch.as_tensor(value)
        return state

    def load(self, state: dict[str, torch.Tensor]) -> None:
        for name in self.momentum:
            self.momentum[name].copy_(state[f"momentum.{name}"])
        for name, parameter in self.others.items():
            self.adam.state[parameter] = {
                k: state[f"adam.{k}.{name}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")
            }


def orthogonalise(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, by five quintic Newton-Schulz steps (Jordan et al., 2024)."""
    x = stack.mT if stack.shape[-2] > stack.shape[-1] else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if stack.shape[-2] > stack.shape[-1] else x


def block_diffusion_bias(length: int, block: int) -> torch.Tensor:
    """Additive mask [2L, 2L] over [x_t, x_0]: own block and half; x_t sees x_0 of earlier blocks; x_0 block-causal."""
    index = torch.arange(2 * length)
    clean = index >= length
    block_of = (index % length) // block
    same_half = clean[:, None] == clean[None, :]
    seen = (same_half & (block_of[:, None] == block_of[None, :])) | (
        clean[None, :] & (block_of[:, None] > block_of[None, :])
    )
    return torch.zeros(2 * length, 2 * length).masked_fill(~seen, float("-inf"))[None, None]


def build(recipe: Recipe, end: int, length_limit: int) -> Qwen3ForCausalLM:
    torch.manual_seed(recipe.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            intermediate_size=recipe.intermediate_size,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=32,
            max_position_embeddings=length_limit,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def schedule(recipe: Recipe, step: int) -> float:
    """Learning-rate factor: warm-up over 60 steps, constant, then linear to 0 at the end of the diffusion steps."""
    last = recipe.autoregressive_steps + recipe.diffusion_steps
    decay = int(recipe.diffusion_steps * recipe.decay_share)
    return min(1.0, (step + 1) / 60, max(0.0, (last - step) / decay))


@torch.compile(dynamic=True)
def head_loss(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per position, in nats."""
    return F.cross_entropy(hidden_ND @ weight_VD.T, target_N, reduction="none")


def losses(
    model: Qwen3ForCausalLM, recipe: Recipe, ids_BL: torch.Tensor, step: int, mask_id: int, end: int, bias: torch.Tensor
) -> torch.Tensor:
    weight_VD = model.get_input_embeddings().weight
    if step < recipe.autoregressive_steps:
        hidden_BLD = model.model(input_ids=ids_BL).last_hidden_state
        return head_loss(hidden_BLD[:, :-1].flatten(0, 1), weight_VD, ids_BL[:, 1:].flatten()).mean()
    masked_BL, timestep_B = masks(ids_BL, end, recipe, step)
    noisy_BL = ids_BL.masked_fill(masked_BL, mask_id)
    length = ids_BL.shape[1]
    position_L = torch.arange(length)
    if recipe.block_size is None:
        hidden_BLD = model.model(
            input_ids=noisy_BL, attention_mask=bias, position_ids=position_L[None]
        ).last_hidden_state
    else:
        hidden_BLD = model.model(
            input_ids=torch.cat([noisy_BL, ids_BL], 1), attention_mask=bias, position_ids=position_L.repeat(2)[None]
        ).last_hidden_state[:, :length]
    loss_N = head_loss(hidden_BLD[masked_BL], weight_VD, ids_BL[masked_BL])
    weight_N = timestep_B.clamp(min=0.15).reciprocal()[:, None].expand_as(masked_BL)[masked_BL]
    return (loss_N * weight_N).sum() / weight_N.sum()


def train(name: str, out: Path, save_every: int = 100) -> None:
    recipe = RECIPES[name]
    folder = out / name
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    streams = token_streams(tokenizer)
    print({k: len(v) for k, v in streams.items()}, flush=True)
    end, mask_id = tokenizer.eos_token_id, tokenizer.mask_token_id
    model = build(recipe, end, 1024)
    optimiser = Muon(model, recipe)
    bias = (
        torch.zeros(1, 1, 1, 1).expand(1, 1, recipe.length, recipe.length)
        if recipe.block_size is None
        else block_diffusion_bias(recipe.length, recipe.block_size)
    )
    state_file, first = folder / "state.safetensors", 0
    if state_file.exists():
        state = load_file(state_file)
        first = int(state.pop("step"))
        model.load_state_dict(
            {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}, strict=False
        )
        optimiser.load(state)
        print(f"resuming at step {first}", flush=True)
    model.model = torch.compile(model.model)
    total, begun, recent = recipe.autoregressive_steps + recipe.diffusion_steps, time.time(), []
    for step in range(first, total):
        ids_BL = windows(streams, recipe, step)
        loss = losses(model, recipe, ids_BL, step, mask_id, end, bias)
        model.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step(schedule(recipe, step))
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise SystemExit(f"loss became {recent[-1]} at step {step}")
        if step % 20 == 19:
            print(
                json.dumps(
                    {
                        "step": step + 1,
                        "loss": round(sum(recent[-20:]) / 20, 4),
                        "s_per_step": round((time.time() - begun) / (step + 1 - first), 3),
                    }
                ),
                flush=True,
            )
        if step % save_every == save_every - 1 or step + 1 == total:
            state = {
                f"model.{n.replace('_orig_mod.', '')}": p.detach() for n, p in model.named_parameters()
            } | optimiser.state()
            save_file(
                {**{k: v.contiguous() for k, v in state.items()}, "step": torch.tensor(step + 1)}, folder / "state.tmp"
            )
            (folder / "state.tmp").replace(state_file)
    model.model = model.model._orig_mod
    model.half().save_pretrained(folder / "final")
    tokenizer.save_pretrained(folder / "final")
    (folder / "final" / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
    if recipe.block_size is not None:
        metadata = {"format": 1, "block_size": recipe.block_size, "mask_token": MASK}
        (folder / "final" / "tidecache.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["tokenizers", "train"])
    parser.add_argument("arguments", nargs="+")
    arguments = parser.parse_args()
    if arguments.action == "tokenizers":
        train_tokenizers(Path(arguments.arguments[0]))
    else:
        train(arguments.arguments[0], Path(arguments.arguments[1]))
