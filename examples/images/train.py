"""Train a small convolutional network on a folder of images: DIR/<label>/*.png -> model.safetensors.

python train.py --data scans --out model
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset


def read_pixels(image):
    """(1, H, W) float32, about -2 to 2."""
    pixels = np.asarray(image.convert("L"), dtype=np.float32) / 255.0
    return torch.from_numpy((pixels - 0.5) / 0.25).unsqueeze(0)


class ImageFolder(Dataset):
    def __init__(self, root):
        self.labels = sorted(entry.name for entry in Path(root).iterdir() if entry.is_dir())
        self.items = [
            (path, index)
            for index, label in enumerate(self.labels)
            for path in sorted((Path(root) / label).glob("*.png"))
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        path, label = self.items[index]
        with Image.open(path) as image:
            return read_pixels(image), label


def build_model(classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


@torch.no_grad()
def momentum_step(parameters, velocity, lr, momentum=0.9):
    """Stochastic gradient descent with momentum; by hand, because importing torch.optim takes a second."""
    for parameter, speed in zip(parameters, velocity, strict=True):
        speed.mul_(momentum).add_(parameter.grad)
        parameter.sub_(lr * speed)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.04)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = ImageFolder(args.data)
    loader = DataLoader(
        data, batch_size=args.batch, shuffle=True, num_workers=args.workers, persistent_workers=args.workers > 0
    )
    model = build_model(len(data.labels))
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()]
    counts = torch.bincount(torch.tensor([label for _, label in data.items]))
    weight = len(data) / (len(counts) * counts)  # rare labels count as much as frequent ones
    for epoch in range(1, args.epochs + 1):
        total = correct = 0
        loss_sum = 0.0
        for step, (images, labels) in enumerate(loader, 1):
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels, weight)
            model.zero_grad()
            loss.backward()
            momentum_step(model.parameters(), velocity, args.lr)
            loss_sum += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
            total += len(labels)
            if step % 10 == 0 or step == len(loader):
                print(
                    f"epoch {epoch}/{args.epochs} step {step}/{len(loader)} loss {loss_sum / total:.4f} accuracy {correct / total:.4f}",
                    flush=True,
                )

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), str(out / "model.safetensors"))
    (out / "labels.json").write_text(json.dumps(data.labels))


if __name__ == "__main__":
    main()
