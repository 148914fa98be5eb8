"""`UIETrainer`: Hugging Face's Seq2SeqTrainer, overridden only where continual learning with GORP differs.

What differs: the method makes the optimizer and adds its penalty, the loss weighs every answer token of a global
batch alike, predictions are the new tokens only and are scored per task and dataset, and checkpoints hold what
trains and nothing else.
"""

from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints

from checkpoints import mark_whole
from compute_metrics import evaluate_predictions
from errors import InputError
from evaluation.generate import Prediction
from files import read_json, whole_file, write_json
from finite import FiniteSteps
from methods import Method
from Proj_torch.sharded_state import start_moments

TRAINABLE_FILE = "trainable.safetensors"
SCHEDULE_FILE = "schedule.json"
REVISITED_ROWS = 64  # that show a method what the layers see once a task is learned


class UIETrainer(Seq2SeqTrainer):
    """Trains one task by one method.

    Args:
        method: prepared method; makes the optimizer, adds the penalty.
        decoder_only: whether the model continues its prompt (LLaMA) or answers from a decoder of its own (T5).
        multilingual: whether ROUGE counts GPT-2's pieces, for text that is not English.
        generation: arguments of `generate` for evaluation and prediction, `max_new_tokens` among them.
    """

    # compute_loss divides by the tokens of the whole global batch, whatever the accumulation.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, method: Method, decoder_only: bool, generation: dict, multilingual: bool = False,
                 **kwargs):
        super().__init__(*args, **kwargs)
        self.method = method
        self.multilingual = multilingual
        self.generation = generation
        # Have the answer tokens of a global batch counted for every model; compute_loss uses the count.
        self.model_accepts_loss_kwargs = True
        self._penalties: list[torch.Tensor] = []
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        self.finite_steps = FiniteSteps(self.args.max_non_finite_steps, watch_gradients=not self.args.fp16)
        if self.is_deepspeed_enabled and not self.args.do_train:
            self._evaluate_without_engine()
        if decoder_only and self.args.label_smoothing_factor:
            raise InputError(
                f"--label_smoothing_factor: found {self.args.label_smoothing_factor}; 0 for a decoder-only model, "
                "whose logits exist only where there is a target"
            )

    def _evaluate_without_engine(self) -> None:
        """Evaluation alone needs no ZeRO engine below stage 3 (where Hugging Face would refuse it)."""
        if self.args.hf_deepspeed_config.is_zero3():
            return
        self.is_deepspeed_enabled = False
        if self.args.bf16 or self.args.fp16:  # as the engine holds the model while it trains
            self.model.to(torch.bfloat16 if self.args.bf16 else torch.float16)

    # Optimizer and loss

    def create_optimizer(self, model=None):
        """The method's optimizer; with it the method's own learning rates per group."""
        if self.optimizer is None:
            args = self.args
            self.optimizer = self.method.create_optimizer(
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            )
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The parent's step, told to the method first: a sharded projection acts within forward and backward."""
        rows = inputs.pop("rows", [])
        self.method.begin_micro_batch(self.accelerator.sync_gradients)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.finite_steps.saw_micro_batch(loss, rows)
        return loss

    def _run_epoch(self, *args, **kwargs):
        """The parent's epoch, unless the last step is in the checkpoint already: the parent would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient's norm, known right before the optimizer steps; a step that is not finite is left out."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.finite_steps.end_of_step(self.state.global_step + 1, norm):
            model.zero_grad()
        return norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross entropy per answer token, plus the method's penalty once an optimizer step.

        The model returns the mean over its own rows. Where the Trainer has counted the answer tokens of the global
        batch (all micro-batches, all ranks), the mean is turned into this batch's share of the global one, so that
        neither accumulation nor the number of ranks changes the gradient. (Hugging Face leaves that to the model,
        and T5's forward does not do it.)
        """
        outputs = model(**inputs, use_cache=False)  # keys and values would be copied for a generation that never comes
        loss = outputs.loss
        if self.label_smoother is not None:
            loss = self.label_smoother(outputs, inputs["labels"])
        if self.method.averages_micro_batches:
            loss = loss / self.current_gradient_accumulation_steps
        elif num_items_in_batch is not None:
            share = (inputs["labels"] != -100).sum() / num_items_in_batch
            loss = loss * share * self.accelerator.num_processes  # gradients are averaged over ranks afterwards
        if model.training:
            loss = self._add_penalty(loss)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs):
        """The parent's count, but the parameters are counted once, not in every step."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    def _add_penalty(self, loss: torch.Tensor) -> torch.Tensor:
        penalty = self.method.penalty()
        if penalty is None:
            return loss
        self._penalties.append(penalty.detach())
        return loss + penalty / self.current_gradient_accumulation_steps

    def revisited_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of the first training rows, the same on every rank."""
        rows = self.train_dataset.select(range(min(REVISITED_ROWS, len(self.train_dataset))))
        for start in range(0, len(rows), self.args.per_device_train_batch_size):
            examples = [rows[i] for i in range(start, min(start + self.args.per_device_train_batch_size, len(rows)))]
            inputs = self._prepare_inputs(self.data_collator(examples))
            inputs.pop("rows", None)
            yield inputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the loss, which includes it, the mean penalty since the last line."""
        if "loss" in logs and self._penalties:
            logs["penalty"] = torch.stack(self._penalties).mean().item()
            self._penalties.clear()
        super().log(logs, start_time)

    # Evaluation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Every row's prediction as text and its scores per task and dataset, see `evaluation/generate.py`.

        The parent's loop makes the model ready (place, precision, DeepSpeed) and gets no batch to run. The loss of the
        reference answers needs a pass of its own: validation has it, since the best step may be chosen by it, and a
        test where `--predict_loss` asks for it.

        Returns the parent's output with `predictions` as a list of strings, one for each row of the dataset.
        """
        output = super().evaluation_loop(DataLoader([]), description, True, ignore_keys, metric_key_prefix)
        rows, metrics, texts = dataloader.dataset, {}, None
        prediction = self._prediction(rows)
        if metric_key_prefix == "eval" or self.args.predict_loss:
            metrics["loss"] = prediction.loss()
        if not self.args.prediction_loss_only:
            tokens = prediction.answers()
            texts = [text.strip() for text in self.processing_class.batch_decode(tokens, skip_special_tokens=True)]
            metrics |= evaluate_predictions(rows, texts, multilingual=self.multilingual)
            metrics["gen_len"] = (tokens != self.processing_class.pad_token_id).sum(1).float().mean().item()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output._replace(predictions=texts, num_samples=len(rows))

    def _prediction(self, rows) -> Prediction:
        args, collator = self.args, self.data_collator
        return Prediction(
            self.model,
            collator,
            rows,
            self.accelerator,
            self.generation,
            most_rows=args.per_device_eval_batch_size,
            most_tokens=args.eval_batch_tokens or args.per_device_eval_batch_size * collator.max_source_length,
            shares_beginnings=collator.decoder_only and not is_deepspeed_zero3_enabled(),
            show_progress=not args.disable_tqdm and self.is_world_process_zero(),
        )

    # Checkpoints within a task

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint's weights, under DeepSpeed from all ranks."""
        if self._has_own_state():
            self._save(output_dir, self.method.training_state() | self._loss_scale())
        else:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        """The parent's checkpoint, marked once all of it is on the disk; only then may older ones go."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = self._get_output_dir(trial)
            mark_whole(Path(folder) / f"checkpoint-{self.state.global_step}")
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """What trains, by name, or the method's own state. The rest is the base and the adapter before."""
        if not self.args.should_save:
            return
        trained = state_dict or {name: value.detach().cpu().contiguous() for name, value in self._trained().items()}
        with whole_file(Path(output_dir or self.args.output_dir) / TRAINABLE_FILE) as partial:
            safetensors.torch.save_file(trained, partial, metadata={"format": "pt"})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._has_own_state():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:  # DeepSpeed's own checkpoint would be a pickle, and for this number of ranks only
            write_json(Path(output_dir) / SCHEDULE_FILE, self.lr_scheduler.state_dict())

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """The parent's; then the method meets the engine, and its own state is read here."""
        own = self._has_own_state()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if own else resume_from_checkpoint)
        self.method.begin_training(self.model_wrapped if self.is_deepspeed_enabled else None)
        if own:
            self.finite_steps.clean_gradients(self.model)
            if resume_from_checkpoint is not None:
                if self.is_deepspeed_enabled:
                    self._start_moments()
                self._load_own_state(Path(resume_from_checkpoint))
        return prepared

    def _has_own_state(self) -> bool:
        """Whether the method saves and loads what trains, moments included: sharded, or in another form than it has
        in the model."""
        return self.is_deepspeed_enabled or self.method.own_state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self._has_own_state():
            return  # read later, when the optimizer is there
        path = Path(resume_from_checkpoint) / TRAINABLE_FILE
        saved, trained = _read_tensors(path), self._trained()
        if saved.keys() != trained.keys():
            raise InputError(f"{path}: holds other parameters than the {len(trained)} that train in this run")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    def _load_own_state(self, folder: Path) -> None:
        saved = _read_tensors(folder / TRAINABLE_FILE)
        try:
            self.method.load_training_state(saved)
        except (InputError, KeyError) as error:
            path = folder / TRAINABLE_FILE
            raise InputError(f"{path}: not of a run like this one ({error})") from None
        self.lr_scheduler.load_state_dict(read_json(folder / SCHEDULE_FILE))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if "loss_scale" in saved:
            self.model_wrapped.optimizer.loss_scale = saved["loss_scale"].item()

    def _start_moments(self) -> None:
        """Have DeepSpeed make its optimizer state; a run that goes on must draw the random numbers it would have."""
        with torch.random.fork_rng():
            inputs = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))
            inputs.pop("rows", None)
            start_moments(self.model_wrapped, self.method.optimizer, lambda: self.model_wrapped(**inputs).loss)

    def _load_best_model(self) -> None:
        if self._has_own_state():
            self._load_own_state(Path(self.state.best_model_checkpoint))
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def _loss_scale(self) -> dict[str, torch.Tensor]:
        """fp16's scale, which DeepSpeed finds by trial."""
        scale = getattr(self.model_wrapped.optimizer, "loss_scale", None) if self.is_deepspeed_enabled else None
        return {} if scale is None else {"loss_scale": torch.tensor(float(scale))}


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: no readable checkpoint ({error})") from None


class DenserEvaluation(TrainerCallback):
    """Logs and evaluates at a few early steps too (`--denser_evaluation`)."""

    STEPS = (1, 50, 100, 200)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.STEPS:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
        return control
