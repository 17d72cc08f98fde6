"""What surrounds the plain step: layers, adapters, masks, weights that change, optimizers, and DeepSpeed's traps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from components.config import Adafactor, AdamW, Custom, Lora, Objective, Optimizer, Sgd, Soul, Train, Wagle
from components.errors import ConfigError, ModelError
from components.layers import decoder_layers
from components.matrices import block_matrices
from components.models import load_model
from components.objectives.terms import find_term
from components.training.engine import AnswerModel, backward, optimizer_step, start_engine
from components.training.job import Job
from components.training.loop import make_batcher
from components.training.reference import Reference
from components.training.trainable import add_adapters, answer_model, negated
from tests.conftest import write_rows
from tests.families import tiny, tiny_folder
from tests.training import TRAIN, answer_logits, distance, lines, plain_gradient, plain_loop, run

SHORT = TRAIN.model_copy(update={"steps": 4})
ADAMW = AdamW(type="adamw", lr=1e-3, weight_decay=0.1)
RMU = Objective.model_validate(
    {
        "forget": {"type": "rmu", "layer": 0, "coefficient": 4.0},
        "normal": {"type": "embedding_difference", "layer": 0},
    }
)
GRAD_DIFF = Objective.model_validate(
    {"forget": {"type": "gradient_ascent", "weight": 0.3}, "normal": {"type": "nll", "weight": 1.0}}
)


def train(**changes: Any) -> Train:
    return SHORT.model_copy(update=changes)


def start_of(job: Job) -> dict[str, torch.Tensor]:
    return load_file(Path(job.model) / "model.safetensors")


# --- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "rwkv", "mpt", "mamba", "gpt_oss", "dbrx"])
def test_decoder_layers_are_those_that_a_text_goes_through(family: str) -> None:
    model = tiny(family)
    layers, seen = decoder_layers(model), []
    for layer in layers:
        layer.register_forward_hook(lambda module, *rest: seen.append(module))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == [*layers]
    assert len(layers) == 2


def test_a_vision_towers_layers_are_no_decoder_layers() -> None:
    """Of Gemma 3 with as many layers in its vision tower as in its text model."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 400, "num_key_value_heads": 1, "head_dim": 16}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    model = tiny("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    assert decoder_layers(model) is model.model.language_model.layers


def test_rmu_ends_at_its_layer_and_leaves_all_above_alone(make_job: Any, tmp_path: Path) -> None:
    job = make_job("rmu", train(steps=12), objective=RMU, optimizer=ADAMW, random=None)
    answering = answer_model(load_model(Path(job.model)), job)
    assert answering.ends
    assert len(answering.model.base_model.layers) == 1
    moved, start = run(job, tmp_path), start_of(job)
    above = [name for name in start if "layers.1" in name or name == "model.norm.weight"]
    assert above
    assert all(torch.equal(moved[name], start[name]) for name in above)  # neither gradient nor weight decay
    assert not torch.equal(moved["model.layers.0.mlp.down_proj.weight"], start["model.layers.0.mlp.down_proj.weight"])
    first, last = lines(job)[0], lines(job)[-1]
    assert first["train/normal_loss"] == pytest.approx(0, abs=1e-9)
    assert last["train/forget_loss"] < first["train/forget_loss"]


