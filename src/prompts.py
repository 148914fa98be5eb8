"""The prompts that a model was trained on, saved with it, and the README of an adapter folder.

`prompts.json` has, for each dataset, what stands before a text ("head") and after it ("tail"), and how many tokens a
prompt and an answer may have.
"""

from collections.abc import Iterable
from pathlib import Path

from errors import InputError
from files import read_json, read_object, write_json
from full_rank import FILE_NAME
from uie_dataset_lora import ANSWER_CUE

PROMPTS = "prompts.json"
CARD = """---
base_model: {base}
tags: [gorp, lora, continual-learning]
---

# Adapter after {datasets}

Trained with GORP, method {method}, on {base}. The folder holds {holds}.

In a checkout of GORP, `python src/answer.py FOLDER --dataset {last} --text "..."` queries it, and
`python src/export.py FOLDER --to NEW_FOLDER` makes a plain Transformers model of it. The prompt of {last} is the
following, with a text in place of TEXT; those of other datasets are in `{prompts}`.

```
{head}TEXT{tail}
```
"""


def save_prompts(folder: Path, previous: Path | None, examples: Iterable[dict], collator) -> None:
    """Write the prompts of the previous task's folder and of each dataset among the examples, in the order in which the
    datasets last occur."""
    known = previous is not None and (previous / PROMPTS).exists()
    heads: dict[str, str] = dict(read_prompts(previous)["heads"]) if known else {}
    for example in examples:
        dataset = f"{example['Task']}/{example['Dataset']}"
        heads[dataset] = heads.pop(dataset, collator.parts(example)[0])
    lengths = {name: getattr(collator, name) for name in ("max_source_length", "max_target_length")}
    write_json(folder / PROMPTS, lengths | {"tail": ANSWER_CUE, "heads": heads})


def read_prompts(folder: Path) -> dict:
    """What `save_prompts` wrote."""
    prompts = read_object(folder / PROMPTS)
    if missing := {"heads", "tail", "max_source_length", "max_target_length"} - prompts.keys():
        raise InputError(f"{folder / PROMPTS}: has no {min(missing)!r}")
    return prompts


def save_card(folder: Path, method: str, base: str) -> None:
    """Write README.md in place of PEFT's model card, which is an empty form."""
    prompts = read_prompts(folder)
    last, holds, config = list(prompts["heads"])[-1], [], read_json(folder / "adapter_config.json")
    if config.get("save_loranew"):
        holds.append("the LoRA, with factors `loranew_A` and `loranew_B`, which PEFT alone leaves out")
    elif (folder / "adapter_model.safetensors").exists():
        holds.append("the LoRA of all tasks, their ranks one after the other")
    if (folder / FILE_NAME).exists():
        holds.append(f"in `{FILE_NAME}` the weights of the base model that changed, which PEFT alone leaves out")
    card = CARD.format(base=base, method=method, datasets=", ".join(prompts["heads"]), holds=" and ".join(holds),
                       last=last, head=prompts["heads"][last], tail=prompts["tail"], prompts=PROMPTS)  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
