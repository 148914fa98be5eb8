"""Arbitrary input: files of any content, any labels and text, weights of any shape.

In the suite some seconds; `GORP_FUZZ=10000` makes so many examples in all (some minutes).
"""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

import full_rank
from arguments import UIETrainingArguments
from command_line import parse_arguments
from errors import InputError
from files import read_json
from helpers import IGNORED, ROOT, byt5, collator, example, gpt2, kept, llama, llama_of_the_hub, merging, t5, text
from loranew import load_loranew
from model.loading import load_model_and_tokenizer
from order_config import SAMPLING, TASK_FILES, TASKS, read_order, read_task_config, write_order
from Proj_torch import ProjAdamW
from Proj_torch.proj_projector import PROJ_TYPES, SIDES, ProjProjector
from Proj_torch.svd import SVD_METHODS
from report.matrix import accuracy_matrix
from subspace import GradientSpace, extend_basis
from uie_dataset_lora import ExampleOptions, prompt_parts, read_examples, read_instructions, read_labels, read_labelled

TOTAL = int(os.environ.get("GORP_FUZZ", "400"))


def share(percent: float):
    """This test's part of all examples."""
    return settings(
        max_examples=max(int(TOTAL * percent / 100), 5), deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


# --- files ---

KEYS = [
    "sentence", "label", "instruction", "instruction_type", "zero-shot", "dataset name", "sampling strategy", "full",
    "dbpedia", "..", *TASKS, "peft_type", "LORA", "r", "r_sum", "target_modules", "lora_alpha", "lora_dropout",
    "init_lora_weights", "exclude_modules", "layers_to_transform", "fan_in_fan_out", "task_type", "output_dir",
    "base_model_name_or_path", "weight_map", "model_type", "t5", "bf16", "zero_optimization", "stage", "enabled",
    "lora_modules", "predict_exact_match_for_a", "-", "A",
]  # fmt: skip
WORDS = st.sampled_from(KEYS) | st.text(max_size=8)  # surrogate halves included
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
                    max_leaves=12)  # fmt: skip
ENTRY = st.fixed_dictionaries({"dataset name": WORDS | SCALARS}, optional={"sampling strategy": st.sampled_from(
    [*SAMPLING, "x", None])})  # fmt: skip
ROW = st.fixed_dictionaries({"sentence": WORDS, "label": st.sampled_from(["A", "B", "-", "", 0])},
                            optional={"id": SCALARS})  # fmt: skip
NEARLY_RIGHT = st.one_of(
    st.lists(ROW | JSON, max_size=4),
    st.lists(WORDS, max_size=4),
    st.dictionaries(st.sampled_from(TASKS), st.lists(ENTRY | JSON, max_size=3) | JSON, max_size=4),
    st.dictionaries(st.sampled_from(TASKS), st.lists(st.fixed_dictionaries(
        {"instruction_type": st.sampled_from(["zero-shot", "few-shot"]), "instruction": WORDS | JSON})), max_size=3),
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5),
)  # fmt: skip
CONTENT = st.one_of(
    JSON.map(json.dumps).map(str.encode),
    NEARLY_RIGHT.map(json.dumps).map(str.encode),
    st.binary(max_size=60),
    st.tuples(NEARLY_RIGHT.map(json.dumps).map(str.encode), st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]]),
    st.text("[{\"a\":1,nulltrue}]\\ud8 ", max_size=40).map(lambda drawn: drawn.encode()),
)
READERS = {
    "read_json": read_json,
    "read_task_config": read_task_config,
    "read_labels": read_labels,
    "read_labelled": lambda path: read_labelled(path, ["A", "B"]),
    "read_instructions": read_instructions,
    "check_deepspeed": lambda path: UIETrainingArguments(use_cpu=True).check_deepspeed(str(path)),
    "parse_arguments": lambda path: parse_arguments([str(path)]),
}


@pytest.mark.parametrize("reader", READERS)
@share(4)
@given(content=CONTENT)
def test_a_file_of_any_content_is_read_or_refused(tmp_path, reader, content):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    try:
        READERS[reader](path)
    except InputError as error:
        assert str(error).isprintable()


@share(4)
@given(name=st.sampled_from(TASK_FILES), content=CONTENT)
def test_an_order_with_any_file_is_read_or_refused(tmp_path, name, content):
    order = tmp_path / "mine_configs"
    write_order(order, [("TC", "dbpedia"), ("SC", "amazon")], overwrite=True)
    (order / "amazon" / name).write_bytes(content)
    try:
        read_order(order)
    except InputError:
        pass