def test_rmu_does_not_depend_on_the_split_or_on_where_the_forward_ends(make_job: Any, tmp_path: Path) -> None:
    """Against the whole forward too, which a normal term on logits asks for, here with a weight of 0."""
    alone = RMU.model_copy(update={"normal": None})
    beside = Objective.model_validate({"forget": RMU.forget, "normal": {"type": "nll", "weight": 0.0}})
    jobs = [
        make_job("a", train(), objective=alone, optimizer=ADAMW, random=None),
        make_job("b", train(micro_batch_size=3, zero_stage=2), objective=alone, optimizer=ADAMW, random=None),
        make_job("c", train(zero_stage=2), objective=beside, optimizer=ADAMW, random=None),
    ]
    ended, split, whole = (run(job, tmp_path) for job in jobs)
    assert distance(ended, split) < 1e-5
    low = [name for name in ended if "layers.0" in name]
    assert distance({name: ended[name] for name in low}, {name: whole[name] for name in low}) < 1e-5
    soul = Soul(type="soul", lr=1e-3, eps=1e-6, gamma=2.0, curvature="gnb")
    job = make_job("gnb", train(), objective=RMU, optimizer=soul, random=None)
    assert not answer_model(load_model(Path(job.model)), job).ends  # labels are sampled from logits
    moved, start = run(job, tmp_path), start_of(job)
    assert torch.equal(moved["model.norm.weight"], start["model.norm.weight"])
    logged = [lines(jobs[0])[0], lines(job)[0]]
    assert logged[0]["train/forget_loss"] == pytest.approx(logged[1]["train/forget_loss"], rel=1e-6)


def test_cached_activations_are_the_live_ones(make_job: Any) -> None:
    job = make_job("states", objective=RMU, random=None)
    batcher, reference = make_batcher(job, 0, 1, torch.device("cpu")), Reference(Path(job.reference["normal"]))
    model = load_model(Path(job.model))
    for i in range(3):
        prompt, answer = batcher.normal.prompt(i), batcher.normal.answer(i)
        ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
        with torch.no_grad():
            live = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, len(prompt) - 1 : -1]
        torch.testing.assert_close(reference.states(i), live, rtol=0, atol=1e-6)


