"""Answer questions about images: one JSON object a line on stdin, one a line on stdout.

python predict.py --model model
{"input": "<base64 of a PNG>"}  ->  {"scores": {"normal": 0.02, "pneumonia": 0.98}}
"""

import argparse
import base64
import io
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from train import build_model, read_pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    labels = json.loads((Path(args.model) / "labels.json").read_text())
    model = build_model(len(labels))
    model.load_state_dict(load_file(str(Path(args.model) / "model.safetensors")))
    model.eval()
    with torch.inference_mode():
        model(torch.zeros(1, 1, 28, 28))  # warm up
        for line in sys.stdin:
            image = Image.open(io.BytesIO(base64.b64decode(json.loads(line)["input"])))
            scores = model(read_pixels(image)[None]).softmax(1)[0].tolist()
            print(json.dumps({"scores": dict(zip(labels, scores, strict=True))}), flush=True)


if __name__ == "__main__":
    main()
