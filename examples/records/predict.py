"""Answer questions about records: one JSON object a line on stdin, one a line on stdout.

python predict.py --model model
{"input": "<base64 of a JSON object {column: value}>"}  ->  {"scores": {"benign": 0.9, "malignant": 0.1}}
"""

import argparse
import base64
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from train import build_model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    labels = json.loads((Path(args.model) / "labels.json").read_text())
    columns = json.loads((Path(args.model) / "columns.json").read_text())
    model = build_model(len(columns), len(labels))
    model.load_state_dict(load_file(str(Path(args.model) / "model.safetensors")))
    model.eval()
    with torch.inference_mode():
        for line in sys.stdin:
            record = json.loads(base64.b64decode(json.loads(line)["input"]))
            scores = model(torch.tensor([[float(record[name]) for name in columns]])).softmax(1)[0].tolist()
            print(json.dumps({"scores": dict(zip(labels, scores, strict=True))}), flush=True)


if __name__ == "__main__":
    main()
