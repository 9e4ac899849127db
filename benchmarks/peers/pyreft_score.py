"""Train with pyreft, and score its forward pass on held-out rows: `pyreft_score.py JOB.json`. The job is that of
`pyreft_train.py` with positions `l1`, and names `seeds` and `test`: rows as in `peft_score.py`.
"""

import json
import sys
from pathlib import Path

import torch
from pyreft_train import load, train
from torch.nn.functional import cross_entropy


@torch.no_grad()
def scores(reft, rows, layers):
    loss = tokens = exact = 0
    for row in rows:
        ids, n_prompt = torch.tensor([row["ids"]]), row["n_prompt"]
        base = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        _, output = reft(base, unit_locations={"sources->base": (None, [[[n_prompt - 1]]] * len(layers))})
        logits, answer = output.logits[0, n_prompt - 1 : -1], ids[0, n_prompt:]
        loss += float(cross_entropy(logits, answer, reduction="sum"))
        tokens += len(answer)
        exact += int((logits.argmax(dim=-1) == answer).all())
    return {"loss": loss / tokens, "exact_match": exact / len(rows)}


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    _, tokenizer = load(Path(job["model"]))
    for prompt, completion, row in zip(job["prompts"], job["completions"], job["rows"], strict=True):
        # Both sides must train on the same tokens.
        assert tokenizer(prompt + completion)["input_ids"] == row["ids"]
        assert len(tokenizer(prompt)["input_ids"]) == row["n_prompt"]
    for seed in job["seeds"]:
        reft, _ = train(job, seed)
        print("RESULT", json.dumps(scores(reft, job["test"], job["layers"])), flush=True)


if __name__ == "__main__":
    main()
