"""Train a small network on a table: DIR/records.csv with a `label` column -> model.safetensors.

python train.py --data records --out model
"""

import argparse
import csv
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def read_table(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name != "label"]
    values = torch.tensor([[float(row[name]) for name in columns] for row in rows])
    labels = sorted({row["label"] for row in rows})
    targets = torch.tensor([labels.index(row["label"]) for row in rows])
    return columns, values, labels, targets


def build_model(columns, classes):
    return nn.Sequential(
        nn.BatchNorm1d(columns, affine=False), nn.Linear(columns, 32), nn.ReLU(), nn.Linear(32, classes)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    columns, values, labels, targets = read_table(Path(args.data) / "records.csv")
    model = build_model(len(columns), len(labels))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(1, args.epochs + 1):
        order = torch.randperm(len(values))
        correct = 0
        for batch in order.split(32):
            logits = model(values[batch])
            loss = nn.functional.cross_entropy(logits, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            correct += (logits.argmax(1) == targets[batch]).sum().item()
        if epoch % 10 == 0:
            print(
                f"epoch {epoch}/{args.epochs} loss {loss.item():.4f} accuracy {correct / len(values):.4f}", flush=True
            )

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), str(out / "model.safetensors"))
    (out / "labels.json").write_text(json.dumps(labels))
    (out / "columns.json").write_text(json.dumps(columns))


if __name__ == "__main__":
    main()
