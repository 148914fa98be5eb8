"""`UIETrainer`: Hugging Face's Seq2SeqTrainer, overridden only where continual learning with GORP differs.

The method creates the optimizer and adds its penalty, every answer token of a global batch has the same weight in the
loss, predictions are scored per task and dataset, and checkpoints hold only what trains.
"""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import ProgressCallback, Seq2SeqTrainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints

from checkpoints import SCHEDULE, TENSORS, load_random_state, write_manifest, write_random_state
from compute_metrics import evaluate_predictions
from errors import InputError
from evaluation.generate import Prediction
from files import atomic_file, read_json, read_tensors, write_json
from methods import Method
from non_finite import NonFiniteGuard
from Proj_torch.optimizer_state import start_moments
from task_examples import sample_places

logger = logging.getLogger("gorp")


class UIETrainer(Seq2SeqTrainer):
    """Trains one task by one method.

    Args:
        method: a method after `prepare`.
        multilingual: whether ROUGE counts GPT-2's tokens instead of English words.
        generation: arguments of `generate` for evaluation and prediction, `max_new_tokens` among them.
        name: the task, as progress bars show it; tasks_left: number of tasks of the order that follow it.

    Attributes:
        when_prepared: called before the first step, once optimizer and schedule exist and any checkpoint is loaded.
    """

    # compute_loss divides by the tokens of the global batch, whatever the accumulation.
    loss_is_scaled_for_ga = True

    def __init__(
        self, *args, method: Method, generation: dict, multilingual: bool = False, name: str = "", tasks_left: int = 0,
        **kwargs
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        if self.pop_callback(ProgressCallback):
            self.add_callback(OrderProgress(name, tasks_left))
        self.name, self.method, self.multilingual, self.generation = name, method, multilingual, generation
        # Makes the Trainer count the answer tokens of a global batch, for compute_loss.
        self.model_accepts_loss_kwargs = True
        self.when_prepared: Callable[[], None] = lambda: None
        self._penalties: list[torch.Tensor] = []
        self._examples: list[str] = []  # names of the current micro-batch's examples
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        self._quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        self.non_finite = NonFiniteGuard(self.args.max_non_finite_steps, watch_gradients=not self.args.fp16)
        self.args.logging_nan_inf_filter = False  # would read a value from the device in every micro-batch
        if self.is_deepspeed_enabled and not self.args.do_train and not self.args.hf_deepspeed_config.is_zero3():
            self.is_deepspeed_enabled = False  # evaluation alone needs no engine, and Hugging Face would reject it
            if self.args.bf16 or self.args.fp16:  # as after training: the base in 16 bits; factors and buffers not
                for name, value in self.model.named_parameters():
                    if ".lora" not in name:
                        value.data = value.data.to(torch.bfloat16 if self.args.bf16 else torch.float16)

    # Optimizer and loss

    def create_optimizer(self, model=None):
        """The method's optimizer, with its own learning rates per group."""
        if self.optimizer is None:
            args = self.args
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = self.method.create_optimizer(lr=args.learning_rate, betas=betas, eps=args.adam_epsilon,
                                                          weight_decay=args.weight_decay)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Take the parent's step, after notifying the method: a sharded projection acts in forward and backward."""
        self._examples = inputs.pop("examples", [])
        self.method.begin_micro_batch(self.accelerator.sync_gradients)
        loss = super().training_step(model, inputs, num_items_in_batch)
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0)  # for the log; a skipped step counts as 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross entropy per answer token, plus the method's penalty once per optimizer step.

        The model returns the mean over its own answer tokens. It is scaled to this batch's share of the mean over the
        global batch (all micro-batches, all ranks), so that neither accumulation nor the number of ranks changes the
        gradient, except in an epoch's last step, for which Accelerate fills up the ranks with the epoch's first
        examples. Hugging Face leaves this to the model, and T5's forward does not do it.
        """
        loss, outputs = self.answer_loss(model, inputs, num_items_in_batch)
        if model.training:
            penalty = self.method.penalty()
            if penalty is not None:
                self._penalties.append(penalty.detach())
                loss = loss + penalty / self.current_gradient_accumulation_steps
            self.non_finite.note_micro_batch(self.state.global_step + 1, loss, self._examples)
        return (loss, outputs) if return_outputs else loss

    def answer_loss(self, model, inputs, num_items_in_batch):
        """This batch's share of the loss over the answers of the global batch, and the model's outputs."""
        outputs = model(**inputs, use_cache=False)  # no generation follows that would read the cache
        loss = outputs.loss
        if self.label_smoother is not None:
            loss = self.label_smoother(outputs, inputs["labels"])
        if self.method.averages_micro_batches:
            loss = loss / self.current_gradient_accumulation_steps
        elif num_items_in_batch is not None:
            share = (inputs["labels"] != -100).sum() / num_items_in_batch
            loss = loss * share * self.accelerator.num_processes  # gradients are averaged over ranks afterwards
        return loss, outputs

    def floating_point_ops(self, inputs):
        """The parent's count, with the parameters counted once and not in every step."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    def shown_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of as many training examples as the method asks for: of all of them, or of this rank's share."""
        if self.model_wrapped is self.model:
            self.model.to(self.args.device)  # before training, DeepSpeed has not placed it yet
        places = sample_places(len(self.train_dataset), self.method.shown_examples)
        if self.method.shares_examples:
            places = places[self.args.process_index :: self.args.world_size]
        shown = self.train_dataset.select(places)
        starts = range(0, len(shown), self.args.per_device_train_batch_size)
        for start in tqdm(starts, f"{self.name}, the method's pass", disable=self._quiet or not starts):
            yield self._batch([shown[place] for place in range(len(shown))[start : start + starts.step]])

    def _batch(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        inputs = self._prepare_inputs(self.data_collator(examples))
        inputs.pop("examples", None)
        return inputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also log the mean penalty since the last line; the loss includes it."""
        if "loss" in logs and self._penalties:
            logs["penalty"] = torch.stack(self._penalties).mean().item()
            self._penalties.clear()
        super().log(logs, start_time)

    def release(self) -> None:
        """Release the engine and the model, which DeepSpeed's hooks would keep alive through the next tasks."""
        self.accelerator.free_memory()  # also destroys the engine
        if self.is_deepspeed_enabled:
            from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

            FWD_MODULE_STACK.clear()  # stage 3 pushes the model and leaves it there

    # Evaluation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Predict every example as text and score the predictions per task and dataset, see `evaluation/generate.py`.

        The parent's loop prepares the model (device, precision, DeepSpeed) and gets no batch to run. The loss of the
        reference answers costs a separate forward pass. It is computed in validation, where it may choose the best
        step, and with `--predict_loss`. Returns the parent's output with `predictions` as a list of strings.
        """
        output = super().evaluation_loop(DataLoader([]), description, True, ignore_keys, metric_key_prefix)
        examples, metrics, args, collator = dataloader.dataset, {}, self.args, self.data_collator
        prediction = Prediction(
            self.model, collator, examples, self.accelerator, self.generation,
            batch_size=args.per_device_eval_batch_size,
            most_tokens=args.eval_batch_tokens or args.per_device_eval_batch_size * collator.max_source_length,
            shares_prefix=collator.decoder_only and not is_deepspeed_zero3_enabled(),
            name=f"{self.name}, {'validate' if metric_key_prefix == 'eval' else 'test'}",
            show_progress=not self._quiet,
        )  # fmt: skip
        with self.accelerator.autocast():  # the precision of training
            if metric_key_prefix == "eval" or args.predict_loss:
                metrics["loss"] = prediction.loss()
            tokens = prediction.answers()
        texts = collator.decode(tokens)
        metrics |= evaluate_predictions(examples, texts, multilingual=self.multilingual)
        metrics["gen_len"] = (tokens != self.processing_class.pad_token_id).sum(1).float().mean().item()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output._replace(predictions=texts, num_samples=len(examples))

    # Private methods of Hugging Face's Trainer. tests/test_resume.py lists them and says why no public one would do.

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Prepare as the parent does without a checkpoint, give the method the engine, then read our checkpoint."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.args.get_warmup_steps(max_steps) >= max_steps:
            logger.warning("--warmup_steps %g covers all %d steps of this task, whose learning rate never reaches its "
                           "value; a number below 1 is a share of the steps", self.args.warmup_steps, max_steps)
        self.method.begin_training(self.model_wrapped if self.is_deepspeed_enabled else None)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.non_finite.watch(self.method.optimizer, trained if self.is_deepspeed_enabled else ())
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                with torch.random.fork_rng():  # DeepSpeed allocates its optimizer state; no random number is drawn
                    inputs = self._batch([self.train_dataset[0]])
                    start_moments(self.model_wrapped, self.method.optimizer, lambda: self.model_wrapped(**inputs).loss)
            self._load_state(Path(resume_from_checkpoint))
        self.when_prepared()
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Do nothing: `_prepare_for_training` reads the checkpoint once there is an optimizer."""

    def _load_rng_state(self, checkpoint) -> None:
        """Restore the generators; called before the first batch after the checkpoint."""
        load_random_state(Path(checkpoint), self.args.process_index)

    def _load_best_model(self) -> None:
        self._load_state(Path(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint in our format; older ones are deleted only when it is complete."""
        args, folder = self.args, Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.store_flos()
        tensors = self.method.training_state()
        write_random_state(folder, args.process_index)
        self.accelerator.wait_for_everyone()
        best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
        if best.exists():
            self.state.best_model_checkpoint = str(best)
        if args.should_save:
            with atomic_file(folder / TENSORS) as partial:
                safetensors.torch.save_file(tensors, partial, metadata={"format": "pt"})
            schedule = {"schedule": self.lr_scheduler.state_dict(), "loss_scale": self._loss_scale()}
            write_json(folder / SCHEDULE, schedule)
            self.state.save_to_json(str(folder / "trainer_state.json"))
            write_manifest(folder)
            rotate_checkpoints(args.output_dir, args.save_total_limit, self.state.best_model_checkpoint)

    def _run_epoch(self, *args, **kwargs):
        """Run the parent's epoch, unless the checkpoint is of the last step: the parent would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient's norm, computed right before the optimizer's step, or under DeepSpeed right after it."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:
            self.non_finite.note_gradient_norm(norm)
        self.non_finite.skips_step()  # here too, as fp16's loss scaler may skip the optimizer's step
        return norm

    def _load_state(self, folder: Path) -> None:
        (saved, _), schedule = read_tensors(folder / TENSORS), read_json(folder / SCHEDULE)
        try:
            self.method.load_training_state(saved)
            self._load_loss_scale(schedule["loss_scale"])
        except (InputError, KeyError) as error:
            raise InputError(f"{folder}: a checkpoint of a different run ({error})") from None
        self.lr_scheduler.load_state_dict(schedule["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _loss_scaler(self):
        """The dynamic loss scaler of fp16, DeepSpeed's or PyTorch's; None without one."""
        if self.is_deepspeed_enabled:
            return getattr(self.model_wrapped.optimizer, "loss_scaler", None)
        return self.accelerator.scaler

    def _loss_scale(self) -> dict[str, float]:
        scaler = self._loss_scaler()
        if scaler is None or isinstance(scaler, torch.amp.GradScaler):
            return scaler.state_dict() if scaler else {}
        return {name: value for name, value in vars(scaler).items() if isinstance(value, (int, float))}

    def _load_loss_scale(self, saved: dict[str, float]) -> None:
        scaler = self._loss_scaler()
        if isinstance(scaler, torch.amp.GradScaler):
            scaler.load_state_dict(saved)
        elif scaler is not None:
            vars(scaler).update(saved)


class OrderProgress(ProgressCallback):
    """The training progress bar, with the task's name, the last loss, and the order's remaining training time, which
    assumes that every remaining task takes as long as this one."""

    def __init__(self, name: str, tasks_left: int):
        super().__init__()
        self.name, self.tasks_left, self.loss = name, tasks_left, ""

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first, self.current_step = time.monotonic(), state.global_step, 0
        if state.is_world_process_zero:
            form = "{desc}: {percentage:3.0f}%|{bar:5}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self.training_bar = tqdm(total=state.max_steps, desc=f"{self.name}, train", bar_format=form)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            step = (time.monotonic() - self.began) / (state.global_step - self.first)
            left = step * (state.max_steps * (1 + self.tasks_left) - state.global_step)
            self.training_bar.set_postfix_str(f"{self.loss}order {tqdm.format_interval(left)} left", refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.loss = f"loss {logs['loss']:.3g}, "
        super().on_log(args, state, control, logs=logs, **kwargs)


class DenserEvaluation(TrainerCallback):
    """Logs and evaluates at a few early steps as well (`--denser_evaluation`)."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (1, 50, 100, 200):
            control.should_log = True
            waited = state.epoch if args.eval_strategy == "epoch" else state.global_step
            if args.eval_strategy != "no" and waited >= args.eval_delay:
                control.should_evaluate = True
                control.should_save |= args.load_best_model_at_end  # this one may be the best
        return control
