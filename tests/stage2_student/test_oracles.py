"""The released code's numbers (tests/oracles/losses.json) reproduced in float64: losses, gradients, masks, passes.

The oracles hold dense logits; ours come from a head. So the student's logits enter as hidden states of a head whose
weight is the identity, and each case runs through the code that training runs: tiled head, chunk sums, objectives,
TIDAL, means. Where the released code draws at random, the oracles give the uniforms.

Shape suffixes: B samples, L student tokens, S teacher tokens, C chunks, N masked positions, V vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.noise import chunks_with_masked_token
from stage2_student import objectives, tidal
from stage2_student.attention import block_diffusion_mask
from stage2_student.denoising import transferred_tokens
from stage2_student.head import Head, gather_logits
from tests.conftest import ORACLES

CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((ORACLES / "losses.json").read_text())["cases"]
}
AXES = {"both": "both", "training_only": "training", "timestep_only": "timestep"}


def cases(*kinds: str) -> list[str]:
    return [name for name, case in CASES.items() if case["kind"] in kinds]


def wide(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(found: Tensor | float, expected: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), wide(expected), rtol=2e-6, atol=1e-9)


def log_probabilities(logits_BLV: Tensor, id_BL: Tensor) -> Tensor:
    """log p of the given ids, by the tiled head with an identity weight."""
    rows_NV = logits_BLV.flatten(0, 1)
    head = Head(torch.eye(rows_NV.shape[1], dtype=torch.float64))
    logit_N, log_z_N1 = gather_logits(rows_NV, head, torch.arange(len(rows_NV)), id_BL.flatten(), (1.0,))
    return (logit_N - log_z_N1[:, 0]).view(id_BL.shape)


def sums_over_chunks(logp_BL: Tensor, member_BLC: Tensor) -> Tensor:
    """Sum over each chunk's tokens, from the oracle's matrix of memberships."""
    sample, token, chunk = member_BLC.nonzero(as_tuple=True)
    batch, _, chunks = member_BLC.shape
    return objectives.sum_over(logp_BL[sample, token], sample * chunks + chunk, batch * chunks).view(batch, chunks)


def memberships(ranges: list[list[list[int]]], length: int, chunks: int) -> Tensor:
    member_BLC = torch.zeros(len(ranges), length, chunks)
    for sample, row in enumerate(ranges):
        for chunk, (start, stop) in enumerate(row):
            member_BLC[sample, start:stop, chunk] = 1
    return member_BLC


def test_no_case_is_left_out() -> None:
    covered = cases("alm") + cases("taid") + cases("step") + cases("attn") + cases("transfer")
    assert sorted(covered) == sorted(CASES)
    assert len(CASES) == 42


@pytest.mark.parametrize("name", cases("alm"))
def test_chunk_losses(name: str) -> None:
    inputs, expected = CASES[name]["inputs"], CASES[name]["outputs"]["f64"]
    student_BLV = wide(inputs["student_logits"]).requires_grad_()
    teacher_BSV = wide(inputs["teacher_logits"])
    student_ids, teacher_ids = torch.tensor(inputs["student_ids"]), torch.tensor(inputs["teacher_ids"])
    chunks = inputs["n_chunks"]
    student_BC = sums_over_chunks(
        log_probabilities(student_BLV, student_ids), memberships(inputs["student_chunks"], student_ids.shape[1], chunks)
    )
    teacher_BC = sums_over_chunks(
        log_probabilities(teacher_BSV, teacher_ids), memberships(inputs["teacher_chunks"], teacher_ids.shape[1], chunks)
    )
    assert_equal(student_BC.detach(), expected["student_chunk_lp"])
    assert_equal(teacher_BC, expected["teacher_chunk_lp"])

    active_BC = torch.tensor(inputs["chunk_mask"], dtype=torch.bool)
    weight_C = wide(inputs["chunk_weights"])[active_BC] if inputs["chunk_weights"] else None
    objective = objectives.reverse_calm_loss if inputs["reverse"] else objectives.calm_loss
    loss_C = objective(student_BC[active_BC], teacher_BC[active_BC], inputs["temperature"])
    loss = objectives.weighted(loss_C, weight_C).over()
    loss.backward()
    assert_equal(loss.detach(), expected["loss"])
    assert_equal(student_BLV.grad, expected["grad_student_logits"])


@pytest.mark.parametrize("name", cases("taid"))
def test_dense_tidal(name: str) -> None:
    inputs, expected = CASES[name]["inputs"], CASES[name]["outputs"]["f64"]
    config = inputs["config"]
    student_BLV = wide(inputs["student_logits"]).requires_grad_()
    masked_BL = torch.tensor(inputs["masked_mask"], dtype=torch.bool)
    timestep_B = wide(inputs["t"])
    strength_B = tidal.strength(
        inputs["global_step"] / max(inputs["max_steps"], 1),
        timestep_B,
        AXES[config["axis_mode"]],
        config["lambda_init"],
        config["lambda_max"],
        config["lambda_decay"],
    )
    assert inputs["entropy_weights"] is None
    sample_N = masked_BL.nonzero()[:, 0]
    shared = slice(0, config["shared_vocab_size"])
    loss_N = objectives.tidal_kl_loss(
        student_BLV[masked_BL][:, shared],
        wide(inputs["teacher_logits"])[masked_BL][:, shared],
        strength_B[sample_N],
        config["temperature"],
    )
    weight_B = tidal.timestep_weight(timestep_B, config["timestep_weight"])
    loss = objectives.weighted(loss_N, weight_B[sample_N]).over()
    loss.backward()
    assert_equal(loss.detach(), expected["loss"])
    assert_equal(student_BLV.grad, expected["grad_student_logits"])


class Step:
    """One training step of the released code, with its uniforms: what is masked, what the teacher sees, the losses."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.inputs, self.config = case["inputs"], case["inputs"]["config"]
        self.batch = {key: torch.tensor(value) for key, value in self.inputs["batch"].items()}
        uniforms = [wide(block) for block in self.inputs["uniforms_in_order"]]
        epsilon = self.config["time_epsilon"]
        self.timestep_B = epsilon + (1.0 - epsilon) * uniforms[0]
        self.ids_BL = self.batch["input_ids"]
        self.trainable_BL = self.batch["labels"] != -100
        drawn_BL = (uniforms[1] < self.timestep_B[:, None]) & self.trainable_BL
        self.split = uniforms[2] < self.config["demo_ratio"] if len(uniforms) > 2 else None
        self.student_BLV = wide(self.inputs["student_logits"]).requires_grad_()
        self.calls = [wide(call) for call in self.inputs["teacher_logits_per_call"]]
        self.member_BLC = self.batch.get("alignment_matrix_student")
        self.masked_BL, self.active_BC = drawn_BL, None
        if self.member_BLC is not None:
            self._mask_whole_chunks(drawn_BL)
        self.progress = self.config["global_step"] / max(self.config["max_steps"], 1)
        self.strength_B = tidal.strength(
            self.progress,
            self.timestep_B,
            AXES[self.config["taid_axis_mode"]],
            self.config["taid_lambda_init"],
            self.config["taid_lambda_max"],
            self.config["taid_lambda_decay"],
        )

    def _mask_whole_chunks(self, drawn_BL: Tensor) -> None:
        """Mask law `token`: every chunk that holds a masked token is masked whole (its trainable part is)."""
        batch, length, chunks = self.member_BLC.shape
        index_L = torch.arange(length)
        self.active_BC = torch.zeros(batch, chunks, dtype=torch.bool)
        for sample in range(batch):
            member_LC = self.member_BLC[sample].bool()
            first_C = np.array([int(index_L[m].min()) if m.any() else 0 for m in member_LC.T])
            stop_C = np.array([int(index_L[m].max()) + 1 if m.any() else 0 for m in member_LC.T])
            hit_C = chunks_with_masked_token(drawn_BL[sample].numpy(), first_C, stop_C)
            self.active_BC[sample] = torch.from_numpy(hit_C)
        whole_BL = (self.member_BLC.bool() & self.active_BC[:, None, :]).any(dim=2)
        self.masked_BL = drawn_BL | (whole_BL & self.trainable_BL)

    def teacher_calls(self) -> list[list[list[int]]]:
        """The ids of each teacher pass: pass 1 masks B, pass 2 masks A; without a split one pass masks both."""
        teacher_ids_BS = self.batch.get("teacher_input_ids", self.ids_BL)
        hidden = (
            [self.masked_items]
            if self.split is None
            else [
                self.masked_items & ~self.split[:, : self.masked_items.shape[1]],
                self.masked_items & self.split[:, : self.masked_items.shape[1]],
            ]
        )
        calls = []
        for items in hidden:
            noisy_BS = teacher_ids_BS.masked_fill(self.teacher_positions(items), self.config["teacher_mask_token_id"])
            if self.active_BC is None:  # block-diffusion teacher: both halves
                halves = [noisy_BS, teacher_ids_BS]
                noisy_BS = torch.cat(halves if self.config["concat_order"] == "xt_x0" else halves[::-1], dim=1)
            calls.append(noisy_BS.tolist())
        return calls

    @property
    def masked_items(self) -> Tensor:
        """What CompDemo splits: active chunks, or masked student tokens."""
        return self.masked_BL if self.active_BC is None else self.active_BC

    def teacher_positions(self, items: Tensor) -> Tensor:
        """The teacher's tokens of these chunks, or of these student tokens."""
        if self.active_BC is not None:
            return (self.batch["alignment_matrix_teacher"].bool() & items[:, None, :]).any(dim=2)
        if "align_student" not in self.batch:
            return items
        positions_BS = torch.zeros(self.batch["teacher_input_ids"].shape, dtype=torch.bool)
        for sample, student, teacher in self.aligned():
            positions_BS[sample, teacher] = items[sample, student]
        return positions_BS

    def aligned(self) -> list[tuple[int, int, int]]:
        """(sample, student token, teacher token) of every aligned pair."""
        return [
            (sample, int(self.batch["align_student"][sample, i]), int(self.batch["align_teacher"][sample, i]))
            for sample, count in enumerate(self.batch["n_aligned"].tolist())
            for i in range(count)
        ]

    def cross_entropy(self) -> Tensor:
        sample_N, token_N = self.masked_BL.nonzero(as_tuple=True)
        nll_N = -log_probabilities(self.student_BLV, self.ids_BL)[sample_N, token_N]
        trainable_B = self.trainable_BL.sum(dim=1)
        if self.config["loss_weight_type"] == "uniform":
            return objectives.Mean(nll_N.sum(), trainable_B.sum()).over()
        return objectives.cross_entropy(
            nll_N, sample_N, self.timestep_B, trainable_B, self.config["loss_norm_type"]
        ).over()

    def chunk_loss(self, mode: str) -> Tensor:
        student_BC = sums_over_chunks(log_probabilities(self.student_BLV, self.ids_BL), self.member_BLC)
        teacher_BCs = [
            sums_over_chunks(
                log_probabilities(call, self.batch["teacher_input_ids"]), self.batch["alignment_matrix_teacher"]
            )
            for call in self.calls
        ]
        # A is scored in pass 2, B in pass 1.
        teacher_BC = teacher_BCs[0] if self.split is None else torch.where(self.split, teacher_BCs[1], teacher_BCs[0])
        # A chunk counts if the student has all of it masked: one that begins in the prompt is masked, but not scored.
        clean_BLC = self.member_BLC.bool() & ~self.masked_BL[:, :, None]
        scored_BC = self.active_BC & ~clean_BLC.any(dim=1)
        sample_C = scored_BC.nonzero()[:, 0]
        student_C, teacher_C = student_BC[scored_BC], teacher_BC[scored_BC]
        temperature = self.config["alm_temperature"]
        reverse = mode.startswith("reverse")
        if not mode.endswith("taid"):
            objective = objectives.reverse_calm_loss if reverse else objectives.calm_loss
            return objectives.weighted(objective(student_C, teacher_C, temperature)).over()
        loss_C = objectives.tidal_calm_loss(student_C, teacher_C, self.strength_B[sample_C], temperature, reverse)
        weight_B = tidal.timestep_weight(self.timestep_B, self.config["taid_timestep_weight"])
        return objectives.weighted(loss_C, weight_B[sample_C]).over()

    def dense_loss(self, mode: str) -> Tensor:
        if "align_student" in self.batch:
            pairs = [pair for pair in self.aligned() if self.masked_BL[pair[0], pair[1]]]
        else:
            pairs = [(sample, token, token) for sample, token in self.masked_BL.nonzero().tolist()]
        sample_N, student_N, teacher_N = (torch.tensor(column) for column in zip(*pairs, strict=True))
        shared = slice(0, self.config["shared_vocab_size"])
        teacher_NV = self.calls[0][sample_N, teacher_N]
        if self.split is not None:
            teacher_NV = torch.where(
                self.split[sample_N, student_N][:, None], self.calls[1][sample_N, teacher_N], teacher_NV
            )
        student_NV, teacher_NV = self.student_BLV[sample_N, student_N][:, shared], teacher_NV[:, shared]
        temperature = self.config["kl_temperature"]
        if mode == "taid":
            loss_N = objectives.tidal_kl_loss(student_NV, teacher_NV, self.strength_B[sample_N], temperature)
            weight_B = tidal.timestep_weight(self.timestep_B, self.config["taid_timestep_weight"])
            return objectives.weighted(loss_N, weight_B[sample_N]).over()
        objective = {"kl": objectives.kl_loss, "reverse_kl": objectives.reverse_kl_loss}[mode]
        return objectives.weighted(objective(student_NV, teacher_NV, temperature)).over()


