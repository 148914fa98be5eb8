"""Every option that Transformers brings along: what it does here, or that it is rejected or reported as ignored.

A new version of Transformers with another option fails here until the option has a place in these tables.
"""

import json
import logging
import shutil

import pytest
import torch
from helpers import T5
from transformers import GenerationConfig

from errors import InputError
from model.loading import NO_SETTINGS, load_model_and_tokenizer

# The base model's generation settings, of which none may reach an answer

EVALUATION = {"max_new_tokens": 12, "num_beams": 1, "repetition_penalty": 1.0, "do_sample": False, "use_cache": True}
SETTINGS = {  # each with the value that a base's generation_config.json then has
    "max_length": 3, "max_new_tokens": 1, "min_length": 8, "min_new_tokens": 8, "early_stopping": True,
    "max_time": 1e-9, "stop_strings": ["a"], "do_sample": True, "num_beams": 4, "use_mtp": True, "use_cache": False,
    "cache_implementation": "static", "cache_config": {"a": 1}, "max_cache_len": 4, "temperature": 0.1, "top_k": 3,
    "top_p": 0.1, "min_p": 0.9, "top_h": 0.5, "typical_p": 0.1, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1,
    "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0, "length_penalty": -3.0, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[934]], "renormalize_logits": True, "forced_bos_token_id": 7,
    "forced_eos_token_id": 1, "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 50.0],
    "suppress_tokens": list(range(2, 900)), "begin_suppress_tokens": [934], "sequence_bias": [[[7], 50.0]],
    "token_healing": True, "guidance_scale": 3.0, "watermarking_config": {"bias": 9.0}, "num_return_sequences": 2,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True,
    "return_dict_in_generate": True, "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.9, "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2, "assistant_early_exit": 1, "assistant_lookbehind": 3, "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5, "speculation_type": "a", "compile_config": {"mode": "a"},
    "disable_compile": True, "continuous_batching_config": {"a": 1}, "low_memory": True, "penalty_alpha": 0.6,
    "dola_layers": "low", "diversity_penalty": 1.0, "num_beam_groups": 2, "constraints": [1], "force_words_ids": [[7]],
    "prefill_chunk_size": 1,
}  # fmt: skip
TOKENS = {"bos_token_id": 9, "eos_token_id": [1, 9], "pad_token_id": 9, "decoder_start_token_id": 9}
NOT_LOADED = ("num_return_sequences", "compile_config")  # with these values Transformers itself loads no model
WITH_EFFECT = ("min_length", "min_new_tokens", "max_time", "forced_bos_token_id", "encoder_no_repeat_ngram_size",
               "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")


def t5_with(folder, file: str, **settings):
    """A copy of the tiny T5 with these settings in one of its files."""
    shutil.copytree(T5, folder)
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    content = json.loads((T5 / file).read_text(encoding="utf-8")) | settings
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plain():
    return load_model_and_tokenizer(str(T5))


def answers(loaded, **changes) -> torch.Tensor:
    prompts = loaded.tokenizer(["What is it about? Company, Film\nA film.\nAnswer:", "Good or Bad?"], padding=True,
                               return_tensors="pt")  # fmt: skip
    return loaded.model.generate(**prompts, **EVALUATION | changes)


def test_the_table_has_every_generation_setting():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert set(SETTINGS | TOKENS) == fields and set(TOKENS) <= set(NO_SETTINGS)


CASES = [("generation_config.json", name) for name in SETTINGS | TOKENS] + [("config.json", name) for name in SETTINGS]


@pytest.mark.parametrize("file, name", CASES)
def test_a_generation_setting_of_the_base_changes_no_answer(file, name, plain, tmp_path, caplog):
    folder = t5_with(tmp_path / "t5", file, **{name: (SETTINGS | TOKENS)[name]})
    if name in NOT_LOADED:
        with pytest.raises(InputError, match=f"the model cannot be loaded: .*{name}"):
            load_model_and_tokenizer(str(folder))
        return
    with caplog.at_level(logging.INFO, "gorp"):
        loaded = load_model_and_tokenizer(str(folder))
    assert loaded.model.generation_config.to_dict() == plain.model.generation_config.to_dict()
    assert torch.equal(answers(loaded), answers(plain))
    if file == "generation_config.json" and name in SETTINGS:
        assert f"t5: its generation settings are ignored: {name} " in caplog.text


@pytest.mark.parametrize("name", WITH_EFFECT)
def test_the_setting_would_change_answers(name, plain):
    assert not torch.equal(answers(plain, **{name: SETTINGS[name]}), answers(plain))
