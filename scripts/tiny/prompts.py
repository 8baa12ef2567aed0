"""Write the tiny study's prompts, with what each says as attributes: `python -m scripts.tiny.prompts`.

They are captions that no training saw, each saying everything, so that what an image should show is known.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from fluxsae.files.whole import write_text
from scripts.tiny.scenes import random_caption


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the prompts of the tiny study.")
    parser.add_argument("--out", type=Path, default=Path("configs/tiny/prompts.jsonl"))
    parser.add_argument("--n", type=int, default=640)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    captions = (random_caption(rng, held_out=True, say_all=True)[1] for _ in range(options.n))
    lines = [json.dumps({"prompt": caption.text, **caption.attributes}) + "\n" for caption in captions]
    write_text(options.out, "".join(lines))


if __name__ == "__main__":
    main()