def put_model(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for path in (ROOT / "initial_model" / "tiny-t5").iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return folder


@share(4)
@given(name=st.sampled_from(["config.json", "model.safetensors.index.json", "model.safetensors",
                             "generation_config.json"]), content=CONTENT)  # fmt: skip
def test_a_model_with_any_file_is_loaded_or_refused(tmp_path, name, content):
    folder = put_model(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    try:
        load_model_and_tokenizer(str(folder), weights=False)
    except InputError:
        pass
    (folder / name).unlink()


VALUES = st.sampled_from([0.0, 1.0, float("nan"), float("inf")])
TENSORS = st.dictionaries(
    st.sampled_from(["q.weight", "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight", "stray", ""]),
    st.builds(
        lambda shape, value, dtype: torch.full(shape, value).nan_to_num().to(dtype) if not dtype.is_floating_point
        else torch.full(shape, value).to(dtype),
        st.lists(st.integers(0, 5), max_size=3),
        VALUES,
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool]),
    ),
    max_size=4,
)
METADATA = st.none() | st.dictionaries(st.sampled_from(["format", "version", "side", "energy"]),
    st.sampled_from(["gorp-gradient-space", "1", "output", "0.9", "pt", "", "x"]), max_size=5)  # fmt: skip
FITS = {"base_model.model.q.lora_A.weight": torch.ones(2, 4), "base_model.model.q.lora_B.weight": torch.ones(5, 2)}
SAFETENSORS = st.one_of(
    st.just(save(FITS)),
    st.builds(lambda tensors, metadata: save(FITS | tensors, metadata), TENSORS, METADATA),
    st.builds(lambda tensors, metadata: save(tensors, metadata), TENSORS, METADATA),
    st.builds(lambda tensors, end: save(tensors)[:end], TENSORS, st.integers(0, 300)),
    st.binary(max_size=80),
    st.builds(lambda header: len(header).to_bytes(8, "little") + header, CONTENT),
)


