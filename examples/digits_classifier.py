# %% [markdown]
# # The line scan in a network of your own
#
# `gspn2_scan` is an ordinary differentiable operator: here it mixes the pixels of scikit-learn's handwritten digits
# (8 x 8) in a small classifier, beside the same classifier with softmax attention. Same width, depth, optimiser and
# seeds; only the mixer differs.
#
# `python examples/digits_classifier.py`, or open it as a notebook (percent format). Needs `pip install scikit-learn`.

# %%
import argparse
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from gspn2_diffusion import GSPN2Config
from gspn2_diffusion.layers import GSPN2Layer

# %% [markdown]
# ## Two mixers with one signature
#
# `GSPN2Layer` does projection, gates and four scans; a mixer needs an output projection after it. Attention gets the
# textbook treatment.


# %%
class Scan(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = GSPN2Layer(channels, channels, GSPN2Config(proxy_dim=0.25))
        self.out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        return self.out(self.mix(tokens, height, width))


class SoftmaxAttention(nn.Module):
    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        return self.mix(tokens, tokens, tokens, need_weights=False)[0]


# %% [markdown]
# ## A classifier around them
#
# Attention does not know where a pixel is, so both networks get a learned position.


# %%
class Classifier(nn.Module):
    def __init__(self, mixer: type[nn.Module], side: int, channels: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(1, channels)
        self.position = nn.Parameter(torch.randn(side * side, channels))
        self.mixers = nn.ModuleList(mixer(channels) for _ in range(depth))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2 * depth))
        self.head = nn.Linear(side * side * channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[1:]
        tokens = self.embed(images.flatten(1)[..., None]) + self.position
        for index, (mixer, feed_forward) in enumerate(zip(self.mixers, self.feed_forwards, strict=True)):
            tokens = tokens + mixer(self.norms[2 * index](tokens), height, width)
            tokens = tokens + feed_forward(self.norms[2 * index + 1](tokens))
        return self.head(tokens.flatten(1))


# %% [markdown]
# ## Train and compare


# %%
def train(mixer: type[nn.Module], data: list[Tensor], epochs: int, seed: int) -> tuple[float, float]:
    """Test accuracy, and seconds of processor time of training."""
    train_images, test_images, train_labels, test_labels = data
    torch.manual_seed(seed)
    model = Classifier(mixer, side=train_images.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    steps = epochs * -(-len(train_images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    started = time.process_time()
    for _ in range(epochs):
        for batch in torch.randperm(len(train_images)).split(64):
            loss = F.cross_entropy(model(train_images[batch]), train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.process_time() - started
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    return accuracy, seconds


# %%
def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Digits with the line scan and with attention as mixer.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    args, _ = parser.parse_known_args()  # a notebook has arguments of its own
    torch.set_num_threads(1)  # maps this small are no work to share
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    data = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    best: dict[str, float] = {}
    for mixer in (Scan, SoftmaxAttention):
        parameters = sum(parameter.numel() for parameter in Classifier(mixer, 8).parameters())
        for seed in range(args.seeds):
            accuracy, seconds = train(mixer, data, args.epochs, seed)
            best[mixer.__name__] = max(accuracy, best.get(mixer.__name__, 0))
            print(f"{mixer.__name__:>16}, seed {seed}: {accuracy:.1%} right, {seconds:.1f} s, {parameters} parameters")
    return best


if __name__ == "__main__":
    best = main()
