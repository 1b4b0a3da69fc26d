"""Do the tests notice likely slips? `python tests/slips.py [NAME ...]`

Puts each slip into a copy of the repository, one at a time, runs the tests concerned and lists the slips that turned
none of them red; exit status 1 where there are any. Without names all of them, with `fast` those whose tests start no
ranks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
COPIED = ("harness", "conf", "launchers", "tests", "pyproject.toml")

PASSED, FAILED = 0, 1
"""Exit statuses of pytest; others stand for tests that did not run."""


@dataclass(frozen=True)
class Slip:
    """A small edit that makes something wrong."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    """What must turn red: arguments of pytest, separated by spaces."""
    starts_ranks: bool


def slips(file: str, tests: str, starts_ranks: bool, edits: Mapping[str, tuple[str, str]]) -> list[Slip]:
    """Slips in one file that the same tests must notice, by name."""
    return [Slip(name, file, right, wrong, tests, starts_ranks) for name, (right, wrong) in edits.items()]


SLIPS = [
    *slips(
        "harness/run/optimizer.py",
        "tests/test_optimizer.py",
        False,
        {
            "norms_decay": ('"weight_decay": 0.0', '"weight_decay": train.weight_decay'),
            "nothing_decays": ("if p.dim() >= 2]", "if p.dim() > 2]"),
            "rate_a_step_late": ("(step + 1) / rise", "step / rise"),
            "rise_a_step_long": ("if step < rise", "if step <= rise"),
            "cosine_from_the_first_step": ("(step - rise) / max(1, train.steps - rise)", "step / train.steps"),
            "cosine_ends_at_zero": ("FINAL_LEARNING_RATE = 0.1", "FINAL_LEARNING_RATE = 0.0"),
            "betas_swapped": ("betas=(first, second)", "betas=(second, first)"),
            "epsilon_of_torch": ("        eps=train.adam_epsilon,\n", ""),
        },
    ),
    *slips(
        "harness/run/optimizer.py",
        "tests/test_parity.py::test_parity[1]",
        True,
        {
            "norms_decay_in_a_layout": ('"weight_decay": 0.0', '"weight_decay": train.weight_decay'),
            "rate_a_step_late_in_a_layout": ("(step + 1) / rise", "step / rise"),
        },
    ),
    *slips(
        "harness/run/data.py",
        "tests/test_parity.py::test_parity[2]",
        True,
        {
            "weight_without_dp": ("num_micro_batches * config.parallel.dp / samples", "num_micro_batches / samples"),
            "replicas_share_samples": ("micro_batch * config.parallel.dp + dp_rank", "micro_batch + dp_rank"),
        },
    ),
    *slips(
        "harness/run/data.py",
        "tests/test_documents.py",
        False,
        {
            "labels_not_shifted": ("tokens[: len(tokens) - besides], tokens[besides:]", "tokens[:length], tokens"),
            "special_tokens_are_masked": (" & ~np.isin(tokens, self._special)", ""),
            "padding_is_masked": ("eligible = (tokens != IGNORE_INDEX) &", "eligible ="),
            "nothing_to_predict_in_short_rows": ("if not chosen.any() and eligible.any()", "if False"),
            "every_token_chosen_is_a_mask": ("chosen & (kind < REPLACED)", "chosen & (kind < 1)"),
            "evaluations_mask_anew": (
                "self._row(number)), self._mask, -1, number",
                "self._row(number)), self._mask, step, number",
            ),
            "a_row_is_one_document": ("sum(length * length for length in lengths)", "sum(lengths) ** 2"),
            "masks_of_every_step_alike": ('self._seed, step, number, "mask")', 'self._seed, number, "mask")'),
            "padding_belongs_to_the_last_document": (
                "np.arange(len(row) + 1), [",
                "np.minimum(np.arange(len(row) + 1), max(0, len(row) - 1)), [",
            ),
            "padded_bidirectional_without_mask": (
                "if not config.masks_documents:",
                'if config.data.documents != "packed":',
            ),
        },
    ),
    *slips(
        "harness/run/evaluate.py",
        "tests/test_documents.py -k evaluation",
        False,
        {
            "evaluated_with_the_documents_of_training": (
                "        tell_documents(context, self._config, self._samples)\n",
                "",
            ),
            "trains_on_with_the_documents_of_the_evaluation": (
                "context.documents, context.shares = training",
                "del training",
            ),
        },
    ),
    *slips(
        "harness/documents.py",
        "tests/test_documents.py",
        False,
        {
            "packing_takes_any_place": (
                "bisect_left(sizes, lengths[number])",
                "len(sizes) - (bool(sizes) and sizes[-1] >= lengths[number])",
            ),
            "rows_overflow": ("bisect_left(sizes, lengths[number])", "bisect_left(sizes, lengths[number] - 1)"),
            "held_out_documents_are_trained_on": (
                "parts = usable[~is_held_out], usable[is_held_out]",
                "parts = usable, usable[is_held_out]",
            ),
        },
    ),
    *slips(
        "harness/model/context.py",
        "tests/test_context.py",
        False,
        {
            "window_one_too_wide": ("seen.triu(1 - window)", "seen.triu(-window)"),
            "positions_go_on_over_documents": ("places.where(begins, 0).cummax(dim=1).values", "0 * places"),
            "masks_of_the_pass_before": ("if self._made[0] != current:", "if self._made[0] is None:"),
        },
    ),
    *slips(
        "harness/model/block.py",
        "tests/test_model.py -k equals_transformers",
        False,
        {
            "norms_of_heads_swapped": (
                "            query, key = self.query_norm(query), self.key_norm(key)\n",
                "            query, key = self.key_norm(query), self.query_norm(key)\n",
            ),
            "slow_pairs_as_fast": (
                "wavelength > length / low, frequencies / scaling.factor, frequencies",
                "wavelength > length / low, frequencies, frequencies",
            ),
            "fast_pairs_as_between": (
                "(wavelength <= length / low) & (wavelength >= length / high)",
                "wavelength <= length / low",
            ),
            "norm_before_the_sum": (
                "self.attention_norm(hidden + self.attention_dropout(self.attention(hidden)))",
                "hidden + self.attention_norm(self.attention_dropout(self.attention(hidden)))",
            ),
        },
    ),
    *slips(
        "harness/model/layers.py",
        "tests/test_model.py -k equals_transformers",
        False,
        {
            "embedding_not_scaled": ("hidden * self.scale + self.rows", "hidden + self.rows"),
            "token_type_of_the_second_kind": ("hidden + self.weight[0]", "hidden + self.weight[1]"),
            "gelu_is_approximate": ('"gelu": F.gelu,', '"gelu": partial(F.gelu, approximate="tanh"),'),
            "exact_gelu": ('"gelu_tanh": partial(F.gelu, approximate="tanh")', '"gelu_tanh": F.gelu'),
            "no_bias_of_the_head": ("return logits + self.bias", "return logits"),
        },
    ),
    *slips(
        "harness/run/engines/deepspeed/engine.py",
        "tests/test_parity.py::test_parity[2",
        True,
        {
            "norms_of_heads_not_summed": ("(tp.sequence_parallel or table[name].of_heads)", "tp.sequence_parallel"),
        },
    ),
    *slips(
        "harness/run/data.py",
        "tests/test_parity.py::test_parity[1]",
        True,
        {
            "same_samples_every_step": ("config, samples, dp_rank, step)", "config, samples, dp_rank, first_step)"),
        },
    ),
    *slips(
        "harness/model/loss.py",
        "tests/test_loss.py",
        False,
        {
            "padding_in_the_softmax": ("if first_padded >= num_columns:", "if True:"),
            "ignored_targets_counted": (".masked_fill_(~counted, 0)\n\n", "\n\n"),
        },
    ),
    *slips(
        "harness/spec/placement.py",
        "tests/test_schedule.py",
        False,
        {
            "a_v_is_a_loop": (
                "turned = self.is_v and chunk % 2 == 1\n        return chunk",
                "turned = False\n        return chunk",
            ),
            "the_last_part_is_on_the_last_stage": ("== self.num_parts - 1", "== self.num_stages - 1"),
        },
    ),
    *slips(
        "harness/spec/zero_bubble.py",
        "tests/test_schedule.py -k torch",
        False,
        {"weights_a_micro_batch_early": ("(WEIGHT, number - ahead - stage)", "(WEIGHT, number - ahead - stage + 1)")},
    ),
    *slips(
        "harness/spec/schedules.py",
        "tests/test_schedule.py",
        False,
        {
            "held_until_the_input_gradient": ("now += waiting[chunk] - of_chunk[chunk]", "now -= of_chunk[chunk]"),
            "a_hand_over_is_received": (
                'if before != stage:\n                yield Instruction("recv',
                'if part > 0:\n                yield Instruction("recv',
            ),
        },
    ),
    *slips(
        "harness/run/engines/deepspeed/scheduled.py",
        "tests/test_examples.py -k deepspeed_executes",
        True,
        {
            "backward_of_the_last_output": (
                "self._outputs.pop(place), self._inputs.pop(place)",
                "self._outputs.pop(next(reversed(self._outputs))), self._inputs.pop(place)",
            ),
        },
    ),
    *slips(
        "harness/launch/compose.py",
        "tests/test_compose.py",
        False,
        {
            "values_stay_after_a_point": (
                "before.items():\n                    OmegaConf.update(base, key, value)",
                "before.items():\n                    pass",
            ),
            "interpolations_are_forgotten": (
                "to_container(config, resolve=False)",
                "to_container(config, resolve=True)",
            ),
        },
    ),
    *slips(
        "harness/run/parity.py",
        "tests/test_defects.py -k copies_differ",
        True,
        {
            "copies_are_not_compared": ("not all(torch.equal(s, whole) for s in slices)", "False"),
        },
    ),
    *slips(
        "harness/analyse/finish.py",
        "tests/test_finish.py",
        False,
        {
            "each_mirror_has_its_own_limit": ("deadline - time.monotonic())", "limit_seconds)"),
            "grandchildren_are_left": ("os.killpg(child", "os.kill(child"),
            "late_pictures_are_whole": ('missing = [f"no pictures within {PICTURES_SECONDS:g} s"]', "missing = []"),
        },
    ),
    *slips(
        "harness/run/engines/deepspeed/clipping.py",
        "tests/test_parity.py::test_parity[2]",
        True,
        {
            "replicated_counted_per_rank": (
                '        and (tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False))\n',
                "",
            ),
            "tied_weight_counted_twice": ('        and not getattr(parameter, "ds_pipe_replicated", False)\n', ""),
            "clipping_by_one_stage": ("model_group is not None and", "model_group is None and"),
        },
    ),
    *slips(
        "harness/run/engines/deepspeed/engine.py",
        "tests/test_parity.py::test_parity[1]",
        True,
        {
            "clipping_never": ("scale_gradients(parameters, self._norm, self.config.train.gradient_clipping)", "pass"),
        },
    ),
    *slips(
        "harness/run/engines/engine.py",
        "tests/test_parity.py::test_parity[1]",
        True,
        {
            "micro_batches_share_masks": ("(self._steps_taken(), instruction.micro_batch)", "(self._steps_taken(), 0)"),
        },
    ),
    *slips(
        "harness/run/engines/torch/pipelining.py",
        "tests/test_parity.py::test_parity[2]",
        True,
        {
            "torch_tied_copies_not_reduced": ("dist.all_reduce(weight.grad, group=self._tied_group)", "pass"),
            "torch_tied_weight_counted_twice": (
                "gradients_of(self._own_parameters())",
                "gradients_of(self.parameters())",
            ),
            "torch_scales_gradients": ("scale_grads=False", "scale_grads=True"),
        },
    ),
    *slips(
        "harness/run/shared_memory.py",
        "tests/test_shared_memory.py",
        True,
        {
            "shared_slots_reused_unheard": ("return all(heard[0] > oldest for heard in self._heard)", "return True"),
            "the_lost_are_named_by_their_place": ("int(number) for _, number, pid, *_", "0 for _, _, pid, *_"),
            "shared_read_before_it_is_said": ("self._peers.wait(lambda: said[0] > number)", "pass"),
            "shared_sums_of_other_ranks_only": (
                "for rank in range(2, self._size):\n            own.add_",
                "for rank in range(3, self._size):\n            own.add_",
            ),
            "shared_means_of_two_are_sums": ("                piece.mul_(factor)\n", "                pass\n"),
            "shared_means_of_more_are_sums": ("            own.mul_(factor)\n", "            pass\n"),
            "shared_sums_end_in_any_order": ("self._begun[0].end(self._say_ahead)", "wanted.end(self._say_ahead)"),
            "shared_lanes_overflow": (
                "has_slot = fits and self._num_in_slots - self._slots_taken[0] < NUM_LANE_SLOTS",
                "has_slot = fits",
            ),
            "shared_lanes_are_of_all_tags": ("key = self._rank, receiver, tag", "key = self._rank, receiver, 0"),
            "shared_memory_of_another_process": ("memory is None or memory._words[0] != int(token)", "memory is None"),
            "shared_descriptors_stay_open": ("    found[rank].close()\n", ""),
            "shared_ranks_wait_for_the_dead": ("if ended and not is_ready():", "if False:"),
            "shared_wish_is_not_heard": (
                "return self.wanted and not self._unavailable",
                "return not self._unavailable",
            ),
        },
    ),
    *slips(
        "harness/run/engines/torch/tensor_parallel.py",
        "tests/test_parity.py::test_parity[2]",
        True,
        {
            "dtensor_replicated_counted_per_rank": ("if self.rank == 0 or getattr(", "if True or getattr("),
            "dtensor_padding_scores": ("if logits.shape[-1] == vocab_size:", "if logits.shape[-1] >= vocab_size:"),
            "dtensor_gradients_are_kept": ("        self.model.zero_grad()\n", ""),
        },
    ),
    *slips(
        "harness/run/engines/torch/data_parallel.py",
        "tests/test_parity.py::test_parity[2]",
        True,
        {
            "ddp_reduces_the_first": ("is_last = number + 1 == self._num_micro_batches", "is_last = number == 0"),
            "ddp_counts_its_own_targets": ("        dist.all_reduce(valid, group=self.group)\n", ""),
        },
    ),
    *slips(
        "harness/analyse/executed.py",
        "tests/test_torch_engine.py",
        True,
        {
            "receives_take_no_time": ("kind=instruction.kind, start_ns=ended_ns, end", "kind=instruction.kind, end"),
        },
    ),
    *slips(
        "harness/model/block.py",
        "tests/test_model.py",
        False,
        {
            "rope_base_fixed": ("self.theta ** (pairs", "10000.0 ** (pairs"),
            "rope_turns_the_other_way": ("torch.cat((-sin, sin), dim=-1)", "torch.cat((sin, -sin), dim=-1)"),
            "norm_epsilon_of_torch": (
                "self.attention_norm = build_norm(model.hidden_size, model.norm_epsilon)",
                "self.attention_norm = build_norm(model.hidden_size)",
            ),
            "gate_and_up_swapped": ("self.activation(gate) * up", "gate * self.activation(up)"),
        },
    ),
    *slips(
        "harness/model/assembly.py",
        "tests/test_model.py",
        False,
        {
            "last_norm_epsilon_of_torch": (
                "norm_class(model), (model.hidden_size, model.norm_epsilon)",
                "norm_class(model), (model.hidden_size,)",
            ),
        },
    ),
    *slips(
        "harness/model/layers.py",
        "tests/test_tensor_parallel.py",
        True,
        {
            "row_bias_per_rank": (
                "sum_of_parts(self.product(hidden, None), self.tp)",
                "sum_of_parts(self.product(hidden, self.bias), self.tp)",
            ),
            "positions_of_the_first_slice": ("first = length * (self.tp.slice_rank or 0)", "first = 0"),
        },
    ),
    *slips(
        "harness/model/weights.py",
        "tests/test_weights.py",
        False,
        {
            "residual_not_narrower": ("std /= math.sqrt(2 * model.num_hidden_layers)", "pass"),
            "residual_by_layers": ("math.sqrt(2 * model", "math.sqrt(model"),
        },
    ),
    *slips(
        "harness/model/context.py",
        "tests/test_dropout.py -k stream_of_its_own",
        False,
        {
            "replicas_share_masks": ("*self.forward_pass, self.dp_rank, place", "*self.forward_pass, place"),
            "steps_share_masks": ("self.seed, *self.forward_pass,", "self.seed, self.forward_pass[1],"),
        },
    ),
    *slips(
        "harness/model/block.py",
        "tests/test_dropout.py -k share_streams",
        False,
        {
            "heads_share_masks": ('f"{name}.probabilities", tp.rank)', 'f"{name}.probabilities", None)'),
        },
    ),
    *slips(
        "harness/spec/counts.py",
        "tests/test_counts.py",
        False,
        {
            "flops_twice_forward": ("return 3 * (blocks", "return 2 * (blocks"),
            "attention_halved": ("if causal and model.causal:", "if model.causal:"),
            "head_not_counted": ("return 3 * (blocks + head_forward_flops(model))", "return 3 * blocks"),
        },
    ),
    *slips(
        "harness/spec/parameters.py",
        "tests/test_counts.py",
        False,
        {
            "tied_head_counted": ("if not model.tie_word_embeddings:", "if True:"),
            "kv_heads_as_many_as_heads": (
                "kv_size = model.num_key_value_heads * model.head_dim",
                "kv_size = model.num_attention_heads * model.head_dim",
            ),
        },
    ),
    *slips(
        "harness/corpus.py",
        "tests/test_corpus.py",
        False,
        {
            "documents_run_into_each_other": (
                'content.update(f"{len(document)} {document}".encode())',
                "content.update(document.encode())",
            ),
        },
    ),
    *slips(
        "harness/prompts.py",
        "tests/test_prompts.py",
        False,
        {
            "half_a_character_is_shown": ("if text.endswith(UNKNOWN) or len(text)", "if len(text)"),
            "every_token_is_read_alone": ("self._last, self._new = self._new, []", "self._last, self._new = [], []"),
            "a_cut_stop_string_is_shown": ("return max(lengths, default=0)", "return 0"),
            "the_first_begin_of_stop_strings_counts": ("(at + len(stop), at)", "(at, at)"),
            "prompts_without_their_first_token": (
                "tokenizer(text, verbose=False)",
                "tokenizer(text, verbose=False, add_special_tokens=False)",
            ),
            "a_prompt_fills_all_positions": ("elif len(tokens) > most:", "elif len(tokens) > most + 1:"),
            "stop_tokens_of_config_json_alone": ('("generation_config.json", "config.json")', '("config.json",)'),
            "a_tokenizer_that_is_carried_but_unused": (
                'if trained_with is not None and (trained_with == "bytes"',
                "if False and (True",
            ),
        },
    ),
    *slips(
        "harness/launch/generate.py",
        "tests/test_generate_cli.py -k any_text or quotes or flags",
        False,
        {
            "two_quoted_texts_are_one": ("(?:\\\\.|(?!\\1)[^\\\\])*", ".*"),
            "a_prompt_is_filled_in": ('re.sub(r"(\\\\*)\\$\\{", r"\\1\\1\\\\${", value)', "value"),
            "the_task_before_all_flags": ("first = overrides[0] if overrides else len(argv)", "first = 0"),
        },
    ),
    *slips(
        "harness/launch/generate.py",
        "tests/test_generate_cli.py -k become or shown or kept",
        True,
        {
            "lines_in_the_order_they_ended": (
                'sorted(read_jsonl(attempt.generated_file), key=lambda line: int(line["number"]))',
                "read_jsonl(attempt.generated_file)",
            ),
            "figures_among_the_text": ('f"run: {attempt.path}"]), file=sys.stderr)', 'f"run: {attempt.path}"]))'),
            "text_comes_again_and_again": ("self._position += len(taken)", "pass"),
            "what_had_ended_is_lost_with_the_rest": (
                "if config.generate.output is not None:",
                'if config.generate.output is not None and outcome.status == "ok":',
            ),
        },
    ),
    *slips(
        "harness/run/inference/texts.py",
        "tests/test_generate_cli.py -k shown",
        True,
        {"text_waits_for_its_end": ("            self._stream.flush()\n", "")},
    ),
    *slips(
        "harness/run/inference/requests.py",
        "tests/test_generate_cli.py -k waiting",
        False,
        {
            "nothing_says_that_it_waits": ("            self._idle()\n", ""),
            "one_long_wait_for_a_request": ("time.sleep(min(left, 1.0))", "time.sleep(left)"),
        },
    ),
    *slips(
        "harness/launch/points.py",
        "tests/test_generate_cli.py -k only_generate",
        False,
        {"an_output_that_nobody_writes": ("config.generate.output is not None:", "False:")},
    ),
    *slips(
        "harness/spec/generation.py",
        "tests/test_generate_cli.py -k one_sentence",
        False,
        {"an_output_of_nothing": ("        if not gives_prompts(config):", "        if False:")},
    ),
    *slips(
        "harness/prompts.py",
        "tests/test_generate_cli.py -k one_sentence",
        False,
        {"a_long_prompt_in_a_message": ("if len(text) <= SHOWN else", "if True else")},
    ),
    *slips(
        "harness/launch/verify.py",
        "tests/test_generate_cli.py -k parity_check",
        False,
        {"a_check_of_the_plain_configuration": ('r"launchers/\\w+\\.py"', 'r"launchers/train\\.py"')},
    ),
    *slips(
        "harness/run/conversion.py",
        "tests/test_conversion.py -k another_type",
        False,
        {"the_old_word_for_types_stays": ('settings.pop("torch_dtype", None)', "pass")},
    ),
    *slips(
        "harness/spec/twin.py",
        "tests/test_twin.py -k window",
        False,
        {"a_window_keeps_its_size": ("SEQUENCE_LENGTH * window // sequence_length", "SEQUENCE_LENGTH")},
    ),
    *slips(
        "harness/spec/twin.py",
        "tests/test_twin.py -k goes_round",
        False,
        {
            "a_twin_has_no_chunks": ("chunk = min(chunk, PREFILL_CHUNK) if has_several else None", "chunk = None"),
            "groups_of_a_twin_are_even": ("count * own_rows + min(uneven, 1)", "count * own_rows"),
            "no_request_of_a_twin_waits": ("batch_size + ENTERING_LATER", "batch_size"),
        },
    ),
    *slips(
        "harness/plan/memory.py",
        "tests/test_memory.py",
        False,
        {
            "nothing_is_sent": ("hidden * (chunk in sends)", "hidden * 0"),
            "computing_again_takes_no_mask": ("per_token += block + masks", "per_token += block"),
            "no_fp32_copy": ('if zero or precision != "fp32" else 0\n', "if zero else 0\n"),
            "moments_not_split": ('config.parallel.dp if zero or precision == "bf16" else 1', "1"),
        },
    ),
    *slips(
        "harness/spec/partition.py",
        "tests/test_partition.py",
        False,
        {
            "ties_to_the_later_stage": ("(weight(held), held)", "(weight(held), -held[0])"),
            "head_weighs_nothing": ("head_forward_flops(model)\n", "0\n"),
        },
    ),
    *slips(
        "harness/spans/span.py",
        "tests/test_spans.py",
        False,
        {
            "bubble_until_the_first_end": (
                "end = max(rank.last_backward_end_ns",
                "end = min(rank.last_backward_end_ns",
            ),
            "bubble_from_the_last_start": (
                "start = min(rank.first_forward_start_ns",
                "start = max(rank.first_forward_start_ns",
            ),
            "busy_of_the_slowest_stage": (
                "busy = sum(sum(r.busy_seconds for r in stage) / len(stage) for stage in stages) / len(stages)",
                "busy = max(sum(r.busy_seconds for r in stage) / len(stage) for stage in stages)",
            ),
            "busy_of_all_tp_ranks": ("r in stage) / len(stage) for", "r in stage) for"),
            "backward_left_out": ("return self.forward_seconds + self.backward_seconds", "return self.forward_seconds"),
            "largest_bubble_of_replicas": (
                "fraction=sum(b.fraction for b in bubbles) / len(bubbles)",
                "fraction=max(b.fraction for b in bubbles)",
            ),
            "mean_of_steps_for_median": (
                "fraction=median(bubble.fraction for bubble in steps)",
                "fraction=sum(bubble.fraction for bubble in steps) / len(steps)",
            ),
            "overhead_is_fraction": ("overhead=total / busy - 1", "overhead=1 - busy / total"),
        },
    ),
    *slips(
        "harness/spec/schedules.py",
        "tests/test_spans.py tests/test_schedule.py",
        False,
        {
            "ideal_with_p_instead_of_p_less_1": ("return Fraction(p - 1, m * v)", "return Fraction(p, m * v)"),
        },
    ),
    *slips(
        "harness/spec/topology.py",
        "tests/test_topology.py",
        False,
        {
            "stages_of_their_first_rank": ("for tp in neighbours]", "for tp in range(1)]"),
        },
    ),
    *slips(
        "harness/spans/clock.py",
        "tests/test_clock.py -k uncertainty",
        False,
        {
            "clock_sign": ("offset, uncertainty = answered - middle", "offset, uncertainty = middle - answered"),
        },
    ),
    *slips(
        "harness/spans/clock.py",
        "tests/test_clock.py -k drift_is_linear",
        False,
        {
            "drift_sign": ("start.offset_ns + round(", "start.offset_ns - round("),
        },
    ),
    *slips(
        "harness/spec/schedules.py",
        "tests/test_schedule.py",
        False,
        {
            "one_forward_too_many_ahead": (
                "ahead = min(stage.num_following, stage.num_micro_batches)\n",
                "ahead = min(stage.num_following + 1, stage.num_micro_batches)\n",
            ),
        },
    ),
    *slips(
        "harness/spans/span.py",
        "tests/test_metrics.py -k summary_by_hand",
        False,
        {
            "mean_bubble_for_median": (
                "fraction=median(bubble.fraction for bubble in steps)",
                "fraction=sum(bubble.fraction for bubble in steps) / len(steps)",
            ),
        },
    ),
    *slips(
        "harness/record/columns.py",
        "tests/test_metrics.py -k summary_by_hand",
        False,
        {
            "ends_of_the_range_swapped": (
                "measured=lambda run: percentile(10)(run.seconds)",
                "measured=lambda run: percentile(90)(run.seconds)",
            ),
            "mfu_of_the_gemm_rate": (
                "run.share_of(run.peak_flops_per_second)",
                "run.share_of(run.gemm_flops_per_second)",
            ),
            "last_peak_of_memory": (
                "measured=lambda run: largest([record.peak_memory_bytes for record in run.records])",
                "measured=lambda run: run.records[-1].peak_memory_bytes",
            ),
            "perplexity_of_base_2": ("else perplexity(run.eval_loss)", "else 2**run.eval_loss"),
        },
    ),
    *slips(
        "harness/record/sources.py",
        "tests/test_metrics.py -k summary_by_hand",
        False,
        {
            "mean_for_median": ("return median(self.seconds)", "return sum(self.seconds) / len(self.seconds)"),
            "a_step_more_of_warm_up": (
                "return self.records[self.config.train.warmup_steps :]",
                "return self.records[self.config.train.warmup_steps + 1 :]",
            ),
            "per_tensor_parallel_rank": (
                "self.tokens_per_second / self.config.parallel.world_size",
                "self.tokens_per_second / self.config.parallel.tp",
            ),
            "not_per_device": ("self.tokens_per_second / self.config.parallel.world_size", "self.tokens_per_second"),
            "first_evaluation": ("return losses[-1]", "return losses[0]"),
        },
    ),
    *slips(
        "harness/record/steps.py",
        "tests/test_metrics.py -k summary_by_hand",
        False,
        {
            "tokens_of_one_replica": (
                "return config.train.global_batch_size * config",
                "return config.train.global_batch_size // config.parallel.dp * config",
            ),
        },
    ),
    *slips(
        "harness/record/steps.py",
        "tests/test_metrics.py -k Repeats",
        False,
        {
            "warm_up_in_the_range": ("for line in lines[warmup_steps:]", "for line in lines"),
        },
    ),
    *slips(
        "harness/record/columns.py",
        "tests/test_metrics.py -k Repeats",
        False,
        {
            "rates_by_their_own_median": ("1 / median(1 / value for value in known)", "median(known)"),
            "slots_of_the_newest": ("        repeats=largest,\n", ""),
        },
    ),
    *slips(
        "harness/plan/hardware.py",
        "tests/test_metrics.py -k datasheet",
        False,
        {
            "mfu_of_another_precision": (".peak_flops.get(config.train.precision)", '.peak_flops.get("bf16")'),
        },
    ),
    *slips(
        "harness/record/sources.py",
        "tests/test_metrics.py -k oversubscribed",
        False,
        {
            "exactly_full_is_oversubscribed": ("threads > machine.num_cores", "threads >= machine.num_cores"),
            "threads_not_counted": (
                "config.parallel.world_size * config.launch.threads_per_rank",
                "config.parallel.world_size",
            ),
        },
    ),
    *slips(
        "harness/record/spread.py",
        "tests/test_spread.py",
        False,
        {
            "drift_backwards": ("after / before - 1", "before / after - 1"),
        },
    ),
    *slips(
        "harness/run/instruments/gemm.py",
        "tests/test_gemm.py -k others",
        False,
        {
            "fair_to_a_single_rank": (
                "threads_per_rank * config.parallel.world_size, machine",
                "threads_per_rank, machine",
            ),
            "cores_of_the_best_size_alone": ("cores in found[best:]", "cores in found[best : best + 1]"),
            "kept_though_disturbed": ("return cores >= fair - max(", "return cores >= 0 * max("),
        },
    ),
    *slips(
        "harness/run/loop.py",
        "tests/test_metrics.py -k slowest_rank",
        True,
        {
            "fastest_rank": ("step_seconds=max(rank", "step_seconds=min(rank"),
            "smallest_rank": ("peak_memory_bytes=max(", "peak_memory_bytes=min("),
        },
    ),
    *slips(
        "harness/record/report.py",
        "tests/test_report.py",
        False,
        {
            "slowest_first": ("key=lambda row: (-row[by]", "key=lambda row: (row[by]"),
            "ranked_in_all": (
                '"tokens_per_second_per_device" if len(sizes) > 1',
                '"tokens_per_second" if len(sizes) > 1',
            ),
            "ties_by_the_median": ("if fast >= slowest", "if entry[by] >= slowest"),
            "a_tie_ends_with_its_last": ("min(slow, slowest)", "slow"),
            "oversubscribed_ranked": ('is_sound(row) and not row["oversubscribed"] and', "is_sound(row) and"),
        },
    ),
    *slips(
        "harness/record/columns.py",
        "tests/test_metrics.py -k warm_up",
        False,
        {
            "drift_with_warm_up": ("drift(run.seconds)", "drift([record.step_seconds for record in run.records])"),
        },
    ),
    *slips(
        "harness/record/steps.py",
        "tests/test_metrics.py -k read_back",
        False,
        {
            "overhead_read_as_fraction": ("fraction / (1 - fraction), fraction *", "fraction, fraction *"),
        },
    ),
    *slips(
        "harness/launch/points.py",
        "tests/test_sweep.py -k measure or repeat",
        False,
        {
            "stale_failures_stay": ("if is_stale(content", 'if status == "ok" and is_stale(content'),
            "failed_repeat_stays": ('int(status != "ok")', "0"),
        },
    ),
    *slips(
        "harness/spec/identity.py",
        "tests/test_config.py -k identity",
        False,
        {
            "settings_not_in_the_identity": ('NOT_COMPUTED = ("data",', 'NOT_COMPUTED = ("data", "deepspeed",'),
            "threads_not_in_the_identity": (', "threads_per_rank": config.launch.threads_per_rank}', "}"),
            "layout_not_in_the_identity": ('NOT_COMPUTED = ("data",', 'NOT_COMPUTED = ("data", "parallel",'),
        },
    ),
    *slips(
        "harness/spec/identity.py",
        "tests/test_versions.py",
        False,
        {
            "later_keys_in_the_identity": (", exclude_defaults=True)", ")"),
        },
    ),
    *slips(
        "harness/run/engines/deepspeed/engine.py",
        "tests/test_checkpoint.py -k same_layout_goes_on",
        True,
        {
            "rate_a_step_late_after_resuming": (
                "last_epoch = progress.scheduler_step - 1",
                "last_epoch = progress.scheduler_step",
            ),
        },
    ),
    *slips(
        "harness/run/engines/deepspeed/engine.py",
        "tests/test_dropout.py -k resuming",
        True,
        {
            "masks_from_the_start_after_resuming": (
                "        engine.global_steps = progress.step  # dropout draws by it\n",
                "",
            ),
        },
    ),
    *slips(
        "harness/model/block.py",
        "tests/test_model.py -k dropout_is_where",
        False,
        {
            "no_dropout_before_the_norm_after_attention": (
                "self.attention_norm(hidden + self.attention_dropout(self.attention(hidden)))",
                "self.attention_norm(hidden + self.attention(hidden))",
            ),
            "no_dropout_after_attention": (
                "self.attention_dropout(self.attention(self.attention_norm(hidden)))",
                "self.attention(self.attention_norm(hidden))",
            ),
            "dropout_around_the_residual": (
                "hidden + self.mlp_dropout(self.mlp(self.mlp_norm(hidden)))",
                "self.mlp_dropout(hidden + self.mlp(self.mlp_norm(hidden)))",
            ),
        },
    ),
    *slips(
        "harness/model/assembly.py",
        "tests/test_model.py -k dropout_is_where",
        False,
        {
            "embedding_drops_twice_as_much": (
                "dropout = (model.dropout, context",
                "dropout = (2 * model.dropout, context",
            )
        },
    ),
    *slips(
        "harness/model/assembly.py",
        "tests/test_dropout.py -k share_streams",
        False,
        {"slices_of_the_embedding_share_a_mask": ('"embedding", tp.slice_rank)', '"embedding", None)')},
    ),
    *slips(
        "harness/model/weights.py",
        "tests/test_weights.py -k as_wide_as",
        False,
        {"width_of_weights_fixed": ("std = model.initializer_range", "std = 0.02")},
    ),
    *slips(
        "harness/model/weight_gradients.py",
        "tests/test_weight_gradients.py",
        False,
        {
            "what_is_left_is_taken_twice": ("left, self._left = self._left, []", "left = [*self._left]"),
            "bias_gradients_are_means": ("rows.sum(dim=0)]", "rows.mean(dim=0)]"),
        },
    ),
    *slips(
        "harness/run/tasks/probe.py",
        "tests/test_layer_seconds.py -k wait",
        True,
        {"layers_are_probed_by_another_library": ("    use_onednn(config.model.onednn)\n", "")},
    ),
    *slips(
        "harness/run/worker.py",
        "tests/test_process.py -k stop",
        True,
        {
            "ranks_stop_without_a_word": ("    _call_when_told_to_stop(fail)\n", ""),
            "forked_children_do_not_stop": ("    os.register_at_fork(after_in_child=forget)", "    forget"),
        },
    ),
    *slips(
        "harness/launch/attempts.py",
        "tests/test_process.py -k stop",
        True,
        {"a_stopped_launcher_stops_the_sweep": (", watched=True)", ")")},
    ),
    *slips(
        "harness/record/diagnose.py",
        "tests/test_process.py -k diagnosis",
        False,
        {
            "the_last_that_was_stopped_is_named": (
                'rank, name = stopped[0]["rank"]',
                'rank, name = stopped[-1]["rank"]',
            ),
            "a_killed_launcher_is_a_stopped_rank": ("if remains.absent or exit_status == 0:", "if remains.absent:"),
        },
    ),
    *slips(
        "harness/run/tasks/verify.py",
        "tests/test_products.py",
        False,
        {"twins_compute_otherwise": ('{"onednn": True} if', "{} if")},
    ),
    *slips(
        "harness/run/instruments/gemm.py",
        "tests/test_gemm.py -k library",
        False,
        {
            "libraries_share_a_rate": ("*shared, *by)", "*shared)"),
            "rate_of_another_library": ('if by == "onednn" else', 'if by == "torch" else'),
        },
    ),
    *slips(
        "harness/analyse/result.py",
        "tests/test_result.py -k products",
        True,
        {"products_are_always_torchs": ('"matrix_products": matrix_products', '"matrix_products": "torch"')},
    ),
    *slips(
        "harness/model/products.py",
        "tests/test_products.py",
        False,
        {
            "onednn_of_a_strided_bias": ("else bias.contiguous()", "else bias"),
            "onednn_without_bias": ('right, dense, "none"', 'right, None, "none"'),
            "onednn_output_is_a_view": ("torch.ops.aten._unsafe_view(rows, shape)", "rows.view(shape)"),
            "onednn_wherever_there_is_one": ("return IS_ONEDNN_FASTER and flop", "return flop"),
            "onednn_for_small_products": (
                "IS_ONEDNN_FASTER and flop >= WORTHWHILE_FLOP",
                "IS_ONEDNN_FASTER and flop > 0",
            ),
            "onednn_against_the_users_will": ("if _wanted is None:", "if not _wanted:"),
            "another_engines_products_are_named": ("_wanted, _has_used_onednn = wanted, False", "_wanted = wanted"),
        },
    ),
    *slips(
        "harness/model/packing.py",
        "tests/test_packing.py",
        False,
        {
            "int8_of_a_scale_for_all_rows": ("rows.abs().amax(dim=-1, keepdim=True)", "rows.abs().amax()[None, None]"),
            "int8_cuts_off": ("add_(zero + 0.5)", "add_(zero)"),
            "int8_overflows_unnoticed": ("return 127 if bool((sums == 64 * 127**2).all()) else 63", "return 127"),
            "int8_without_bias": ("output * scale if bias is None else", "output * scale if True else"),
            "embeddings_are_packed": ("if is_embedding and not has_tied_head:", "if False:"),
            "rows_that_are_looked_up_are_dropped": ("if not (is_embedding and embeds):", "if True:"),
            "weights_stay_beside_packed_ones": ('layer.register_parameter("weight", None)', "pass"),
        },
    ),
    *slips(
        "harness/model/weight_gradients.py",
        "tests/test_products.py",
        False,
        {
            "put_off_gradients_twice": ("            return of_hidden, None, None, None\n", ""),
            "gradient_of_the_transposed": (
                "product(rows.t(), hidden.reshape(-1, hidden.shape[-1]).t())",
                "product(rows.t(), hidden.reshape(-1, hidden.shape[-1]).t()).neg()",
            ),
        },
    ),
    *slips(
        "harness/run/engines/deepspeed/transfers.py",
        "tests/test_transfers.py",
        False,
        {"kinds_share_a_tag": ("                taken[stages] += 1\n", "            taken[stages] += 1\n")},
    ),
    *slips(
        "harness/spec/zero_bubble.py",
        "tests/test_zero_bubble.py -k memory_allows or only_ratios",
        False,
        {
            "eighths_of_any_memory": ("parts = of_1f1b if of_1f1b <= 24 else 8", "parts = 8"),
            "durations_have_a_unit": ("float(10.0 ** math.floor(math.log10(longest)))", "1.0"),
        },
    ),
    *slips(
        "harness/plan/memory.py",
        "tests/test_memory.py -k halves or split_backward",
        False,
        {"outputs_are_not_kept": ("return (inputs + outputs) * PREC", "return inputs * PREC")},
    ),
    *slips(
        "harness/plan/memory.py",
        "tests/test_memory.py -k buffers_and_masks or share_a_head",
        False,
        {
            "shared_keys_are_halved": (
                "max(model.num_key_value_heads // tp, 1) * model.head_dim",
                "model.num_key_value_heads * model.head_dim // tp",
            ),
            "mask_of_the_embedding_everywhere": ("if first and model.dropout > 0", "if model.dropout > 0"),
            "buffers_not_sliced": ("        received //= parallel.num_slices\n", ""),
            "middle_stages_receive_once": ("received * len(lanes)", "received * min(1, len(lanes))"),
        },
    ),
    *slips(
        "harness/analyse/explain.py",
        "tests/test_accounting.py -k jitter",
        False,
        {
            "simulated_with_jitter": (
                'bubbles["transfer"], bubbles["host"], causes',
                'bubbles["jitter"], bubbles["host"], causes',
            )
        },
    ),
    *slips(
        "harness/analyse/explain.py",
        "tests/test_accounting.py -k load or there_are",
        False,
        {
            "long_micro_batches_are_jitter": (
                '"load": bubble_of(loaded | links)',
                '"load": bubble_of(of_chunks | links)',
            ),
            "every_stage_has_its_own_load": ("where=means > 0), there, (0, 1))", "where=means > 0), there, (1,))"),
            "slow_stages_count_more_for_load": (
                "    means = _mean(table, there, (2,))\n",
                "    means = _mean(table, there, (0, 1, 2))\n",
            ),
            "passes_that_are_not_there_count": ("for values in (table, there))", "for values in (table, table >= 0))"),
        },
    ),
    *slips(
        "harness/spans/span.py",
        "tests/test_spans.py -k replicas_wait",
        False,
        {
            "replicas_end_with_their_last_stage": (
                "max(rank.last_backward_end_ns for stage in stages for rank in stage) for stages in replicas",
                "max(rank.last_backward_end_ns for rank in stages[-1]) for stages in replicas",
            ),
            "the_latest_replica_does_not_count": (
                "for end in ends) / len(ends) / 1e9",
                "for end in ends) / (len(ends) - 1) / 1e9",
            ),
        },
    ),
    *slips(
        "harness/model/emulated.py",
        "tests/test_emulated.py -k share",
        False,
        {
            "backward_waits_for_the_micro_batch_of_now": (
                "ctx.block.wait_backward(ctx.share)",
                "ctx.block.wait_backward(ctx.block.context.share)",
            ),
            "weights_of_padding_take_time": (
                "partial(self._wait_for_weights, seconds / 2)",
                "partial(self._wait_for_weights, self._model.backward_seconds / 2)",
            ),
        },
    ),
    *slips(
        "harness/analyse/breakdown.py",
        "tests/test_breakdown.py -k spread or residual",
        False,
        {
            "first_steps_stand_for_a_run": ("values[i * len(values) // count]", "values[i]"),
            "negative_residuals_are_small": ("100 * abs(a.residual_seconds)", "100 * a.residual_seconds"),
        },
    ),
    *slips(
        "harness/run/loop.py",
        "tests/test_metrics.py -k of_torch",
        True,
        {
            "rate_of_the_next_step": (
                "learning_rate=learning_rate,",
                "learning_rate=self.engine.learning_rate(),",
            ),
            "norm_squared": ("            grad_norm=norm,", "            grad_norm=norm and norm**2,"),
        },
    ),
    *slips(
        "harness/run/data.py",
        "tests/test_metrics.py -k of_torch",
        True,
        {
            "half_of_the_tokens_count": (
                "return sum(sum(samples.lengths(step, number)) for number in range(count))",
                "return sum(sum(samples.lengths(step, number)) for number in range(count)) // 2",
            ),
        },
    ),
    *slips(
        "harness/run/engines/deepspeed/settings.py",
        "tests/test_metrics.py -k add_up_in",
        False,
        {"micro_batches_add_up_in_bf16": ("config.gradient_dtype", "config.train.precision")},
    ),
    *slips(
        "harness/record/store.py",
        "tests/test_bad_input.py -k nobody_was_left",
        False,
        {"unsaid_results_are_lost": ('if "environment" in content and self.keep_partial_result()', "if False")},
    ),
    *slips(
        "harness/model/pretrained.py",
        "tests/test_pretrained.py -k reads_its_slice",
        False,
        {
            "fused_parts_begin_at_the_first": ("sum(size for _, size in spec.parts[:index])", "0"),
            "transposed_matrices_split_the_other_way": ("(spec.shard_dim == 1) != transposed", "spec.shard_dim == 1"),
        },
    ),
    *slips(
        "harness/run/weights.py",
        "tests/test_pretrained.py -k masters",
        False,
        {"masters_begin_at_the_first": ("[held.start : held.start + held.length]", "[: held.length]")},
    ),
    *slips(
        "harness/run/checkpoint.py",
        "tests/test_pretrained.py -k filled_from",
        False,
        {"padding_as_it_was": ("parameter.zero_()", "pass")},
    ),
    *slips(
        "harness/run/conversion.py",
        "tests/test_conversion.py -k byte_by_byte",
        False,
        {"exported_as_it_lies": ("yield bytes_of(read.t() if transposed else read)", "yield bytes_of(read)")},
    ),
    *slips(
        "harness/run/carried.py",
        "tests/test_conversion.py -k resumed_trainings",
        False,
        {"resumed_from_nowhere": ("config.train.resume or config.model.weights", "config.model.weights")},
    ),
    *slips(
        "harness/spec/initial_weights.py",
        "tests/test_pretrained.py -k bring_their_shape",
        False,
        {"the_shape_of_the_configuration": ("if key in NOT_THE_SHAPE}", "}")},
    ),
    *slips(
        "harness/spec/identity.py",
        "tests/test_pretrained.py -k follows_the_content",
        False,
        {"weights_by_their_path": ("weights_fingerprint(config.model.weights)", "config.model.weights")},
    ),
    *slips(
        "harness/spec/pretrained.py",
        "tests/test_pretrained.py -k bad_folders",
        False,
        {"cut_files_are_taken": ("if num_bytes != end:", "if num_bytes > end:")},
    ),
    *slips(
        "harness/record/report.py",
        "tests/test_report.py::TestInference",
        False,
        {
            "generation_by_steps": (
                'if row.get("task") == "generate" else "step_seconds"',
                'if False else "step_seconds"',
            ),
            "tasks_share_a_ranking": (
                '(row.get("task") or "train", row.get("part") or "model"), [])',
                '("train", "model"), [])',
            ),
            "offered_rates_compete": ("is_comparable(row) and not has_rate(row)", "is_comparable(row)"),
        },
    ),
    *slips(
        "harness/record/rows.py",
        "tests/test_report.py::TestInference tests/test_metrics.py::TestInference",
        False,
        {
            "speedup_over_other_threads": ("[settings, threads, config.launch.slots]", "[settings]"),
            "stale_rows_have_speedups": (' and not found["stale"] and', " and"),
            "warm_up_before_a_crash_counts": (
                'lines[config.train.warmup_steps :] if config.task == "forward" else lines',
                "lines",
            ),
        },
    ),
    *slips(
        "harness/record/columns.py",
        "tests/test_report.py::TestInference",
        False,
        {
            "latency_is_a_rate": ("if is_rate else (one[name], row[name])", "if is_rate else (row[name], one[name])"),
            "efficiency_is_speedup": ('return speedup and speedup / row["world_size"]', "return speedup"),
        },
    ),
    *slips(
        "harness/analyse/rings.py",
        "tests/test_finish.py",
        False,
        {
            "tokens_go_to_the_next_stage": ('"send_tokens": 0', '"send_tokens": stage + 1'),
            "who_hears_receives_tokens": ('s._replace(kind="hear")', "s"),
            "all_of_decode_is_drawn": ("passes[:MOST_PASSES]", "passes"),
        },
    ),
]


def main(names: Sequence[str]) -> int:
    """Try the named slips, without names all; 1 where one was not noticed or does not fit the code."""
    known = {slip.name for slip in SLIPS}
    if unknown := set(names) - known - {"fast"}:
        print(
            f"no such slip: {', '.join(sorted(unknown))}; there are: fast, {', '.join(sorted(known))}", file=sys.stderr
        )
        return 2
    chosen = [s for s in SLIPS if not names or s.name in names or ("fast" in names and not s.starts_ranks)]
    faults = {}
    with copied_repository() as copy:
        passing = {tests: run_tests(tests, copy) == PASSED for tests in dict.fromkeys(slip.tests for slip in chosen)}
        for slip in chosen:
            fault = fault_of(slip, copy) if passing[slip.tests] else f"{slip.tests} fails without any slip"
            print(f"{slip.name}: {fault or 'noticed'}", flush=True)
            if fault:
                faults[slip.name] = fault
    print(
        f"\n{len(chosen)} slips, {len(faults)} not noticed", *(f"{name}: {f}" for name, f in faults.items()), sep="\n"
    )
    return 1 if faults else 0


@contextmanager
def copied_repository() -> Iterator[Path]:
    """A copy of what the tests need, in a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="slips-") as folder:
        for name in COPIED:
            source, target = REPOSITORY / name, Path(folder, name)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        yield Path(folder)


def fault_of(slip: Slip, copy: Path) -> str | None:
    """None for a slip that turns a test red, else what is wrong with it or with the tests."""
    file = copy / slip.file
    content = file.read_text()
    if (count := content.count(slip.right)) != 1:
        return f"{slip.file} holds {slip.right!r} {count} times; adapt tests/slips.py"
    try:
        file.write_text(content.replace(slip.right, slip.wrong))
        status = run_tests(slip.tests, copy)
    finally:
        file.write_text(content)
    return None if status == FAILED else f"{slip.tests} ends with status {status}"


def run_tests(tests: str, copy: Path) -> int:
    """Exit status of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split(maxsplit=2)]
    # Bytecode is found by the second and the size of its source, which a slip may share with what is right.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