class OneLayer(nn.Module):
    """The smallest model that an adapter of `q` fits."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 5)
        self.config = {}


@share(4)
@given(content=SAFETENSORS, config=st.none() | JSON | st.dictionaries(st.sampled_from(KEYS), SCALARS, max_size=5))
def test_an_adapter_of_any_content_is_loaded_or_refused(tmp_path, content, config):
    adapter = {"peft_type": "LORA", "r": 2, "r_sum": 2, "target_modules": "q"}
    if config is not None:
        adapter = adapter | config if isinstance(config, dict) else config
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    for name in ("adapter_model", "full_rank_weights", "gradient_space"):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    for read in (lambda: load_loranew(OneLayer(), tmp_path), lambda: full_rank.load_weights(OneLayer(), tmp_path),
                 lambda: GradientSpace().load(tmp_path / "gradient_space.safetensors", {})):  # fmt: skip
        try:
            read()
        except InputError:
            pass


@share(4)
@given(content=CONTENT)
def test_results_of_any_content_are_reported_or_refused(tmp_path, content):
    folder = tmp_path / "outputs" / "1-a"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predict_results.json").write_bytes(content)
    try:
        accuracy_matrix(tmp_path)
    except InputError:
        pass


# --- prompts and batches ---

CHARACTERS = st.characters(exclude_categories=["Cs"])
ANY_TEXT = st.text(CHARACTERS, min_size=1, max_size=200).filter(str.strip)
ODD = st.sampled_from(["</s>", "<s>", "<unk>", "<pad>", "<|endoftext|>", "\nAnswer:", "Answer: A", "Option: a, b \n",
                       " ", "\n", "\0", "\u202e", "{0}", "%s", "\u2581", "\u0120", "<0x0A>", "A"])  # fmt: skip
SENTENCES = st.lists(ODD | ANY_TEXT, min_size=1, max_size=6).map("".join).filter(str.strip)
LABELS = (st.lists(ODD | st.text(CHARACTERS, min_size=1, max_size=20), min_size=1, max_size=3).map("".join)
          .filter(str.strip))  # fmt: skip
KINDS = [(t5, False), (byt5, False), (llama, True), (llama_of_the_hub, True), (gpt2, True), (merging, True)]
LOSSLESS = {byt5, gpt2, merging}


def prompt_ids(batch: dict, index: int, *, answer_in_input: bool) -> list[int]:
    """What the model reads of a row before its answer."""
    mask = batch["attention_mask"][index].bool()
    if answer_in_input:
        mask &= batch["labels"][index] == IGNORED
    return kept(batch["input_ids"][index], mask)


@pytest.mark.parametrize("build, decoder_only", KINDS)
@share(5)
@given(sentence=SENTENCES, times=st.sampled_from([1, 20]), label=LABELS, other=LABELS, limit=st.integers(120, 260),
       shown=st.booleans())  # fmt: skip
def test_the_answer_is_whole_and_the_prompt_does_not_know_it(
    tokenizers, build, decoder_only, sentence, times, label, other, limit, shown  # noqa: F811
):
    tokenizer = tokenizers[build]
    collate = collator(tokenizer, decoder_only, max_source_length=limit, max_target_length=150)
    sentence *= times  # often longer than the limit
    rows = [example(sentence, label), example(sentence, other), example("x", "A")]
    if shown:
        rows = [row | {"Samples": [{"sentence": "shown", "label": "B"}]} for row in rows]
    try:
        collate.check(rows)
    except InputError as refused:
        # Of all that may stand in a label, only these are no good: its length, with T5's tokenizer a special token, and
        # characters that the tokenizer does not write back.
        assert ("--max_target_length" in str(refused) or build is t5 and " spells " in str(refused)
                or build not in LOSSLESS and " becomes " in str(refused))  # fmt: skip
        return
    batch = collate(rows)
    for index, row in enumerate(rows):
        [answer] = collate._answers([row])
        labels = batch["labels"][index]
        assert labels[labels != IGNORED].tolist() == answer
        assert answer[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in answer[:-1]
        assert len(answer) > 1
        prompt = prompt_ids(batch, index, answer_in_input=decoder_only)
        assert len(prompt) <= limit
        if decoder_only:
            assert kept(batch["input_ids"][index], batch["attention_mask"][index]) == prompt + answer
            assert batch["attention_mask"][index, -1] == 1
        if build in LOSSLESS:
            assert text(tokenizer, answer).removeprefix(" " if decoder_only else "") == row["Instance"]["label"]
            assert text(tokenizer, prompt).endswith("\nAnswer:")
    trained = [prompt_ids(batch, index, answer_in_input=decoder_only) for index in range(len(rows))]
    tested = collate([row | {"subset": "test"} for row in rows])
    assert [prompt_ids(tested, index, answer_in_input=False) for index in range(len(rows))] == trained
    assert trained[0] == trained[1]


@share(6)
@given(
    labels=st.lists(LABELS, min_size=1, max_size=5),
    sentences=st.lists(SENTENCES, min_size=1, max_size=4),
    instruction=SENTENCES,
    shown=st.integers(0, 2),
)
def test_a_dataset_of_any_text_gives_its_prompts_or_is_refused(tmp_path, labels, sentences, instruction, shown):
    rows = [{"sentence": sentence, "label": labels[index % len(labels)]} for index, sentence in enumerate(sentences)]
    folder = tmp_path / "benchmark" / "TC" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "dev", "test"):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "labels.json").write_text(json.dumps(labels))
    write_order(tmp_path / "mine_configs", [("TC", "mine")], overwrite=True)
    entries = [{"instruction_type": kind, "instruction": instruction} for kind in ("zero-shot", "few-shot")]
    (tmp_path / "instructions.json").write_text(json.dumps({"TC": entries}))
    try:
        options = ExampleOptions(tmp_path / "benchmark", tmp_path / "instructions.json", num_examples=shown,
                                 max_num_instances_per_task=-1, max_num_instances_per_eval_task=-1)  # fmt: skip
        examples = list(read_examples([tmp_path / "mine_configs" / "mine"], options))
    except InputError as error:
        assert "allowed:" in str(error) or len(str(error)) >= 2000
        return
    for row in examples:
        head, sentence, tail = prompt_parts(row, add_task_name=True, add_dataset_name=True)
        assert head.startswith("Task:TC\nDataset:mine\n" + instruction)
        assert f"Option: {', '.join(labels)} \n" in head and tail == "\nAnswer:"
        assert sentence in sentences and len(row["Samples"]) == shown
        other = row | {"Instance": row["Instance"] | {"label": "?", "ground_truth": "?"}}
        assert prompt_parts(other, add_task_name=True, add_dataset_name=True) == (head, sentence, tail)


# --- projections ---


def laid_out(G: torch.Tensor, layout: str) -> torch.Tensor:
    """G with its values in another order of memory."""
    if layout == "transposed":
        return G.T.contiguous().T
    if layout == "strided":
        wide = torch.zeros(2 * G.shape[0], 3 * G.shape[1], dtype=G.dtype)
        wide[::2, ::3] = G
        return wide[::2, ::3]
    return G[:1].expand_as(G) if layout == "expanded" else G


def assert_orthonormal(basis: torch.Tensor) -> None:
    torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-5, rtol=0)


SIZES = st.sampled_from([1, 1, 2, 3, 5, 8, 13])
MATRICES = st.fixed_dictionaries({
    "rows": SIZES, "columns": SIZES, "rank": st.integers(0, 14), "proj_type": st.sampled_from(PROJ_TYPES),
    "svd": st.sampled_from(SVD_METHODS),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    "layout": st.sampled_from(["plain", "transposed", "strided", "expanded"]),
    "scale": st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4, 1e30]),
    "seed": st.integers(0, 1000),
})  # fmt: skip


def matrix(case: dict) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case["seed"])
    G = torch.randn(case["rows"], case["columns"], generator=generator) * case["scale"]
    return laid_out(G.to(case["dtype"]), case["layout"])


@share(12)
@given(case=MATRICES)
def test_any_matrix_is_projected_or_its_rank_refused(case):
    G = matrix(case)
    before = G.clone()
    projector = ProjProjector(case["rank"], proj_type=case["proj_type"], svd=case["svd"])
    if not 1 <= case["rank"] <= min(G.shape):
        with pytest.raises(InputError, match="allowed: 1 to"):
            projector.refresh(G)
        return
    projector.refresh(G)
    assert torch.equal(G, before) or not before.isfinite().all()
    back = projector.project_back(projector.project(G))
    assert back.dtype == (torch.float64 if case["dtype"] == torch.float64 else torch.float32) and back.shape == G.shape
    if not G.isfinite().all():
        return
    for basis in projector.bases:
        if basis is not None:
            assert_orthonormal(basis)
    unit = G.double() / max(G.double().abs().max().item(), 1e-300)
    best = torch.linalg.svdvals(unit)[: case["rank"]].square().sum()
    held = (back.double() / max(G.double().abs().max().item(), 1e-300)).square().sum()
    assert held >= 0.98 * best - 1e-6 and held <= unit.square().sum() * (1 + 1e-3) + 1e-6


@share(6)
@given(case=MATRICES, side=st.sampled_from(SIDES), space=st.integers(0, 13), steps=st.integers(1, 3),
       protect=st.sampled_from(["gp_first", "gp_second", "orthogonal"]))  # fmt: skip
def test_a_step_of_any_weight_is_finite_and_stays_out_of_the_space(case, side, space, steps, protect):
    assume((protect, case["proj_type"]) != ("gp_second", "full"))  # refused
    case = case | {"rank": 1 + case["rank"] % min(case["rows"], case["columns"]), "scale": min(case["scale"], 1e4)}
    size = case["rows"] if side == "output" else case["columns"]
    S = torch.linalg.qr(torch.randn(size, min(space, size), generator=torch.Generator().manual_seed(1))).Q
    weight = nn.Parameter(torch.zeros(case["rows"], case["columns"]))
    optimizer = ProjAdamW([{
        "params": [weight], "rank": case["rank"], "update_proj_gap": 2, "scale": 1.0, "proj_type": case["proj_type"],
        "svd": case["svd"], "scale_mats": [S], "protect_side": side, protect: True}], lr=1.0)  # fmt: skip
    for step in range(steps):
        weight.grad = matrix(case | {"seed": case["seed"] + step, "dtype": torch.float32})
        optimizer.step()
    assert weight.isfinite().all()
    inside = S.T @ weight if side == "output" else weight @ S
    if protect == "orthogonal":
        assert inside.abs().max().item() <= 1e-4 * steps if inside.numel() else True


@share(4)
@given(case=MATRICES, energy=st.floats(0.01, 1), held=st.integers(0, 5))
def test_a_space_of_any_moment_is_a_basis_that_holds_its_energy(case, energy, held):
    M = matrix(case)
    assume(M.isfinite().all())
    S = torch.linalg.qr(torch.randn(len(M), min(held, len(M)), generator=torch.Generator().manual_seed(2))).Q
    T = extend_basis(S, M, energy)
    assert_orthonormal(T)
    assert torch.equal(T[:, : S.shape[1]], S.to(T)) and T.shape[1] <= len(M)
    unit = M.to(T) / M.to(T).abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    assert (T.mT @ unit).double().square().sum() >= (energy - 1e-4) * unit.double().square().sum() - 1e-6