def test_a_layer_that_is_not_there_is_refused(make_job: Any) -> None:
    objective = Objective.model_validate({"forget": {"type": "rmu", "layer": 7}})
    with pytest.raises(ModelError, match=r"layer=7, layers=2\). Expected 0 to 1"):
        answer_model(load_model(Path(make_job("x").model)), make_job("x").model_copy(update={"objective": objective}))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_without_gradient_does_not_move(make_job: Any, stage: int) -> None:
    """ZeRO-3 would apply the gradient of the step before once more."""
    make_job("group")  # torch.distributed is up
    model = load_model(Path(make_job("x").model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = start_engine(AnswerModel(model, layer=0), optimizer, train(zero_stage=stage, gradient_clipping=0.0))
    ids, positions = torch.tensor([[5, 6, 7, 8]]), torch.tensor([1, 2])

    def step(which: str) -> dict[str, torch.Tensor]:
        outputs = engine(ids, positions)
        backward(engine, getattr(outputs, which).square().mean(), last=True)
        optimizer_step(engine)
        with torch.no_grad():
            return {name: p.detach().clone() for name, p in engine.module.named_parameters()}

    first, second = step("logits"), step("states")
    engine.destroy()
    low, high = (f"model.model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    assert torch.equal(first[high], second[high])
    assert not torch.equal(first[low], second[low])


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [ADAMW, Soul(type="soul", lr=1e-3, eps=1e-6, weight_decay=0.1)], ids=str)
def test_masked_weights_keep_every_bit(make_job: Any, tmp_path: Path, optimizer: Any) -> None:
    masks = []
    for stage in (0, 2, 3):
        job = make_job(
            f"mask{stage}", train(zero_stage=stage), objective=GRAD_DIFF, random=None, optimizer=optimizer
        ).model_copy(update={"mask": Wagle(type="wagle", keep=0.6, batches=2)})
        moved, start = run(job, tmp_path), start_of(job)
        masks.append({name: moved[name] != start[name] for name in moved})
        share = sum(int(mask.sum()) for mask in masks[-1].values()) / sum(mask.numel() for mask in masks[-1].values())
        assert 0.5 < share < 0.6001  # of those that may move some did not, such as embeddings of tokens not seen
    for other in masks[1:]:
        differing = sum(int((mask != other[name]).sum()) for name, mask in masks[0].items())
        assert differing < 1e-3 * sum(mask.numel() for mask in other.values())  # ZeRO adds gradients in another order


def test_the_mask_is_wagles_score(make_job: Any, tmp_path: Path) -> None:
    """Against gradients from a plain model: what moved is what has the largest scores."""
    mask = Wagle(type="wagle", keep=0.5, batches=1, gamma=0.05)
    job = make_job("score", train(steps=1, zero_stage=3), objective=GRAD_DIFF, random=None, optimizer=ADAMW)
    job = job.model_copy(update={"mask": mask})
    moved, start = run(job, tmp_path), start_of(job)
    forget, normal = plain_gradient(job, "forget", -1.0), plain_gradient(job, "normal", 1.0)
    scores = {name: ((start[name] - normal[name] / 0.05) * g).abs() for name, g in forget.items()}
    every = torch.cat([score.flatten() for score in scores.values()])
    bound = every.sort(descending=True).values[len(every) // 2 - 1]
    wrong = sum(int(((scores[n] >= bound) != (moved[n] != start[n])).sum()) for n in scores)
    assert wrong < 1e-3 * len(every)


@pytest.mark.parametrize("stage", [0, 3])
def test_adapters_are_merged_into_the_weights(make_job: Any, tmp_path: Path, stage: int) -> None:
    from peft import PeftModel

    lora = Lora(rank=4, alpha=8, targets=["q_proj", "v_proj"], export_adapter=True)
    soul = Soul(type="soul", lr=1e-2, eps=1e-6, gamma=2.0)
    job = make_job("lora", train(zero_stage=stage, lora=lora), objective=GRAD_DIFF, random=None, optimizer=soul)
    moved, start = run(job, tmp_path), start_of(job)
    changed = {name for name in start if not torch.equal(moved[name], start[name])}
    assert changed == {name for name in start if "q_proj" in name or "v_proj" in name}
    adapted = PeftModel.from_pretrained(load_model(Path(job.model)), Path(f"{job.output}-adapter"))
    whole = AutoModelForCausalLM.from_pretrained(job.output)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=1e-5)
    if stage == 3:
        job0 = make_job("lora0", train(zero_stage=0, lora=lora), objective=GRAD_DIFF, random=None, optimizer=soul)
        assert distance(run(job0, tmp_path), moved) < 1e-5


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss", "phimoe", "hunyuan_v1_moe", "jetmoe"])
def test_adapters_reach_every_matrix_of_the_blocks(
    make_job: Any, base: Path, tmp_path: Path, family: str, stage: int
) -> None:
    """Whatever modules hold them; nothing else moves, and the adapter by itself gives the merged model."""
    from peft import PeftModel

    folder = tiny_folder(family, base, tmp_path / "model")
    lora = Lora(rank=2, alpha=4, export_adapter=True)
    settings = {"objective": GRAD_DIFF, "random": None, "optimizer": AdamW(type="adamw", lr=1e-2), "model": str(folder)}
    job = make_job("lora", train(zero_stage=stage, lora=lora, steps=2), **settings)
    run(job, tmp_path)
    start, moved = (dict(load_model(place).named_parameters()) for place in (folder, Path(job.output)))
    changed = {name for name in start if not torch.equal(moved[name], start[name])}
    assert changed == {*block_matrices(load_model(folder))}
    adapted = PeftModel.from_pretrained(load_model(folder), Path(f"{job.output}-adapter"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        whole = load_model(Path(job.output))(input_ids=ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "targets", "named"),
    [
        ("dbrx", "all-linear", "Wqkv, layer, out_proj"),  # its experts are read by another module
        ("phimoe", ["router"], "k_proj"),  # gives more than a tensor
        ("mamba", "all-linear", "in_proj"),
        ("llama", ["nope"], "down_proj"),
    ],
)
def test_a_model_that_does_not_run_with_adapters_is_refused(family: str, targets: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"Adapters cannot be put .* Set train.lora.targets to some of .*{named}"):
        add_adapters(tiny(family), Lora(targets=targets), 0)


def test_only_named_parameters_are_trained(make_job: Any, tmp_path: Path) -> None:
    for stage in (1, 3):
        job = make_job(f"named{stage}", train(trainable=r"layers\.1\..*down_proj", zero_stage=stage), optimizer=ADAMW)
        moved, start = run(job, tmp_path), start_of(job)
        changed = {name for name in start if not torch.equal(moved[name], start[name])}
        assert changed == {"model.layers.1.mlp.down_proj.weight"}
    with pytest.raises(ConfigError, match=r"No parameter has such a name .* found in names such as model\."):
        run(make_job("none", train(trainable="no_such")), tmp_path)
    with pytest.raises(ConfigError, match=r"Adapters cannot be put"):
        run(make_job("t", train(lora=Lora(targets=["nope"]))), tmp_path)


@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer"), (3, "parameters")])
def test_offload_changes_nothing(make_job: Any, tmp_path: Path, stage: int, offload: str) -> None:
    here, there = (
        run(make_job(f"{where}", train(zero_stage=stage, offload=where, micro_batch_size=3)), tmp_path)
        for where in ("none", offload)
    )
    assert distance(here, there) < 1e-6


OPTIMIZERS: list[dict[str, Any]] = [
    {"type": "sgd", "lr": 0.5},
    {"type": "lion", "lr": 1e-3},
    {"type": "soul", "preset": "soul-release", "lr": 1e-3},
    {"type": "soul", "lr": 1e-3, "gamma": 2.0, "curvature": "squared_gradient", "curvature_of": "normal"},
    {"type": "soul", "lr": 1e-3, "gamma": 2.0, "adaptive": {"low": 0.05, "high": 0.3, "soonest": 1}},
    {"type": "influence", "lr": 1.0, "damping": 1.0},
]


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: "-".join(map(str, c.values()))[:30])
def test_every_optimizer_forgets_and_does_not_depend_on_the_stage(
    make_job: Any, tmp_path: Path, config: dict[str, Any]
) -> None:
    # eps of 1e-6: below it the step is the sign of rounding errors
    given = {"eps": 1e-6, **config} if config["type"] == "soul" else config
    optimizer = TypeAdapter(Optimizer).validate_python(given)
    clip = 0.0 if config["type"] == "influence" else 0.5
    jobs = []
    for stage in (0, 3):
        changes = {"zero_stage": stage, "gradient_clipping": clip, "steps": 6}
        job = make_job(f"s{stage}", train(**changes), objective=GRAD_DIFF, random=None)
        jobs.append(job.model_copy(update={"optimizer": optimizer}))
    assert distance(run(jobs[0], tmp_path), run(jobs[1], tmp_path)) < 2e-5
    assert forget_probability(jobs[0], jobs[0].output) < forget_probability(jobs[0], jobs[0].model)


def test_adafactor_trains_without_zero(make_job: Any, tmp_path: Path) -> None:
    job = make_job("factor", train(zero_stage=0), objective=GRAD_DIFF, random=None)
    job = job.model_copy(update={"optimizer": Adafactor(type="adafactor", lr=1e-3)})
    run(job, tmp_path)
    assert forget_probability(job, job.output) < forget_probability(job, job.model)


def forget_probability(job: Job, model: str) -> float:
    batcher, net = make_batcher(job, 0, 1, torch.device("cpu")), load_model(Path(model))
    found = []
    for i in range(len(batcher.forget)):
        logp = torch.log_softmax(answer_logits(net, batcher.forget.prompt(i), batcher.forget.answer(i)), -1)
        targets = torch.from_numpy(batcher.forget.answer(i).astype(np.int64))
        found.append(logp.gather(-1, targets[:, None]).mean().exp().item())
    return float(np.mean(found))


def test_task_vector_negation_is_the_mirror_image_of_learning(make_job: Any, tmp_path: Path) -> None:
    learning = Objective.model_validate({"forget": {"type": "nll"}, "negate": 0.5})
    settings = {"random": None, "normal": None, "optimizer": Sgd(type="sgd", lr=0.1, momentum=0.0)}
    job = make_job("negated", train(steps=6), objective=learning, **settings)
    opposite, start = run(job, tmp_path), start_of(job)
    plain = make_job("learnt", train(steps=6), objective=learning.model_copy(update={"negate": None}), **settings)
    learnt = run(plain, tmp_path)
    for name, first in start.items():
        torch.testing.assert_close(opposite[name] - first, -0.5 * (learnt[name] - first), rtol=0, atol=1e-6)
    below, at, above = (forget_probability(job, folder) for folder in (job.output, job.model, plain.output))
    assert below < at < above
    assert negated({"a": torch.tensor([1.0])}, {"a": torch.tensor([3.0])}, 2.0)["a"].item() == -3.0


# --- weights and measurements -----------------------------------------------------------------------------------------


def test_the_dual_variable_follows_the_global_loss(make_job: Any, tmp_path: Path) -> None:
    """λ after each step is the closed form of the logged losses, once a step however it is split."""
    dual = {"type": "dual", "bound": 0.2, "rate": 3.0, "start": 1.0}
    objective = Objective.model_validate(
        {"forget": {"type": "logit_flattening", "weight": 0.01}, "normal": {"type": "nll", "weight": dual}}
    )
    for size in (8, 3):
        job = make_job(f"dual{size}", train(steps=6, micro_batch_size=size), objective=objective, random=None)
        run(job, tmp_path)
        expected = 1.0
        for line in lines(job):
            assert line["train/normal_weight"] == pytest.approx(expected, rel=1e-9)
            expected = max(0.0, expected + 3.0 * (line["train/normal_loss"] - 0.2))


@pytest.mark.parametrize("stage", [0, 3])
def test_gradients_of_terms_are_measured_right(make_job: Any, tmp_path: Path, stage: int) -> None:
    """Norms and cosine against autograd on a plain model; the balanced weight is made from them."""
    objective = Objective.model_validate(
        {
            "forget": {"type": "gradient_ascent", "weight": 0.3},
            "normal": {"type": "nll", "weight": {"type": "balanced", "ratio": 2.0, "every": 3, "largest": 1e6}},
        }
    )
    settings = train(gradient_cosine_every=2, zero_stage=stage)
    job = make_job("angle", settings, objective=objective, random=None, optimizer=ADAMW)
    run(job, tmp_path)
    signs = {"forget": -1.0, "normal": 1.0}
    found = {g: torch.cat([p.flatten() for p in plain_gradient(job, g, s).values()]) for g, s in signs.items()}
    first = lines(job)[0]
    for group, g in found.items():
        assert first[f"train/{group}_grad_norm"] == pytest.approx(g.norm().item(), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(found["forget"], found["normal"], dim=0).item()
    assert first["train/gradient_cosine"] == pytest.approx(cosine, abs=1e-4)
    assert ["train/gradient_cosine" in line for line in lines(job)] == [True, False, True, False]
    expected = 2.0 * 0.3 * found["forget"].norm() / found["normal"].norm()
    assert first["train/normal_weight"] == pytest.approx(expected.item(), rel=1e-4)
    assert lines(job)[2]["train/normal_weight"] == first["train/normal_weight"] != lines(job)[3]["train/normal_weight"]


# --- small things that went wrong elsewhere ---------------------------------------------------------------------------


def test_one_row_and_answers_of_one_token(make_job: Any, tmp_path: Path) -> None:
    """Batches of one row whose answers have one token, or three: the same as a plain loop."""
    ids = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17]]
    sets = {name: tmp_path / "rows" / name for name in ("forget", "normal", "random")}
    for folder in sets.values():
        write_rows(folder, ids, [3, 2, 3])
    settings = train(batch_size=1, micro_batch_size=1, steps=3)
    job = make_job("one", settings, **{name: str(folder) for name, folder in sets.items()})
    assert distance(run(job, tmp_path), plain_loop(job, 3)) < 1e-5


def test_a_custom_term_that_does_not_fit_is_refused() -> None:
    def refuse(path: str, **settings: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            find_term(Custom(type="custom", import_path=path, settings=settings))
        return str(caught.value)

    assert "cannot be imported" in refuse("tests.no_such.term")
    assert "cannot be imported" in refuse("tests.custom_terms.no_such")
    assert "lacks ['scale']" in refuse("tests.custom_terms.ascent")
    assert "does not take ['more']" in refuse("tests.custom_terms.ascent", scale=1.0, more=2)
    assert "the random responses, without chosen=true" in refuse("components.objectives.forget.dpo", beta=1.0)
    assert "activations, without a layer" in refuse("components.objectives.forget.rmu", coefficient=1.0)
    assert "one of them is kept for a group" in refuse("tests.custom_terms.two_originals")


def test_a_custom_term_may_take_activations_or_responses(make_job: Any, tmp_path: Path) -> None:
    """As custom terms, RMU and DPO do what they do under their own names."""
    for own, custom in (
        ({"type": "rmu", "layer": 0, "coefficient": 4.0}, {"layer": 0, "settings": {"coefficient": 4.0}}),
        ({"type": "dpo", "beta": 0.2}, {"chosen": True, "per": "row", "settings": {"beta": 0.2}}),
    ):
        path = f"components.objectives.forget.{own['type']}"
        objectives = (
            Objective.model_validate({"forget": forget})
            for forget in (own, {"type": "custom", "import_path": path, **custom})
        )
        ours, theirs = (
            run(make_job(f"{own['type']}{i}", train(), objective=o, optimizer=ADAMW, normal=None), tmp_path)
            for i, o in enumerate(objectives)
        )
        assert distance(ours, theirs) == 0


def test_a_mask_beside_a_term_on_activations(make_job: Any, tmp_path: Path) -> None:
    job = make_job("both", train(), objective=RMU, optimizer=ADAMW, random=None)
    job = job.model_copy(update={"mask": Wagle(type="wagle", keep=0.5, batches=1)})
    moved, start = run(job, tmp_path), start_of(job)
    share = np.mean([(moved[n] != start[n]).float().mean().item() for n in moved if "layers.0" in n])
    assert 0.1 < share < 0.9


def test_a_refresh_comes_before_its_time_when_much_is_clipped(make_job: Any, tmp_path: Path) -> None:
    """Momentum is clipped where h is 0: with a wide band nothing is refreshed, with a narrow one every second step."""
    found = {}
    for name, high in (("wide", 1.0), ("narrow", 0.01)):
        soul = Soul.model_validate(
            {"type": "soul", "lr": 1e-3, "hessian_interval": 10, "adaptive": {"low": 0.0, "high": high, "soonest": 2}}
        )
        found[name] = run(make_job(name, train(steps=3), objective=GRAD_DIFF, random=None, optimizer=soul), tmp_path)
        assert all(0.01 < line["train/clip_fraction"] <= 1.0 for line in lines(make_job(name)))
    assert distance(found["wide"], found["narrow"]) > 1e-4  # the third step had another Hessian


def test_alternate_answers_go_by_row(make_job: Any) -> None:
    objective = Objective.model_validate({"forget": {"type": "dpo"}, "normal": {"type": "nll"}})
    job = make_job("rows", objective=objective, random=make_job("x").forget, responses_by_row=True)
    batcher = make_batcher(job, 0, 1, torch.device("cpu"))
    for number in (0, 5):
        rows = batcher.plan.step_rows(number)
        assert rows.random.tolist() == [[i] for i in rows.forget]