@pytest.mark.parametrize("name", cases("step"))
def test_step(name: str) -> None:
    step, expected = Step(CASES[name]), CASES[name]["outputs"]
    log, config = expected["f64"]["log"], step.config
    assert step.masked_BL.int().tolist() == expected["masked_mask"]
    noisy_BL = step.ids_BL.masked_fill(step.masked_BL, config["student_mask_id"])
    assert noisy_BL.tolist() == expected["student_noised_ids"]
    assert step.ids_BL.tolist() == expected["student_second_half_ids"]
    assert step.teacher_calls() == expected["teacher_calls_input_ids"]

    cross_entropy = step.cross_entropy()
    total = cross_entropy
    assert_equal(cross_entropy.detach(), log["ce_loss"])
    for mode in config["distill_mode"].removesuffix("_aligned").split("+"):
        if "alm" in mode:
            loss, weight = step.chunk_loss(mode), config["alm_weight"]
        else:
            loss, weight = step.dense_loss(mode), config["taid_weight" if mode == "taid" else "kl_weight"]
        assert_equal(loss.detach(), log[f"{mode}_loss"])
        total = total + weight * loss
    if "lambda_train" in log:
        assert_equal(tidal.training_strength(step.progress), log["lambda_train"])
    total.backward()
    assert_equal(total.detach(), expected["f64"]["loss"])
    assert_equal(step.student_BLV.grad, expected["f64"]["grad_student_logits"])


@pytest.mark.parametrize("name", cases("attn"))
def test_block_mask(name: str) -> None:
    inputs = CASES[name]["inputs"]
    length = inputs["n"]
    seen = block_diffusion_mask(length, inputs["block_size"])
    assert inputs["x0_first"]
    order = torch.cat([torch.arange(length, 2 * length), torch.arange(length)])  # the oracle puts x_0 first
    rows = ["".join(str(int(value)) for value in row) for row in seen[order][:, order]]
    assert rows == CASES[name]["outputs"]["rows"]


@pytest.mark.parametrize("name", cases("transfer"))
def test_transferred_tokens(name: str) -> None:
    inputs = CASES[name]["inputs"]
    assert transferred_tokens(inputs["masked"], inputs["steps"]) == CASES[name]["outputs"]["counts"]
